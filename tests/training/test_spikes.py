"""Steps that explode: judged by the median of what was taken, left out in the step, counted, bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import compute_loss, make_batch, make_params, scale_loss

from postrain.config import OptimizerConfig, SpikeSection
from postrain.errors import UserError
from postrain.training.optimizer import make_optimizer
from postrain.training.spikes import MIN_UPDATES, WINDOW, check_step, judge_step, new_history
from postrain.training.step import init_train_state, make_train_step

OPTIMIZER, SCHEDULE = make_optimizer(OptimizerConfig(learning_rate=1e-3), 200)


def scaled_loss(params, batch, rng):
    """The first token of a batch makes its loss large (7) or NaN (8); any other leaves it."""
    first = batch["tokens"][0, 0]
    factor = jnp.where(first == 7, 50.0, jnp.where(first == 8, jnp.nan, 1.0))
    return scale_loss(compute_loss(params, batch, rng), factor)


def batch_of(seed, first=0):
    batch = make_batch(seed)
    batch["tokens"][0, 0] = first
    return batch


def run(batches, threshold):
    state = init_train_state(make_params(), {}, OPTIMIZER, jax.random.key(0))
    step, history = make_train_step(scaled_loss, OPTIMIZER, spike_threshold=threshold, schedule=SCHEDULE), []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return jax.device_get(state.replace(rng=None)), history


def test_limits_are_the_threshold_times_the_medians_of_the_last_steps_taken():
    history, values = new_history(), np.random.default_rng(0).uniform(1, 9, (2, 100)).astype(np.float32)
    taken, limits = jnp.bool_(True), ("loss_limit", "grad_norm_limit")
    for count, (loss, norm) in enumerate(values.T):
        _, _, facts = judge_step(history, loss, norm, taken, 3.0)
        if count >= MIN_UPDATES:
            expected = 3 * np.median(values[:, max(0, count - WINDOW) : count], axis=1)
        else:
            expected = [np.inf] * 2
        np.testing.assert_allclose([float(facts[name]) for name in limits], expected, rtol=1e-6)
        is_update, history, facts = judge_step(history, loss, norm, taken, 0.0)
        assert is_update and [float(facts[name]) for name in limits] == [np.inf] * 2, "no threshold judges nothing"


def test_a_spike_changes_nothing_but_the_counts_and_is_not_what_is_usual():
    good = [batch_of(seed) for seed in range(MIN_UPDATES + 4)]
    spikes = [batch_of(seed, first) for seed, first in ((90, 7), (91, 8), (92, 7))]
    without, _ = run(good, 3.0)
    state, history = run([*good[:-1], *spikes, good[-1]], 3.0)
    assert [bool(m["usual"]) for m in history] == [True] * (MIN_UPDATES + 3) + [False] * 3 + [True]
    assert [int(m["in_a_row"]) for m in history][-4:] == [1, 2, 3, 0] and int(state.history["skipped"]) == 3
    rates = [float(m["train/learning_rate"]) for m in history]
    assert rates == pytest.approx(
        [float(SCHEDULE(update)) for update in [*range(MIN_UPDATES + 3), *[MIN_UPDATES + 3] * 4]]
    )
    assert rates[-1] < rates[-5]
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(without, part))
    for name in ("loss", "grad_norm", "updates"):
        np.testing.assert_array_equal(state.history[name], without.history[name])
    assert int(state.step) == MIN_UPDATES + 7


def test_nothing_is_judged_before_there_is_a_history_or_without_a_threshold():
    _, early = run([batch_of(0), batch_of(1, 7)], 3.0)
    _, off = run([*[batch_of(seed) for seed in range(MIN_UPDATES)], batch_of(1, 7)], 0.0)
    assert all(bool(m["usual"]) for m in early + off)


def metrics_of(**values):
    usual = {"train/loss": 9.0, "train/grad_norm": 5.0, "loss_limit": 3.0, "grad_norm_limit": 4.0}
    return usual | {"finite": True, "usual": False, "in_a_row": 1, "skipped": 1} | values


@pytest.mark.parametrize("policy", ["none", "stop"])
def test_stop_names_step_rows_and_what_is_usual(policy):
    section = SpikeSection(policy=policy)
    message = r"step 17: a spike, loss 9 and gradient norm 5; expected at most 3 and 4 \(.*\), rows chat.jsonl:3: look"
    with pytest.raises(UserError, match=message):
        check_step(section, 17, metrics_of(), lambda: "chat.jsonl:3", print)
    metrics = metrics_of(finite=False, **{"train/loss": np.nan})
    with pytest.raises(UserError, match="step 18: loss nan .* not both finite, rows chat.jsonl:3"):
        check_step(section, 18, metrics, lambda: "chat.jsonl:3", print)


def test_skips_are_reported_and_bounded_in_a_row():
    lines, section = [], SpikeSection(policy="skip", limit=2)
    for in_a_row in (1, 2, 1, 2):
        check_step(section, 17, metrics_of(in_a_row=in_a_row), lambda: "chat.jsonl:3", lines.append)
    assert len(lines) == 4 and lines[0].endswith("rows chat.jsonl:3: skipped")
    with pytest.raises(UserError, match=r"more than train.spike.limit = 2 steps in a row"):
        check_step(section, 17, metrics_of(in_a_row=3), lambda: "chat.jsonl:3", lines.append)
    check_step(section, 17, metrics_of(usual=True), lambda: pytest.fail("rows of a usual step"), lines.append)
    assert len(lines) == 4
