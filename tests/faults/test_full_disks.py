"""A disk that is full or read-only from some write on: an error, nothing lost, and on with it when it is mended."""

import json
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_at_writes_of_every_eighth_kind():
    script = pathlib.Path(__file__).with_name("full_disks.py")
    result = subprocess.run([sys.executable, script, "--every=8"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) >= 6 and any("ENOSPC" in kind for kind in found) and any("EROFS" in kind for kind in found)
    assert {kind: wrong for kind, wrong in found.items() if wrong} == {}
