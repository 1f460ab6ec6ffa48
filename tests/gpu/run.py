"""One command for a machine with a GPU or TPU, which need have no network: what works there, and how fast.

    python tests/gpu/wheels.py                       # here, once: packages that the machine lacks -> build/wheels
    python tests/gpu/run.py --out build/gpu.json     # there, under nine minutes
    python tests/gpu/run.py --report build/gpu.json  # here: the figures into docs/benchmarks.md, by the device's name

Kernels against softmax written out, forward and backward; the recipe's train step at 8,192 tokens a row; the chunked
loss; attention's speed; generation; a whole `postrain train`. Each part (tests/gpu/parts.py) is a process of its own
with a limit of its own; FILE is whole after every part, whatever happens to the next. The exit code is 1 when a part
fails or a result is wrong. `--size=small` runs everything in a minute or two, on a CPU too, where kernels are
interpreted.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "gpu"
PAGE = ROOT / "docs" / "benchmarks.md"
FOLDERS = [ROOT, HERE, ROOT / "tests" / "models", ROOT / "tests" / "benchmarks"]  # that a part imports from
# Seconds that a part may take. What is not over by then is stopped; the cases that it has finished count.
LIMITS = {"device": 60, "kernels": 150, "sft": 200, "loss": 60, "attention": 80, "generate": 100, "product": 120}
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "gpu.json", metavar="FILE")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=520, help="of all parts together")
    parser.add_argument("--wheels", type=pathlib.Path, default=ROOT / "build" / "wheels", metavar="FOLDER")
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE", help="write the figures of FILE into the page")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # what a process of its own runs
    arguments = parser.parse_args()
    if arguments.part:
        return run_cases(arguments.part, arguments.size, arguments.out)
    if arguments.report:
        write_section(arguments.page, json.loads(arguments.report.read_text()))
        return 0
    results = run_parts(arguments)
    print(format_results(results))
    return 0 if is_good(results) else 1


# In the process of a part.


def run_cases(part: str, size: str, out: pathlib.Path) -> int:
    """Runs a part's cases; adds a line of JSON to ``out`` after each, and goes on after one that fails."""
    import parts

    failed = False
    for name, case in parts.PARTS[part](parts.SIZES[size]):
        start = time.perf_counter()
        try:
            figures = case()
        except Exception as error:  # any: the next case is to run
            traceback.print_exc()
            figures = {"ok": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            failed = True
        seconds = round(time.perf_counter() - start, 2)
        with out.open("a") as file:
            file.write(json.dumps({"case": name, "seconds": seconds, **figures}) + "\n")
    return int(failed)


# In the process that starts them. It never imports JAX: a device's memory belongs to the part that runs.


def run_parts(arguments: argparse.Namespace) -> dict:
    """Results of all parts: {"size", "versions", "parts": {part: {"status", "seconds", "cases", "stderr"}}}."""
    deadline = time.monotonic() + arguments.seconds
    results = {"size": arguments.size, "date": time.strftime("%Y-%m-%d"), "versions": {}, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        site = pathlib.Path(folder, "site")
        results["installed"] = install_wheels(arguments.wheels, site)
        results["versions"] = find_versions(site)
        for part in arguments.parts:
            limit = min(LIMITS[part], deadline - time.monotonic())
            if limit < 5:
                results["parts"][part] = {"status": "no time left", "seconds": 0.0, "cases": {}, "stderr": ""}
            else:
                print(f"{part}: at most {limit:.0f} s", file=sys.stderr, flush=True)
                results["parts"][part] = run_part(part, arguments.size, limit, pathlib.Path(folder), site)
            write_json(arguments.out, results)
    return results


def run_part(part: str, size: str, limit: float, folder: pathlib.Path, site: pathlib.Path) -> dict:
    lines, errors = folder / f"{part}.jsonl", folder / f"{part}.stderr"
    lines.touch()
    paths = [str(path) for path in (*FOLDERS, site)] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "run.py"), "--part", part, "--size", size, "--out", str(lines)]
    start = time.monotonic()
    with errors.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            status = "ok" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: it and what it has started
            process.wait()
            status = f"stopped after {limit:.0f} s"
    cases = [json.loads(line) for line in lines.read_text().splitlines()]
    tail = "" if status == "ok" else errors.read_text(errors="replace")[-4000:]
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "cases": {one.pop("case"): one for one in cases}, "stderr": tail}


def install_wheels(wheels: pathlib.Path, site: pathlib.Path) -> list[str]:
    """Unpacks into ``site`` those wheels whose package this Python does not have; returns their names."""
    names = {path: re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower() for path in sorted(wheels.glob("*.whl"))}
    there = {re.sub(r"[-_.]+", "-", one.name).lower() for one in importlib.metadata.distributions() if one.name}
    missing = [path for path, name in names.items() if name not in there]
    site.mkdir()
    if missing:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, missing)]
        subprocess.run(command, check=True)
    return [names[path] for path in missing]


def find_versions(site: pathlib.Path) -> dict[str, str]:
    found = {one.name: one.version for one in importlib.metadata.distributions(path=[str(site), *sys.path])}
    return {name: found[name] for name in VERSIONS if name in found}


def write_json(path: pathlib.Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(path)


def is_good(results: dict) -> bool:
    """Whether every part ended well and no case has a wrong result."""
    return all(
        part["status"] == "ok" and all(case.get("ok", True) for case in part["cases"].values())
        for part in results["parts"].values()
    )


# The page.

UNITS = {  # figure -> its heading and form, in the order of the columns
    "kind": ("", "{}"),
    "memory_gib": ("memory, GiB", "{:.1f}"),
    "published_tflops": ("published TFLOP/s", "{:.0f}"),
    "parameters": ("parameters", "{:,}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "ms": ("ms", "{:.2f}"),
    "ms_per_step": ("ms a step", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.1f}"),
    "gb_per_second": ("GB/s", "{:,.0f}"),
    "forward_ms": ("forward, ms", "{:.2f}"),
    "forward_tflops": ("TFLOP/s", "{:.1f}"),
    "both_ms": ("with gradients, ms", "{:.2f}"),
    "both_tflops": ("TFLOP/s", "{:.1f}"),
    "error": ("largest error", "{:.1e}"),
    "reference_error": ("of the reference", "{:.1e}"),
    "arguments_gib": ("state, GiB", "{:.2f}"),
    "temporaries_gib": ("temporaries, GiB", "{:.3f}"),
    "peak_gib": ("peak, GiB", "{:.2f}"),
    "compile_s": ("compiled in, s", "{:.1f}"),
    "first_s": ("first call, s", "{:.1f}"),
    "seconds": ("s", "{:.1f}"),
    "first_loss": ("first loss", "{:.3f}"),
    "last_loss": ("last loss", "{:.3f}"),
    "ok": ("", "{}"),
}
TITLES = {
    "device": "The device",
    "kernels": "Attention kernels against softmax written out in float32: output and gradients, over the largest entry",
    "sft": "The train step on packed rows",
    "loss": "The loss and its gradients in bfloat16",
    "attention": "Attention in bfloat16, forward and with its gradients",
    "generate": "Generation",
    "product": "A whole `postrain train` of a tiny model",
}
FULL = {  # what "full" is, see parts.FULL
    "kernels": "rows of 1,500 positions",
    "sft": "a Qwen3 of 0.6 billion parameters, 4 rows of 8,192 tokens an update",
    "loss": "8,192 tokens, a vocabulary of 151,936, hidden size 2,048",
    "attention": "a row of 8,192 positions, 16 heads over 8 key heads of 128",
    "generate": "the same Qwen3 in bfloat16, prompts of 512 tokens, 256 new tokens",
}


def format_results(results: dict) -> str:
    """The Markdown of a device: a table for each part, and what failed by its reason."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    blocks = [f"{results['date']}, size {results['size']}, {versions}."]
    for part, result in results["parts"].items():
        title = ": ".join([TITLES[part], *([FULL[part]] if results["size"] == "full" and part in FULL else [])])
        blocks.append(f"{title} ({result['status']}, {result['seconds']:.0f} s).")
        cases = result["cases"]
        columns = [key for key in UNITS if any(case.get(key) is not None for case in cases.values())]
        columns = [key for key in columns if key != "seconds" or part == "product"]
        if columns:
            head = " | ".join(["", *(UNITS[key][0] for key in columns)])
            rows = [f"| {name} | {' | '.join(_format(case, key) for key in columns)} |" for name, case in cases.items()]
            blocks.append("\n".join([f"|{head} |", "|---" * (len(columns) + 1) + "|", *rows]))
        failed = [f"- {name}: {case['failed']}" for name, case in cases.items() if "failed" in case]
        if failed:
            blocks.append("\n".join(failed))
    return "\n\n".join(blocks)


def _format(case: dict, key: str) -> str:
    if case.get(key) is None:
        return ""
    return {True: "ok", False: "**wrong**"}[case[key]] if key == "ok" else UNITS[key][1].format(case[key])


def write_section(page: pathlib.Path, results: dict) -> None:
    """Puts the figures under the device's name into the page: in place of an earlier run's there, or as a new section.

    Raises SystemExit where the device is not known, as the part that describes it failed.
    """
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import workloads

    kind = results["parts"].get("device", {}).get("cases", {}).get("device", {}).get("kind")
    if kind is None:
        raise SystemExit("error: expected the name of the device in the results, found none: see 'stderr' in the file")
    name = "gpu_" + re.sub(r"\W+", "_", kind).strip("_").lower()
    text = page.read_text()
    if f"<!-- {name} -->" not in text:
        before, end, after = text.partition("<!-- /accelerators -->")
        page.write_text(f"{before}### {kind}\n\n<!-- {name} -->\n<!-- /{name} -->\n\n{end}{after}")
    workloads.write_section(page, name, format_results(results))


if __name__ == "__main__":
    raise SystemExit(main())
