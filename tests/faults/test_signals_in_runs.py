"""SIGTERM wherever a run is: it saves and says so, or ends at once where nothing is lost; the bytes stay the same."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ENDS_AT_ONCE = -signal.SIGTERM  # 143 to a shell
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped():
    result = subprocess.run([sys.executable, HERE / "stops.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "code", "saved"),
    [
        ("rows", ENDS_AT_ONCE, []),
        ("compile", ENDS_AT_ONCE, []),
        ("first evaluation", 143, []),
        ("batch", 143, ["1"]),
        ("wait", 143, ["2"]),
        ("update", 143, ["2", "3"]),
        ("evaluation", 143, ["2", "4"]),
        ("save", 143, ["2"]),
        ("last evaluation", 143, ["4", "6"]),
        ("export", ENDS_AT_ONCE, ["4", "6"]),
        ("twice", ENDS_AT_ONCE, ["2"]),
    ],
)
def test_sigterm(stopped, name, code, saved):
    found = stopped[name]
    assert found["code"] == code, found["printed"]
    assert found["saved"] == saved and found["seconds"] < 60
    assert found["differs"] == [], "started again it ends in the bytes of a run that was not stopped"
    assert ("the same command goes on from there" in found["printed"]) == (code == 143)
