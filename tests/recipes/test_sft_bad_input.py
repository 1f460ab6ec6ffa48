"""What bad input gets: one clear line that says what, where and what to do; code 2; nothing that looks whole."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from sft_runs import make_values, read_folder, read_lines, write_config, write_rows

from postrain import cli
from postrain.errors import UserError
from postrain.recipes import train

NO_MARKERS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_messages(path, *roles):
    path.write_text(json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}) + "\n")


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def cut_in_half(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "model.layers.1.input_layernorm.weight"
MODELS = {
    "missing tensor": (lambda folder: change_tensors(folder, lambda t: t.pop(NORM)), NORM),
    "misshapen tensor": (
        lambda folder: change_tensors(folder, lambda t: t.update({NORM: np.ones(7, np.float32)})),
        f"{NORM} [7] instead of [40]",
    ),
    "corrupt file": (cut_in_half, "model.safetensors"),
    "not a number": (
        lambda folder: change_tensors(
            folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 0), np.nan)
        ),
        "layer 1, mlp.up.kernel holds numbers that are not finite",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "no template": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}'),
        "template",
    ),
}
CONFIGS = {
    "missing file": ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "missing model": ({"model": {"path": "nowhere"}}, "config key 'model.path' = 'nowhere' is a folder that does not"),
    "name on the hub": ({"model": {"path": "Qwen/Qwen3-0.6B"}}, "Qwen/Qwen3-0.6B is not a folder here, and the cache"),
    "missing tokenizer": ({"model": {"tokenizer": "nowhere"}}, "config key 'model.tokenizer' = 'nowhere' is a folder"),
    "wrong key": ({"train": {"step": 3}}, "config key 'train.step' does not exist; did you mean 'train.steps'?"),
    "mesh": ({"mesh": {"tensor": 2, "fsdp": 2}}, "mesh: fsdp=2 x tensor=2 does not divide into 1 devices"),
    "mesh axis": ({"mesh": {"model": 2}}, "config key 'mesh.model' does not exist; 'mesh' has data, fsdp, tensor"),
    "a layer twice": (
        {"model": {"lora": {"rank": 4, "targets": ["q", "v", "q"]}}},
        "config key 'model.lora.targets' names 'q' twice",
    ),
    "special without tokens": (
        {"model": {"new_tokens": {"special": True}}},
        "config key 'model.new_tokens.special' is True, but there are no new tokens",
    ),
    "number": ({"optimizer": {"b1": 1.5}}, "config key 'optimizer.b1' must be below 1, found 1.5"),
    "tracker": ({"trackers": {"wandb": "offline"}}, "trackers.wandb: needs the package wandb"),
    "long rows": ({"data": {"too_long": "error", "sequence_length": 20}}, "train.jsonl:1"),
    "all rows long": ({"data": {"sequence_length": 20}}, "too long for data.sequence_length = 20"),
}


def fail_training(values, folder, capsys):
    """The one line on stderr of a run that must fail, and that it left nothing behind."""
    config, workdir = write_config(folder / "config.py", values), folder / "run"
    code = cli.main(["train", f"--config={config}", f"--workdir={workdir}"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 700, error
    left = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    assert left <= {"rejected.jsonl"}, left  # which says why
    assert workdir.exists() == bool(left)
    return error


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_folder(name, inputs, tmp_path, capsys):
    spoil, words = MODELS[name]
    shutil.copytree(inputs / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    spoil(tmp_path / "model")
    values = make_values(inputs)
    values["model"]["path"] = str(tmp_path / "model")
    assert words in fail_training(values, tmp_path, capsys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config(name, inputs, tmp_path, capsys, monkeypatch):
    sections, words = CONFIGS[name]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    assert words in fail_training(make_values(inputs, **sections), tmp_path, capsys)


@pytest.mark.parametrize(("metric", "before"), [("eval/losss", True), ("eval/losss", False), ("train/losss", False)])
def test_a_metric_that_nobody_measures(inputs, tmp_path, metric, before):
    """Refused at the first measurement, not at the first checkpoint, which may come hours later."""
    best = {"every": 2, "keep_best": 1, "metric": metric}
    values = make_values(inputs, eval={"every": 1, "before": before, "generate_rows": 0}, checkpoint=best)
    found = metric.replace("losss", "accuracy, ")
    with pytest.raises(UserError, match=f"'checkpoint.metric' = '{metric}' is not measured; found {found}"):
        train(values, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "rows.jsonl"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "rows.jsonl:1: messages[0].role must be one of"),
        ('{"messages": [\n', "rows.jsonl:1"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "rows.jsonl:1: no assistant message"),
        ('{"mesages": []}\n', "rows.jsonl:1: expected the keys 'messages'"),
    ],
)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_bad_rows(part, rows, words, inputs, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(rows)
    values = make_values(inputs, data={part: str(tmp_path / "rows.jsonl")})
    assert words in fail_training(values, tmp_path, capsys)


def test_a_template_without_the_needed_markers(inputs, tmp_path, capsys):
    (tmp_path / "bare.jinja").write_text(NO_MARKERS)
    error = fail_training(make_values(inputs, data={"chat_template": str(tmp_path / "bare.jinja")}), tmp_path, capsys)
    assert "train.jsonl:1" in error


def test_too_many_skipped_rows_stop_the_run_and_are_listed(inputs, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", 10)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    skip = {"train": str(tmp_path / "rows.jsonl"), "on_bad_row": "skip", "max_bad_fraction": 0.05}
    assert "more than data.max_bad_fraction" in fail_training(make_values(inputs, data=skip), tmp_path, capsys)
    [rejected] = read_lines(tmp_path / "run" / "rejected.jsonl")
    assert (rejected["line"], "'messages' is empty" in rejected["reason"]) == (11, True)


def test_a_tokenizer_that_is_not_the_models(inputs, tmp_path, capsys):
    """The folder has fewer embeddings than the tokenizer has ids."""
    from tiny_models import make_tiny_model

    make_tiny_model(tmp_path / "model", "llama", vocab_size=70)
    values = make_values(inputs)
    values["model"] |= {"path": str(tmp_path / "model"), "tokenizer": str(inputs / "model")}
    assert "train.jsonl:1: token id" in fail_training(values, tmp_path, capsys)


def test_a_workdir_that_is_a_file(inputs, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    config = write_config(tmp_path / "config.py", make_values(inputs))
    assert cli.main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_that_is_a_model(inputs, tmp_path):
    """Its config.json would be taken by the run's."""
    folder = tmp_path / "model"
    shutil.copytree(inputs / "model", folder)
    before = read_folder(folder)
    with pytest.raises(UserError, match="holds the weights of a model"):
        train(make_values(inputs), folder)
    assert read_folder(folder) == before
    with pytest.raises(UserError, match="--workdir is empty"):
        train(make_values(inputs), "")


def run_with_small_files(config, workdir, kib=None):
    """A run whose files may not grow beyond ``kib``, which is what a full disk looks like to it."""
    command = [sys.executable, "-m", "postrain.cli", "train", f"--config={config}", f"--workdir={workdir}"]
    if kib is not None:
        command = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command]
    # Without the tests' cache of compiled programs: what the limit cuts short there would be read by later tests.
    environment = os.environ | ({} if kib is None else {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kib", [3, 60, 200])
def test_a_full_disk(kib, inputs, tmp_path):
    """First the config does not fit, then the checkpoint, then the export."""
    config, workdir = write_config(tmp_path / "config.py", make_values(inputs)), tmp_path / "run"
    result = run_with_small_files(config, workdir, kib)
    assert result.returncode in (1, 2), result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "File too large" in result.stderr or "disk is full" in result.stderr
    assert not (workdir / "export").exists()
    assert [path.name for path in workdir.iterdir() if "partial" in path.name] == []


def test_a_failed_run_goes_on_when_there_is_room_again(inputs, tmp_path, finished):
    config, workdir = write_config(tmp_path / "config.py", make_values(inputs)), tmp_path / "run"
    assert run_with_small_files(config, workdir, 60).returncode != 0
    result = run_with_small_files(config, workdir)
    assert result.returncode == 0, result.stderr
    assert read_folder(workdir / "export") == read_folder(finished[0] / "export")
