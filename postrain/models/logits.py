"""Logits of token ids in one call: for notebooks and tests. Training never makes this array."""

import functools

import jax
import jax.numpy as jnp

from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden, compute_logits
from postrain.sharding import find_mesh, mesh_context


def logits(params, config: ModelConfig, tokens, segment_ids=None, positions=None) -> jax.Array:
    """What follows each token.

    Args:
        params: the whole tree of parameters.
        config: of the model.
        tokens: int [T] or [B, T].
        segment_ids: like ``tokens``, documents of a row as 1, 2, ... and padding as 0; None: one document a row.
        positions: like ``tokens``; None: counted from 0 in each document.

    Returns:
        [T, V] or [B, T, V] in ``config.compute_dtype``'s accumulation type, V = ``config.vocab_size``.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = jnp.atleast_2d(tokens)
    segments = jnp.ones_like(rows) if segment_ids is None else jnp.atleast_2d(jnp.asarray(segment_ids, jnp.int32))
    places = count_positions(segments) if positions is None else jnp.atleast_2d(jnp.asarray(positions, jnp.int32))
    found = _logits(params, rows, segments, places, config=config, mesh=find_mesh(params))
    return found.reshape(*tokens.shape, config.vocab_size)


def count_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Positions that restart at 0 wherever the segment changes: int32 [B, T]."""
    index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    changed = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(changed, index, 0), axis=1)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _logits(params, tokens_BT, segment_ids_BT, positions_BT, *, config, mesh):
    with mesh_context(mesh):
        hidden = compute_hidden(params, config, tokens_BT, segment_ids_BT, positions_BT)
        return compute_logits(params, config, hidden)[..., : config.vocab_size]
