"""Losses and gradients of groups do not depend on whether their prompts are computed once or for each answer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import make_tiny_model

from postrain.config import PreferenceSection, RewardSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Group, Rendered, layout_of, share_prompts
from postrain.hf.load import load_pretrained
from postrain.models.flops import count_batch
from postrain.models.heads import HeadConfig, init_heads
from postrain.objectives.preference import make_preference_loss
from postrain.objectives.reward import make_reward_loss
from postrain.recipes.reward import read_last
from postrain.training.model import Forward
from postrain.types import Batch

FAMILIES = {
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 3.0, "tie_word_embeddings": True},
    "gemma3": {"num_hidden_layers": 7, "sliding_window": 6, "tie_word_embeddings": True},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
}
LENGTH = 96
HEAD = HeadConfig("score", position="every")


def make_groups(most_answers: int, least: float = 0.0) -> list[Group]:
    """Groups of 2 answers or more, ragged, with prompts from one token on and holes in the masks of answers."""
    rng, groups = np.random.default_rng(3), []
    for i in range(9):
        prompt = rng.integers(4, 301, (1, 2, 17, 5, 30, 9, 3, 24, 12)[i])
        sequences = []
        for j in range(rng.integers(2, most_answers + 1)):
            answer = rng.integers(4, 301, rng.integers(1, 12))
            mask = np.concatenate([np.zeros(len(prompt), bool), rng.random(len(answer)) < 0.8])
            mask[-1] = True
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            scores = Field("scores", np.full(len(tokens), least + j % 3 + 0.1 * j, np.float32), "sequence")
            sequences.append(Rendered(tokens, mask, RowRef("test", "test", i), fields=(scores,)))
        groups.append(Group(tuple(sequences)))
    return groups


def make_batch(groups, packed=True, length=LENGTH) -> Batch:
    bins = pack(np.array([group.slots for group in groups]), length, method="best_fit" if packed else "none")
    return Batch.from_arrays(assemble_batch([[groups[i] for i in row] for row in bins], length, layout_of(groups[0])))


def make_both(most_answers, packed=True, length=LENGTH, each=None, least=0.0) -> tuple[Batch, Batch]:
    """The groups with their prompts shared, and without; ``each``: of a ``Preparation``, which they go through."""
    groups = [each(group) if each else group for group in make_groups(most_answers, least)]
    shared = make_batch([share_prompts().each(group) for group in groups], packed, length)
    return shared, make_batch(groups, packed, 2 * length)


def load(folder, family, **options):
    config, params = load_pretrained(make_tiny_model(folder, family, **FAMILIES[family]))
    return dataclasses.replace(config, attention_chunk=8, **options), params


def in_order(batch: Batch, values_BT) -> np.ndarray:
    """The values of trained slots in the order of their targets and tokens, which does not depend on the row."""
    trained = np.asarray(batch.loss_mask) > 0
    keys = (np.asarray(x)[trained] for x in (batch.positions, batch.targets, batch.tokens))
    return np.asarray(values_BT)[trained][np.lexsort(tuple(keys))]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_p_and_gradients_are_those_of_unshared_prompts(tmp_path, family):
    """In float64, where only rounding may differ."""
    config, params = load(tmp_path, family)
    with jax.enable_x64(True):
        config = dataclasses.replace(config, compute_dtype="float64")
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        forward = Forward(config, chunk=16)

        def weigh(params, batch):
            found = forward.logprobs(params, batch)[0].logprobs
            return (found * batch.loss_mask * (1 + 0.01 * batch.targets)).sum(), found

        compute = jax.jit(jax.value_and_grad(weigh, has_aux=True))

        both = make_both(5)
        (result, grads), (expected, expected_grads) = (compute(params, batch) for batch in both)
    assert both[0].tokens.shape[0] < both[1].tokens.shape[0] * 2, "shared prompts take less room"
    found, wanted = (in_order(batch, values) for batch, (_, values) in zip(both, (result, expected), strict=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert float(result[0]) == pytest.approx(float(expected[0]), rel=1e-9)
    for (path, grad), leaf in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        error = np.abs(np.asarray(grad) - np.asarray(leaf)).max()
        assert error <= 1e-9 * np.abs(np.asarray(leaf)).max(), (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(("loss", "packed"), [("sigmoid", True), ("sigmoid", False), ("softmax", True)])
def test_losses_metrics_and_gradients_of_preferences(tmp_path, loss, packed):
    config, params = load(tmp_path, "qwen3")
    forward, options = Forward(config, chunk=16), PreferenceSection(loss=loss, beta=0.3, nll_coef=0.5)
    other = jax.tree.map(lambda x: x * 1.05, params)
    loss_fn = make_preference_loss(
        forward.logprobs, lambda params, batch: forward.logprobs(other, batch)[0].logprobs, options
    )
    check_losses(loss_fn, params, make_both(2 if loss == "sigmoid" else 5, packed), "preference")


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_losses_metrics_and_gradients_of_rewards(tmp_path, loss):
    """Of answers that are read to their ends, which a head scores; the scores of the data are also below 0."""
    config, params = load(tmp_path, "gemma2")
    params |= init_heads([HEAD], config, jax.random.key(0))
    outputs = functools.partial(Forward(config, chunk=16).outputs, head=HEAD)
    options = RewardSection(loss=loss, centering_coef=0.2)
    if loss == "bradley_terry":
        options = dataclasses.replace(options, margin=0.5, margin_of="scores")
    check_losses(
        make_reward_loss(outputs, options, held_out=True),
        params,
        make_both(2 if loss == "bradley_terry" else 5, each=read_last, least=-1.5),
        "reward",
    )


def check_losses(loss_fn, params, both, name):
    """The same sums and gradients of batches with shared prompts and without."""

    @jax.jit
    def compute(params, batch):
        def mean(params):
            sums = loss_fn(params, batch, None)
            return sum(term.total / term.weight for term in sums.losses.values()), sums

        return jax.value_and_grad(mean, has_aux=True)(params)

    ((found, sums), grads), ((expected, expected_sums), expected_grads) = (compute(params, batch) for batch in both)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert sums.losses[name].weight == expected_sums.losses[name].weight == 9
    for name, term in expected_sums.metrics.items():
        assert float(sums.metrics[name].total) == pytest.approx(float(term.total), rel=1e-5, abs=1e-5), name
    for (path, grad), leaf in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(grad, leaf, rtol=0, atol=2e-6 * scale, err_msg=jax.tree_util.keystr(path))


def test_operations_are_counted_where_they_are_computed(tmp_path):
    """Prompts once, and of each token of an answer as many keys as without sharing."""
    config, _ = load(tmp_path, "gemma2")
    groups = make_groups(4)
    shared = [share_prompts().each(group) for group in groups]
    arrays = [assemble_batch([[group] for group in of], 2 * LENGTH, layout_of(of[0])) for of in (shared, groups)]
    found, expected = (count_batch(array, config) for array in arrays)
    assert found.trained_tokens == expected.trained_tokens
    assert expected.tokens - found.tokens == sum(group.saved_slots for group in shared)
    assert [window > 0 for window in config.layer_windows].count(True) == 2 and len(config.layer_windows) == 3
    saved = sum(
        (len(group.sequences) - 1)
        * (2 * np.minimum(np.arange(group.shared_slots) + 1, 6).sum() + np.arange(group.shared_slots + 1).sum())
        / 3
        for group in shared
    )
    assert expected.attention_pairs - found.attention_pairs == pytest.approx(saved)
