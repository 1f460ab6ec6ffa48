"""Thirty kills of training runs; every run ends in the bytes of one that was not killed. By hand: a thousand."""

import json
import pathlib
import subprocess
import sys

KILLS = 30


def test_killed_thirty_times_every_run_ends_in_the_same_bytes():
    script = pathlib.Path(__file__).with_name("kills.py")
    result = subprocess.run([sys.executable, script, f"--kills={KILLS}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["kills"] == KILLS == sum(found["hit"].values())
    assert found["kinds"] > 40 and len(found["hit"]) > KILLS // 2, "kills of many kinds"
