"""Rotary position embedding. Legend: B rows, T positions, N heads, H head_dim."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from postrain.models.config import RopeConfig
from postrain.models.precision import accumulation_dtype


def compute_inverse_frequencies(rope: RopeConfig, head_dim: int, dtype=np.float32) -> np.ndarray:
    """Radians per position of each of the H/2 planes, [H/2] in ``dtype``, float32 or float64.

    In float32 rounded where the models' own code rounds: at position 100,000 the last bit of a frequency is 0.006
    radians.
    """
    real = np.dtype(dtype).type
    exponents = np.arange(0, head_dim, 2, dtype=real) / real(head_dim)
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(real)
    frequencies = real(1) / powers
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / real(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 1 / frequencies * real(2 * math.pi)  # a number over a tensor, as torch rounds it
        longest = rope.original_max_positions / rope.low_freq_factor
        shortest = rope.original_max_positions / rope.high_freq_factor
        turns = 1 / wavelengths * real(rope.original_max_positions)
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
        scaled = np.where(wavelengths > longest, frequencies / rope.factor, between)
        return np.where(wavelengths < shortest, frequencies, scaled).astype(real)
    if rope.kind == "yarn":
        # The plane that turns `beta` times within the original positions, as a real number.
        plane = lambda beta: (
            head_dim * math.log(rope.original_max_positions / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
        )
        first, last = plane(rope.beta_fast), plane(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first if last != first else 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=real) - first) / width, 0, 1).astype(real)
        kept = 1 - ramp
        return (1 / (real(rope.factor) * powers) * (1 - kept) + frequencies * kept).astype(real)
    raise ValueError(f"rope kind {rope.kind!r}: expected one of default, linear, llama3, yarn")


def compute_rotations(
    rope: RopeConfig, head_dim: int, positions_BT: jax.Array, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, [B, T, 1, H/2] in ``dtype``: computed once, used by every layer."""
    angles = positions_BT[..., None, None].astype(dtype) * compute_inverse_frequencies(rope, head_dim, dtype)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rotations(x_BTNH: jax.Array, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (h, h + H/2) of every head; returns x's dtype."""
    cos, sin = rotations
    first, second = jnp.split(x_BTNH.astype(accumulation_dtype(x_BTNH.dtype)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
