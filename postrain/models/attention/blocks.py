"""What the attention back ends share: the mask of a packed row in blocks of queries and of keys.

Legend: B rows, T queries, S keys, N query heads, K key heads, H head_dim, Q and C queries and keys of a block.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # not -inf: a block that is masked whole for a query must give exp(MASKED - max) = 0, not NaN


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap); ``x`` itself where ``cap`` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad_to_blocks(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, block_q: int, block_k: int):
    """The same with T and S multiples of the blocks. Added queries see one key, so that their softmax is of something.

    That key is the one of their own place: starts still never fall, and no block becomes visible to a real query.
    """
    (batch, length), num_keys = starts_BT.shape, k_BSKH.shape[1]
    more_queries = -length % block_q
    more_keys = round_up(num_keys + more_queries, block_k) - num_keys
    pad = lambda x, count: jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x
    if more_queries:
        own = first + length + jnp.arange(more_queries, dtype=jnp.int32)
        starts_BT = jnp.concatenate([starts_BT, jnp.broadcast_to(own, (batch, more_queries))], axis=1)
    return pad(q_BTNH, more_queries), pad(k_BSKH, more_keys), pad(v_BSKH, more_keys), starts_BT


def blocks_of_keys(starts_BT, first, block_q: int, block_k: int):
    """First and last block of keys that some query of each block sees, int32 [B, T / Q] both."""
    lows = starts_BT.reshape(starts_BT.shape[0], -1, block_q).min(-1) // block_k
    highs = (first + (jnp.arange(lows.shape[1], dtype=jnp.int32) + 1) * block_q - 1) // block_k
    return lows, jnp.broadcast_to(highs, lows.shape)


def blocks_of_queries(starts_BT, first, block_q: int, block_k: int, num_blocks_k: int):
    """First and last block of queries of which some see each block of keys, int32 [B, S / C]; last < first: none.

    They are neighbours, as neither starts nor the diagonal ever fall from one query to the next.
    """
    lows, highs = blocks_of_keys(starts_BT, first, block_q, block_k)
    blocks = jnp.arange(num_blocks_k, dtype=jnp.int32)
    search = lambda rows, side: jax.vmap(functools.partial(jnp.searchsorted, side=side), (0, None))(rows, blocks)
    return search(highs, "left").astype(jnp.int32), search(lows, "right").astype(jnp.int32) - 1


def sink_gradient(sinks_KG, logsumexp_BKGT, dots_BKGT):
    """d sinks: a sink's weight is exp(sink - logsumexp), its value 0, so weight * (0 - dots). None without sinks."""
    if sinks_KG is None:
        return None
    return -(jnp.exp(sinks_KG[None, :, :, None] - logsumexp_BKGT) * dots_BKGT).sum((0, 3))
