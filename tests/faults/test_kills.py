"""Kills of training runs; every run ends in the bytes of one that was not killed. By hand: a thousand."""

import json
import pathlib
import subprocess
import sys

import kills
import pytest
from kill_figures import add_figures, format_figures, read_figures

KILLS = 30
OBJECTIVES = ("--preference", "--kto", "--reward", "--head", "--distill")


def kill(count, *words):
    script = pathlib.Path(__file__).with_name("kills.py")
    result = subprocess.run([sys.executable, script, f"--kills={count}", *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert sum(one["kills"] for one in found.values()) == count
    assert all(one["kills"] == sum(one["hit"].values()) for one in found.values())
    return found


def test_killed_thirty_times_every_run_ends_in_the_same_bytes():
    [found] = kill(KILLS).values()
    assert found["kinds"] > 40 and len(found["hit"]) > KILLS // 2, "kills of many kinds"


def test_a_process_of_two_is_killed_and_the_other_ends_by_itself():
    [found] = kill(2, "--processes=2").values()
    assert 0 < found["outlived"] < 30


def test_runs_of_every_objective_are_killed():
    """Pairs with a cached reference, single answers beside a live one, a reward head, a head beside the vocabulary
    whose rewards weigh the rows, and a student beside its teacher.
    """
    found = kill(2 * len(OBJECTIVES), *OBJECTIVES)
    assert len(found) == len(OBJECTIVES) and all(one["kills"] == 2 and one["kinds"] > 40 for one in found.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes=2", "--reward", "--kto"], "--processes=2 is a kind of run by itself: leave out --kto --reward"),
        (["--kills=1", "--reward", "--kto"], "--kills=1: expected at least 2"),
        (["--kills=0"], "--kills=0: expected at least 1"),
    ],
)
def test_flags_that_would_measure_nothing_are_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kills.py", *words])
    with pytest.raises(SystemExit) as stopped:
        kills.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("way", [*OBJECTIVES, "--streamed"])
def test_runs_are_killed_more_often(way):
    [found] = kill(12, way).values()
    assert found["kinds"] > 40


def test_figures_of_other_seeds_are_added_and_of_the_same_replaced():
    found = {"kills": 3, "runs": 2, "kinds": 9, "seconds": 6.0, "outlived": 0.5, "seeds": [0], "hit": {"a b/N": 3}}
    page = f"<!-- kills_2 -->\n{format_figures(found)}\n<!-- /kills_2 -->"
    assert read_figures(page, "2") == found
    other = found | {"seeds": [4], "hit": {"c": 3}, "outlived": 0.0}
    both = add_figures(read_figures(page, "2"), other)
    assert both == {
        "kills": 6,
        "runs": 4,
        "kinds": 9,
        "seconds": 12.0,
        "outlived": 0.5,
        "seeds": [0, 4],
        "hit": {"a b/N": 3, "c": 3},
    }
    assert add_figures(found, found) == found
