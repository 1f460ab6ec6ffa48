"""The chunked back end against softmax written out, on ragged packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain.models.attention import attention, cached_attention, compute_document_starts


def make_row(lengths, total):
    """segment_ids and positions of documents of these lengths, padded to ``total``."""
    segment_ids, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
    offset = 0
    for i, length in enumerate(lengths):
        segment_ids[offset : offset + length] = i + 1
        positions[offset : offset + length] = np.arange(length)
        offset += length
    return segment_ids, positions


ROWS = [[5, 30, 1, 1, 20], [77], [3, 3, 3], [40, 37]]


def make_inputs(num_heads, num_kv, head_dim, total=77, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((len(ROWS), total, num_heads, head_dim)).astype(np.float32)
    k, v = (rng.standard_normal((len(ROWS), total, num_kv, head_dim)).astype(np.float32) for _ in range(2))
    segment_ids, positions = (np.stack(x) for x in zip(*(make_row(r, total) for r in ROWS), strict=True))
    return q, k, v, segment_ids, positions


def dense_attention(q, k, v, segment_ids, window=0, sinks=None, softcap=0.0, scale=None):
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    index = np.arange(q.shape[1])
    distance = index[:, None] - index
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance >= 0) & (distance < (window or 10**6))
    scores = jnp.where(seen[:, None], scores, -np.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))], -1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : len(index)]
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


MECHANISMS = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "soft cap": {"softcap": 1.5, "scale": 0.7},
    "sinks": {"sinks": True},
    "all": {"window": 19, "softcap": 2.0, "scale": 0.3, "sinks": True},
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 10), (3, 1, 16)])
@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_equals_dense_attention_forward_and_backward(heads, chunk, mechanism):
    q, k, v, segment_ids, positions = make_inputs(*heads)
    real = (segment_ids > 0)[:, :, None, None]
    target = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32) * real
    options = dict(MECHANISMS[mechanism])
    sinks = np.linspace(-1, 2, heads[0], dtype=np.float32) if options.pop("sinks", False) else None
    window = options.pop("window", None)

    def ours(q, k, v, sinks, window):
        where = {"segment_ids": segment_ids, "positions": positions, "window": window}
        out = attention(q, k, v, **where, sinks=sinks, chunk=chunk, **options)
        return (out * target).sum(), out

    def reference(q, k, v, sinks):
        out = dense_attention(q, k, v, segment_ids, window, sinks, **options)
        return (out * target).sum(), out

    which = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    # The window is traced, as it is under the scan over layers.
    (_, out), grads = jax.jit(jax.value_and_grad(ours, which, has_aux=True))(q, k, v, sinks, window)
    (_, expected), expected_grads = jax.value_and_grad(reference, which, has_aux=True)(q, k, v, sinks)
    np.testing.assert_allclose(out * real, expected * real, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=1e-5)


def test_a_window_of_zero_is_none():
    q, k, v, segment_ids, positions = make_inputs(2, 1, 4)
    run = lambda window: attention(q, k, v, segment_ids=segment_ids, positions=positions, window=window, chunk=16)
    np.testing.assert_array_equal(run(None), run(jnp.int32(0)))
    assert np.abs(run(None) - run(jnp.int32(3))).max() > 0.1


def test_one_document_cannot_touch_another_at_all():
    q, k, v, segment_ids, positions = make_inputs(4, 2, 8)
    first = segment_ids == 1
    rng = np.random.default_rng(2)
    changed = lambda x: np.where(first[:, :, None, None], rng.standard_normal(x.shape), x).astype(np.float32)
    q2, k2, v2 = changed(q), changed(k), changed(v)

    @jax.jit
    def run(q, k, v):
        fn = lambda q, k, v: attention(q, k, v, segment_ids=segment_ids, positions=positions, chunk=16)
        out, vjp = jax.vjp(fn, q, k, v)
        return out, *vjp(np.where(first[:, :, None, None], 0, 1).astype(np.float32) * jnp.ones_like(out))

    others = ~first
    for x, y in zip(run(q, k, v), run(q2, k2, v2), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[others], np.asarray(y)[others])
    np.testing.assert_array_equal(np.asarray(run(q, k, v)[2])[first], 0)


def test_padding_gives_finite_values_and_gradients():
    q, k, v, segment_ids, positions = make_inputs(2, 1, 4)
    fn = lambda q: attention(q, k, v, segment_ids=np.zeros_like(segment_ids), positions=positions, chunk=16).sum()
    value, grad = jax.jit(jax.value_and_grad(fn))(q)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_document_starts():
    starts = compute_document_starts(jnp.array([[1, 1, 2, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]))
    np.testing.assert_array_equal(starts, [[0, 0, 2, 2, 2, 5, 6, 6], [0, 0, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cached_attention_is_the_last_row_of_the_whole(mechanism):
    q, k, v, _, _ = make_inputs(6, 2, 8)
    options = dict(MECHANISMS[mechanism])
    if "sinks" in options:
        options["sinks"] = np.linspace(-1, 2, 6, dtype=np.float32)
    whole = dense_attention(q, k, v, np.ones(q.shape[:2], np.int32), **options)
    positions = np.array([[4, 5], [0, 1], [75, 76], [9, 10]])
    rows = np.arange(len(q))[:, None]
    heads_first = [jnp.asarray(x).transpose(0, 2, 1, 3) for x in (k, v)]
    out = cached_attention(q[rows, positions], *heads_first, positions, **options)
    np.testing.assert_allclose(out, whole[rows, positions], atol=2e-6)
