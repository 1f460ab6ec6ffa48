"""Log-probabilities of tokens from hidden states, without the [N, V] array of logits.

Positions whose mask is zero are dropped before the projection onto the vocabulary; the rest is projected in chunks, so
that only one chunk's logits are in memory, in forward and in backward. Three functions use the same chunks:
``compute_token_logprobs``, for any objective, whose backward computes the logits again; ``compute_weighted_nll``, for a
sum whose weights are known beforehand, which computes the gradient together with the logits and saves a quarter of the
products; and ``map_logits``, for what is to be computed from the whole distribution of a token.

Legend: N positions, D embed_size, V' padded vocabulary, C chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from postrain.sharding import BATCH_AXES


@flax.struct.dataclass
class TokenLogprobs:
    """Per position, float32 (float64 of float64 hidden states), 0 where the mask is 0. In nats."""

    logprobs: jax.Array  # log p(target)
    entropy: jax.Array  # -sum_v p log p
    logsumexp: jax.Array  # log of the softmax's denominator (for z-loss, and to compare samplers)
    uniform: jax.Array  # log p averaged over the vocabulary (for label smoothing)
    correct: jax.Array  # 1 where the target is the likeliest token; without a gradient


def _sum_dtype(hidden) -> jnp.dtype:
    """Of logits and sums: float32, or float64 where the hidden states are."""
    return jnp.promote_types(hidden.dtype, jnp.float32)


class _Static(NamedTuple):
    vocab_size: int
    chunk: int
    softcap: float  # c: logits are c tanh(product / c); 0: the product itself


class _Compacted(NamedTuple):
    """Indices of the masked-in positions first, and how many chunks they fill."""

    order: jax.Array  # int32 [N padded to a multiple of C]; N: no position
    num_chunks: jax.Array  # int32 []


def _compact(mask_N, chunk: int) -> _Compacted:
    is_in = mask_N != 0
    size = mask_N.shape[0]
    slots = jnp.where(is_in, jnp.cumsum(is_in) - 1, size + chunk)
    order = jnp.full(math.ceil(size / chunk) * chunk, size, jnp.int32)
    order = order.at[slots].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    return _Compacted(order, (is_in.sum() + chunk - 1) // chunk)


def _take(x, rows, fill=0):
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=fill)


def _chunk(hidden_ND, unembed_VD, compacted: _Compacted, index, static: _Static):
    """Positions [C] of a chunk, their hidden states [C, D] and ``project`` of them."""
    rows = jax.lax.dynamic_slice_in_dim(compacted.order, index * static.chunk, static.chunk)
    hidden = _take(hidden_ND, rows)
    return rows, hidden, project(hidden, unembed_VD, static.vocab_size, static.softcap)


def project(hidden_CD, unembed_VD, vocab_size: int, softcap: float = 0.0) -> jax.Array:
    """Logits [C, V'] of hidden states, in ``_sum_dtype``, -inf past the vocabulary; ``softcap`` as in ``_Static``."""
    logits = jnp.einsum("cd,vd->cv", hidden_CD, unembed_VD, preferred_element_type=_sum_dtype(hidden_CD))
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if vocab_size < unembed_VD.shape[0]:
        logits = jnp.where(jnp.arange(unembed_VD.shape[0]) < vocab_size, logits, -jnp.inf)
    return logits


def _logsumexp(logits):
    peak = logits.max(-1)
    return peak + jnp.log(jnp.exp(logits - peak[:, None]).sum(-1)), peak


def _gradients(dlogits, logits, hidden, unembed_VD, softcap: float):
    """Gradients of the chunk's projection, to the hidden states [C, D] and to the unembedding [V', D]."""
    if softcap:  # d(c tanh(x / c)) = 1 - tanh^2
        dlogits = dlogits * jnp.where(jnp.isneginf(logits), 0.0, 1 - jnp.square(logits / softcap))
    dtype, dlogits = _sum_dtype(hidden), dlogits.astype(hidden.dtype)
    to_hidden = jnp.einsum("cv,vd->cd", dlogits, unembed_VD, preferred_element_type=dtype)
    to_unembed = functools.partial(jnp.einsum, "cv,cd->vd", dlogits, hidden, preferred_element_type=dtype)
    return to_hidden, to_unembed


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_logprobs(hidden_ND, unembed_VD, targets_N, mask_N, static):
    compacted = _compact(mask_N, static.chunk)
    unembed_VD = unembed_VD.astype(hidden_ND.dtype)  # once, not for every chunk

    def body(index, outputs):
        rows, _, logits = _chunk(hidden_ND, unembed_VD, compacted, index, static)
        logsumexp, peak = _logsumexp(logits)
        target_logits = jnp.take_along_axis(logits, _take(targets_N, rows)[:, None], axis=1)[:, 0]
        # -sum p log p, not logsumexp - sum p logit, which loses the digits that the two have in common.
        log_p = logits - logsumexp[:, None]
        entropy = -jnp.where(jnp.isneginf(logits), 0.0, jnp.exp(log_p) * log_p).sum(-1)
        uniform = jnp.where(jnp.isneginf(logits), 0.0, log_p).sum(-1) / static.vocab_size
        correct = (target_logits >= peak).astype(entropy.dtype)
        values = target_logits - logsumexp, entropy, logsumexp, uniform, correct
        return tuple(o.at[rows].set(v, mode="drop") for o, v in zip(outputs, values, strict=True))

    start = (jnp.zeros(targets_N.shape, _sum_dtype(hidden_ND)),) * 5
    return TokenLogprobs(*jax.lax.fori_loop(0, compacted.num_chunks, body, start))


def _token_logprobs_forward(hidden_ND, unembed_VD, targets_N, mask_N, static):
    needs_unembed = unembed_VD.perturbed
    hidden_ND, unembed_VD, targets_N, mask_N = (x.value for x in (hidden_ND, unembed_VD, targets_N, mask_N))
    out = _token_logprobs(hidden_ND, unembed_VD, targets_N, mask_N, static)
    residuals = hidden_ND, unembed_VD, targets_N, mask_N, out, (() if needs_unembed else None)
    return out, residuals


def _token_logprobs_backward(static, residuals, grads: TokenLogprobs):
    hidden_ND, unembed_VD, targets_N, mask_N, out, needs_unembed = residuals
    compacted = _compact(mask_N, static.chunk)
    dtype, unembed_VD = unembed_VD.dtype, unembed_VD.astype(hidden_ND.dtype)
    wide = _sum_dtype(hidden_ND)
    is_zero = lambda g: isinstance(g, jax.custom_derivatives.SymbolicZero)
    dense = lambda g: jnp.zeros(g.shape, wide) if is_zero(g) else g
    dlogprob_N, dentropy_N, dlogsumexp_N = dense(grads.logprobs), dense(grads.entropy), dense(grads.logsumexp)
    duniform_N = dense(grads.uniform)

    def body(index, carry):
        dhidden, dunembed = carry
        rows, hidden, logits = _chunk(hidden_ND, unembed_VD, compacted, index, static)
        log_p = logits - _take(out.logsumexp, rows)[:, None]
        p = jnp.exp(log_p)
        dlogprob, dlogsumexp = _take(dlogprob_N, rows), _take(dlogsumexp_N, rows)
        dlogits = p * (dlogsumexp - dlogprob)[:, None]
        if not is_zero(grads.uniform):
            share = jnp.where(jnp.isneginf(logits), 0.0, 1 / static.vocab_size)
            dlogits = dlogits + (share - p) * _take(duniform_N, rows)[:, None]
        if not is_zero(grads.entropy):  # dH/dlogit_v = -p_v (log p_v + H)
            surprise = jnp.where(p > 0, log_p + _take(out.entropy, rows)[:, None], 0.0)
            dlogits = dlogits - p * surprise * _take(dentropy_N, rows)[:, None]
        hits = jnp.arange(logits.shape[1]) == _take(targets_N, rows)[:, None]
        dlogits = dlogits + jnp.where(hits, dlogprob[:, None], 0.0)
        to_hidden, to_unembed = _gradients(dlogits, logits, hidden, unembed_VD, static.softcap)
        dhidden = dhidden.at[rows].set(to_hidden.astype(dhidden.dtype), mode="drop")
        return dhidden, (None if dunembed is None else dunembed + to_unembed())

    start = jnp.zeros_like(hidden_ND), (None if needs_unembed is None else jnp.zeros(unembed_VD.shape, wide))
    dhidden, dunembed = jax.lax.fori_loop(0, compacted.num_chunks, body, start)
    return dhidden, (None if dunembed is None else dunembed.astype(dtype)), None, None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_nll(hidden_ND, unembed_VD, targets_N, weights_N, static):
    sums, _, _ = _weighted_nll_pass(hidden_ND, unembed_VD, targets_N, weights_N, static, False, False)
    return sums


def _weighted_nll_pass(hidden_ND, unembed_VD, targets_N, weights_N, static, to_hidden, to_unembed):
    """One pass over the chunks: (loss, correct) sums, and the gradients of the loss sum where they are needed."""
    compacted = _compact(weights_N, static.chunk)
    unembed_VD = unembed_VD.astype(hidden_ND.dtype)  # once, not for every chunk

    def body(index, carry):
        loss, correct, dhidden, dunembed = carry
        rows, hidden, logits = _chunk(hidden_ND, unembed_VD, compacted, index, static)
        logsumexp, peak = _logsumexp(logits)
        targets, weights = _take(targets_N, rows), _take(weights_N, rows)
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        loss = loss + (weights * (logsumexp - target_logits)).sum()
        correct = correct + jnp.where(target_logits == peak, weights, 0.0).sum()
        if to_hidden or to_unembed:
            hits = jnp.arange(logits.shape[1]) == targets[:, None]
            dlogits = (jnp.exp(logits - logsumexp[:, None]) - hits) * weights[:, None]
            dhidden_rows, dunembed_rows = _gradients(dlogits, logits, hidden, unembed_VD, static.softcap)
            if to_hidden:
                dhidden = dhidden.at[rows].set(dhidden_rows.astype(dhidden.dtype), mode="drop")
            if to_unembed:
                dunembed = dunembed + dunembed_rows()
        return loss, correct, dhidden, dunembed

    wide = _sum_dtype(hidden_ND)
    start = (
        jnp.zeros((), wide),
        jnp.zeros((), wide),
        jnp.zeros_like(hidden_ND) if to_hidden else None,
        jnp.zeros(unembed_VD.shape, wide) if to_unembed else None,
    )
    loss, correct, dhidden, dunembed = jax.lax.fori_loop(0, compacted.num_chunks, body, start)
    return (loss, correct), dhidden, dunembed


def _weighted_nll_forward(hidden_ND, unembed_VD, targets_N, weights_N, static):
    sums, dhidden, dunembed = _weighted_nll_pass(
        hidden_ND.value,
        unembed_VD.value,
        targets_N.value,
        weights_N.value,
        static,
        hidden_ND.perturbed,
        unembed_VD.perturbed,
    )
    dtype = jnp.zeros((), unembed_VD.value.dtype)
    return sums, (dhidden, dunembed, dtype)


def _weighted_nll_backward(static, residuals, grads):
    dhidden, dunembed, dtype = residuals
    dloss = grads[0]
    if isinstance(dloss, jax.custom_derivatives.SymbolicZero):
        dloss = jnp.zeros(())
    scale = lambda x, to: None if x is None else (x * dloss).astype(to)
    return scale(dhidden, None if dhidden is None else dhidden.dtype), scale(dunembed, dtype.dtype), None, None


_weighted_nll.defvjp(_weighted_nll_forward, _weighted_nll_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def _map_logits(values, hidden_ND, unembed_VD, mask_N, rows, shared, static):
    compacted = _compact(mask_N, static.chunk)
    unembed_VD = unembed_VD.astype(hidden_ND.dtype)  # once, not for every chunk

    def of_chunk(index):
        at, _, logits = _chunk(hidden_ND, unembed_VD, compacted, index, static)
        return at, values(logits, jax.tree.map(lambda x: _take(x, at), rows), shared)

    def body(index, outputs):
        at, found = of_chunk(index)
        return jax.tree.map(lambda out, value: out.at[at].set(value, mode="drop"), outputs, found)

    _, shapes = jax.eval_shape(of_chunk, 0)
    start = jax.tree.map(lambda x: jnp.zeros((mask_N.shape[0], *x.shape[1:]), x.dtype), shapes)
    return jax.lax.fori_loop(0, compacted.num_chunks, body, start)


def _map_logits_forward(values, hidden_ND, unembed_VD, mask_N, rows, shared, static):
    needs_unembed = unembed_VD.perturbed
    inputs = jax.tree.map(
        lambda x: x.value,
        (hidden_ND, unembed_VD, mask_N, rows, shared),
        is_leaf=lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal),
    )
    return _map_logits(values, *inputs, static), (inputs, () if needs_unembed else None)


def _map_logits_backward(values, static, residuals, grads):
    (hidden_ND, unembed_VD, mask_N, rows, shared), needs_unembed = residuals
    compacted = _compact(mask_N, static.chunk)
    dtype, unembed_VD = unembed_VD.dtype, unembed_VD.astype(hidden_ND.dtype)
    wide = _sum_dtype(hidden_ND)
    is_zero = lambda g: isinstance(g, jax.custom_derivatives.SymbolicZero)
    grads = jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype) if is_zero(g) else g, grads, is_leaf=is_zero)

    def body(index, carry):
        dhidden, dunembed = carry
        at, hidden, logits = _chunk(hidden_ND, unembed_VD, compacted, index, static)
        take = lambda x: _take(x, at)
        _, pull = jax.vjp(lambda logits: values(logits, jax.tree.map(take, rows), shared), logits)
        (dlogits,) = pull(jax.tree.map(take, grads))
        to_hidden, to_unembed = _gradients(dlogits, logits, hidden, unembed_VD, static.softcap)
        dhidden = dhidden.at[at].set(to_hidden.astype(dhidden.dtype), mode="drop")
        return dhidden, (None if dunembed is None else dunembed + to_unembed())

    start = jnp.zeros_like(hidden_ND), (None if needs_unembed is None else jnp.zeros(unembed_VD.shape, wide))
    dhidden, dunembed = jax.lax.fori_loop(0, compacted.num_chunks, body, start)
    return dhidden, (None if dunembed is None else dunembed.astype(dtype)), None, None, None


_map_logits.defvjp(_map_logits_forward, _map_logits_backward, symbolic_zeros=True)


def _per_row_shard(fn, hidden, unembed, *per_position, sums: bool):
    """Runs ``fn`` on each device's own rows and positions: they are gathered within a device, never across devices.

    ``hidden`` and ``unembed`` may be several arrays. Other mesh axes (the vocabulary over ``tensor``) stay with the
    partitioner.
    """
    mesh, (_, *positions) = jax.sharding.get_abstract_mesh(), per_position[0].shape
    split = lambda axes: tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    rows, sequence = split(BATCH_AXES), split(("sequence",)) if positions else ()
    if sequence and positions[0] % mesh.shape["sequence"]:
        sequence = ()
    flatten = lambda x: x.reshape(-1, *x.shape[per_position[0].ndim :])

    def local(hidden, unembed, *per_position):
        out = fn(jax.tree.map(flatten, hidden), unembed, *(x.reshape(-1) for x in per_position))
        restore = (lambda x: x[None]) if sums else (lambda x: x.reshape(*per_position[0].shape, *x.shape[1:]))
        return jax.tree.map(restore, out)

    if axes := rows + sequence:
        where = P(rows or None, *sequence)
        specs = where, P(), *(where for _ in per_position)
        out_specs = P(axes) if sums else where
        local = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
        )
    out = local(hidden, unembed, *per_position)
    return jax.tree.map(lambda x: x.sum(0), out) if sums else out


def compute_token_logprobs(
    hidden, unembed_VD, targets, mask, *, vocab_size: int, chunk: int = 1024, softcap: float = 0.0
) -> TokenLogprobs:
    """log p(target), entropy and logsumexp of every position where ``mask`` is not 0.

    ``hidden`` [..., D], ``unembed_VD`` [V', D], ``targets`` and ``mask`` [...]. At most ``chunk`` x V' logits
    exist at a time, capped at ``softcap`` where it is not 0. Gradients flow to ``hidden`` and ``unembed_VD``.
    """
    fn = lambda h, u, t, m: _token_logprobs(h, u, t, m, _Static(vocab_size, min(chunk, t.shape[0]), softcap))
    return _per_row_shard(fn, hidden, unembed_VD, targets, mask, sums=False)


def compute_weighted_nll(
    hidden, unembed_VD, targets, weights, *, vocab_size: int, chunk: int = 1024, softcap: float = 0.0
):
    """Sum of -weight * log p(target), and the weight of targets that are the likeliest token; in ``_sum_dtype``.

    Shapes as ``compute_token_logprobs``; positions of weight 0 are skipped. Only the first has a gradient.
    """
    fn = lambda h, u, t, w: _weighted_nll(h, u, t, w, _Static(vocab_size, min(chunk, t.shape[0]), softcap))
    return _per_row_shard(fn, hidden, unembed_VD, targets, weights.astype(_sum_dtype(hidden)), sums=True)


def map_logits(
    values: Callable,
    hidden,
    unembed_VD,
    mask,
    rows=(),
    shared=(),
    *,
    vocab_size: int,
    chunk: int = 1024,
    softcap: float = 0.0,
):
    """What ``values`` computes from the logits of every position where ``mask`` is not 0; 0 elsewhere.

    Args:
      values: ``(logits [C, V'], rows, shared) -> arrays [C, ...]`` of a chunk of C positions, several in a tuple or
        dict. Logits are -inf past the vocabulary. Its derivative is JAX's.
      rows: arrays [..., *] of positions, of which ``values`` gets [C, *].
      shared: arrays that it gets whole.

    Other arguments and memory as ``compute_token_logprobs``, times the arrays [C, V'] that ``values`` makes. Gradients
    flow to ``hidden`` and ``unembed_VD``: ``rows`` and ``shared`` are constants.
    """
    fn = lambda h, u, m: _map_logits(
        values, h[0], u[0], m, h[1], u[1], _Static(vocab_size, min(chunk, m.shape[0]), softcap)
    )
    return _per_row_shard(fn, (hidden, rows), (unembed_VD, shared), mask, sums=False)
