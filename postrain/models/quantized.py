"""Frozen kernels in 4 or 8 bits, matrix products with them, and frozen embeddings in 8 bits.

A quantised kernel is a dict of arrays in the place of the array [..., I, O]:

- NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 16 levels, the quantiles of a normal distribution, times the
  absolute maximum of each block of 64 numbers. ``nf4`` uint8, two numbers a byte, the first in the low half. The
  maxima are quantised once more: ``absmax`` uint8 counts ``absmax_step`` from ``absmax_low``, float32 of each column.
  4.125 bits a parameter and 8 bytes a column.
- int8: ``int8`` times the float32 ``scale`` of its output channel, the channel's absolute maximum / 127.

An embedding [V, D] is int8 beside kernels of either kind, each token with a ``scale`` [V, 1] of its own: 4 bits would
show, and as the projection onto the vocabulary the tokens are its output channels.

Blocks, bytes and columns of NF4 run along one axis, which the caller chooses: that of the residual stream, so that
tensor parallelism, which splits the other one, cuts none of them.

Nothing dequantised is kept: one layer's matrix (one expert's, where products are by blocks) exists while it is
multiplied, and is made again for backward, which needs no gradient of it.

Legend: N rows, I and O the sizes in and out, V tokens, D the residual stream.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("nf4", "int8")
BLOCK = 64
# bitsandbytes' table (create_normal_map): quantiles of N(0, 1), 8 below zero and 7 above, scaled to [-1, 1].
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_NF4_BOUNDS = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2


def is_quantized(kernel) -> bool:
    """Whether ``kernel`` is a dict of this module rather than an array."""
    return isinstance(kernel, dict)


def quantize(kernel: jax.Array, kind: str, axis: int = -2) -> dict[str, jax.Array]:
    """The quantised kernel of an array [..., I, O], from float32.

    ``kind``: of KINDS. ``axis``: -2 or -1, along which NF4's blocks run; the last block may be shorter. Raises
    ValueError where that axis is odd, so that its numbers do not pair up, or the kind is unknown.
    """
    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        return _scale_to_int8(kernel, -2)
    if kind != "nf4":
        raise ValueError(f"quantisation {kind!r}: expected one of {', '.join(KINDS)}")
    axis += kernel.ndim
    size = kernel.shape[axis]
    if size % 2:
        raise ValueError(f"NF4 packs two numbers in a byte: found {size} along axis {axis} of {kernel.shape}")
    padded = jnp.pad(kernel, [(0, -size % BLOCK if i == axis else 0) for i in range(kernel.ndim)])
    absmax = jnp.abs(_split(padded, axis, BLOCK)).max(axis + 1)
    unit = kernel / _nonzero(_repeat(absmax, axis, size))
    codes = functools.reduce(jnp.add, [(unit > bound).astype(jnp.uint8) for bound in _NF4_BOUNDS])
    low, high = (edge(absmax, axis=axis, keepdims=True) for edge in (jnp.min, jnp.max))
    step = (high - low) / 255
    first, second = (jax.lax.index_in_dim(_split(codes, axis, 2), i, axis + 1, keepdims=False) for i in (0, 1))
    return {
        "nf4": first | second << 4,
        "absmax": jnp.round((absmax - low) / _nonzero(step)).astype(jnp.uint8),
        "absmax_low": low,
        "absmax_step": step,
    }


def quantize_rows(table_VD: jax.Array) -> dict[str, jax.Array]:
    """The int8 embedding of an array [V, D], from float32."""
    return _scale_to_int8(table_VD.astype(jnp.float32), -1)


def as_array(kernel, dtype) -> jax.Array:
    """A kernel or embedding, quantised or not, in ``dtype``."""
    return dequantize(kernel, dtype) if is_quantized(kernel) else kernel.astype(dtype)


def dequantize(kernel: dict[str, jax.Array], dtype) -> jax.Array:
    """The array [..., I, O] of a quantised kernel: computed in float32, then rounded to ``dtype``."""
    if "int8" in kernel:
        return (kernel["int8"].astype(jnp.float32) * kernel["scale"]).astype(dtype)
    packed, axis, shape = kernel["nf4"], _blocked_axis(kernel), shape_of(kernel)
    codes = jnp.stack([packed & 15, packed >> 4], axis + 1).reshape(shape)
    # NF4_LEVELS[codes], float32, bit by bit: accelerators gather from tables slowly. Sums of which one term is 0, so
    # exact. Not ``jnp.where``: differentiating a scan would move its constants out of the loop, each as large as the
    # matrix.
    levels = NF4_LEVELS.tolist()
    for bit in range(4):
        one = ((codes >> bit) & 1).astype(jnp.float32)
        levels = [one * high + (1 - one) * low for low, high in zip(levels[::2], levels[1::2], strict=True)]
    absmax = kernel["absmax_low"] + kernel["absmax_step"] * kernel["absmax"].astype(jnp.float32)
    return (levels[0] * _repeat(absmax, axis, shape[axis])).astype(dtype)


def shape_of(kernel) -> tuple[int, ...]:
    """[..., I, O] of a kernel, quantised or not."""
    if not is_quantized(kernel):
        return kernel.shape
    if "int8" in kernel:
        return kernel["int8"].shape
    packed, axis = kernel["nf4"], _blocked_axis(kernel)
    return tuple(2 * size if i == axis else size for i, size in enumerate(packed.shape))


def dequantize_params(params, dtype):
    """A parameter tree with every quantised kernel as an array of ``dtype``, one after the other."""
    if not isinstance(params, dict):
        return params
    if "nf4" in params or "int8" in params:
        return jax.jit(dequantize, static_argnums=1)(params, dtype)
    return {key: dequantize_params(value, dtype) for key, value in params.items()}


def dot(x: jax.Array, kernel) -> jax.Array:
    """x @ kernel in x's dtype, x [..., I]; ``kernel`` an array [I, O] or quantised."""
    return _quantized_dot(x, kernel) if is_quantized(kernel) else x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _quantized_dot(x, kernel):
    return x @ dequantize(kernel, x.dtype)


def _quantized_dot_backward(kernel, grad):
    contracted = ((grad.ndim - 1,), (1,)), ((), ())
    return jax.lax.dot_general(grad, dequantize(kernel, grad.dtype), contracted), None


_quantized_dot.defvjp(lambda x, kernel: (_quantized_dot(x, kernel), kernel), _quantized_dot_backward)


def _scale_to_int8(x: jax.Array, axis: int) -> dict[str, jax.Array]:
    scale = jnp.abs(x).max(axis, keepdims=True) / 127
    return {"int8": jnp.round(x / _nonzero(scale)).astype(jnp.int8), "scale": scale}


def _blocked_axis(kernel) -> int:
    packed, absmax = kernel["nf4"], kernel["absmax"]
    return packed.ndim - (2 if packed.shape[-1] == absmax.shape[-1] else 1)


def _split(x, axis: int, size: int):
    """[..., n * size, ...] -> [..., n, size, ...]."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _repeat(per_block, axis: int, size: int):
    """Each block's number for all of its numbers, ``size`` along ``axis``."""
    return jax.lax.slice_in_dim(jnp.repeat(per_block, BLOCK, axis), 0, size, axis=axis)


def _nonzero(x):
    return jnp.where(x == 0, 1, x)
