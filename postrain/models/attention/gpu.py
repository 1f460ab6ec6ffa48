"""Flash attention for NVIDIA GPUs: Pallas kernels that Triton compiles (``chunked`` says the maths).

Each program has one block of queries, or of keys for the gradients to k and v, and loops over the blocks that some
query of it may see: no mask is in memory, and what lies outside document, window and diagonal costs nothing.

Legend: B rows, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim, Q and C queries and keys of a
block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from postrain.models.attention.chunked import MASKED, blocks_of_queries, pad_to_blocks, sink_gradient, soft_cap

MAX_BLOCK = 64
# Bytes of a block of keys: queries, keys, values and gradients of a block have to fit into shared memory, some twice.
MAX_BYTES = 2**14


class _Static(NamedTuple):
    softcap: float
    block: int
    interpret: bool


def flash_gpu(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    starts_BT,
    sinks_N,
    first,
    *,
    softcap: float,
    scale: float,
    max_block: int = MAX_BLOCK,
    interpret: bool = False,
):
    """What ``dispatch`` says of every back end, [B, T, N, H]. ``max_block``: positions of a block.

    ``interpret``: on any platform, slowly.
    """
    length, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    width = max(16, 1 << (head_dim - 1).bit_length())  # Triton's blocks are powers of two, and products' at least 16
    size = q_BTNH.dtype.itemsize
    # In float32 half as many: products without tensor cores are unrolled, and larger ones compile for minutes.
    block = max(16, min(max_block, 2 * MAX_BLOCK // size, MAX_BYTES // (width * size)))
    q, k, v, starts = pad_to_blocks(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, block, block)
    q = (q * scale).astype(q.dtype)  # folded in once, instead of into every block of scores
    if width > head_dim:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - head_dim))) for x in (q, k, v))
    first = jnp.asarray(first, jnp.int32)
    return _flash(q, k, v, starts, first, sinks_N, _Static(softcap, block, interpret))[:, :length, :, :head_dim]


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _scores(q, k, starts, i, j, first, static: _Static):
    """Capped scores [Q, C] of block i of queries and j of keys before the mask, and the mask."""
    offsets = jnp.arange(static.block, dtype=jnp.int32)
    key, query = (j * static.block + offsets)[None, :], (first + i * static.block + offsets)[:, None]
    return soft_cap(_dot(q, k.T), static.softcap), (key >= starts[:, None]) & (key <= query)


def _keys_of(starts_ref, i, first, static: _Static):
    """Bounds of the blocks of keys that block i of queries may see; starts never fall: the first is the least."""
    return starts_ref[0] // static.block, (first + (i + 1) * static.block - 1) // static.block + 1


def _forward_kernel(first_ref, q_ref, k_ref, v_ref, starts_ref, sinks_ref, out_ref, lse_ref, *, static: _Static):
    i, first = pl.program_id(2), first_ref[0]
    q, starts = q_ref[...], starts_ref[...]

    def step(j, carry):
        out, total, peak = carry
        keys = pl.ds(j * static.block, static.block)
        scores, visible = _scores(q, k_ref[keys, :], starts, i, j, first, static)
        scores = jnp.where(visible, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(1))
        weights, decay = jnp.exp(scores - new_peak[:, None]), jnp.exp(peak - new_peak)
        out = out * decay[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return out, total * decay + weights.sum(1), new_peak

    shape = (static.block,)
    if sinks_ref is None:
        start = jnp.zeros(shape, jnp.float32), jnp.full(shape, MASKED, jnp.float32)
    else:  # a key seen before all others, whose value is 0
        start = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32) + sinks_ref[0]
    start = jnp.zeros(q.shape, jnp.float32), *start
    out, total, peak = jax.lax.fori_loop(*_keys_of(starts_ref, i, first, static), step, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = peak + jnp.log(total)


def _weights_and_gradient(q, k, v, starts, grad, lse, dots, i, j, first, static: _Static):
    """The softmax weights of two blocks and the gradient of their scores before the cap, [Q, C]."""
    scores, visible = _scores(q, k, starts, i, j, first, static)
    weights = jnp.exp(jnp.where(visible, scores, MASKED) - lse[:, None])
    dscores = weights * (_dot(grad, v.T) - dots[:, None])
    if static.softcap:  # d(c tanh(x / c)) = 1 - tanh^2
        dscores = dscores * (1 - jnp.square(scores / static.softcap))
    return weights, dscores


def _query_gradient_kernel(
    first_ref, q_ref, k_ref, v_ref, starts_ref, grad_ref, lse_ref, dots_ref, dq_ref, *, static: _Static
):
    i, first = pl.program_id(2), first_ref[0]
    q, starts, grad, lse, dots = (ref[...] for ref in (q_ref, starts_ref, grad_ref, lse_ref, dots_ref))

    def step(j, dq):
        keys = pl.ds(j * static.block, static.block)
        k = k_ref[keys, :]
        _, dscores = _weights_and_gradient(q, k, v_ref[keys, :], starts, grad, lse, dots, i, j, first, static)
        return dq + _dot(dscores.astype(k.dtype), k)

    bounds = _keys_of(starts_ref, i, first, static)
    dq_ref[...] = jax.lax.fori_loop(*bounds, step, jnp.zeros(q.shape, jnp.float32)).astype(dq_ref.dtype)


def _key_gradient_kernel(first_ref, begin_ref, end_ref, *refs, static: _Static):
    q_ref, k_ref, v_ref, starts_ref, grad_ref, lse_ref, dots_ref, dk_ref, dv_ref = refs
    j, first = pl.program_id(2), first_ref[0]
    k, v = k_ref[...], v_ref[...]

    def head(g, sums):
        def step(i, sums):
            dk, dv = sums
            queries = pl.ds(i * static.block, static.block)
            q, grad = q_ref[queries, g, :], grad_ref[queries, g, :]
            per_query = lse_ref[g, queries], dots_ref[g, queries]
            starts = starts_ref[queries]
            weights, dscores = _weights_and_gradient(q, k, v, starts, grad, *per_query, i, j, first, static)
            dk = dk + _dot(dscores.astype(q.dtype).T, q)
            return dk, dv + _dot(weights.astype(grad.dtype).T, grad)

        return jax.lax.fori_loop(begin_ref[0], end_ref[0] + 1, step, sums)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1], head, start)
    dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def _call(kernel, grid, in_specs, out_specs, out_shape, static: _Static):
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=static.interpret,
    )


def _query_specs(q_BTNH, k_BSKH, static: _Static) -> dict[str, pl.BlockSpec]:
    """What a program of (row, head, block of queries) gets: its queries, and the keys of the whole row."""
    groups, head_dim = q_BTNH.shape[2] // k_BSKH.shape[2], q_BTNH.shape[3]
    return {
        "first": pl.BlockSpec((1,), lambda b, n, i: (0,)),
        "queries": pl.BlockSpec((None, static.block, None, head_dim), lambda b, n, i: (b, i, n, 0)),
        "keys": pl.BlockSpec((None, k_BSKH.shape[1], None, head_dim), lambda b, n, i: (b, 0, n // groups, 0)),
        "starts": pl.BlockSpec((None, static.block), lambda b, n, i: (b, i)),
        "sinks": pl.BlockSpec((1,), lambda b, n, i: (n,)),
        "per_query": pl.BlockSpec((None, None, static.block), lambda b, n, i: (b, n, i)),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, sinks_N, static: _Static):
    return _flash_forward(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, sinks_N, static)[0]


def _flash_forward(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, sinks_N, static: _Static):
    batch, length, num_heads, _ = q_BTNH.shape
    specs = _query_specs(q_BTNH, k_BSKH, static)
    kernel, kinds = _forward_kernel, ["first", "queries", "keys", "keys", "starts", "sinks"]
    operands = [first[None], q_BTNH, k_BSKH, v_BSKH, starts_BT, sinks_N]
    if sinks_N is None:
        kernel = lambda f, q, k, v, starts, *outs, static: _forward_kernel(
            f, q, k, v, starts, None, *outs, static=static
        )
        kinds, operands = kinds[:-1], operands[:-1]
    outs = [
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32),
    ]
    grid, out_specs = (batch, num_heads, length // static.block), [specs["queries"], specs["per_query"]]
    out, logsumexp = _call(kernel, grid, [specs[kind] for kind in kinds], out_specs, outs, static)(*operands)
    # What backward needs besides the inputs: named here, where rematerialisation can keep both.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q_BTNH, k_BSKH, v_BSKH, starts_BT, first, sinks_N, out, logsumexp)


def _flash_backward(static: _Static, residuals, grad_BTNH):
    q, k, v, starts_BT, first, sinks_N, out, logsumexp = residuals
    batch, length, num_heads, _ = q.shape
    # sum_s p_s dp_s of every query, by the identity of the flash attention paper (section 3.1 of the backward).
    dots = (grad_BTNH.astype(jnp.float32) * out.astype(jnp.float32)).sum(3).transpose(0, 2, 1)
    specs = _query_specs(q, k, static)
    kinds = "first", "queries", "keys", "keys", "starts", "queries", "per_query", "per_query"
    grid, shape = (batch, num_heads, length // static.block), jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = _call(_query_gradient_kernel, grid, [specs[x] for x in kinds], specs["queries"], shape, static)
    dq = call(first[None], q, k, v, starts_BT, grad_BTNH, logsumexp, dots)
    dk, dv = _key_gradients(q, k, v, starts_BT, first, grad_BTNH, logsumexp, dots, static)
    dsinks = sink_gradient(sinks_N if sinks_N is None else sinks_N[:, None], logsumexp[:, :, None], dots[:, :, None])
    return dq, dk, dv, None, None, dsinks if dsinks is None else dsinks[:, 0]


def _key_gradients(q, k, v, starts_BT, first, grad_BTNH, logsumexp, dots, static: _Static):
    """One program for each (row, key head, block of keys): the queries of its G heads, the whole row of them."""
    (batch, length, num_heads, head_dim), (_, num_keys, num_kv, _) = q.shape, k.shape
    groups, num_blocks_k = num_heads // num_kv, num_keys // static.block
    begin, end = blocks_of_queries(starts_BT, first, static.block, static.block, num_blocks_k)
    bound = pl.BlockSpec((None, 1), lambda b, h, j: (b, j))
    queries = pl.BlockSpec((None, length, groups, head_dim), lambda b, h, j: (b, 0, h, 0))
    keys = pl.BlockSpec((None, static.block, None, head_dim), lambda b, h, j: (b, j, h, 0))
    starts = pl.BlockSpec((None, length), lambda b, h, j: (b, 0))
    per_query = pl.BlockSpec((None, groups, length), lambda b, h, j: (b, h, 0))
    first_spec = pl.BlockSpec((1,), lambda b, h, j: (0,))
    in_specs = [first_spec, bound, bound, queries, keys, keys, starts, queries, per_query, per_query]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    grid = batch, num_kv, num_blocks_k
    call = _call(_key_gradient_kernel, grid, in_specs, [keys, keys], shapes, static)
    return call(first[None], begin, end, q, k, v, starts_BT, grad_BTNH, logsumexp, dots)


_flash.defvjp(_flash_forward, _flash_backward)
