"""What several objectives are made of: sums over the segments of packed rows, and the loss of a margin."""

from collections.abc import Callable

import jax
from jax.nn import log_sigmoid


def reduce_segments(reduce: Callable, values: jax.Array, ids: jax.Array, size: int) -> jax.Array:
    """``jax.ops.segment_sum``, ``segment_max``, ... over each row, [B, size] from two arrays [B, N].

    Entry i of a row is that of the positions whose id is i; for ``segment_ids`` and ``group_ids`` 0 is the padding.
    What has no position gets the reduction of nothing: 0 of a sum, the lowest number of a maximum.
    """
    return jax.vmap(lambda values, ids: reduce(values, ids, num_segments=size))(values, ids)


def sum_segments(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Of every segment of packed rows the sum over its positions, [B, T + 1]; entry 0 is that of the padding."""
    return reduce_segments(jax.ops.segment_sum, values_BT, segment_ids_BT, segment_ids_BT.shape[1] + 1)


def logistic_loss(margin: jax.Array, share: float) -> jax.Array:
    """-log sigmoid of a margin, with a ``share`` of the labels taken to be wrong."""
    loss = -(1 - share) * log_sigmoid(margin)
    return loss - share * log_sigmoid(-margin) if share else loss
