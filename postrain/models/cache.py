"""Keys and values of past positions, for generation.

Two layouts, for the two ways of running the layers (``compute_hidden_cached``): stacked, [L, B, K, M, H], one
array that a scan over the layers writes in place; or split, a tuple of L arrays [B, K, M, H]. Heads come
before slots because that is the order in which attention multiplies: no transposition at every step.

Legend: L layers, B rows, S new positions, M slots, K kv heads, H head_dim.
"""

import flax.struct
import jax
import jax.numpy as jnp

from postrain.models.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    k: jax.Array | tuple[jax.Array, ...]  # [L, B, K, M, H], or L times [B, K, M, H]
    v: jax.Array | tuple[jax.Array, ...]

    @property
    def num_rows(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-4]

    @property
    def num_slots(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-2]


def init_cache(config: ModelConfig, batch: int, length: int, dtype=None, *, split: bool = False) -> KVCache:
    """An empty cache of ``length`` slots a row. ``split``: for the layers of ``split_layers``."""
    shape = batch, config.num_kv_heads, length, config.head_dim
    dtype = dtype or jnp.dtype(config.compute_dtype)
    if split:
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in "kv")
        return KVCache(k=k, v=v)
    return KVCache(k=jnp.zeros((config.num_layers, *shape), dtype), v=jnp.zeros((config.num_layers, *shape), dtype))


def resize_cache(cache: KVCache, rows: jax.Array, length: int) -> KVCache:
    """The cache of ``rows`` (int32 [B'], each as often as it is named) with ``length`` slots a row, new ones empty."""

    def change(x):
        x = jax.lax.slice_in_dim(x, 0, min(length, x.shape[-2]), axis=x.ndim - 2)
        x = jnp.take(x, rows, axis=x.ndim - 4)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, length - x.shape[-2]), (0, 0)])

    return jax.tree.map(change, cache)


def insert_rows(cache: KVCache, small: KVCache, sources: jax.Array, targets: jax.Array, count: jax.Array) -> KVCache:
    """Row ``sources[i]`` of ``small`` in the place of the beginning of row ``targets[i]``, for the first ``count``."""

    def insert(i, cache):
        def put(x, new):
            new = jax.lax.slice_in_dim(new, 0, min(x.shape[-2], new.shape[-2]), axis=x.ndim - 2)
            row = jax.lax.dynamic_slice_in_dim(new, sources[i], 1, axis=x.ndim - 4)
            return jax.lax.dynamic_update_slice_in_dim(x, row, targets[i], axis=x.ndim - 4)

        return jax.tree.map(put, cache, small)

    return jax.lax.fori_loop(0, count, insert, cache)


def write_cache(cache: jax.Array, new_BSKH: jax.Array, positions_BS: jax.Array, layer=None) -> jax.Array:
    """Writes each new entry at its position; entries at position -1 are dropped.

    ``cache`` is [B, K, M, H], or [L, B, K, M, H] with the index of the layer to write.
    """
    slots_BS = jnp.where(positions_BS < 0, cache.shape[-2], positions_BS)
    rows_B1 = jnp.arange(cache.shape[-4])[:, None]
    index = (rows_B1, slice(None), slots_BS) if layer is None else (layer, rows_B1, slice(None), slots_BS)
    return cache.at[index].set(new_BSKH.astype(cache.dtype), mode="drop")
