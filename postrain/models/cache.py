"""Keys and values of past positions, for generation. Legend: L layers, B rows, M slots, K kv heads, H head_dim."""

import flax.struct
import jax
import jax.numpy as jnp

from postrain.models.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    k: jax.Array  # [L, B, M, K, H]
    v: jax.Array  # [L, B, M, K, H]


def init_cache(config: ModelConfig, batch: int, length: int, dtype=None) -> KVCache:
    """An empty cache of ``length`` slots a row."""
    shape = config.num_layers, batch, length, config.num_kv_heads, config.head_dim
    dtype = dtype or jnp.dtype(config.compute_dtype)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def write_cache(cache_BMKH: jax.Array, new_BSKH: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """Writes each new entry at its position; entries at position -1 are dropped."""
    slots = jnp.where(positions_BS < 0, cache_BMKH.shape[1], positions_BS)
    rows = jnp.arange(cache_BMKH.shape[0])[:, None]
    return cache_BMKH.at[rows, slots].set(new_BSKH.astype(cache_BMKH.dtype), mode="drop")
