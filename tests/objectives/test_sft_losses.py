"""Variants of the loss of supervised fine-tuning are their formulas in torch, values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from odd_config import ODD_CONFIG

from postrain.config import SftSection
from postrain.models import transformer
from postrain.models.params import init_params
from postrain.objectives.logprobs import compute_token_logprobs
from postrain.objectives.sft import compute_token_loss, make_sft_loss, make_token_loss
from postrain.training.model import Forward
from postrain.types import Batch

SHAPE, EMBED, VOCAB, PADDED = (3, 29), 24, 301, 320
CONFIG = dataclasses.replace(ODD_CONFIG, init_std=0.3)
FORWARD = Forward(CONFIG, chunk=16)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((*SHAPE, EMBED)).astype(np.float32)
    table = (rng.standard_normal((PADDED, EMBED)) * 0.7).astype(np.float32)
    targets = rng.integers(0, VOCAB, SHAPE).astype(np.int32)
    targets[:, ::2] = (hidden @ table[:VOCAB].T).argmax(-1)[:, ::2]  # of all probabilities, up to almost 1
    weights = ((rng.random(SHAPE) < 0.6) * rng.choice([1.0, 0.5], SHAPE)).astype(np.float32)
    return hidden, table, targets, weights


def label_smoothing(logits, targets):
    """torch's own, with what it calls the mean over classes."""
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")


def z_loss(logits, targets):
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return nll + 0.01 * logits.logsumexp(-1) ** 2


def focal(logits, targets):
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    return -((1 - p) ** 1.5) * p.log()


def dft(logits, targets):
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    return -p.detach() * p.log()


def clipped(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").clamp(max=4.0)


def all_at_once(logits, targets):
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = (1 - p) ** 0.5 * p.detach() * label_smoothing(logits, targets)
    return torch.where(-p.log() > 6, 6.0, loss) + 0.01 * logits.logsumexp(-1) ** 2


VARIANTS = {
    label_smoothing: {"label_smoothing": 0.2},
    z_loss: {"z_loss_coef": 0.01},
    focal: {"focal_gamma": 1.5},
    dft: {"probability_weights": True},
    clipped: {"nll_clip": 4.0},
    all_at_once: {
        "focal_gamma": 0.5,
        "probability_weights": True,
        "label_smoothing": 0.2,
        "nll_clip": 6.0,
        "z_loss_coef": 0.01,
    },
}


@pytest.mark.parametrize("reference", VARIANTS, ids=lambda function: function.__name__)
def test_a_variant_is_its_formula_in_torch(arrays, reference):
    hidden, table, targets, weights = arrays
    options = SftSection(**VARIANTS[reference])

    def ours(hidden, table):
        found = compute_token_logprobs(hidden, table, targets, weights, vocab_size=VOCAB, chunk=16)
        return (compute_token_loss(found, options) * weights).sum()

    loss, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, table)
    inputs = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (hidden, table)]
    logits = (inputs[0] @ inputs[1][:VOCAB].T).reshape(-1, VOCAB)
    losses = reference(logits, torch.tensor(targets).long().ravel())
    expected = (losses * torch.tensor(weights, dtype=torch.float64).ravel()).sum()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    for found, of in zip(grads, inputs, strict=True):
        np.testing.assert_allclose(found, of.grad, rtol=0, atol=1e-5 * of.grad.abs().max().item())


def test_a_certain_token_has_a_finite_gradient_under_every_option():
    hidden, table = jnp.full((1, 1, EMBED), 9.0), jnp.zeros((PADDED, EMBED)).at[5].set(9.0)
    options = SftSection(label_smoothing=0.1, z_loss_coef=1e-4, focal_gamma=0.5, probability_weights=True, nll_clip=1.0)

    def loss(hidden, target):
        found = compute_token_logprobs(hidden, table, target, jnp.ones((1, 1)), vocab_size=VOCAB, chunk=16)
        return compute_token_loss(found, options).sum()

    for target in (5, 6):
        value, grad = jax.value_and_grad(loss)(hidden, jnp.full((1, 1), target))
        assert np.isfinite(value) and np.isfinite(grad).all()


def make_batch() -> Batch:
    rng = np.random.default_rng(1)
    shape = 2, 24
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], 8, axis=1).astype(np.int32)
    positions = np.concatenate([np.r_[0:8, 0:8, 0:8][None], np.r_[0:16, 0:8][None]]).astype(np.int32)
    tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, *shape)).astype(np.int32)
    mask = ((rng.random(shape) < 0.7) & (segments > 0)).astype(np.float32)
    return Batch(tokens, targets, mask, segments, positions)


def test_without_options_it_is_the_likelihood():
    params, batch = init_params(CONFIG, jax.random.key(0)), make_batch()
    logprobs = lambda params, batch, rng: FORWARD.logprobs(params, batch)
    plain = make_sft_loss(FORWARD.nll)(params, batch, jax.random.key(0))
    found = make_token_loss(logprobs, SftSection())(params, batch, jax.random.key(0))
    np.testing.assert_allclose(found.losses["sft"], plain.losses["sft"], rtol=1e-6)
    np.testing.assert_allclose(found.metrics["accuracy"], plain.metrics["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(found.metrics["nll"], plain.losses["sft"], rtol=1e-6)


def test_noise_is_as_large_as_the_document_says_and_none_of_it_at_padding(monkeypatch):
    seen, alpha, batch = [], 5.0, make_batch()
    params = init_params(CONFIG, jax.random.key(0))
    run = lambda self, params, batch, embedded: seen.append(embedded) or compute(self, params, batch, embedded)
    compute = Forward._compute_hidden
    monkeypatch.setattr(Forward, "_compute_hidden", run)
    found, _ = FORWARD.noisy_logprobs(params, batch, jax.random.key(1), alpha)
    noise = np.abs(seen[0] - transformer.embed(params, CONFIG, batch.tokens)) * np.sqrt(CONFIG.embed_size) / alpha
    for row, segment, length in ((0, 1, 8), (0, 2, 8), (1, 1, 16), (1, 2, 8)):
        own = noise[row][batch.segment_ids[row] == segment] * np.sqrt(length)
        assert 0.95 < own.max() <= 1 + 1e-4 and own.mean() == pytest.approx(0.5, abs=0.06)
    assert not noise[batch.segment_ids == 0].any()
    again, _ = FORWARD.noisy_logprobs(params, batch, jax.random.key(2), alpha)
    none, _ = FORWARD.noisy_logprobs(params, batch, jax.random.key(2), 0.0)
    assert not np.array_equal(found.logprobs, again.logprobs)
    monkeypatch.undo()
    np.testing.assert_allclose(none.logprobs, FORWARD.logprobs(params, batch)[0].logprobs, rtol=1e-6)
