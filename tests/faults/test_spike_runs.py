"""Rows that explode in a run: what is left is, bit for bit, what a run without them gives. kills.py kills such runs."""

import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import postrain
from postrain.errors import UserError
from postrain.recipes import sft

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "recipes"))
from sft_runs import make_inputs, make_values, read_lines, without_perf, write_rows  # noqa: E402

SPIKE, STEPS = 23, 30  # the batch that is odd, updates
ODD = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ZQXJKVWYZQXJKVWY"}]}\n'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train(inputs, folder, batches, policy, steps=STEPS, rank=0, every=10, **spike):
    """A run over ``batches``, numbers of pairs of rows; the pair SPIKE has a row that is nothing like the others."""
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "all.jsonl", 2 * STEPS + 8).read_text().splitlines(keepends=True)
    rows[2 * SPIKE - 1] = ODD
    (folder / "train.jsonl").write_text("".join("".join(rows[2 * i - 2 : 2 * i]) for i in batches))
    values = make_values(
        inputs,
        model={"lora": {"rank": rank}},
        data={"shuffle": False, "packing": "none", "eval": [], "train": str(folder / "train.jsonl")},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        train={"steps": steps, "spike": {"policy": policy, "threshold": 4.0} | spike},
        checkpoint={"every": every},
        export={"format": "none"},
    )
    postrain.train(values, folder / "run")
    state = ocp.load_checkpointables(folder / "run" / "checkpoints" / str(steps), {"state": None})["state"]
    return state, read_lines(folder / "run" / "metrics.jsonl")


def assert_same_updates(found, expected):
    for part in ("params", "opt_state", "history"):
        a, b = ({**tree, "skipped": 0} if part == "history" else tree for tree in (found[part], expected[part]))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_that_is_skipped_is_as_if_its_batch_had_not_been_there(inputs, tmp_path, capsys):
    every = list(range(1, STEPS + 1))
    state, lines = train(inputs, tmp_path / "skip", every, "skip")
    told = [line for line in capsys.readouterr().out.splitlines() if "a spike" in line]
    assert len(told) == 1 and f"step {SPIKE}: " in told[0] and f"train.jsonl:{2 * SPIKE}: skipped" in told[0]
    assert [line["train/skipped"] for line in lines] == [float(step >= SPIKE) for step in every]
    every.remove(SPIKE)
    without, _ = train(inputs, tmp_path / "without", every, "skip", steps=STEPS - 1)  # the same program
    assert_same_updates(state, without)


def test_a_rollback_goes_on_from_the_checkpoint_with_what_comes_after_the_batch(inputs, tmp_path, capsys):
    state, lines = train(inputs, tmp_path / "back", range(1, STEPS + 5), "rollback")
    told = [line for line in capsys.readouterr().out.splitlines() if "a spike" in line]
    assert len(told) == 1 and f"step {SPIKE}: " in told[0] and "going back to the newest checkpoint" in told[0]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["train/rollbacks"] for line in lines] == [0.0] * 20 + [1.0] * (STEPS - 20)
    after = [*range(1, 21), *range(SPIKE + 1, STEPS + 5)]
    without, _ = train(inputs, tmp_path / "without", after, "rollback")
    assert_same_updates(state, without)
    assert int(state["step"]) == int(without["step"]) == STEPS


def test_a_run_that_was_stopped_goes_back_to_where_one_that_was_not_does(inputs, tmp_path, monkeypatch):
    """A signal makes a checkpoint of step 21, between that of step 20 and the spike; another one of step 22."""
    make = lambda folder: train(inputs, tmp_path / folder, range(1, STEPS + 5), "rollback")
    expected, lines = make("whole")
    make_batch, calls = sft.make_global_batch, []

    def stopped(*arguments):
        calls.append(1)
        # Updates 21 and 22, the spike itself, and after going back from it update 21, of which there is a checkpoint.
        if len(calls) in (21, 22, 23, 26):
            signal.raise_signal(signal.SIGTERM)
        return make_batch(*arguments)

    monkeypatch.setattr(sft, "make_global_batch", stopped)
    for _ in range(4):
        with pytest.raises(SystemExit) as caught:
            make("cut")
        assert caught.value.code == 143
    assert sorted(path.name for path in (tmp_path / "cut" / "run" / "checkpoints").iterdir()) == ["20", "21", "22"]
    found, cut_lines = make("cut")
    assert_same_updates(found, expected)
    assert without_perf(cut_lines) == without_perf(lines)


def test_adapters_go_back_with_the_base_that_they_had(inputs, tmp_path, capsys):
    """Adapters learn less in so few steps: with a low threshold an ordinary batch, that of step 17, is the spike."""
    steps, bad, low = 18, 17, {"rank": 4, "threshold": 1.3}
    state, lines = train(inputs, tmp_path / "back", range(1, STEPS + 5), "rollback", steps=steps, **low)
    told = [line for line in capsys.readouterr().out.splitlines() if "a spike" in line]
    assert len(told) == 1 and f"step {bad}: " in told[0]
    assert [line["train/rollbacks"] for line in lines] == [0.0] * 10 + [1.0] * (steps - 10)
    after = [*range(1, 11), *range(bad + 1, STEPS + 5)]
    without, _ = train(inputs, tmp_path / "without", after, "rollback", steps=steps, **low)
    assert_same_updates(state, without)


def test_stop_and_a_rollback_without_a_checkpoint_are_errors_that_name_the_step(inputs, tmp_path):
    with pytest.raises(UserError, match=rf"step {SPIKE}: a spike, .* rows .*train.jsonl:{2 * SPIKE}: look at them"):
        train(inputs, tmp_path / "stop", range(1, STEPS + 1), "stop")
    assert sorted(path.name for path in (tmp_path / "stop" / "run" / "checkpoints").iterdir()) == ["10", "20"]
    with pytest.raises(UserError, match=f"step {SPIKE}: no checkpoint that was due to go back to: lower checkpoint"):
        train(inputs, tmp_path / "back", range(1, STEPS + 1), "rollback", every=STEPS)


def test_a_run_that_went_back_past_a_damaged_checkpoint_saves_that_step_again(inputs, tmp_path, monkeypatch, capsys):
    """Checkpoint 20 is damaged before the spike at 23: back to step 10, and a signal at step 13."""
    make_batch, calls, checkpoints = sft.make_global_batch, [], tmp_path / "run" / "checkpoints"

    def damage(*arguments):
        calls.append(1)
        if len(calls) == 22:
            while not (checkpoints / "20").exists():
                time.sleep(0.01)
            file = max((path for path in (checkpoints / "20").rglob("*") if path.is_file()), key=os.path.getsize)
            damaged = bytearray(file.read_bytes())
            damaged[100] ^= 1
            file.write_bytes(damaged)
        if len(calls) == SPIKE + 3:
            signal.raise_signal(signal.SIGTERM)
        return make_batch(*arguments)

    monkeypatch.setattr(sft, "make_global_batch", damage)
    with pytest.raises(SystemExit):
        train(inputs, tmp_path, range(1, STEPS + 5), "rollback")
    assert f"stopped at step 13 of {STEPS}" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "13", "20.unreadable"]
