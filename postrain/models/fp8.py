"""Matrix products in 8-bit floating point.

Micikevicius et al. 2022, arXiv:2209.05433: operands of the forward product in e4m3 (4 bits of exponent, 3 of mantissa),
gradients in e5m2, each tensor scaled so that its largest entry is the format's ("current scaling": from the very
tensor, not from earlier steps). Products are added up in float32. The weights that are updated stay float32.

A tensor has one scale, so rounding depends on what is in it: splitting a batch otherwise changes a result by rounding.
"""

import jax
import jax.numpy as jnp


def quantize(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """``(q, scale)`` with x ~ q * scale: q in ``dtype``, scale a float32 scalar."""
    x32 = x.astype(jnp.float32)
    largest, limit = jnp.max(jnp.abs(x32)), float(jnp.finfo(dtype).max)
    tiny = float(jnp.finfo(jnp.float32).tiny)  # a quotient below it is flushed to 0
    scale = jnp.where(largest > 0, jnp.maximum(largest / limit, tiny), 1.0)
    return jnp.clip(x32 / scale, -limit, limit).astype(dtype), scale


@jax.custom_vjp
def fp8_dot(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x @ w in x's dtype, x [..., I]: both in e4m3; backward multiplies the gradient in e5m2 with the same operands."""
    return _forward(x, w_IO)[0]


def _forward(x, w_IO):
    like = jnp.zeros((), x.dtype), jnp.zeros((), w_IO.dtype)  # residuals hold arrays alone: of a dtype, one with it
    x, w = quantize(x, jnp.float8_e4m3fn), quantize(w_IO, jnp.float8_e4m3fn)
    return _dot(x, w, (x[0].ndim - 1,), (0,)).astype(like[0].dtype), (x, w, like)


def _backward(residuals, grad):
    x, w, (like_x, like_w) = residuals
    rows = tuple(range(grad.ndim - 1))
    grad = quantize(grad, jnp.float8_e5m2)
    return _dot(grad, w, (len(rows),), (1,)).astype(like_x.dtype), _dot(x, grad, rows, rows).astype(like_w.dtype)


def _dot(a, b, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> jax.Array:
    """float32 product of two quantised arrays over these axes of each."""
    (a, scale_a), (b, scale_b) = a, b
    contracted = (axes_a, axes_b), ((), ())
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32) * (scale_a * scale_b)


fp8_dot.defvjp(_forward, _backward)
