"""Files that a run reads and that are missing, cut, flipped or unreadable: named, or made up for by a good copy."""

import json
import pathlib
import subprocess
import sys

import pytest
from bad_reads import RESULTS


def sweep(*words):
    script = pathlib.Path(__file__).with_name("bad_reads.py")
    result = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_damage_of_a_shard_is_found_when_a_run_goes_on():
    found = sweep("--only=goes on, inputs/model/model-00001")
    assert len(found) == 9 and set(found.values()) == {"named"}, found


@pytest.mark.slow
def test_all_files():
    found = sweep()
    assert len(found) > 200
    assert {case: result for case, result in found.items() if result not in RESULTS} == {}
