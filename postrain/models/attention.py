"""Causal attention over packed rows.

A document is a maximal run of equal ``segment_ids`` in a row; a query sees the keys of its own document up
to itself and nothing else. Back ends stand behind ``attention``; ``select_backend`` says which one runs.

The "chunked" back end is flash attention (Dao et al. 2022, arXiv:2205.14135; backward by recomputation) in
plain XLA: blocks of ``chunk`` queries against blocks of ``chunk`` keys with a running softmax, no [T, T]
array in forward or backward, and blocks that no query of the block may see are skipped at run time: with
short documents the work grows with T * document length, not T^2.

Legend: B rows, T positions, S new positions, M slots of a cache, N query heads, K key/value heads, G = N / K,
H head_dim, C chunk, R rows computed together.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

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


def attention(q_BTNH, k_BTKH, v_BTKH, *, segment_ids, positions, backend: str = "auto", chunk: int = 128):
    """Softmax(q k^T / sqrt(H)) v within each document, [B, T, N, H] in q's dtype; softmax in float32.

    ``segment_ids`` [B, T] delimit the documents. ``positions`` [B, T] must restart with each document: they
    are required so that nobody forgets them where they matter (rotary embedding, windows); causality itself
    goes by the order in the row.
    """
    del positions  # in the order of the row by contract
    select_backend(backend)
    starts_BT = compute_document_starts(segment_ids)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _chunked(q_BTNH, k_BTKH, v_BTKH, starts_BT, chunk)
    return _sharded(q_BTNH, k_BTKH, v_BTKH, starts_BT, chunk, mesh)


def _sharded(q_BTNH, k_BTKH, v_BTKH, starts_BT, chunk, mesh):
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
    body = functools.partial(_chunked, chunk=chunk)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, spec, spec, P(rows, None)), out_specs=spec, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, starts_BT)


def _chunked(q_BTNH, k_BTKH, v_BTKH, starts_BT, chunk: int):
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
    q = (q_BTNH * (1 / math.sqrt(head_dim))).astype(q_BTNH.dtype)
    q = q.reshape(batch, -1, num_kv, num_heads // num_kv, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
    # One row at a time on CPU, where a loop costs nothing and each row skips its own blocks; all rows
    # together on accelerators, which need the width.
    rows = 1 if jax.default_backend() == "cpu" else batch
    out = _flash(q, k, v, starts_BT, chunk, rows)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length + padding, num_heads, head_dim)
    return out[:, :length]


def _block(x, index, chunk, axis):
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis)


def _visible(starts_RC, i, j, chunk):
    """[R, 1, 1, C, C] bool: may query c of block i see key s of block j?"""
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    key_index = j * chunk + offsets
    causal = key_index[None, :] <= (i * chunk + offsets)[:, None]
    return (causal & (key_index[None, None, :] >= starts_RC[:, :, None]))[:, None, None]


def _scores(q_RKGCH, k_RKSH, starts_RC, i, j, chunk):
    scores = jnp.einsum("rkgch,rksh->rkgcs", q_RKGCH, k_RKSH, preferred_element_type=jnp.float32)
    return jnp.where(_visible(starts_RC, i, j, chunk), scores, MASKED)


def _groups(x, rows):
    """[B, ...] -> [B / R, R, ...]."""
    return x.reshape(x.shape[0] // rows, rows, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q_BKGTH, k_BKTH, v_BKTH, starts_BT, chunk, rows):
    return _flash_forward(q_BKGTH, k_BKTH, v_BKTH, starts_BT, chunk, rows)[0]


def _flash_forward(q_BKGTH, k_BKTH, v_BKTH, starts_BT, chunk, rows):
    num_blocks = q_BKGTH.shape[3] // chunk

    def row_group(operands):
        q, k, v, starts = operands

        def query_block(i):
            q_i, starts_i = _block(q, i, chunk, 3), _block(starts, i, chunk, 1)

            def key_block(j, carry):
                out, total, peak = carry
                scores = _scores(q_i, _block(k, j, chunk, 2), starts_i, i, j, chunk)
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
            start = jnp.zeros(q_i.shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, MASKED)
            out, total, peak = jax.lax.fori_loop(starts_i.min() // chunk, i + 1, key_block, start)
            return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

        return jax.lax.map(query_block, jnp.arange(num_blocks, dtype=jnp.int32))

    out, logsumexp = jax.lax.map(row_group, tuple(_groups(x, rows) for x in (q_BKGTH, k_BKTH, v_BKTH, starts_BT)))
    # [B/R, T/C, R, K, G, C, ...] -> [B, K, G, T, ...]
    out = jnp.moveaxis(out, 1, 4).reshape(q_BKGTH.shape)
    logsumexp = jnp.moveaxis(logsumexp, 1, 4).reshape(q_BKGTH.shape[:-1])
    # What backward needs besides the inputs: named here, where rematerialisation can keep both.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q_BKGTH, k_BKTH, v_BKTH, starts_BT, out, logsumexp)


def _flash_backward(chunk, rows, residuals, grad_BKGTH):
    q_BKGTH, k_BKTH, v_BKTH, starts_BT, out, logsumexp = residuals
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
                weights = jnp.exp(_scores(q_i, k_j, starts_i, i, j, chunk) - lse_i[..., None])
                dv_j = jnp.einsum(
                    "rkgcs,rkgch->rksh", weights.astype(grad.dtype), grad_i, preferred_element_type=jnp.float32
                )
                dweights = jnp.einsum("rkgch,rksh->rkgcs", grad_i, v_j, preferred_element_type=jnp.float32)
                dscores = (weights * (dweights - dots_i[..., None])).astype(q.dtype)
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
    return dq, dk.reshape(k_BKTH.shape), dv.reshape(v_BKTH.shape), None


_flash.defvjp(_flash_forward, _flash_backward)


def cached_attention(q_BSNH, k_BKMH, v_BKMH, positions_BS):
    """New queries at ``positions_BS`` against M cached keys and values: slots 0..position are seen, [B, S, N, H]."""
    batch, steps, num_heads, head_dim = q_BSNH.shape
    num_kv, num_slots = k_BKMH.shape[1:3]
    groups = num_heads // num_kv
    # All queries of a key head as rows of one matrix, [B, K, G*S, H]: a plain batched product with the cache.
    q = (q_BSNH * (1 / math.sqrt(head_dim))).astype(k_BKMH.dtype).reshape(batch, steps, num_kv, groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv, groups * steps, head_dim)
    scores = jnp.einsum("bkqh,bkmh->bkqm", q, k_BKMH, preferred_element_type=jnp.float32)
    seen = jnp.arange(num_slots) <= jnp.tile(positions_BS, (1, groups))[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, MASKED), axis=-1).astype(v_BKMH.dtype)
    out = jnp.einsum("bkqm,bkmh->bkqh", weights, v_BKMH, preferred_element_type=jnp.float32)
    out = out.reshape(batch, num_kv, groups, steps, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q_BSNH.shape).astype(q_BSNH.dtype)
