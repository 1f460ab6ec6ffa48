"""Flash attention (Dao et al. 2022, arXiv:2205.14135; backward by recomputation) in plain XLA, for every platform.

Blocks of ``chunk`` queries against blocks of ``chunk`` keys with a running softmax, no [T, S] array in forward or
backward, and blocks that no query of the block may see are skipped at run time: with short documents the work grows
with T * document length, not T^2. Where documents share a prefix, the blocks between it and the document's own are
skipped too. It is the reference that the kernels are held to; what they share with it, the mask
of a packed row in blocks of queries and of keys, stands at the end.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim, C chunk, R rows computed
together; for the kernels Q and C queries and keys of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from postrain.models.config import accumulation_dtype
from postrain.sharding import current_platform

MASKED = -1e30  # not -inf: a block that is masked whole for a query must give exp(MASKED - max) = 0, not NaN


def chunked(q_BTNH, k_BSKH, v_BSKH, starts_BT, sinks_N, first, *prefix_BT, softcap: float, scale: float, chunk: int):
    """What ``postrain.models.attention.dispatch`` says of every back end, [B, T, N, H].

    ``prefix_BT``: of rows with shared prefixes two more arrays, those of ``dispatch.compute_visible_prefix``.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv, chunk = k_BSKH.shape[2], min(chunk, length)
    q_BTNH, k_BSKH, v_BSKH, starts_BT = pad_to_blocks(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, chunk, chunk)
    prefix_BT = tuple(jnp.concatenate([x, starts_BT[:, length:]], axis=1) for x in prefix_BT)  # none of added queries
    # The scale is folded into q once, instead of into every block of scores.
    q = (q_BTNH * scale).astype(q_BTNH.dtype)
    q = q.reshape(batch, -1, num_kv, num_heads // num_kv, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    sinks_KG = None if sinks_N is None else sinks_N.reshape(num_kv, num_heads // num_kv)
    # One row at a time on CPU, where a loop costs nothing and each row skips its own blocks; all rows
    # together on accelerators, which need the width.
    rows = 1 if current_platform() == "cpu" else batch
    first = jnp.asarray(first, jnp.int32)
    out = _flash(q, k, v, (starts_BT, *prefix_BT), first, sinks_KG, _Static(softcap, chunk, rows))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, num_heads, head_dim)
    return out[:, :length]


class _Static(NamedTuple):
    softcap: float
    chunk: int
    rows: int  # computed together


def _block(x, index, chunk, axis):
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis)


def _scores(q_RKGCH, k_RKSH, bounds, i, j, first, softcap):
    """Capped scores [R, K, G, C, C] of block i of queries and j of keys, and bool [R, 1, 1, C, C], which are seen.

    ``bounds``: what each query of the block sees, int32 [R, C] each: the first key of its own document, and of rows
    with shared prefixes the first key of its prefix and the one after its last.
    """
    starts_RC, *prefix_RC = bounds
    dtype, chunk = accumulation_dtype(q_RKGCH.dtype), starts_RC.shape[1]
    scores = soft_cap(jnp.einsum("rkgch,rksh->rkgcs", q_RKGCH, k_RKSH, preferred_element_type=dtype), softcap)
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    key_index = j * chunk + offsets
    causal = key_index[None, :] <= (first + i * chunk + offsets)[:, None]
    seen = causal & (key_index[None, None, :] >= starts_RC[:, :, None])
    if prefix_RC:
        lows, highs = (x[:, :, None] for x in prefix_RC)
        seen |= (key_index >= lows) & (key_index < highs)
    return scores, seen[:, None, None]


def _keys_of(bounds, i, first):
    """Numbers n of the blocks of keys that some query of block i may see, from the first to one past the last, and
    the block of a number."""
    starts_RC, *prefix_RC = bounds
    chunk = starts_RC.shape[1]
    begin, end = starts_RC.min() // chunk, (first + (i + 1) * chunk - 1) // chunk + 1
    if not prefix_RC:
        return begin, end, lambda n: n
    # The prefix of the block's first document lies before it; those of others are among the blocks from ``begin`` on.
    lows, highs = prefix_RC
    prefix_begin = jnp.minimum(lows.min() // chunk, begin)
    last = jnp.where(lows < starts_RC.min(), highs, 0).max()
    prefix_end = jnp.clip((last + chunk - 1) // chunk, prefix_begin, begin)
    gap = begin - prefix_end
    return prefix_begin, end - gap, lambda n: jnp.where(n < prefix_end, n, n + gap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q_BKGTH, k_BKSH, v_BKSH, bounds, first, sinks_KG, static: _Static):
    return _flash_forward(q_BKGTH, k_BKSH, v_BKSH, bounds, first, sinks_KG, static)[0]


def _flash_forward(q_BKGTH, k_BKSH, v_BKSH, bounds, first, sinks_KG, static: _Static):
    softcap, chunk, rows = static
    num_blocks, dtype = q_BKGTH.shape[3] // chunk, accumulation_dtype(q_BKGTH.dtype)

    def row_group(operands):
        q, k, v, *bounds = operands

        def query_block(i):
            q_i, bounds_i = _block(q, i, chunk, 3), [_block(x, i, chunk, 1) for x in bounds]
            begin, end, block_of = _keys_of(bounds_i, i, first)

            def key_block(n, carry):
                (out, total, peak), j = carry, block_of(n)
                scores, visible = _scores(q_i, _block(k, j, chunk, 2), bounds_i, i, j, first, softcap)
                scores = jnp.where(visible, scores, MASKED)
                new_peak = jnp.maximum(peak, scores.max(-1))
                weights = jnp.exp(scores - new_peak[..., None])
                decay = jnp.exp(peak - new_peak)
                values = jnp.einsum(
                    "rkgcs,rksh->rkgch",
                    weights.astype(v.dtype),
                    _block(v, j, chunk, 2),
                    preferred_element_type=dtype,
                )
                return out * decay[..., None] + values, total * decay + weights.sum(-1), new_peak

            shape = q_i.shape[:-1]
            if sinks_KG is None:
                start = jnp.zeros(shape, dtype), jnp.full(shape, MASKED, dtype)
            else:  # a key seen before all others, whose value is 0
                start = jnp.ones(shape, dtype), jnp.broadcast_to(sinks_KG[None, :, :, None], shape)
            start = jnp.zeros(q_i.shape, dtype), *start
            out, total, peak = jax.lax.fori_loop(begin, end, key_block, start)
            return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

        return jax.lax.map(query_block, jnp.arange(num_blocks, dtype=jnp.int32))

    # Rows in groups that are computed together: [B / R, R, ...].
    groups = tuple(x.reshape(-1, rows, *x.shape[1:]) for x in (q_BKGTH, k_BKSH, v_BKSH, *bounds))
    out, logsumexp = jax.lax.map(row_group, groups)
    # [B/R, T/C, R, K, G, C, ...] -> [B, K, G, T, ...]
    out = jnp.moveaxis(out, 1, 4).reshape(q_BKGTH.shape)
    logsumexp = jnp.moveaxis(logsumexp, 1, 4).reshape(q_BKGTH.shape[:-1])
    # What backward needs besides the inputs: named here, where rematerialisation can keep both.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q_BKGTH, k_BKSH, v_BKSH, bounds, first, sinks_KG, out, logsumexp)


def _flash_backward(static: _Static, residuals, grad_BKGTH):
    softcap, chunk, rows = static
    q_BKGTH, k_BKSH, v_BKSH, bounds, first, sinks_KG, out, logsumexp = residuals
    num_blocks, dtype = q_BKGTH.shape[3] // chunk, accumulation_dtype(q_BKGTH.dtype)
    # sum_s p_s dp_s of every query, by the identity of the flash attention paper (section 3.1 of the backward).
    dots = (grad_BKGTH.astype(dtype) * out.astype(dtype)).sum(-1)

    def row_group(operands):
        q, k, v, grad, dots, logsumexp, *bounds = operands

        def query_block(carry, i):
            bounds_i = [_block(x, i, chunk, 1) for x in bounds]
            begin, end, block_of = _keys_of(bounds_i, i, first)
            q_i, grad_i, dots_i, lse_i = (_block(x, i, chunk, 3) for x in (q, grad, dots, logsumexp))

            def key_block(n, carry):
                (dq_i, dk, dv), j = carry, block_of(n)
                k_j, v_j = _block(k, j, chunk, 2), _block(v, j, chunk, 2)
                scores, visible = _scores(q_i, k_j, bounds_i, i, j, first, softcap)
                weights = jnp.exp(jnp.where(visible, scores, MASKED) - lse_i[..., None])
                dv_j = jnp.einsum("rkgcs,rkgch->rksh", weights.astype(grad.dtype), grad_i, preferred_element_type=dtype)
                dweights = jnp.einsum("rkgch,rksh->rkgcs", grad_i, v_j, preferred_element_type=dtype)
                dscores = weights * (dweights - dots_i[..., None])
                if softcap:  # d(c tanh(x / c)) = 1 - tanh^2
                    dscores = dscores * (1 - jnp.square(scores / softcap))
                dscores = dscores.astype(q.dtype)
                dq_i = dq_i + jnp.einsum("rkgcs,rksh->rkgch", dscores, k_j, preferred_element_type=dtype)
                dk_j = jnp.einsum("rkgcs,rkgch->rksh", dscores, q_i, preferred_element_type=dtype)
                add = lambda total, part: jax.lax.dynamic_update_slice_in_dim(
                    total, _block(total, j, chunk, 2) + part, j * chunk, 2
                )
                return dq_i, add(dk, dk_j), add(dv, dv_j)

            start = jnp.zeros(q_i.shape, dtype), *carry
            dq_i, dk, dv = jax.lax.fori_loop(begin, end, key_block, start)
            return (dk, dv), dq_i.astype(q.dtype)

        start = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
        (dk, dv), dq = jax.lax.scan(query_block, start, jnp.arange(num_blocks, dtype=jnp.int32))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    operands = q_BKGTH, k_BKSH, v_BKSH, grad_BKGTH, dots, logsumexp, *bounds
    dq, dk, dv = jax.lax.map(row_group, tuple(x.reshape(-1, rows, *x.shape[1:]) for x in operands))
    dq = jnp.moveaxis(dq, 1, 4).reshape(q_BKGTH.shape)
    return dq, dk.reshape(k_BKSH.shape), dv.reshape(v_BKSH.shape), None, None, sink_gradient(sinks_KG, logsumexp, dots)


_flash.defvjp(_flash_forward, _flash_backward)


# --- what all back ends share ---


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap); ``x`` itself where ``cap`` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def pad_to_blocks(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, block_q: int, block_k: int):
    """The same with T and S multiples of the blocks. Added queries see one key, so that their softmax is of something.

    That key is the one of their own place: starts still never fall, and no block becomes visible to a real query.
    """
    (batch, length), num_keys = starts_BT.shape, k_BSKH.shape[1]
    more_queries = -length % block_q
    more_keys = more_queries + -(num_keys + more_queries) % block_k
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
