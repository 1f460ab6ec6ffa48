"""Ragged packed rows, the mechanisms of attention, and softmax written out: what every back end is held to."""

import jax
import jax.numpy as jnp
import numpy as np


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


LONG_ROWS = [[5, 130, 1, 1, 60, 90], [299], [3, 3, 3]]  # of 299


def make_inputs(num_heads, num_kv, head_dim, rows=ROWS, total=77, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((len(rows), total, num_heads, head_dim)).astype(np.float32)
    k, v = (rng.standard_normal((len(rows), total, num_kv, head_dim)).astype(np.float32) for _ in range(2))
    segment_ids, positions = (np.stack(x) for x in zip(*(make_row(r, total) for r in rows), strict=True))
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
