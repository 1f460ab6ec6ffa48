"""Reward-weighted fine-tuning on arrays: what the loss is divided by, and what weights do to what is learned."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.config import WeightsSection
from postrain.data.reward_weights import FIELD, compute_weights, group_means
from postrain.models.params import init_params
from postrain.objectives.sft import divide_by_tokens, make_sft_loss, measure_weights
from postrain.training.model import Forward
from postrain.types import Batch

FORWARD = Forward(dataclasses.replace(ODD_CONFIG, init_std=0.3), chunk=16)
LENGTH = 12


@pytest.fixture(scope="module")
def params():
    return init_params(FORWARD.model_config, jax.random.key(0))


def make_batch(rows, weights, field=None):
    """Documents of the same seeds have the same tokens; one a row, the last half of each trained."""
    tokens = np.stack([np.random.default_rng(seed).integers(0, 301, LENGTH + 1) for seed in rows]).astype(np.int32)
    trained = np.tile(np.arange(LENGTH) >= LENGTH // 2, (len(rows), 1)).astype(np.float32)
    ones = np.ones_like(trained, np.int32)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
    mask = trained * np.float32(weights)[:, None]
    fields = {} if field is None else {FIELD: jnp.asarray(trained * np.float32(field)[:, None])}
    arrays = (tokens[:, :-1], tokens[:, 1:], mask, ones, places)
    return Batch(*map(jnp.asarray, arrays), fields=fields)


def value_and_grad(loss_fn, params, batch):
    def mean(params):
        term = loss_fn(params, batch, jax.random.key(0)).losses["sft"]
        return term.total / term.weight

    return jax.jit(jax.value_and_grad(mean))(params)


def assert_close(one, other, rtol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


def test_a_row_of_weight_2_is_the_row_twice(params):
    loss_fn = make_sft_loss(FORWARD.nll)
    weighted = value_and_grad(loss_fn, params, make_batch([1, 2, 3, 4], [2.0, 1.0, 1.0, 0.0]))
    twice = value_and_grad(loss_fn, params, make_batch([1, 1, 2, 3], [1.0] * 4))
    assert_close(weighted, twice, 1e-6)


def test_ips_divides_by_the_number_of_tokens_and_the_others_by_the_sum_of_weights(params):
    nll = make_sft_loss(FORWARD.nll)
    run = jax.jit(lambda batch: nll(params, batch, jax.random.key(0)).losses["sft"])
    mean = lambda term: float(term.total) / float(term.weight)
    each = [mean(run(make_batch([row] * 3, [1.0] * 3))) for row in (1, 2, 3)]
    weights = [4.0, 0.0, 0.5]
    normalised = run(make_batch([1, 2, 3], weights))
    batch = make_batch([1, 2, 3], [1.0] * 3, weights)
    by_tokens = divide_by_tokens(nll, FIELD)(params, batch, jax.random.key(0)).losses["sft"]
    expected = sum(w * loss for w, loss in zip(weights, each, strict=True))
    assert mean(normalised) == pytest.approx(expected / 4.5, rel=1e-6)
    assert mean(by_tokens) == pytest.approx(expected / 3, rel=1e-6)
    assert by_tokens.weight == 3 * LENGTH / 2, "rows of weight 0 count"


def test_the_effective_share_of_an_update_is_that_of_its_tokens():
    weights = np.array([4.0, 1.0, 0.5, 0.5])
    share = weights.sum() ** 2 / np.square(weights).sum() / 4
    for batch, field in ((make_batch(range(4), weights), ""), (make_batch(range(4), [1.0] * 4, weights), FIELD)):
        found = measure_weights(batch, field)
        assert float(found["train/weights/effective_share"]) == pytest.approx(share, rel=1e-6)
        assert float(found["train/weights/mean"]) == pytest.approx(1.5)
    assert float(measure_weights(make_batch([1], [3.0]))["train/weights/effective_share"]) == 1
    assert float(measure_weights(make_batch([1], [0.0]))["train/weights/effective_share"]) == 0


def test_without_a_baseline_a_context_of_high_reward_decides_for_all_and_with_one_it_does_not():
    """Two members, ten rows each, one question: one answers 'a' nine times of ten, the other once.

    Each member's rewards are all the same, so no answer is better than another, and a model that cannot tell the
    members apart should answer 'a' half of the time. exp(reward / temperature) alone lets the member of the higher
    rewards decide.
    """
    answers = np.array([1] * 9 + [0] + [1] + [0] * 9)
    members, rewards = ["ann"] * 10 + ["bob"] * 10, np.repeat([3.1, 0.7], 10)
    options = WeightsSection(mode="exp", temperature=0.8)

    def learn(weights):
        """The share of 'a' after training one logit, which both members share, to the end."""
        batch = Batch(
            None,
            jnp.asarray(answers[:, None]),
            jnp.asarray(weights[:, None], jnp.float32),
            *(jnp.ones((20, 1), jnp.int32),) * 2,
        )

        def nll(logit, batch):
            logp = jax.nn.log_sigmoid(jnp.where(batch.targets == 1, logit, -logit))
            return -(logp * batch.loss_mask).sum(), jnp.zeros(()), None

        loss_fn = make_sft_loss(nll)

        def loss(logit):
            term = loss_fn(logit, batch, jax.random.key(0)).losses["sft"]
            return term.total / term.weight

        update = lambda _, logit: logit - 4 * jax.grad(loss)(logit)
        return float(jax.nn.sigmoid(jax.lax.fori_loop(0, 500, update, jnp.float32(2.0))))

    alone, _ = compute_weights(rewards, options)
    ratio = math.exp((3.1 - 0.7) / 0.8)
    assert learn(alone) == pytest.approx((0.9 * ratio + 0.1) / (ratio + 1), abs=1e-5), "0.86, and not 0.5"
    baselines = group_means(rewards, members)
    advantage, _ = compute_weights(
        rewards, WeightsSection(mode="advantage", temperature=0.8, baseline="member"), baselines=baselines
    )
    assert learn(advantage) == pytest.approx(0.5, abs=1e-5)
