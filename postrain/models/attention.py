"""Causal attention over packed rows.

A document is a maximal run of equal ``segment_ids`` in a row; a query sees the keys of its own document up
to itself, the last ``window`` of them where there is a window, and nothing else. Back ends stand behind
``attention``; ``select_backend`` says which one runs.

The "chunked" back end is flash attention (Dao et al. 2022, arXiv:2205.14135; backward by recomputation) in
plain XLA: blocks of ``chunk`` queries against blocks of ``chunk`` keys with a running softmax, no [T, T]
array in forward or backward, and blocks that no query of the block may see are skipped at run time: with
short documents the work grows with T * document length, not T^2.

Legend: B rows, T positions, S new positions, M slots of a cache, N query heads, K key/value heads, G = N / K,
H head_dim, C chunk, R rows computed together.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from postrain.sharding import current_platform

BACKENDS = ("chunked",)
MASKED = -1e30  # not -inf: a block that is masked whole for a query must give exp(MASKED - max) = 0, not NaN


def select_backend(name: str) -> str:
    """The back end that ``model.attention`` asks for; "auto" is the fastest one that every device runs."""
    if name == "auto":
        return "chunked"
    if name not in BACKENDS:
        raise ValueError(f"attention back end {name!r} is none of auto, {', '.join(BACKENDS)}")
    return name


def compute_document_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Index in the row at which the document of each position starts, int32 [B, T]."""
    index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    previous = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(segment_ids_BT != previous, index, 0), axis=1)


def compute_visible_starts(segment_ids_BT: jax.Array, window: jax.Array | int | None = None) -> jax.Array:
    """First key, by its index in the row, that each query sees, int32 [B, T]; the last one is the query's own.

    This is the whole mask of a packed row. ``window`` (an integer, traced or not; 0 = none) counts the query itself.
    """
    starts_BT = compute_document_starts(segment_ids_BT)
    if window is None:
        return starts_BT
    nearest = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32) - window + 1
    return jnp.where(window > 0, jnp.maximum(starts_BT, nearest), starts_BT)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap); ``x`` itself where ``cap`` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    segment_ids,
    positions,
    window=None,
    sinks=None,
    softcap: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    chunk: int = 128,
):
    """Softmax(softcap(q k^T scale)) v within each document, [B, T, N, H] in q's dtype; softmax in float32.

    ``segment_ids`` [B, T] delimit the documents. ``positions`` [B, T] must restart with each document: they
    are required so that nobody forgets them where they matter (rotary embedding); causality and windows go by
    the order in the row. ``window``: keys that a query sees, itself included, 0 = all; it may be traced.
    ``sinks`` [N]: a logit of each head that takes its share of the softmax and gives nothing. ``softcap``: see
    ``soft_cap``. ``scale``: default 1 / sqrt(H).
    """
    del positions  # in the order of the row by contract
    select_backend(backend)
    starts_BT = compute_visible_starts(segment_ids, window)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    sinks_N = None if sinks is None else sinks.astype(jnp.float32)
    body = functools.partial(_chunked, softcap=softcap, scale=scale, chunk=chunk)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return body(q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N)
    return _sharded(body, q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, mesh)


def _sharded(body, q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, mesh):
    """Every device computes its own rows and heads: attention needs no communication."""
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    ways = mesh.shape.get("tensor", 1)
    num_heads, num_kv = q_BTNH.shape[2], k_BTKH.shape[2]
    if num_heads % ways:
        raise ValueError(f"{num_heads} heads do not divide over tensor={ways}")
    if num_kv % ways:
        # Fewer key heads than devices: repeat each so that every device holds those of its queries.
        repeats = math.lcm(num_kv, ways) // num_kv
        k_BTKH, v_BTKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKH, v_BTKH))
        if num_heads % k_BTKH.shape[2]:
            raise ValueError(f"{num_heads} heads over {num_kv} key heads do not divide over tensor={ways}")
    heads = "tensor" if ways > 1 else None
    spec = P(rows, None, heads, None)
    specs = spec, spec, spec, P(rows, None), (None if sinks_N is None else P(heads))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N)


def _chunked(q_BTNH, k_BTKH, v_BTKH, starts_BT, sinks_N, *, softcap: float, scale: float, chunk: int):
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv = k_BTKH.shape[2]
    chunk = min(chunk, length)
    padding = -length % chunk
    if padding:
        widths = ((0, 0), (0, padding), (0, 0), (0, 0))
        q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, widths) for x in (q_BTNH, k_BTKH, v_BTKH))
        # What is added is a document of its own, so that its softmax is over something.
        starts_BT = jnp.pad(starts_BT, ((0, 0), (0, padding)), constant_values=length)
    # The scale is folded into q once, instead of into every block of scores.
    q = (q_BTNH * scale).astype(q_BTNH.dtype)
    q = q.reshape(batch, -1, num_kv, num_heads // num_kv, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
    sinks_KG = None if sinks_N is None else sinks_N.reshape(num_kv, num_heads // num_kv)
    # One row at a time on CPU, where a loop costs nothing and each row skips its own blocks; all rows
    # together on accelerators, which need the width.
    rows = 1 if current_platform() == "cpu" else batch
    out = _flash(q, k, v, starts_BT, sinks_KG, _Static(softcap, chunk, rows))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length + padding, num_heads, head_dim)
    return out[:, :length]


class _Static(NamedTuple):
    softcap: float
    chunk: int
    rows: int  # computed together


def _block(x, index, chunk, axis):
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis)


def _visible(starts_RC, i, j, chunk):
    """[R, 1, 1, C, C] bool: may query c of block i see key s of block j?"""
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    key_index = j * chunk + offsets
    causal = key_index[None, :] <= (i * chunk + offsets)[:, None]
    return (causal & (key_index[None, None, :] >= starts_RC[:, :, None]))[:, None, None]


def _scores(q_RKGCH, k_RKSH, softcap):
    return soft_cap(jnp.einsum("rkgch,rksh->rkgcs", q_RKGCH, k_RKSH, preferred_element_type=jnp.float32), softcap)


def _groups(x, rows):
    """[B, ...] -> [B / R, R, ...]."""
    return x.reshape(x.shape[0] // rows, rows, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q_BKGTH, k_BKTH, v_BKTH, starts_BT, sinks_KG, static: _Static):
    return _flash_forward(q_BKGTH, k_BKTH, v_BKTH, starts_BT, sinks_KG, static)[0]


def _flash_forward(q_BKGTH, k_BKTH, v_BKTH, starts_BT, sinks_KG, static: _Static):
    softcap, chunk, rows = static
    num_blocks = q_BKGTH.shape[3] // chunk

    def row_group(operands):
        q, k, v, starts = operands

        def query_block(i):
            q_i, starts_i = _block(q, i, chunk, 3), _block(starts, i, chunk, 1)

            def key_block(j, carry):
                out, total, peak = carry
                scores = _scores(q_i, _block(k, j, chunk, 2), softcap)
                scores = jnp.where(_visible(starts_i, i, j, chunk), scores, MASKED)
                new_peak = jnp.maximum(peak, scores.max(-1))
                weights = jnp.exp(scores - new_peak[..., None])
                decay = jnp.exp(peak - new_peak)
                values = jnp.einsum(
                    "rkgcs,rksh->rkgch",
                    weights.astype(v.dtype),
                    _block(v, j, chunk, 2),
                    preferred_element_type=jnp.float32,
                )
                return out * decay[..., None] + values, total * decay + weights.sum(-1), new_peak

            shape = q_i.shape[:-1]
            if sinks_KG is None:
                start = jnp.zeros(shape, jnp.float32), jnp.full(shape, MASKED)
            else:  # a key seen before all others, whose value is 0
                start = jnp.ones(shape, jnp.float32), jnp.broadcast_to(sinks_KG[None, :, :, None], shape)
            start = jnp.zeros(q_i.shape, jnp.float32), *start
            out, total, peak = jax.lax.fori_loop(starts_i.min() // chunk, i + 1, key_block, start)
            return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

        return jax.lax.map(query_block, jnp.arange(num_blocks, dtype=jnp.int32))

    out, logsumexp = jax.lax.map(row_group, tuple(_groups(x, rows) for x in (q_BKGTH, k_BKTH, v_BKTH, starts_BT)))
    # [B/R, T/C, R, K, G, C, ...] -> [B, K, G, T, ...]
    out = jnp.moveaxis(out, 1, 4).reshape(q_BKGTH.shape)
    logsumexp = jnp.moveaxis(logsumexp, 1, 4).reshape(q_BKGTH.shape[:-1])
    # What backward needs besides the inputs: named here, where rematerialisation can keep both.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q_BKGTH, k_BKTH, v_BKTH, starts_BT, sinks_KG, out, logsumexp)


def _flash_backward(static: _Static, residuals, grad_BKGTH):
    softcap, chunk, rows = static
    q_BKGTH, k_BKTH, v_BKTH, starts_BT, sinks_KG, out, logsumexp = residuals
    num_blocks = q_BKGTH.shape[3] // chunk
    # sum_s p_s dp_s of every query, by the identity of the flash attention paper (section 3.1 of the backward).
    dots = (grad_BKGTH.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def row_group(operands):
        q, k, v, starts, grad, dots, logsumexp = operands

        def query_block(carry, i):
            starts_i = _block(starts, i, chunk, 1)
            q_i, grad_i, dots_i, lse_i = (_block(x, i, chunk, 3) for x in (q, grad, dots, logsumexp))

            def key_block(j, carry):
                dq_i, dk, dv = carry
                k_j, v_j = _block(k, j, chunk, 2), _block(v, j, chunk, 2)
                scores = _scores(q_i, k_j, softcap)
                visible = _visible(starts_i, i, j, chunk)
                weights = jnp.exp(jnp.where(visible, scores, MASKED) - lse_i[..., None])
                dv_j = jnp.einsum(
                    "rkgcs,rkgch->rksh", weights.astype(grad.dtype), grad_i, preferred_element_type=jnp.float32
                )
                dweights = jnp.einsum("rkgch,rksh->rkgcs", grad_i, v_j, preferred_element_type=jnp.float32)
                dscores = weights * (dweights - dots_i[..., None])
                if softcap:  # d(c tanh(x / c)) = 1 - tanh^2
                    dscores = dscores * (1 - jnp.square(scores / softcap))
                dscores = dscores.astype(q.dtype)
                dq_i = dq_i + jnp.einsum("rkgcs,rksh->rkgch", dscores, k_j, preferred_element_type=jnp.float32)
                dk_j = jnp.einsum("rkgcs,rkgch->rksh", dscores, q_i, preferred_element_type=jnp.float32)
                add = lambda total, part: jax.lax.dynamic_update_slice_in_dim(
                    total, _block(total, j, chunk, 2) + part, j * chunk, 2
                )
                return dq_i, add(dk, dk_j), add(dv, dv_j)

            start = jnp.zeros(q_i.shape, jnp.float32), *carry
            dq_i, dk, dv = jax.lax.fori_loop(starts_i.min() // chunk, i + 1, key_block, start)
            return (dk, dv), dq_i.astype(q.dtype)

        start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(query_block, start, jnp.arange(num_blocks, dtype=jnp.int32))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    operands = q_BKGTH, k_BKTH, v_BKTH, starts_BT, grad_BKGTH, dots, logsumexp
    dq, dk, dv = jax.lax.map(row_group, tuple(_groups(x, rows) for x in operands))
    dq = jnp.moveaxis(dq, 1, 4).reshape(q_BKGTH.shape)
    # The sink's weight is exp(sink - logsumexp), its value 0: d = weight * (0 - dots).
    dsinks = None
    if sinks_KG is not None:
        dsinks = -(jnp.exp(sinks_KG[None, :, :, None] - logsumexp) * dots).sum((0, 3))
    return dq, dk.reshape(k_BKTH.shape), dv.reshape(v_BKTH.shape), None, dsinks


_flash.defvjp(_flash_forward, _flash_backward)


def cached_attention(
    q_BSNH, k_BKMH, v_BKMH, positions_BS, *, window=None, sinks=None, softcap: float = 0.0, scale: float | None = None
):
    """New queries at ``positions_BS`` against M cached keys and values: slots 0..position are seen, [B, S, N, H].

    The rest as in ``attention``; a window leaves the last ``window`` of those slots.
    """
    batch, steps, num_heads, head_dim = q_BSNH.shape
    num_kv, num_slots = k_BKMH.shape[1:3]
    groups = num_heads // num_kv
    scale = head_dim**-0.5 if scale is None else scale
    # All queries of a key head as rows of one matrix, [B, K, G*S, H]: a plain batched product with the cache.
    q = (q_BSNH * scale).astype(k_BKMH.dtype).reshape(batch, steps, num_kv, groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv, groups * steps, head_dim)
    scores = soft_cap(jnp.einsum("bkqh,bkmh->bkqm", q, k_BKMH, preferred_element_type=jnp.float32), softcap)
    slots, queries = jnp.arange(num_slots), jnp.tile(positions_BS, (1, groups))[:, :, None]
    seen = slots <= queries
    if window is not None:
        seen &= (window <= 0) | (slots > queries - window)
    scores = jnp.where(seen[:, None], scores, MASKED)
    if sinks is not None:  # one more key, whose value is 0
        logits = jnp.repeat(sinks.astype(jnp.float32).reshape(num_kv, groups), steps, axis=1)[None, :, :, None]
        scores = jnp.concatenate([scores, jnp.broadcast_to(logits, (batch, *logits.shape[1:]))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :num_slots].astype(v_BKMH.dtype)
    out = jnp.einsum("bkqm,bkmh->bkqh", weights, v_BKMH, preferred_element_type=jnp.float32)
    out = out.reshape(batch, num_kv, groups, steps, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q_BSNH.shape).astype(q_BSNH.dtype)
