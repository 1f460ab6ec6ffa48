"""The command for machines with an accelerator, run small on a CPU, and its kernels compiled for an H100."""

import importlib
import json
import pathlib
import subprocess
import sys
import types
import zipfile

import pytest

HERE = pathlib.Path(__file__).parent
PAGE = "# Page\n\n<!-- accelerators -->\n<!-- /accelerators -->\n\n## More\n"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of this folder."""
    monkeypatch.syspath_prepend(str(HERE))
    return lambda name: importlib.import_module(name)


def command(script, *words):
    result = subprocess.run([sys.executable, HERE / script, *map(str, words)], capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-4000:]
    return result


def test_everything_runs_small(tmp_path):
    """Every part on this CPU, kernels interpreted, then the section of the page, which a second run replaces."""
    out, page = tmp_path / "deep" / "gpu.json", tmp_path / "page.md"
    result = command("run.py", "--size=small", "--seconds=1500", "--out", out, "--wheels", tmp_path / "none")
    results = json.loads(out.read_text())
    for part, found in results["parts"].items():
        assert found["status"] == "ok" and found["cases"], (part, found["stderr"])
        assert all(case.get("ok", True) for case in found["cases"].values()), (part, found["cases"])
    assert result.returncode == 0
    assert list(results["parts"]) == ["device", "kernels", "sft", "loss", "attention", "generate", "product"]
    kernels = results["parts"]["kernels"]["cases"]
    assert len(kernels) == 4 and all(0 < case["error"] < 0.02 for case in kernels.values())
    for case in results["parts"]["sft"]["cases"].values():
        assert case["last_loss"] < case["first_loss"] and case["tokens_per_second"] > 0

    page.write_text(PAGE)
    for _ in range(2):
        assert command("run.py", "--report", out, "--page", page).returncode == 0
    text = page.read_text()
    assert text.count("### cpu") == text.count("<!-- gpu_cpu -->") == text.count("The train step on packed rows") == 1
    assert "| LoRA on nf4 | " in text and text.endswith("<!-- /accelerators -->\n\n## More\n")


def test_without_time_the_file_is_whole(tmp_path):
    result = command("run.py", "--size=small", "--seconds=0", "--out", tmp_path / "gpu.json")
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert result.returncode == 1 and {part["status"] for part in parts.values()} == {"no time left"}
    refused = command("run.py", "--report", tmp_path / "gpu.json")
    assert refused.returncode == 1 and "expected the name of the device in the results, found none" in refused.stderr


def test_a_part_that_takes_too_long_is_stopped(load, tmp_path):
    found = load("run").run_part("device", "small", 0.2, tmp_path, tmp_path / "site")
    assert found["status"] == "stopped after 0 s" and found["cases"] == {}


def test_a_case_that_fails_is_named_and_the_next_one_runs(load, tmp_path, monkeypatch, capsys):
    def fail():
        raise ValueError("no such instruction\nmore")

    cases = {"bad": fail, "wrong": lambda: {"error": 1.0, "ok": False}, "good": lambda: {"ms": 1.5}}
    fake = types.SimpleNamespace(PARTS={"loss": lambda sizes: iter(cases.items())}, SIZES={"small": None})
    monkeypatch.setitem(sys.modules, "parts", fake)
    run = load("run")
    assert run.run_cases("loss", "small", tmp_path / "lines") == 1
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    found = {line.pop("case"): line for line in lines}
    assert found["bad"]["failed"] == "ValueError: no such instruction" and found["good"]["ms"] == 1.5
    assert "no such instruction" in capsys.readouterr().err
    result = {"status": "ok", "seconds": 1.0, "cases": found, "stderr": ""}
    results = {"size": "small", "date": "today", "versions": {"jax": "1"}, "parts": {"loss": result}}
    text = run.format_results(results)
    assert "| wrong |  | 1.0e+00 | **wrong** |" in text and "- bad: ValueError: no such instruction" in text
    assert not run.is_good(results)
    del found["bad"], found["wrong"]
    assert run.is_good(results)


def write_wheel(folder, name):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 7\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_only_missing_packages_are_unpacked(load, tmp_path):
    for name in ("not_anywhere", "numpy"):
        write_wheel(tmp_path, name)
    assert load("run").install_wheels(tmp_path, tmp_path / "site") == ["not-anywhere"]
    assert (tmp_path / "site" / "not_anywhere.py").read_text() == "VALUE = 7\n"
    assert not (tmp_path / "site" / "numpy.py").exists()


def test_the_wheels_are_what_jax_and_transformers_do_not_bring(load):
    wheels = load("wheels")
    missing = wheels.list_needed(wheels.read_project()) - wheels.list_needed(wheels.THERE)
    assert {"grain", "ml-collections", "array-record", "portpicker"} <= missing
    assert not missing & {"jax", "jaxlib", "numpy", "huggingface-hub", "torch", "protobuf"}


def test_the_kernels_compile_for_an_h100():
    """At every size of heads that run.py compares, in bfloat16 and float32."""
    result = command("compile.py", "h100:1x1", "--only=kernels")
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 8 and all(line["temporaries_gib"] < 1 for line in lines)
