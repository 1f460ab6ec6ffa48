"""Choosing the next token of every row from its logits: pure maths on arrays.

Sampling is by the inverse of the cumulative distribution in two levels: the probabilities are summed in
chunks of consecutive ids, one uniform number chooses the chunk in proportion to its sum, a second one the
token within the chunk. This reads the logits twice and needs two random numbers a row, where the Gumbel
trick (``jax.random.categorical``) needs a random number and two logarithms per entry of the vocabulary;
the second uniform keeps the resolution of rare tokens: 2^-23 of their chunk, not of everything.

top-k and top-p (Holtzman et al. 2020, arXiv:1904.09751) are thresholds found by bisection over the bit
patterns of float32: at most 32 passes over the row, exact, and no sort. Tokens that tie with the last one
included are included too, so that the result does not depend on the order of ids. Every row has its own settings, and
a threshold that no row asks for is not looked for.

Two log-probabilities come back with each token. ``logprobs`` is under the distribution that was sampled
from, after edits, temperature, ids that are left out, and filters: importance ratios need this one. ``model_logprobs``
is the model's own at the same temperature over the whole vocabulary, which a trainer recomputes and compares with.
Where every id may be chosen they are equal. ``kept_mass`` is the probability of all ids that could be chosen, under the
edited logits of the whole vocabulary.

Legend: B rows, V entries of the vocabulary (padded), C chunks, W ids of a chunk; 32 W' bits for the V ids.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

MAX_CHUNK = 256
LOWEST = float(jnp.finfo(jnp.float32).min)


@flax.struct.dataclass
class Choice:
    """One token per row. All [B]."""

    tokens: jax.Array  # int32
    logprobs: jax.Array  # float32, under the distribution sampled from; 0 when greedy, which is certain
    # float32, under softmax(logits / temperature); of temperature 1 when greedy; -inf: no id may be chosen
    model_logprobs: jax.Array
    kept_mass: jax.Array  # float32, of the ids that could be chosen; of the one id when greedy
    top_ids: jax.Array | None = None  # int32 [B, number of them]: the most probable ids of the model
    top_logprobs: jax.Array | None = None  # float32 [B, number of them], as model_logprobs


@flax.struct.dataclass
class Filters:
    """Which ids of each row may be drawn, all [B]: at most ``top_k`` ids (0: all); of them the fewest most probable
    whose probabilities, renormalised, reach ``top_p`` (1: all); of them those of at least ``min_p`` times the
    probability of the best (0: all). Ties are kept."""

    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32


@flax.struct.dataclass
class Edits:
    """What changes each row's logits before anything else, as ``rollout.requests.SamplingParams`` says."""

    bias_BV: jax.Array  # float32
    counts_BV: jax.Array  # int32: how often the answer has each id
    prompt_BV: jax.Array  # bool: whether the prompt has it
    stops_BV: jax.Array  # bool: ids that would end the row
    length: jax.Array  # int32 [B]: tokens of the answer so far
    minimum: jax.Array  # int32 [B]: tokens before which it must not end
    repetition: jax.Array  # float32 [B]
    presence: jax.Array  # float32 [B]
    frequency: jax.Array  # float32 [B]

    def apply(self, logits_BV: jax.Array) -> jax.Array:
        """``logits_BV`` with ids beyond those of the arrays as they were."""
        rest = logits_BV.shape[-1] - self.bias_BV.shape[-1]
        bias, counts, prompt, stops = (
            jnp.pad(x, ((0, 0), (0, rest))) for x in (self.bias_BV, self.counts_BV, self.prompt_BV, self.stops_BV)
        )
        edited = logits_BV + bias
        factor = jnp.where(edited > 0, 1 / self.repetition[:, None], self.repetition[:, None])
        edited = jnp.where((counts > 0) | prompt, edited * factor, edited)
        edited -= self.presence[:, None] * (counts > 0) + self.frequency[:, None] * counts
        too_early = stops & (self.length < self.minimum)[:, None]
        return jnp.where(too_early, LOWEST, jnp.maximum(edited, LOWEST))

    def count(self, tokens_B: jax.Array) -> "Edits":
        """With one more token of each answer; -1: none."""
        rows = jnp.arange(tokens_B.shape[0])
        places = jnp.where(tokens_B < 0, self.counts_BV.shape[-1], tokens_B)
        counts = self.counts_BV.at[rows, places].add(1, mode="drop")
        return self.replace(counts_BV=counts, length=self.length + (tokens_B >= 0))


def choose_greedy(
    logits_BV: jax.Array, *, vocab_size: int, allowed_BW=None, edits: Edits | None = None, tops: int = 0
) -> Choice:
    """The most probable id below ``vocab_size`` of every row, the lowest of those that tie.

    ``allowed_BW``: uint32 [B, ceil(vocab_size / 32)], bit i of word j is set where id 32 j + i may be chosen; None:
    all. ``tops``: how many of the model's most probable ids come along.
    """
    whole = _mask_vocabulary(logits_BV.astype(jnp.float32), vocab_size)
    edited = whole if edits is None else edits.apply(whole)
    logits = _leave_out(edited, allowed_BW)
    tokens, best_B1 = _find_best(logits, _split(logits).max(-1))
    log_total_B = _log_total(edited, best_B1, 1.0, above_best=allowed_BW is not None)
    kept_mass = jnp.minimum(jnp.exp(-log_total_B), 1)
    ones = jnp.ones_like(best_B1)
    model_B, tops_B = _model_logprobs(whole, tokens, best_B1, ones, log_total_B, edits is not None, tops)
    model_B = _mark_impossible(model_B, best_B1)
    return Choice(tokens, jnp.zeros_like(model_B), model_B, kept_mass, *tops_B)


def choose(
    logits_BV: jax.Array,
    uniforms_B2: jax.Array,
    temperature_B: jax.Array,
    *,
    vocab_size: int,
    filters: Filters | None = None,
    allowed_BW=None,
    edits: Edits | None = None,
    tops: int = 0,
) -> Choice:
    """One id below ``vocab_size`` per row, drawn with two uniform numbers in [0, 1) per row.

    A row of temperature 0 takes the most probable id, as ``choose_greedy`` does. Other temperatures divide the logits,
    after ``edits``; ids that are not ``allowed_BW`` (as in choose_greedy) are left out before ``filters``.
    """
    whole = _mask_vocabulary(logits_BV.astype(jnp.float32), vocab_size)
    edited = whole if edits is None else edits.apply(whole)
    logits = _leave_out(edited, allowed_BW)
    best_token_B, best_B1 = _find_best(logits, _split(logits).max(-1))
    is_greedy_B = temperature_B == 0
    scale_B1 = jnp.where(is_greedy_B, 1.0, temperature_B)[:, None]
    weights_BV = jnp.exp((logits - best_B1) / scale_B1)
    candidates_BV = weights_BV if filters is None else _filter(logits, weights_BV, filters)
    candidates_BCW = _split(candidates_BV)
    sums_BC = candidates_BCW.sum(-1)
    chunk_B = invert_cumulative(sums_BC, uniforms_B2[:, 0])
    within_B = invert_cumulative(_take_chunk(candidates_BCW, chunk_B), uniforms_B2[:, 1])
    drawn_B = (chunk_B * candidates_BCW.shape[-1] + within_B).astype(jnp.int32)
    tokens_B = jnp.where(is_greedy_B, best_token_B, drawn_B)

    log_kept_B = jnp.log(sums_BC.sum(-1))
    log_total_B = log_kept_B
    if allowed_BW is not None:
        log_total_B = _log_total(edited, best_B1, scale_B1, above_best=True)
    elif filters is not None:
        log_total_B = jnp.log(_sum(weights_BV))
    log_weight_B = (_take(logits, tokens_B) - best_B1[:, 0]) / scale_B1[:, 0]
    logprobs_B = jnp.where(is_greedy_B, 0.0, log_weight_B - log_kept_B)
    kept_mass_B = jnp.minimum(jnp.exp(jnp.where(is_greedy_B, 0.0, log_kept_B) - log_total_B), 1)
    model_B, tops_B = _model_logprobs(whole, tokens_B, best_B1, scale_B1, log_total_B, edits is not None, tops)
    model_B = _mark_impossible(model_B, best_B1)
    return Choice(tokens_B, logprobs_B, model_B, kept_mass_B, *tops_B)


def _find_best(logits_BV, chunk_best_BC):
    """(the id of the largest logit, the lowest of those that tie, int32 [B]; that logit [B, 1]).

    In two levels because an argmax over a long row is not vectorised on CPU: there it costs 10x a max.
    """
    chunk_B = jnp.argmax(chunk_best_BC, axis=-1)
    within_BW = _take_chunk(_split(logits_BV), chunk_B)
    tokens_B = chunk_B * within_BW.shape[-1] + jnp.argmax(within_BW, axis=-1)
    return tokens_B.astype(jnp.int32), within_BW.max(-1, keepdims=True)


def _filter(logits_BV, weights_BV, filters: Filters):
    """The weights with 0 for ids that ``filters`` leave out."""

    def keep_top_k(weights):
        size = weights.shape[-1]
        counts = jnp.where(filters.top_k > 0, filters.top_k, size).astype(jnp.float32)
        least_B1 = find_threshold(logits_BV, jnp.ones_like(weights), counts)[:, None]
        return jnp.where((logits_BV >= least_B1) | (filters.top_k <= 0)[:, None], weights, 0.0)

    def keep_top_p(weights):
        least_B1 = find_threshold(weights, weights, filters.top_p * _sum(weights))[:, None]
        return jnp.where((weights >= least_B1) | (filters.top_p >= 1)[:, None], weights, 0.0)

    unchanged = lambda weights: weights
    kept_BV = jax.lax.cond((filters.top_k > 0).any(), keep_top_k, unchanged, weights_BV)
    kept_BV = jax.lax.cond((filters.top_p < 1).any(), keep_top_p, unchanged, kept_BV)
    return jnp.where(kept_BV >= filters.min_p[:, None], kept_BV, 0.0)  # the best one's weight is 1


def _log_total(edited_BV, best_B1, scale_B1, *, above_best: bool):
    """Log of the sum of exp((logits - best) / temperature), [B]. ``above_best``: some may be far above the best."""
    if not above_best:
        return jnp.log(_sum(jnp.exp((edited_BV - best_B1) / scale_B1)))
    highest_B1 = _split(edited_BV).max(-1).max(-1)[:, None]
    log_total_B = jnp.log(_sum(jnp.exp((edited_BV - highest_B1) / scale_B1)))
    return log_total_B + ((highest_B1 - best_B1) / scale_B1)[:, 0]


def _model_logprobs(whole_BV, tokens_B, best_B1, scale_B1, log_total_B, edited: bool, tops: int):
    """Log-probabilities of ``tokens_B`` under the model before edits; (ids, log-probabilities) of the ``tops`` best."""
    if edited:  # the best edited logit may be far from the model's own: digits would be lost beside it
        best_B1 = _split(whole_BV).max(-1).max(-1)[:, None]
        log_total_B = _log_total(whole_BV, best_B1, scale_B1, above_best=False)
    # The best one subtracted first: logits over a small temperature are large numbers.
    logprobs_B = (_take(whole_BV, tokens_B) - best_B1[:, 0]) / scale_B1[:, 0] - log_total_B
    return logprobs_B, find_top(whole_BV, tops, best_B1, scale_B1, log_total_B) if tops else ()


def _mark_impossible(model_logprobs_B, best_B1):
    """-inf for rows in which no id may be chosen."""
    return jnp.where(best_B1[:, 0] <= LOWEST, -jnp.inf, model_logprobs_B)


def find_top(logits, count: int, best, scale, log_total):
    """(ids, log-probabilities) of the ``count`` largest of ``logits`` [..., V]; the others as in ``_log_total``."""
    values, ids = jax.lax.top_k(logits, count)
    return ids.astype(jnp.int32), (values - best) / scale - log_total[..., None]


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
        counted = jnp.where(values_BV >= _from_ordered(middle)[:, None], weights_BV, 0.0)
        reached = _sum(counted) >= targets_B
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
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, LOWEST)


def _leave_out(logits_BV, allowed_BW):
    if allowed_BW is None:
        return logits_BV
    bits = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(bits.shape[0], -1)
    size = logits_BV.shape[-1]
    bits = jnp.pad(bits, ((0, 0), (0, max(size - bits.shape[-1], 0))))[:, :size]
    return jnp.where(bits > 0, logits_BV, LOWEST)


def _split(x_BV):
    """[B, V] -> [B, C, W]: W is the largest power of two up to MAX_CHUNK that divides V."""
    return x_BV.reshape(x_BV.shape[0], -1, math.gcd(x_BV.shape[1], MAX_CHUNK))


def _sum(x_BV):
    """Of each row, [B]. In two levels, as a sum over a long row is not vectorised on CPU."""
    return _split(x_BV).sum(-1).sum(-1)


def _take(x_BV, index_B):
    return jnp.take_along_axis(x_BV, index_B[:, None], axis=-1)[:, 0]


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
