"""The kernels compile for a real TPU and a real GPU, over heads and positions, and need less than the reference."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("attention_compile.py")


@pytest.mark.parametrize(("target", "kernel"), [("v5e:2x2", "flash_tpu"), ("h100:1x4", "flash_gpu")])
def test_a_kernel_compiles_for_its_target(target, kernel):
    command = [sys.executable, SCRIPT, target, kernel, "auto", "chunked"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    ours, auto, chunked = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
    assert ours["kernels"] == 3, "forward, the gradient to queries, and the one to keys and values"
    assert auto | {"backend": kernel} == ours, "what is chosen where nothing is asked for"
    assert chunked["kernels"] == 0 and ours["temporaries"] < chunked["temporaries"]
