"""Killed at any instant and started again, a run ends in the same bytes; a changed one is refused or told."""

import os
import signal
import subprocess
import sys
import time

import pytest
from sft_runs import make_values, read_folder, read_lines, run_cli, without_perf, write_config, write_rows

import postrain
from postrain.errors import UserError

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
    with pytest.raises(UserError, match="the data pipeline is not the one of this checkpoint") as caught:
        postrain.train(values, workdir)
    assert "train.jsonl" in str(caught.value) or "sources" in str(caught.value)
    assert read_folder(workdir) == before


def test_another_adapter_is_refused(inputs, finished):
    workdir, _ = finished
    values = make_values(inputs)
    values["model"]["lora"] = {"rank": 8}
    with pytest.raises(UserError, match="the train state is not the one of this checkpoint"):
        postrain.train(values, workdir)


def test_what_else_changed_is_told(inputs, tmp_path, capsys):
    postrain.train(make_values(inputs, train={"steps": 2}, eval={"generate_rows": 0}), tmp_path)
    capsys.readouterr()
    values = make_values(inputs, train={"steps": 3}, eval={"generate_rows": 1}, optimizer={"learning_rate": 2e-2})
    postrain.train(values, tmp_path)
    line = "goes on from step 2; changed since: optimizer.learning_rate 0.01 -> 0.02, train.steps 2 -> 3\n"
    assert line in capsys.readouterr().out
