"""Rows that explode in a run: what is left is, bit for bit, what a run without them gives. kills.py kills such runs."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import postrain
from postrain.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "recipes"))
from sft_runs import make_inputs, make_values, read_lines, write_rows  # noqa: E402

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


def test_stop_is_an_error_that_names_the_step_and_its_rows(inputs, tmp_path):
    with pytest.raises(UserError, match=rf"step {SPIKE}: a spike, .* rows .*train.jsonl:{2 * SPIKE}: look at them"):
        train(inputs, tmp_path, range(1, STEPS + 1), "stop")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "20"]
