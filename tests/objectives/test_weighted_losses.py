"""Reward-weighted fine-tuning on arrays: what the loss is divided by, and what weights do to what is learned."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.config import SftSection, WeightsSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Rendered, layout_of
from postrain.data.reward_weights import FIELD, REWARDS, compute_weights, group_means
from postrain.models.heads import HeadConfig, init_heads
from postrain.models.params import init_params
from postrain.objectives.logprobs import TokenLogprobs
from postrain.objectives.sft import (
    divide_by_tokens,
    make_advantage_loss,
    make_sft_loss,
    make_token_loss,
    measure_weights,
)
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


# --- advantages over a head ---

HEAD = HeadConfig("value", position="every", bias=True)
OPTIONS = SftSection(
    label_smoothing=0.1,
    weights=WeightsSection(mode="advantage", baseline="head", temperature=0.7, clip=2.5),
)
COMPUTE = functools.partial(FORWARD.logprobs_and_outputs, head=HEAD)


@pytest.fixture(scope="module")
def params_with_head(params):
    return params | init_heads([HEAD], FORWARD.model_config, jax.random.key(1))


def make_documents():
    """Of several lengths, with two answers or one, from the first predicted token on or later; weights of their own."""
    rng, documents = np.random.default_rng(3), []
    trained_of = ([4, 5, 6], [1, 2, 6, 7], [9], [2], [3, 4, 8, 9, 10])
    for i, trained in enumerate(trained_of):
        length = max(trained) + 1 + i % 2
        mask = np.isin(np.arange(length), trained)
        reward = Field(REWARDS, np.full(length, [1.5, -0.5, 0.0, 30.0, 0.4][i], np.float32), of="sequence")
        tokens = rng.integers(0, 301, length).astype(np.int32)
        documents.append(Rendered(tokens, mask, RowRef("t", "t", i), fields=(reward,), weight=[1.0, 2.0][i == 1]))
    return documents


def lay_out(rows, length):
    return Batch.from_arrays(jax.tree.map(jnp.asarray, assemble_batch(rows, length, layout_of(rows[0][0]))))


def test_advantages_over_a_head_are_those_of_plain_numpy_packed_or_not(params_with_head):
    """The head is read at the token before the first trained one, in every document; the weights and both losses."""
    documents, section = make_documents(), OPTIONS.weights
    loss_fn = jax.jit(make_advantage_loss(COMPUTE, OPTIONS, REWARDS))
    alone = lay_out([[document] for document in documents], 12)
    packed = lay_out([documents[:2] + documents[3:4], documents[2:3] + documents[4:], []], 24)
    found, outputs, _ = COMPUTE(params_with_head, alone, jax.random.key(0))
    totals, weights, error, clipped = 0.0, 0.0, 0.0, 0
    for i, document in enumerate(documents):
        first = int(document.loss_mask.argmax()) - 1  # the slot that has read the token before it
        advantage = float(document.fields[0].values[0]) - float(outputs[i, first, 0])
        weight = min(math.exp(advantage / section.temperature), section.clip) * document.weight
        clipped += math.exp(advantage / section.temperature) > section.clip
        slots = np.flatnonzero(document.loss_mask[1:])
        nll = -np.asarray(found.logprobs[i], np.float64)[slots]
        spread = -np.asarray(found.uniform[i], np.float64)[slots]
        totals, weights = totals + weight * (0.9 * nll + 0.1 * spread).sum(), weights + weight * len(slots)
        error += document.weight * advantage**2
    for batch in (alone, packed):
        sums = loss_fn(params_with_head, batch, jax.random.key(0))
        assert list(sums.losses) == ["sft", "value"]
        assert float(sums.losses["sft"].total) == pytest.approx(totals, rel=1e-5)
        assert float(sums.losses["sft"].weight) == pytest.approx(weights, rel=1e-5)
        assert float(sums.losses["value"].total) == pytest.approx(error, rel=1e-5)
        assert float(sums.losses["value"].weight) == 6, "five documents, one of them of weight 2"
        assert float(sums.metrics["weights/limited"].total) == clipped == 2
        assert float(sums.metrics["weights/mean"].total) == pytest.approx(weights, rel=1e-5)
        assert float(sums.metrics["weights/mean"].weight) == sum(d.num_trained for d in documents)


def test_the_policy_has_no_gradient_through_the_head_and_the_head_one_of_its_own(params_with_head):
    batch = lay_out([[document] for document in make_documents()], 12)
    loss_fn, rng = make_advantage_loss(COMPUTE, OPTIONS, REWARDS), jax.random.key(0)
    gradient = jax.jit(
        lambda params, name: jax.grad(lambda p: loss_fn(p, batch, rng).losses[name].total)(params), static_argnums=1
    )
    of_policy, of_head = (gradient(params_with_head, name) for name in ("sft", "value"))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_policy["heads"]))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_head["heads"]))
    assert np.asarray(of_head["layers"]["attention"]["q"]["kernel"]).any(), "the trunk learns to expect rewards, too"
    # The gradient of the policy is that of weights that are constants.
    _, outputs, _ = COMPUTE(params_with_head, batch, rng)
    first = [int(document.loss_mask.argmax()) - 1 for document in make_documents()]
    values = np.asarray(outputs)[np.arange(5), first, 0]
    rewards = np.array([document.fields[0].values[0] for document in make_documents()])
    weights = np.minimum(np.exp((rewards - values) / 0.7), 2.5).astype(np.float32)
    constant = dataclasses.replace(batch, loss_mask=batch.loss_mask * weights[:, None])
    plain = make_token_loss(lambda params, batch, rng: FORWARD.logprobs(params, batch), OPTIONS)
    expected = jax.jit(jax.grad(lambda p: plain(p, constant, rng).losses["sft"].total))(params_with_head)
    assert_close(of_policy, expected, 1e-5)


def test_rewards_far_from_what_the_head_expects_stay_finite(params_with_head):
    options = dataclasses.replace(OPTIONS, weights=dataclasses.replace(OPTIONS.weights, clip=0.0, temperature=1e-6))
    raise_rewards = lambda reward: (reward._replace(values=reward.values * 1e4),)
    rows = [[dataclasses.replace(one, fields=raise_rewards(one.fields[0]))] for one in make_documents()]
    sums = make_advantage_loss(COMPUTE, options, REWARDS)(params_with_head, lay_out(rows, 12), jax.random.key(0))
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(sums))
    assert float(sums.losses["sft"].weight) >= math.exp(29.9)


@pytest.mark.parametrize("tells_contexts_apart", [True, False])
def test_a_head_that_can_tell_contexts_apart_is_a_baseline_of_each_and_another_is_none(tells_contexts_apart):
    """The two members above; policy and head train together, by the sum of both losses."""
    answers = jnp.asarray(np.array([1] * 9 + [0] + [1] + [0] * 9)[:, None])
    rewards = jnp.asarray(np.repeat([1.2, -1.2], 10)[:, None], jnp.float32)  # less their mean
    contexts = jnp.asarray(np.repeat(np.eye(2), 10, axis=0)[:, None], jnp.float32)
    contexts = contexts if tells_contexts_apart else jnp.ones_like(contexts)
    ones = jnp.ones((20, 1), jnp.int32)
    batch = Batch(None, answers, jnp.ones((20, 1)), ones, ones, fields={REWARDS: rewards})

    def compute(params, batch, rng):
        logp = jax.nn.log_sigmoid(jnp.where(batch.targets == 1, params["logit"], -params["logit"]))
        zeros = jnp.zeros_like(logp)
        return TokenLogprobs(logp, zeros, zeros, zeros, zeros), contexts @ params["head"], None

    options = SftSection(weights=WeightsSection(mode="advantage", baseline="head", temperature=0.8))
    loss_fn = make_advantage_loss(compute, options, REWARDS)

    def loss(params):
        sums = loss_fn(params, batch, jax.random.key(0))
        return sum(term.total / term.weight for term in sums.losses.values())

    step = lambda _, params: jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))
    start = {"logit": jnp.float32(2.0), "head": jnp.zeros((2, 1))}
    learned = jax.jit(lambda params: jax.lax.fori_loop(0, 2000, step, params))(start)
    ratio = math.exp(2.4 / 0.8)
    expected = 0.5 if tells_contexts_apart else (0.9 * ratio + 0.1) / (ratio + 1)
    assert float(jax.nn.sigmoid(learned["logit"])) == pytest.approx(expected, abs=1e-4)
