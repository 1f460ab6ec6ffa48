"""Choosing the next token of every row from its logits: pure maths on arrays.

Sampling is by the inverse of the cumulative distribution in two levels: the probabilities are summed in
chunks of consecutive ids, one uniform number chooses the chunk in proportion to its sum, a second one the
token within the chunk. This reads the logits twice and needs two random numbers a row, where the Gumbel
trick (``jax.random.categorical``) needs a random number and two logarithms per entry of the vocabulary;
the second uniform keeps the resolution of rare tokens: 2^-23 of their chunk, not of everything.

top-k and top-p (Holtzman et al. 2020, arXiv:1904.09751) are thresholds found by bisection over the bit
patterns of float32: at most 32 passes over the row, exact, and no sort. Tokens that tie with the last one
included are included too, so that the result does not depend on the order of ids.

Two log-probabilities come back with each token. ``logprobs`` is under the distribution that was sampled
from, after temperature, banned ids, top-k and top-p: importance ratios need this one. ``model_logprobs`` is the
model's own at the same temperature over the whole vocabulary, which a trainer recomputes and compares with. Where
every id may be chosen they are equal.

Legend: B rows, V entries of the vocabulary (padded), C chunks, W ids of a chunk.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

MAX_CHUNK = 256


@flax.struct.dataclass
class Choice:
    """One token per row. All [B]."""

    tokens: jax.Array  # int32
    logprobs: jax.Array  # float32, under the distribution sampled from; 0 when greedy, which is certain
    model_logprobs: jax.Array  # float32, under softmax(logits / temperature); of temperature 1 when greedy


def choose_greedy(logits_BV: jax.Array, *, vocab_size: int, allowed_V=None) -> Choice:
    """The most probable id below ``vocab_size`` of every row, the lowest of those that tie.

    ``allowed_V``: bool [vocab_size], the ids that may be chosen; None: all.
    """
    whole = _mask_vocabulary(logits_BV.astype(jnp.float32), vocab_size)
    logits = _leave_out(whole, allowed_V)
    # In two levels because an argmax over a long row is not vectorised on CPU: there it costs 10x a max.
    chunks_BCW = _split(logits)
    chunk_B = jnp.argmax(chunks_BCW.max(-1), axis=-1)
    within_BW = _take_chunk(chunks_BCW, chunk_B)
    tokens = chunk_B * chunks_BCW.shape[-1] + jnp.argmax(within_BW, axis=-1)
    best_B1 = within_BW.max(-1, keepdims=True)
    if allowed_V is None:
        model_logprobs = -jnp.log(jnp.exp(whole - best_B1).sum(-1))
    else:  # an id that is left out may be far more probable
        model_logprobs = -jax.nn.logsumexp(whole - best_B1, axis=-1)
    return Choice(tokens.astype(jnp.int32), jnp.zeros_like(model_logprobs), model_logprobs)


def choose_sampled(
    logits_BV: jax.Array,
    uniforms_B2: jax.Array,
    *,
    vocab_size: int,
    temperature,
    top_k: int = 0,
    top_p=None,
    allowed_V=None,
) -> Choice:
    """One id below ``vocab_size`` per row, drawn with two uniform numbers in [0, 1) per row.

    ``temperature`` divides the logits; ids that are not ``allowed_V`` (as in choose_greedy) are left out; then stay at
    most ``top_k`` ids (0: all), then the fewest most probable ids whose probabilities, renormalised after top-k, reach
    ``top_p`` (None: all); ties are kept.
    """
    whole = _mask_vocabulary(logits_BV.astype(jnp.float32), vocab_size)
    logits = _leave_out(whole, allowed_V)
    best_B1 = logits.max(-1, keepdims=True)
    weights_BV = jnp.exp((logits - best_B1) / temperature)
    candidates_BV = weights_BV
    if 0 < top_k < vocab_size:
        kth_B = find_threshold(logits, jnp.ones_like(logits), jnp.full(logits.shape[0], top_k, jnp.float32))
        candidates_BV = jnp.where(logits >= kth_B[:, None], candidates_BV, 0.0)
    if top_p is not None:
        least_B = find_threshold(candidates_BV, candidates_BV, top_p * candidates_BV.sum(-1))
        candidates_BV = jnp.where(candidates_BV >= least_B[:, None], candidates_BV, 0.0)
    candidates_BCW = _split(candidates_BV)
    sums_BC = candidates_BCW.sum(-1)
    chunk_B = invert_cumulative(sums_BC, uniforms_B2[:, 0])
    chunk_BW = _take_chunk(candidates_BCW, chunk_B)
    within_B = invert_cumulative(chunk_BW, uniforms_B2[:, 1])
    log_weight_B = jnp.log(jnp.take_along_axis(chunk_BW, within_B[:, None], axis=-1)[:, 0])
    logprobs_B = log_weight_B - jnp.log(sums_BC.sum(-1))
    if allowed_V is not None:
        # The best one subtracted first: logits over a small temperature are large numbers.
        model_logprobs_B = log_weight_B - jax.nn.logsumexp((whole - best_B1) / temperature, axis=-1)
    elif candidates_BV is weights_BV:
        model_logprobs_B = logprobs_B
    else:
        model_logprobs_B = log_weight_B - jnp.log(weights_BV.sum(-1))
    tokens_B = (chunk_B * candidates_BCW.shape[-1] + within_B).astype(jnp.int32)
    return Choice(tokens=tokens_B, logprobs=logprobs_B, model_logprobs=model_logprobs_B)


def invert_cumulative(weights_BN: jax.Array, uniforms_B: jax.Array) -> jax.Array:
    """Index drawn in proportion to the weights (>= 0, one at least > 0): int32 [B].

    The first index whose cumulative weight exceeds uniform * total. An entry of weight 0 is never chosen,
    whatever rounding does to the cumulative sums.
    """
    cumulative = jnp.cumsum(weights_BN, axis=-1)
    possible = weights_BN > 0
    above = possible & (cumulative > (uniforms_B * cumulative[:, -1])[:, None])
    last = weights_BN.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)


def find_threshold(values_BV: jax.Array, weights_BV: jax.Array, targets_B: jax.Array) -> jax.Array:
    """The largest t with sum(weights[values >= t]) >= target, per row: float32 [B].

    ``weights`` are >= 0; a target over the sum of all gives the lowest value. Exact: bisection over the
    ordered bit patterns of float32.
    """
    low = _to_ordered(values_BV.min(-1))
    high = _to_ordered(values_BV.max(-1)) + 1

    def is_open(bracket):
        low, high = bracket
        return jnp.any(_midpoint(low, high) > low)

    def halve(bracket):
        low, high = bracket
        middle = _midpoint(low, high)
        reached = jnp.where(values_BV >= _from_ordered(middle)[:, None], weights_BV, 0.0).sum(-1) >= targets_B
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    return _from_ordered(jax.lax.while_loop(is_open, halve, (low, high))[0])


def make_uniforms(row_keys_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Two uniform numbers per row, [B, 2], from the row's own key and the position that is chosen.

    Nothing of the batch enters, so a row's randomness does not depend on which rows it is computed with.
    """
    keys = jax.vmap(jax.random.fold_in)(row_keys_B, positions_B)
    return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)


def _mask_vocabulary(logits_BV, vocab_size):
    if vocab_size == logits_BV.shape[-1]:
        return logits_BV
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, jnp.finfo(logits_BV.dtype).min)


def _leave_out(logits_BV, allowed_V):
    if allowed_V is None:
        return logits_BV
    allowed_V = jnp.pad(allowed_V, (0, logits_BV.shape[-1] - allowed_V.shape[-1]))
    return jnp.where(allowed_V, logits_BV, jnp.finfo(logits_BV.dtype).min)


def _split(x_BV):
    """[B, V] -> [B, C, W]: W is the largest power of two up to MAX_CHUNK that divides V."""
    return x_BV.reshape(x_BV.shape[0], -1, math.gcd(x_BV.shape[1], MAX_CHUNK))


def _take_chunk(x_BCW, chunk_B):
    return jnp.take_along_axis(x_BCW, chunk_B[:, None, None], axis=1)[:, 0]


def _to_ordered(x):
    """float32 -> int32 in the same order (and back, below): negative floats count downwards in their bits."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)  # + 0.0: -0.0 and 0.0 are equal, and must stay so
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(i):
    return jax.lax.bitcast_convert_type(i ^ ((i >> 31) & 0x7FFFFFFF), jnp.float32)


def _midpoint(low, high):
    """floor((low + high) / 2) without overflow."""
    return (low & high) + ((low ^ high) >> 1)
