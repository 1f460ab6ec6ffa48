"""The loop under recipes that are not those of postrain: several updates in a step, several losses, another source."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain.config import resolve
from postrain.errors import UserError
from postrain.objectives.sft import make_sft_loss
from postrain.training.evaluate import make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import Forward, load_model
from postrain.training.program import build_program
from postrain.training.rows import open_eval_rows, open_train_rows
from postrain.training.session import open_session
from postrain.types import BatchFacts, LossSums, WeightedSum

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from sft_runs import make_inputs, make_values, read_lines, without_perf  # noqa: E402

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Pairs:
    """Two batches of rows an item: a source that is not ``Rows``, whose state holds more than the data's position."""

    def __init__(self, rows, mesh):
        self._rows, self._mesh, self._items = rows, mesh, 0
        self.fingerprint = rows.fingerprint | {"batches": 2}

    def __next__(self):
        batches = [next(self._rows)]
        self._facts = [self._rows.describe_last()]
        batches.append(next(self._rows))
        self._facts.append(self._rows.describe_last())
        self._items += 1
        return batches

    def describe_last(self):
        facts = self._facts
        name_rows = lambda: ", ".join(one.name_rows() for one in facts)
        joined = {name: [one.arrays[name] for one in facts] for name in ("segment_ids", "loss_mask")}
        return BatchFacts(name_rows, {name: np.concatenate(arrays) for name, arrays in joined.items()})

    def get_state(self):
        return {"rows": self._rows.get_state(), "items": self._items}

    def join_states(self, states):
        return states[0] | {"rows": self._rows.join_states([state["rows"] for state in states])}

    def set_state(self, state, step):
        self._items = state["items"] if state else step
        self._rows.set_state(state and state["rows"], 2 * step)

    def format_consumption(self, state):
        return [f"{state['items']} pairs of batches"]

    def close(self):
        self._rows.close()


def add_entropy(loss_fn, forward):
    """A second named loss, with another weight than the first: the mean logsumexp of the rows' trained tokens."""

    def both(params, batch, rng):
        sums = loss_fn(params, batch, rng)
        found, _ = forward.logprobs(params, batch)
        rows = (batch.loss_mask.sum(1) > 0).sum().astype(jnp.float32)
        mean = found.logsumexp.sum(1) / jnp.maximum(batch.loss_mask.sum(1), 1)
        return LossSums(sums.losses | {"size": WeightedSum(mean.sum(), rows)}, sums.metrics)

    return both


def train(config, workdir, crash_at=None):
    """A recipe: two updates a step, of two losses. ``crash_at``: the step in which it ends with an error."""
    config = resolve(config)
    with open_session(config, workdir) as session:
        rows = open_train_rows(session, kind="sft")
        held_out = open_eval_rows(session, kind="sft")
        model = load_model(config, session.model_folder, session.mesh)
        forward = Forward(model.config, chunk=64)
        program = build_program(
            config,
            model,
            session.mesh,
            2 * STEPS,
            loss_fn=add_entropy(make_sft_loss(forward.nll), forward),
            loss_coefs={"size": 0.01},
        )
        session.print_summary(model, program, rows, held_out)
        evaluators = [make_loss_evaluator(session, program, held_out)]
        source = Pairs(rows, session.mesh)
        with open_loop(session, program, model, source, STEPS, evaluators, held_out) as loop:
            for batches in loop:
                if loop.step == crash_at:
                    raise MemoryError("no room")
                updates = []
                for batch in batches:
                    loop.state, metrics = program.train_step(loop.state, batch)
                    updates.append(metrics)
                loop.finish_step(updates, **{"train/pairs": float(loop.step)})
            return int(loop.state.step), jax.device_get(loop.state.params)


def values_of(inputs, **sections):
    return make_values(inputs, train={"steps": STEPS}, eval={"every": 2, "generate_rows": 0}, **sections)


def test_steps_and_updates_are_two_counters_and_a_run_that_crashed_ends_in_the_same_bytes(inputs, tmp_path, capsys):
    updates, params = train(values_of(inputs), tmp_path / "whole")
    assert updates == 2 * STEPS
    assert "consumed    4 pairs of batches" in capsys.readouterr().out
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["train/updates"] for line in lines[1:]] == [2.0, 4.0, 6.0, 8.0]
    assert [line["train/pairs"] for line in lines[1:]] == [1.0, 2.0, 3.0, 4.0]
    assert not any("train/skipped" in line for line in lines), "only where the policy is to skip steps"
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) == ["2", "4"]
    for crash_at in (2, 4):  # before any checkpoint, and after the one of step 2
        with pytest.raises(MemoryError):
            train(values_of(inputs), tmp_path / "cut", crash_at)
    again, same = train(values_of(inputs), tmp_path / "cut")
    assert again == updates and "goes on from step 2" in capsys.readouterr().out
    jax.tree.map(lambda a, b: None if (a == b).all() else pytest.fail("other parameters"), params, same)
    metrics = [without_perf(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_a_line_has_the_means_of_the_steps_since_the_last_one_also_of_a_run_that_crashed(inputs, tmp_path):
    train(values_of(inputs), tmp_path / "each")
    values = values_of(inputs)
    values["train"]["log_every"] = 3
    with pytest.raises(MemoryError):
        train(values, tmp_path / "cut", 3)
    train(values, tmp_path / "cut")
    each = {line["step"]: line for line in read_lines(tmp_path / "each" / "metrics.jsonl")}
    lines = {line["step"]: line for line in read_lines(tmp_path / "cut" / "metrics.jsonl")}
    logged = [step for step, line in lines.items() if "train/loss" in line]
    assert list(lines) == [0, 2, 3, 4] and logged == [3, 4], "evaluated at 0, 2 and 4"
    steps = [each[step] for step in (1, 2, 3)]
    weights = [line["train/weight"] for line in steps]
    assert len(set(weights)) > 1
    for name, counts in (
        ("train/loss", weights),
        ("train/loss/size", [line["train/weight/size"] for line in steps]),
        ("train/grad_norm", None),
    ):
        mean = np.average([line[name] for line in steps], weights=counts)
        assert lines[3][name] == pytest.approx(mean, rel=1e-6), name
    assert lines[3]["train/learning_rate"] == each[3]["train/learning_rate"]
    assert without_perf([lines[4]]) == without_perf([each[4]])


def test_each_of_several_losses_is_logged_and_their_sum_is_the_loss(inputs, tmp_path):
    train(values_of(inputs), tmp_path / "run")
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        for group in {name.split("/")[0] for name in line if name.endswith("/loss")}:
            expected = line[f"{group}/loss/sft"] + 0.01 * line[f"{group}/loss/size"]
            assert line[f"{group}/loss"] == pytest.approx(expected, rel=1e-6)
            assert line[f"{group}/loss/size"] > 1


def test_a_step_whose_second_update_is_not_finite_names_the_rows_of_both(inputs, tmp_path):
    values = values_of(inputs, optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(UserError, match=r"step \d: loss .* not both finite, rows .*train\.jsonl:\d+, .*train\.jsonl"):
        train(values, tmp_path / "run")


def test_a_state_of_another_source_is_refused(inputs, tmp_path):
    """The fingerprint of the source is part of the checkpoint."""
    import postrain

    train(values_of(inputs), tmp_path / "run")
    with pytest.raises(UserError, match="the run cannot go on: this has changed: "):
        postrain.train(values_of(inputs), tmp_path / "run")
