"""Chunked token logprobs against log_softmax of the whole array, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain.objectives.logprobs import compute_token_logprobs, compute_weighted_nll

SHAPE, EMBED, VOCAB, PADDED = (3, 29), 24, 301, 320
# Times the error that the plain formula itself makes in float32. The gradient of the unembedding makes 4.5 times that
# error, everything else at most 3.3 times. Why more than the plain formula's: the probabilities of backward are
# exp(logit - logsumexp), with the rounding of a logsumexp near 11, where the plain formula divides exponentials by
# their sum. To divide here too, backward would need the largest logit and the sum of every position; it makes 3.6 of
# the 4.5, and is not worth that.
MOST_TIMES = 15


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((*SHAPE, EMBED)).astype(np.float32)
    unembed = (rng.standard_normal((PADDED, EMBED)) * 0.5).astype(np.float32)
    unembed[VOCAB:] = 7.0  # whatever stands in the padding must not matter
    targets = rng.integers(0, VOCAB, SHAPE).astype(np.int32)
    mask = (rng.random(SHAPE) < 0.6).astype(np.float32)  # with holes
    mask[1] = 0
    weights = mask * rng.random(SHAPE).astype(np.float32)
    return hidden, unembed, targets, mask, weights


def dense(hidden, unembed, targets, mask):
    logits = hidden @ unembed[:VOCAB].T
    logsumexp = jax.nn.logsumexp(logits, -1)
    log_p = logits - logsumexp[..., None]
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return tuple(jnp.where(mask != 0, x, 0.0) for x in (picked, entropy, logsumexp, log_p.mean(-1)))


@pytest.mark.parametrize("chunk", [8, 32, 1024])
def test_logprobs_entropy_logsumexp_and_mean_with_gradients(inputs, chunk):
    hidden, unembed, targets, mask, _ = inputs
    rng = np.random.default_rng(1)
    cotangents = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(4)]

    def ours(hidden, unembed):
        out = compute_token_logprobs(hidden, unembed, targets, mask, vocab_size=VOCAB, chunk=chunk)
        values = out.logprobs, out.entropy, out.logsumexp, out.uniform
        return sum((v * c).sum() for v, c in zip(values, cotangents, strict=True)), values

    def reference(hidden, unembed):
        values = dense(hidden, unembed, targets, mask)
        return sum((v * c).sum() for v, c in zip(values, cotangents, strict=True)), values

    def run(fn, *inputs):
        (_, values), grads = jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))(*inputs)
        return [np.asarray(x) for x in (*values, *grads)]  # numpy: jax would subtract in float32

    narrow, plain = run(ours, hidden, unembed), run(reference, hidden, unembed)
    with jax.enable_x64(True):
        wide = hidden.astype(np.float64), unembed.astype(np.float64)
        wide, exact = run(ours, *wide), run(reference, *wide)
    for x, theirs, y, true in zip(narrow, plain, wide, exact, strict=True):
        np.testing.assert_allclose(y, true, rtol=1e-12, atol=1e-13)
        assert x.dtype == np.float32 and y.dtype == true.dtype == np.float64
        np.testing.assert_allclose(x, true, rtol=0, atol=MOST_TIMES * np.abs(theirs - true).max())


@pytest.mark.parametrize("chunk", [8, 1024])
def test_weighted_nll_with_gradients(inputs, chunk):
    hidden, unembed, targets, _, weights = inputs

    def ours(hidden, unembed):
        loss, correct = compute_weighted_nll(hidden, unembed, targets, weights, vocab_size=VOCAB, chunk=chunk)
        return 3.0 * loss, correct

    reference = lambda hidden, unembed: -3.0 * (dense(hidden, unembed, targets, weights)[0] * weights).sum()
    plain_gradient = lambda *inputs: [np.asarray(x) for x in jax.jit(jax.grad(reference, (0, 1)))(*inputs)]
    (loss, correct), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, unembed)
    np.testing.assert_allclose(loss, reference(hidden, unembed), rtol=1e-6)
    with jax.enable_x64(True):
        exact = plain_gradient(hidden.astype(np.float64), unembed.astype(np.float64))
    for x, theirs, true in zip(grads, plain_gradient(hidden, unembed), exact, strict=True):
        assert theirs.dtype == np.float32 and true.dtype == np.float64
        np.testing.assert_allclose(x, true, rtol=0, atol=MOST_TIMES * np.abs(theirs - true).max())
    hits = (hidden @ unembed[:VOCAB].T).argmax(-1) == targets
    np.testing.assert_allclose(correct, (hits * weights).sum(), rtol=1e-6)


def test_both_primitives_agree(inputs):
    hidden, unembed, targets, _, weights = inputs
    targets[0, ::3] = (hidden @ unembed[:VOCAB].T).argmax(-1)[0, ::3]
    loss, correct = compute_weighted_nll(hidden, unembed, targets, weights, vocab_size=VOCAB, chunk=16)
    found = compute_token_logprobs(hidden, unembed, targets, weights, vocab_size=VOCAB, chunk=16)
    np.testing.assert_allclose(loss, -(found.logprobs * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(correct, (found.correct * weights).sum(), rtol=1e-6)
    assert correct > 0


def test_nothing_trained_is_zero_not_nan(inputs):
    hidden, unembed, targets, mask, _ = inputs
    fn = lambda h: compute_weighted_nll(h, unembed, targets, 0 * mask, vocab_size=VOCAB, chunk=16)[0]
    loss, grad = jax.value_and_grad(fn)(hidden)
    assert loss == 0 and not np.asarray(grad).any()


def test_a_frozen_unembedding_costs_no_gradient(inputs):
    """With adapters the unembedding does not train: its [V', D] gradient must not be computed."""
    hidden, unembed, targets, _, weights = inputs

    def flops(argnums):
        fn = lambda h, u: compute_weighted_nll(h, u, targets, weights, vocab_size=VOCAB, chunk=128)[0]
        text = jax.jit(jax.grad(fn, argnums)).lower(hidden, unembed).as_text()
        return text.count("dot_general")

    assert (flops((0,)), flops((0, 1))) == (2, 3)


@pytest.mark.parametrize("loss", ["weighted_nll", "token_logprobs"])
def test_temporaries_at_a_large_vocabulary_are_a_tenth_of_the_naive_loss(loss):
    tokens, vocab, embed = 4096, 151_936, 512
    abstract = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    args = abstract(tokens, embed), abstract(vocab, embed), abstract(tokens, dtype=jnp.int32), abstract(tokens)

    def chunked(h, u, t, m):
        if loss == "weighted_nll":
            return compute_weighted_nll(h, u, t, m, vocab_size=vocab, chunk=256)[0]
        return (compute_token_logprobs(h, u, t, m, vocab_size=vocab, chunk=256).logprobs * m).sum()

    def naive(h, u, t, m):
        log_p = jax.nn.log_softmax(h @ u.T)
        return (jnp.take_along_axis(log_p, t[:, None], 1)[:, 0] * m).sum()

    temporaries = lambda fn: jax.jit(jax.grad(fn, (0, 1))).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries(chunked) <= temporaries(naive) / 10
