"""An object store that is killed while a run reads from it: waited for, named, and on with the run when it is back."""

import json
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found():
    script = pathlib.Path(__file__).with_name("vanishing.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_store_that_stays_away_is_named_and_the_run_goes_on_to_the_same_bytes_when_it_is_back(found):
    gone = found["gone"]
    assert gone["code"] == 2 and "Traceback" not in gone["printed"], gone["printed"]
    [error] = [line for line in gone["printed"].splitlines() if line.startswith("error: ")]
    assert "s3://corpus/" in error and "4 tries within" in error and "start the same command again" in error
    assert gone["saved"] and gone["saved"][-1] >= 4, "the checkpoints from before are there"
    assert gone["differs"] == []


@pytest.mark.slow
def test_a_store_that_comes_back_in_time_leaves_no_trace_in_the_run(found):
    back = found["back"]
    assert back["code"] == 0, back["printed"]
    assert "try 1 of 12 failed" in back["printed"]
    assert back["differs"] == []


@pytest.mark.slow
def test_damaged_pieces_of_the_cache_are_fetched_again(found):
    assert found["cache damaged"]["pieces"] >= 6 and found["cache damaged"]["differs"] == []
