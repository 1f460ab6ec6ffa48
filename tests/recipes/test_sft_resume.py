"""Killed at any instant and started again, a run ends in the same bytes; a changed one is refused or told."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from sft_runs import make_values, read_folder, read_lines, run_cli, without_perf, write_config, write_rows

import postrain
from postrain.checkpoint.checkpointer import Checkpointer
from postrain.checkpoint.record import RunRecord
from postrain.config import MeshConfig, OptimizerConfig, resolve, to_dict
from postrain.errors import UserError
from postrain.export import export_workdir
from postrain.report.workdir import lock_workdir
from postrain.sharding import make_mesh
from postrain.training.compatibility import format_config_changes, format_rate_jump
from postrain.training.model import load_model
from postrain.training.optimizer import make_optimizer
from postrain.training.step import abstract_train_state

STEPS = 40


def values_of(inputs, **sections):
    values = make_values(
        inputs, **{"train": {"steps": STEPS}, "eval": {"every": 10}, "checkpoint": {"every": 3}} | sections
    )
    values["optimizer"]["ema_decay"] = 0.9
    return values


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    postrain.train(values_of(inputs), workdir)
    return workdir


def start(config, workdir):
    command = [sys.executable, "-m", "postrain.cli", "train", f"--config={config}", f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def wait_for_step(process, workdir, step):
    """Until metrics.jsonl has a line of ``step``; fails when the run ends before."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline:
        if path.exists() and f'"step": {step},' in path.read_text():
            assert process.poll() is None, process.stdout.read()
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    raise AssertionError(f"no step {step} in {path}")


def assert_same_run(workdir, reference):
    assert without_perf(read_lines(workdir / "metrics.jsonl")) == without_perf(read_lines(reference / "metrics.jsonl"))
    assert read_lines(workdir / "samples.jsonl") == read_lines(reference / "samples.jsonl")
    assert read_folder(workdir / "export") == read_folder(reference / "export")


def test_killed_twice_it_ends_in_the_same_bytes(inputs, uninterrupted, tmp_path):
    config, workdir = write_config(tmp_path / "c.py", values_of(inputs)), tmp_path / "run"
    for step in (8, 22):
        process = start(config, workdir)
        wait_for_step(process, workdir, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (workdir / "export").exists()
    result = run_cli("train", f"--config={config}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "goes on from step" in result.stdout
    assert_same_run(workdir, uninterrupted)


def read_state(workdir, values):
    """Path -> dtype, shape and bytes of everything in the newest checkpoint's train state."""
    config, mesh = resolve(values), make_mesh(MeshConfig())
    folder = config.model.path
    model, (optimizer, _) = load_model(config, folder, mesh), make_optimizer(config.optimizer, 1)
    abstract = abstract_train_state(model.params, {}, optimizer, mesh=mesh, ema=True)
    with Checkpointer(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpointer:
        restored = checkpointer.restore(abstract)
    state = restored.state.replace(rng=jax.random.key_data(restored.state.rng))
    leaves = {
        jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    return restored.record.step, restored.record.data_position, leaves


def test_full_training_killed_in_a_save_and_in_the_export_ends_in_the_same_state(inputs, tmp_path):
    values = values_of(inputs, train={"steps": 8}, eval={"every": 4}, model={"lora": {"rank": 0}})
    reference, workdir, config = tmp_path / "reference", tmp_path / "run", write_config(tmp_path / "c.py", values)
    postrain.train(values, reference)
    script = [sys.executable, pathlib.Path(__file__).with_name("killed_run.py"), config, workdir]

    def run_until(instant):
        result = subprocess.run([*script, instant], capture_output=True, text=True, env=os.environ, timeout=240)
        assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
        return result.stdout, sorted(path.name for path in (workdir / "checkpoints").iterdir())

    assert run_until("saving:6")[1] == ["3", "6.saving"]
    printed, left = run_until("exporting")
    assert "6.saving: an unfinished save, removed" in printed and "goes on from step 3\n" in printed
    assert left == ["6", "8"]
    assert [path.name for path in workdir.glob(".export*")] == [".export.unchecked"]
    size = sum(path.stat().st_size for path in workdir.glob(".export*/**/*.safetensors"))
    assert size > 100_000 and not (workdir / "export").exists(), "the model is written and not yet in its place"
    result = run_cli("train", f"--config={config}", f"--workdir={workdir}", "--config.export.format=none")
    assert result.returncode == 0, result.stderr
    assert list(workdir.glob(".*")) == [], "a run that exports nothing clears the place too"
    run_until("exporting")
    result = run_cli("train", f"--config={config}", f"--workdir={workdir}")
    assert result.returncode == 0 and "goes on from step 8\n" in result.stdout, result.stderr
    assert list(workdir.glob(".*")) == []
    assert_same_run(workdir, reference)
    found, expected = read_state(workdir, values), read_state(reference, values)
    assert found == expected
    paths = " ".join(found[2])
    assert found[0] == 8 and all(part in paths for part in (".params", ".opt_state", ".mu", ".nu", ".ema", ".rng"))


def test_sigterm_saves_and_says_how_to_go_on(inputs, uninterrupted, tmp_path):
    values = values_of(inputs, checkpoint={"every": 0})
    config, workdir = write_config(tmp_path / "c.py", values), tmp_path / "run"
    process = start(config, workdir)
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in printed
    stopped = read_lines(workdir / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(stopped)]
    result = run_cli("train", f"--config={config}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"goes on from step {stopped}\n" in result.stdout
    assert_same_run(workdir, uninterrupted)


def test_other_data_is_refused_by_name(inputs, finished, tmp_path):
    workdir, _ = finished
    write_rows(tmp_path / "train.jsonl", 41)
    values = make_values(inputs)
    values["data"]["train"] = str(tmp_path / "train.jsonl")
    before = read_folder(workdir)
    with pytest.raises(
        UserError, match=r"has changed: source 'train': file train.jsonl has other content: was \S+ bytes"
    ):
        postrain.train(values, workdir)
    assert read_folder(workdir) == before


def test_all_that_changed_is_named_at_once_and_before_anything_is_loaded(inputs, finished, tmp_path, monkeypatch):
    workdir, _ = finished
    before = read_folder(workdir)
    shutil.copytree(inputs / "model", tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    write_rows(tmp_path / "train.jsonl", 41)
    changed = {"optimizer": {"name": "lion", "learning_rate": 1e-3, "ema_decay": 0.5}, "eval": {"every": 1}}
    values = make_values(inputs, data={"train": str(tmp_path / "train.jsonl"), "seed": 3}, **changed)
    values["model"] = {"path": str(tmp_path / "model"), "lora": {"rank": 8, "targets": ["q"]}}
    for module, name in (("training.rows", "open_batches"), ("hf.load", "load_pretrained")):
        monkeypatch.setattr(f"postrain.{module}.{name}", lambda *_, name=name: pytest.fail(f"{name} was called"))
    with pytest.raises(UserError, match=f"{workdir}/checkpoints/6: the run cannot go on: this has changed: ") as caught:
        postrain.train(values, workdir)
    error = str(caught.value)
    for words in (
        "data.seed: was 0, is 3;",
        "file train.jsonl has other content",
        "model.lora.rank: was 4, is 8;",
        "model.lora.targets: was [",
        "model.path: other content of config.json;",
        "optimizer.name: was 'adamw', is 'lion';",
        "optimizer.ema_decay: was 0.0, is 0.5:",
    ):
        assert words in error, error
    assert "learning_rate" not in error and "eval" not in error and "\n" not in error
    assert read_folder(workdir) == before


def test_files_of_a_glob_are_compared_one_by_one(inputs, tmp_path):
    for i in range(3):
        write_rows(tmp_path / f"part{i}.jsonl", 8, first=8 * i)
    (tmp_path / "part1.jsonl").open("a").write("\n")
    values = make_values(inputs, data={"train": str(tmp_path / "part*.jsonl"), "eval": []}, train={"steps": 1})
    values["export"] = {"format": "none"}
    postrain.train(values, tmp_path / "run")
    assert postrain.train(values, tmp_path / "run")["train/loss"] > 0
    write_rows(tmp_path / "part1.jsonl", 9, first=8)
    write_rows(tmp_path / "part3.jsonl", 1)
    with pytest.raises(UserError) as caught:
        postrain.train(values, tmp_path / "run")
    assert "file part3.jsonl is new; " in str(caught.value) and "file part1.jsonl has other content" in str(
        caught.value
    )
    assert "part0" not in str(caught.value) and "part2" not in str(caught.value)


@pytest.mark.parametrize("length", [{"steps": 3}, {"steps": 0, "epochs": 0.1}])
def test_fewer_steps_than_were_done_are_refused(inputs, finished, length, capsys):
    """The export would be of a model that nobody asked for, under a config that does not tell."""
    workdir, _ = finished
    before = read_folder(workdir)
    with pytest.raises(UserError, match=r"checkpoints/6: the run already is at step 6, past the \d that") as caught:
        postrain.train(make_values(inputs, train=length), workdir)
    assert "\n" not in str(caught.value) and "done" not in capsys.readouterr().out
    assert read_folder(workdir) == before


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, "model.lora.rank: was 4, is 8:"),
        ({"rank": 4, "alpha": 8}, "model.lora.alpha: was 32.0, is 8.0:"),
        ({"rank": 0}, "model.lora.rank: was 4, is 0:"),
    ],
)
def test_another_adapter_is_refused(inputs, finished, lora, words):
    workdir, _ = finished
    values = make_values(inputs)
    values["model"]["lora"] = lora
    with pytest.raises(UserError, match=f"has changed: {words} change it back, or use another workdir"):
        postrain.train(values, workdir)


def test_another_recipe_is_refused(inputs, finished):
    workdir, _ = finished
    values = make_values(inputs) | {"recipe": "preference"}
    values["eval"]["generate_rows"] = 0
    with pytest.raises(UserError, match="has changed: recipe: was 'sft', is 'preference'.*, or use another workdir$"):
        postrain.train(values, workdir)


def test_a_second_run_in_the_workdir_is_refused_and_a_kept_checkpoint_exported_meanwhile(inputs, tmp_path):
    workdir, values = tmp_path / "run", make_values(inputs, eval={"generate_rows": 0, "before": False})
    values["checkpoint"] |= {"every": 2, "keep": 3}
    postrain.train(values, workdir)
    before = read_folder(workdir)
    with lock_workdir(workdir):  # as a run holds it
        with pytest.raises(UserError, match=rf"{workdir} is in use by another run \(process {os.getpid()}\)"):
            postrain.train(values, workdir)
        (workdir / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()  # and saves
        assert "wrote step 4" in export_workdir(workdir, tmp_path / "four", step=4)
        assert (workdir / "checkpoints" / "8.orbax-checkpoint-tmp").is_dir()
        with pytest.raises(UserError, match=r"no step 3, found \[2, 4, 6\]"):
            export_workdir(workdir, tmp_path / "three", step=3)
    assert "wrote step 6" in export_workdir(workdir, tmp_path / "six")
    name = "model.safetensors"
    assert (tmp_path / "six" / name).read_bytes() == before[f"export/{name}"] != (tmp_path / "four" / name).read_bytes()


def changes_of(old, new):
    record = RunRecord(1, {}, to_dict(resolve(old)), {}, {})
    return format_config_changes(record, resolve(new), None)


def test_a_key_that_an_older_version_did_not_have_is_no_change(inputs):
    """A run that it has finished may be repeated."""
    config = resolve(make_values(inputs))
    old = to_dict(config)
    del old["sft"]["weights"], old["train"]["count_moved"]
    assert format_config_changes(RunRecord(1, {}, old, {}, {}), config, None) == ""


def test_other_held_out_rows_are_told(inputs):
    unseen = {"every": 3, "before": False, "batch_size": 2}
    line = changes_of(make_values(inputs), make_values(inputs, data={"eval": "other.jsonl"}, eval=unseen))
    assert line.startswith("; changed since: data.eval [")
    assert not any(f"eval.{key} " in line for key in unseen)


def test_whatever_changes_what_an_evaluation_measures_is_told(inputs):
    old = make_values(inputs, eval={"generate_rows": 3, "loss_rows": 0, "max_new_tokens": 8})
    measured = {"generate_rows": 2, "loss_rows": 4, "max_new_tokens": 16, "metrics": ["exact_match"]}
    for key, value in measured.items():
        line = changes_of(old, make_values(inputs, eval={key: value}))
        assert line.startswith(f"; changed since: eval.{key} ") and line.endswith(f"-> {value!r}"), line


def test_another_number_of_micro_batches_is_told_where_noise_is_drawn_for_each(inputs):
    parts = {"train": {"micro_batches": 2}}
    assert changes_of(make_values(inputs), make_values(inputs, **parts)) == ""
    noise = {"sft": {"noise": 5.0}}
    line = changes_of(make_values(inputs) | noise, make_values(inputs, **parts) | noise)
    assert line == "; changed since: train.micro_batches 1 -> 2"


def test_other_content_of_the_held_out_file_is_told(inputs, tmp_path, capsys):
    rows = write_rows(tmp_path / "eval.jsonl", 6, first=40)
    sections = {"data": {"eval": str(rows)}, "eval": {"generate_rows": 0}, "export": {"format": "none"}}
    postrain.train(make_values(inputs, train={"steps": 1}, **sections), tmp_path / "run")
    for first in (40, 50):
        write_rows(rows, 6, first=first)
        values = make_values(inputs, train={"steps": 2 if first == 40 else 3}, **sections)
        capsys.readouterr()
        postrain.train(values, tmp_path / "run")
        printed = capsys.readouterr().out
        told = "held out: source 'eval': file eval.jsonl has other content" in printed
        assert "; changed since: train.steps" in printed and told == (first == 50), printed


def test_what_else_changed_is_told(inputs, tmp_path, capsys):
    postrain.train(make_values(inputs, train={"steps": 2}, eval={"generate_rows": 0}), tmp_path)
    capsys.readouterr()
    values = make_values(inputs, train={"steps": 3}, eval={"generate_rows": 1}, optimizer={"learning_rate": 2e-2})
    postrain.train(values, tmp_path)
    changed = "optimizer.learning_rate 0.01 -> 0.02, train.steps 2 -> 3, eval.generate_rows 0 -> 1"
    jump = "to 0.005, by the schedule of 3 updates, where 0 was planned, by that of 2"
    told = f"goes on from step 2; changed since: {changed}\nthe learning rate jumps at step 3: {jump}\n"
    assert told in capsys.readouterr().out


def test_a_jump_of_the_learning_rate_is_told_with_both_rates():
    cosine = {"learning_rate": 1e-5, "schedule": "cosine"}
    planned = RunRecord(5, {}, {"optimizer": cosine}, {}, {}, total_updates=10)
    line = "the learning rate jumps at step 6: to 8.54e-06, by the schedule of 20 updates, where 5e-06 was planned, "
    assert format_rate_jump(planned, OptimizerConfig(**cosine), 20, 5) == line + "by that of 10"
    assert format_rate_jump(planned, OptimizerConfig(**cosine), 10, 5) == ""
    constant = RunRecord(5, {}, {"optimizer": {"schedule": "constant"}}, {}, {}, total_updates=10)
    assert format_rate_jump(constant, OptimizerConfig(schedule="constant"), 20, 5) == ""
