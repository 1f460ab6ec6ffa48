"""A run that hangs is stopped, named by its phase, with the stacks of all its threads; one that computes is not."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from postrain.cluster.processes import HANG
from postrain.cluster.stopping import Watchdog

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes"))


@pytest.fixture(scope="module")
def hangs(tmp_path_factory):
    from sft_runs import make_inputs

    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    result = subprocess.run([sys.executable, HERE / "hangs.py", inputs], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "evaluator", "data worker", "device", "save", "evaluation", "export"])
def test_a_hang_is_named_by_its_phase_and_the_run_stopped(hangs, name):
    found = hangs[name]
    assert found["code"] == HANG == 124, found["printed"]
    assert f"in phase '{found['phase']}'" in found["stacks"].splitlines()[0], found["stacks"]
    assert found["stacks"].splitlines()[0] in found["printed"]
    assert "(most recent call first)" in found["stacks"] and "recipes/sft.py" in found["stacks"]
    assert "read_bytes" in found["stacks"] and "read_bytes" in found["printed"], "the thread that waits is shown"


@pytest.mark.slow
def test_processes_whose_partner_has_stopped_name_the_step(hangs):
    found = hangs["partner"]
    assert found["code"] == HANG, found["printed"]
    first = found["stacks"].splitlines()[0]
    assert "in phase 'step'" in first and "Process 0 of 2: one that has stopped keeps all others waiting" in first


SCRIPT = """
import pathlib, sys, time
from postrain.cluster.stopping import Watchdog

def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(10_000))

with Watchdog(pathlib.Path(sys.argv[1]), 0.5) as watch:
    compute(1.0)
    with watch.phase("data"):
        compute(1.0)
    for _ in range(5):
        with watch.phase("step", watches_cpu=False):
            time.sleep(0.2)
    with watch.phase("evaluation"):
        with watch.phase("data"):
            pass
        {end}
    print("done")
"""


@pytest.mark.parametrize(("end", "code"), [("compute(1.0)", 0), ("time.sleep(60)", HANG)])
def test_only_what_makes_no_progress_is_a_hang(tmp_path, end, code):
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", SCRIPT.replace("{end}", end), tmp_path], capture_output=True)
    assert result.returncode == code and (b"done" in result.stdout) == (code == 0), result.stderr
    assert (tmp_path / "hang.txt").exists() == bool(code) and time.monotonic() - start < 40
    assert not code or b"phase 'evaluation'" in result.stderr


def test_a_waiting_accelerator_that_keeps_the_processor_busy_hangs(tmp_path):
    script = SCRIPT.replace("{end}", 'with watch.phase("step", watches_cpu=False): compute(60)')
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True)
    assert result.returncode == HANG and b"phase 'step'" in result.stderr


def test_a_process_that_was_stopped_did_not_hang(tmp_path):
    """By SIGSTOP, as schedulers and debuggers do; the same time asleep ends it."""
    import os
    import signal

    script = SCRIPT.replace("{end}", 'print("sleeps", flush=True); time.sleep(0.2)')
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"sleeps\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(30) == 0


def test_no_timeout_watches_nothing(tmp_path):
    with Watchdog(tmp_path, 0.0) as watch, watch.phase("data"):
        assert not watch._thread.is_alive()
