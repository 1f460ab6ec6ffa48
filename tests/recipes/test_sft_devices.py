"""The same run on other devices: the same numbers, and checkpoints that move from one mesh to another."""

import os
import subprocess
import sys

import pytest
from sft_runs import make_values, read_lines, without_perf, write_config

FOUR = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}


def run(words, **environment):
    command = [sys.executable, "-m", "postrain.cli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_four_devices_then_one_are_as_one(inputs, finished, tmp_path):
    reference, _ = finished
    values = make_values(inputs, data={"batch_size": 2})
    config, workdir = write_config(tmp_path / "c.py", values), tmp_path / "run"
    train = ["train", f"--config={config}", f"--workdir={workdir}"]
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    printed = run([*train, *mesh, "--config.train.micro_batches=1"], **FOUR)
    assert "4 devices (cpu): fsdp=2 x tensor=2" in printed
    for ours, theirs in zip(
        without_perf(read_lines(workdir / "metrics.jsonl")),
        without_perf(read_lines(reference / "metrics.jsonl")),
        strict=True,
    ):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    run(["export", f"--workdir={workdir}", f"--output={tmp_path / 'one'}"])
    longer = run([*train, "--config.train.steps=7", "--config.mesh.fsdp=1"])
    assert "goes on from step 6" in longer
    assert read_lines(workdir / "metrics.jsonl")[-1]["step"] == 7
