"""Flash attention for TPUs: a Pallas kernel for the whole mask of a packed row (``chunked`` says the maths).

The kernel runs over a list of pairs (block of queries, block of keys) that is made from the data: only blocks
that some query of the block may see are on it, so blocks outside document, window and diagonal are neither fetched nor
computed, and their number is the length of the grid. The list is in the order of what is summed: by queries for the
output and its gradient to q, by keys for the gradients to k and v.

Positions lie along the 128 lanes, so that what each query has one of (start, logsumexp) is a row of lanes, and a
head_dim below 128 takes no padding. Scores are [keys, queries] accordingly.

Legend: B rows, T queries, S keys, N query heads, K key heads, G = N / K, H head_dim, Q and C queries and keys of a
block, P pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from postrain.errors import UserError
from postrain.models.attention.chunked import (
    MASKED,
    blocks_of_keys,
    blocks_of_queries,
    pad_to_blocks,
    sink_gradient,
    soft_cap,
)

LANES = 128
SHIFT = 16  # a pair is one int32: block of queries << SHIFT | block of keys
MAX_BLOCK = 512
# Of a block of queries, all heads of a key head: it, its output and their sums share the chip's memory.
MAX_BYTES = 2**20
MAX_PAIRS = 2**17  # half a MiB of scalar memory


class _Static(NamedTuple):
    softcap: float
    block_q: int
    block_k: int
    interpret: bool


def flash_tpu(
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

    ``interpret``: on any platform, slowly. Raises UserError where a row has more pairs of blocks than can be listed.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_keys, num_kv = k_BSKH.shape[1:3]
    groups = num_heads // num_kv
    room = max(LANES, MAX_BYTES // (groups * head_dim * q_BTNH.dtype.itemsize) // LANES * LANES)
    block_q = min(max_block, room, length + -length % LANES)
    block_k = min(max_block, num_keys + -num_keys % LANES)
    if batch * _most_pairs(length, num_keys, block_q, block_k) > MAX_PAIRS:
        raise UserError(
            f"config key 'model.attention' = 'flash_tpu': {batch} rows of {num_keys} positions a device have more "
            "blocks than a TPU's scalar memory lists: raise mesh.sequence or train.micro_batches, or set it to chunked"
        )
    q, k, v, starts = pad_to_blocks(q_BTNH, k_BSKH, v_BSKH, starts_BT, first, block_q, block_k)
    # The scale is folded into q once, instead of into every block of scores.
    q = (q * scale).astype(q.dtype).transpose(0, 2, 3, 1).reshape(batch, num_kv, groups, head_dim, -1)
    k, v = (x.transpose(0, 2, 3, 1) for x in (k, v))
    sinks_KG = None if sinks_N is None else sinks_N.reshape(num_kv, groups)
    static = _Static(softcap, block_q, block_k, interpret)
    out = _flash(q, k, v, starts, jnp.asarray(first, jnp.int32), sinks_KG, static)
    return out.reshape(batch, num_heads, head_dim, -1)[..., :length].transpose(0, 3, 1, 2)


# The pairs.


class _Pairs(NamedTuple):
    pairs: jax.Array  # int32 [B * (P + 1)], each row's P and one more
    counts: jax.Array  # int32 [B]: how many of the P there are


def _most_pairs(length: int, num_keys: int, block_q: int, block_k: int) -> int:
    """Pairs of a row of one document; the queries are the last ``length`` of the keys, where there are most."""
    num_blocks_q, num_blocks_k = -(-length // block_q), -(-num_keys // block_k) + 1
    ends = ((num_keys - length + (i + 1) * block_q - 1) // block_k + 1 for i in range(num_blocks_q))
    return sum(min(end, num_blocks_k) for end in ends) + num_blocks_k


def _list_pairs(q, k, starts_BT, first, static: _Static, by_keys: bool) -> _Pairs:
    """Pairs (x, y) with lows[x] <= y <= highs[x] in the order of x, which are blocks of keys or of queries."""
    length, num_keys, (block_q, block_k) = q.shape[-1], k.shape[-1], static[1:3]
    most = _most_pairs(length, num_keys, block_q, block_k)
    if by_keys:
        begin, end = blocks_of_queries(starts_BT, first, block_q, block_k, num_keys // block_k)
        # A block of keys that no query sees has one pair too, which sets its gradient to 0.
        lows_BX = jnp.minimum(begin, length // block_q - 1)
        highs_BX = jnp.maximum(lows_BX, end)
    else:
        lows_BX, highs_BX = blocks_of_keys(starts_BT, first, block_q, block_k)
    sizes = highs_BX - lows_BX + 1
    ends = jnp.cumsum(sizes, axis=1)
    index = jnp.minimum(jnp.arange(most + 1, dtype=jnp.int32), ends[:, -1:] - 1)  # after the last it is repeated
    x = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(ends, index)
    take = functools.partial(jnp.take_along_axis, indices=x, axis=1)
    y = take(lows_BX) + index - (take(ends) - take(sizes))
    pairs = (y << SHIFT | x) if by_keys else (x << SHIFT | y)
    return _Pairs(pairs.astype(jnp.int32).reshape(-1), ends[:, -1].astype(jnp.int32))


class _Where(NamedTuple):
    """The pair of a step of the grid."""

    i: jax.Array
    j: jax.Array
    opens: jax.Array  # the first pair of its sum
    closes: jax.Array
    real: jax.Array  # not one of the steps that only other rows need


def _locate(pairs_ref, counts_ref, per_row: int, by_keys: bool) -> _Where:
    b, p = pl.program_id(0), pl.program_id(2)
    at = b * per_row + p
    pair = pairs_ref[at]
    major = lambda pair: pair & (2**SHIFT - 1) if by_keys else pair >> SHIFT
    count = counts_ref[b]
    opens = (p == 0) | (major(pairs_ref[jnp.maximum(at - 1, 0)]) != major(pair))
    closes = (p == count - 1) | (major(pairs_ref[at + 1]) != major(pair))
    return _Where(pair >> SHIFT, pair & (2**SHIFT - 1), opens, closes, p < count)


# The kernels.


def _dot(x, y, contract_x: int, contract_y: int):
    # Products of bfloat16 are exact, and the compiler refuses them where a higher precision is asked for.
    precision = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else None
    contract = ((contract_x,), (contract_y,)), ((), ())
    return jax.lax.dot_general(x, y, contract, precision=precision, preferred_element_type=jnp.float32)


def _visible(where: _Where, starts_1Q, first, static: _Static):
    shape = static.block_k, static.block_q
    key = where.j * static.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = first + where.i * static.block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (key >= starts_1Q) & (key <= query)


def _forward_kernel(pairs, counts, first, sinks, *refs, static: _Static, per_row: int):
    q_ref, k_ref, v_ref, starts_ref, out_ref, lse_ref, sum_ref, total_ref, peak_ref = refs
    where, groups = _locate(pairs, counts, per_row, by_keys=False), q_ref.shape[0]
    kv_head = pl.program_id(1)

    @pl.when(where.opens & where.real)
    def _():
        def start(g, _):
            row = pl.ds(g, 1)
            sum_ref[g] = jnp.zeros(sum_ref.shape[1:], jnp.float32)
            # A sink is a key seen before all others, whose value is 0.
            total_ref[row, :] = jnp.full((1, static.block_q), 0.0 if sinks is None else 1.0)
            peak_ref[row, :] = jnp.full((1, static.block_q), MASKED if sinks is None else sinks[kv_head * groups + g])

        jax.lax.fori_loop(0, groups, start, None)

    @pl.when(where.real)
    def _():
        visible = _visible(where, starts_ref[...], first[0], static)

        def head(g, _):
            row = pl.ds(g, 1)
            scores = soft_cap(_dot(k_ref[...], q_ref[g], 0, 0), static.softcap)  # [C, Q]
            scores = jnp.where(visible, scores, MASKED)
            peak = jnp.maximum(peak_ref[row, :], scores.max(0, keepdims=True))
            weights, decay = jnp.exp(scores - peak), jnp.exp(peak_ref[row, :] - peak)
            total_ref[row, :] = total_ref[row, :] * decay + weights.sum(0, keepdims=True)
            sum_ref[g] = sum_ref[g] * decay + _dot(v_ref[...], weights.astype(v_ref.dtype), 1, 0)
            peak_ref[row, :] = peak

        jax.lax.fori_loop(0, groups, head, None)

    @pl.when(where.closes & where.real)
    def _():
        def finish(g, _):
            row = pl.ds(g, 1)
            out_ref[g] = (sum_ref[g] / total_ref[row, :]).astype(out_ref.dtype)
            lse_ref[row, :] = peak_ref[row, :] + jnp.log(total_ref[row, :])

        jax.lax.fori_loop(0, groups, finish, None)


def _weights_and_gradient(g, q_ref, k_ref, v_ref, grad_ref, lse_ref, dots_ref, visible, softcap):
    """The softmax weights of a pair and the gradient of its scores before the cap, [C, Q]."""
    row = pl.ds(g, 1)
    scores = soft_cap(_dot(k_ref[...], q_ref[g], 0, 0), softcap)
    weights = jnp.exp(jnp.where(visible, scores, MASKED) - lse_ref[row, :])
    dscores = weights * (_dot(v_ref[...], grad_ref[g], 0, 0) - dots_ref[row, :])
    if softcap:  # d(c tanh(x / c)) = 1 - tanh^2
        dscores = dscores * (1 - jnp.square(scores / softcap))
    return weights, dscores


def _query_gradient_kernel(pairs, counts, first, *refs, static: _Static, per_row: int):
    q_ref, k_ref, v_ref, starts_ref, grad_ref, lse_ref, dots_ref, dq_ref, sum_ref = refs
    where, groups = _locate(pairs, counts, per_row, by_keys=False), q_ref.shape[0]

    @pl.when(where.opens & where.real)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(where.real)
    def _():
        visible = _visible(where, starts_ref[...], first[0], static)

        def head(g, _):
            refs = q_ref, k_ref, v_ref, grad_ref, lse_ref, dots_ref
            _, dscores = _weights_and_gradient(g, *refs, visible, static.softcap)
            sum_ref[g] += _dot(k_ref[...], dscores.astype(k_ref.dtype), 1, 0)

        jax.lax.fori_loop(0, groups, head, None)

    @pl.when(where.closes & where.real)
    def _():
        dq_ref[...] = sum_ref[...].astype(dq_ref.dtype)


def _key_gradient_kernel(pairs, counts, first, *refs, static: _Static, per_row: int):
    q_ref, k_ref, v_ref, starts_ref, grad_ref, lse_ref, dots_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
    where, groups = _locate(pairs, counts, per_row, by_keys=True), q_ref.shape[0]

    @pl.when(where.opens & where.real)
    def _():
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)

    @pl.when(where.real)
    def _():
        visible = _visible(where, starts_ref[...], first[0], static)

        def head(g, _):
            refs = q_ref, k_ref, v_ref, grad_ref, lse_ref, dots_ref
            weights, dscores = _weights_and_gradient(g, *refs, visible, static.softcap)
            dv_sum[...] += _dot(grad_ref[g], weights.astype(grad_ref.dtype), 1, 1)
            dk_sum[...] += _dot(q_ref[g], dscores.astype(q_ref.dtype), 1, 1)

        jax.lax.fori_loop(0, groups, head, None)

    @pl.when(where.closes & where.real)
    def _():
        dk_ref[...], dv_ref[...] = dk_sum[...].astype(dk_ref.dtype), dv_sum[...].astype(dv_ref.dtype)


def _run(kernel, pairs: _Pairs, scalars, operands, out_kinds, scratch, shape, static: _Static):
    """The kernel on every pair of every row and key head. ``operands`` are (kind, array), kinds as in ``specs``."""
    (batch, num_kv, groups, head_dim), block_q, block_k = shape, static.block_q, static.block_k
    per_row = pairs.pairs.size // batch
    pair = lambda b, p, pairs: pairs[b * per_row + p]
    query = lambda b, p, pairs: pair(b, p, pairs) >> SHIFT
    key = lambda b, p, pairs: pair(b, p, pairs) & (2**SHIFT - 1)
    specs = {
        "queries": pl.BlockSpec(
            (None, None, groups, head_dim, block_q), lambda b, h, p, pairs, *_: (b, h, 0, 0, query(b, p, pairs))
        ),
        "keys": pl.BlockSpec((None, None, head_dim, block_k), lambda b, h, p, pairs, *_: (b, h, 0, key(b, p, pairs))),
        "starts": pl.BlockSpec((None, 1, block_q), lambda b, h, p, pairs, *_: (b, 0, query(b, p, pairs))),
        "per_query": pl.BlockSpec(
            (None, None, groups, block_q), lambda b, h, p, pairs, *_: (b, h, 0, query(b, p, pairs))
        ),
    }
    kinds, arrays = zip(*operands, strict=True)
    scalars = [*pairs, *scalars]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(batch, num_kv, pairs.counts.max()),
        in_specs=[specs[kind] for kind in kinds],
        out_specs=[specs[kind] for kind, _ in out_kinds],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    return pl.pallas_call(
        functools.partial(kernel, static=static, per_row=per_row),
        grid_spec=grid_spec,
        out_shape=[shape for _, shape in out_kinds],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=static.interpret,
    )(*scalars, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _flash(q_BKGHT, k_BKHS, v_BKHS, starts_BT, first, sinks_KG, static: _Static):
    return _flash_forward(q_BKGHT, k_BKHS, v_BKHS, starts_BT, first, sinks_KG, static)[0]


def _flash_forward(q_BKGHT, k_BKHS, v_BKHS, starts_BT, first, sinks_KG, static: _Static):
    _, _, groups, head_dim, length = q_BKGHT.shape
    pairs = _list_pairs(q_BKGHT, k_BKHS, starts_BT, first, static, by_keys=False)
    kernel, scalars = _forward_kernel, [first[None]]
    if sinks_KG is None:
        kernel = lambda pairs, counts, first, *refs, **kw: _forward_kernel(pairs, counts, first, None, *refs, **kw)
    else:
        scalars.append(sinks_KG.reshape(-1))
    operands = ("queries", q_BKGHT), ("keys", k_BKHS), ("keys", v_BKHS), ("starts", starts_BT[:, None])
    lse_shape = jax.ShapeDtypeStruct((*q_BKGHT.shape[:3], length), jnp.float32)
    outs = ("queries", jax.ShapeDtypeStruct(q_BKGHT.shape, q_BKGHT.dtype)), ("per_query", lse_shape)
    scratch = (groups, head_dim, static.block_q), (groups, static.block_q), (groups, static.block_q)
    out, logsumexp = _run(kernel, pairs, scalars, operands, outs, scratch, q_BKGHT.shape[:4], static)
    # What backward needs besides the inputs: named here, where rematerialisation can keep both.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q_BKGHT, k_BKHS, v_BKHS, starts_BT, first, sinks_KG, out, logsumexp)


def _flash_backward(static: _Static, residuals, grad_BKGHT):
    q, k, v, starts_BT, first, sinks_KG, out, logsumexp = residuals
    # sum_s p_s dp_s of every query, by the identity of the flash attention paper (section 3.1 of the backward).
    dots = (grad_BKGHT.astype(jnp.float32) * out.astype(jnp.float32)).sum(3)
    operands = [("queries", q), ("keys", k), ("keys", v), ("starts", starts_BT[:, None]), ("queries", grad_BKGHT)]
    operands += [("per_query", logsumexp), ("per_query", dots)]
    run = functools.partial(_run, scalars=[first[None]], operands=operands, shape=q.shape[:4], static=static)
    like = lambda kind, x: (kind, jax.ShapeDtypeStruct(x.shape, x.dtype))
    by_queries, by_keys = (_list_pairs(q, k, starts_BT, first, static, by_keys) for by_keys in (False, True))
    scratch, sums = [(*q.shape[2:4], static.block_q)], (q.shape[3], static.block_k)
    [dq] = run(_query_gradient_kernel, by_queries, out_kinds=[like("queries", q)], scratch=scratch)
    dk, dv = run(_key_gradient_kernel, by_keys, out_kinds=[like("keys", k), like("keys", v)], scratch=[sums, sums])
    return dq, dk, dv, None, None, sink_gradient(sinks_KG, logsumexp, dots)


_flash.defvjp(_flash_forward, _flash_backward)
