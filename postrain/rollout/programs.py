"""The engine's compiled programs, on a cache with a row for each request in work.

``prefill`` fills small caches with what prompts begin with; ``insert`` puts their rows into the cache of the slots;
``decode`` chooses up to STEPS tokens for every row that is open. What a row is asked (temperature, stop ids ...) is
arrays of one entry per row, so that requests of every kind stand in one batch and no request compiles anything.
Static are three answers alone: whether any row is drawn, whether any filters, and whether probabilities of the best ids
are wanted.

Shapes come from a short list of sizes (``bucket``), so that other prompts reuse compiled programs. On CPU the layers
and their caches are split (``models.transformer.split_layers``), elsewhere they are stacked.

Legend: B rows, P rows of a small cache, S new positions, M positions that a cache has room for, V ids.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from postrain.models.cache import KVCache, init_cache, insert_rows, resize_cache
from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden_cached, compute_logits
from postrain.rollout.requests import MAX_STOP_IDS
from postrain.rollout.sampling import Edits, Filters, choose, choose_greedy, find_top, make_uniforms
from postrain.sharding import constrain

PREFILL = 128  # prompt tokens per compiled call: bounds the scores held at once, [P, N, PREFILL, M]
STEPS = 32  # tokens of a row per compiled call at most
MAX_TOPS = 20  # most probable ids that a step finds where any row wants some
CACHE_AXES = ("batch", "kv_heads", None, None)


@flax.struct.dataclass
class Rows:
    """What each row is asked and where it stands: [B], on the host between calls. A row with none remaining is shut."""

    last: np.ndarray  # int32: the newest token, which is not in the cache
    positions: np.ndarray  # int32: of that token
    remaining: np.ndarray  # int32: tokens to come at most
    seeds: np.ndarray  # uint32
    sample_ids: np.ndarray  # uint32 [B, 2]: the low and the high half
    temperature: np.ndarray  # float32, 0: greedy
    filters: Filters
    stop_ids: np.ndarray  # int32 [B, MAX_STOP_IDS], -1: none


def make_rows(count: int) -> Rows:
    """Rows that are shut."""
    ints = lambda: np.zeros(count, np.int32)
    return Rows(
        last=ints(),
        positions=ints(),
        remaining=ints(),
        seeds=np.zeros(count, np.uint32),
        sample_ids=np.zeros((count, 2), np.uint32),
        temperature=np.zeros(count, np.float32),
        filters=Filters(top_k=ints(), top_p=np.ones(count, np.float32), min_p=np.zeros(count, np.float32)),
        stop_ids=np.full((count, MAX_STOP_IDS), -1, np.int32),
    )


@flax.struct.dataclass
class Chunk:
    """What ``decode`` chose: [B, STEPS], tokens -1 where there is none."""

    tokens: jax.Array
    logprobs: jax.Array
    model_logprobs: jax.Array
    kept_mass: jax.Array
    top_ids: jax.Array | None = None  # [B, STEPS, number of them]
    top_logprobs: jax.Array | None = None


def bucket(size: int, smallest: int = 64) -> int:
    """The least of smallest * (1, 1.5, 2, 3, 4, 6, 8, ...) that holds ``size``; for smallest 1: 1, 2, 3, 4, 6 ..."""
    power = smallest
    while power < size:
        power *= 2
    three_quarters = power * 3 // 4
    return three_quarters if size <= three_quarters and three_quarters > smallest else power


def _constrain_cache(cache: KVCache) -> KVCache:
    return jax.tree.map(lambda x: constrain(x, (None,) * (x.ndim - 4) + CACHE_AXES), cache)


def _whole(tree):
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), tree)


@functools.partial(jax.jit, static_argnames=("config", "rows", "length", "split"))
def make_cache(*, config: ModelConfig, rows: int, length: int, split: bool) -> KVCache:
    return _constrain_cache(init_cache(config, rows, length, split=split))


@functools.partial(jax.jit, static_argnames="length")
def resize(cache: KVCache, rows: jax.Array, *, length: int) -> KVCache:
    """The cache of ``rows`` (int32 [B'], each as often as it is named) with ``length`` positions each."""
    return _constrain_cache(resize_cache(cache, rows, length))


@functools.partial(jax.jit, donate_argnames="cache")
def insert(cache: KVCache, small: KVCache, sources: jax.Array, targets: jax.Array, count: jax.Array) -> KVCache:
    """Row ``sources[i]`` of ``small`` in the place of row ``targets[i]``, for the first ``count`` (int32 [B] both)."""
    return _constrain_cache(insert_rows(cache, small, sources, targets, count))


@functools.partial(jax.jit, static_argnames="length")
def extract(cache: KVCache, row: jax.Array, *, length: int) -> KVCache:
    """The first ``length`` positions of one row, as a cache of its own."""
    return resize_cache(cache, row[None], length)


@jax.jit
def is_finite(cache: KVCache) -> jax.Array:
    """Whether it holds numbers alone, bool []: 0 times NaN is NaN, so that attention would spread any other."""
    return _whole(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(cache)]).all())


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(params, cache: KVCache, tokens_PS, positions_PS, *, config: ModelConfig) -> KVCache:
    """``cache`` with tokens at their positions; those at position -1 are padding."""
    _, cache = compute_hidden_cached(params, config, tokens_PS, positions_PS, cache)
    return _constrain_cache(cache)


@functools.partial(jax.jit, static_argnames=("config", "tops"), donate_argnames="cache")
def prefill_scored(params, cache: KVCache, tokens_PS, positions_PS, targets_PS, *, config: ModelConfig, tops: int):
    """As ``prefill``; with log-probabilities [P, S] of what follows each token, and those of the ``tops`` best ids."""
    hidden, cache = compute_hidden_cached(params, config, tokens_PS, positions_PS, cache)
    logits = compute_logits(params, config, hidden)
    best = logits.max(-1, keepdims=True)
    total = jnp.log(jnp.exp(logits - best).sum(-1))
    chosen = jnp.take_along_axis(logits, targets_PS[..., None], axis=-1)[..., 0] - best[..., 0]
    found = find_top(logits, tops, best, jnp.ones_like(best), total)
    return _constrain_cache(cache), _whole((chosen - total, *found))


@functools.partial(jax.jit, static_argnames=("config", "sampled", "filtered", "tops"), donate_argnames="cache")
def decode(
    params,
    cache: KVCache,
    rows: Rows,
    limit,
    leave_early,
    edits: Edits | None,
    allowed_BW,
    *,
    config: ModelConfig,
    sampled: bool,
    filtered: bool,
    tops: int,
):
    """Up to ``limit`` (traced, at most STEPS) tokens for every row that is open: (cache, positions, remaining, Chunk).

    ``leave_early``: ends as soon as any row does. ``allowed_BW``: bits of the ids that may be chosen, uint32.
    """
    num_rows = rows.last.shape[0]
    was_open = rows.remaining > 0
    keys = _make_row_keys(rows.seeds, rows.sample_ids) if sampled else None
    floats = lambda: jnp.zeros((num_rows, STEPS), jnp.float32)
    chunk = Chunk(jnp.full((num_rows, STEPS), -1, jnp.int32), floats(), floats(), floats())
    if tops:
        shape = num_rows, STEPS, tops
        chunk = chunk.replace(top_ids=jnp.zeros(shape, jnp.int32), top_logprobs=jnp.zeros(shape, jnp.float32))
    options = {"vocab_size": config.vocab_size, "allowed_BW": allowed_BW, "tops": tops}

    def goes_on(carry):
        step, _, _, _, remaining, _, _ = carry
        some_ended = (was_open & (remaining == 0)).any()
        return (step < limit) & (remaining > 0).any() & ~(leave_early & some_ended)

    def advance(carry):
        step, cache, last, positions, remaining, edits, chunk = carry
        is_open = remaining > 0
        hidden, cache = compute_hidden_cached(
            params, config, last[:, None], jnp.where(is_open, positions, -1)[:, None], cache
        )
        logits = compute_logits(params, config, hidden[:, 0])
        if sampled:
            uniforms = make_uniforms(keys, positions + 1)
            filters = rows.filters if filtered else None
            choice = choose(logits, uniforms, rows.temperature, filters=filters, edits=edits, **options)
        else:
            choice = choose_greedy(logits, edits=edits, **options)
        tokens = jnp.where(is_open, choice.tokens, -1)
        stopped = (tokens[:, None] == rows.stop_ids).any(-1)
        new = Chunk(tokens, choice.logprobs, choice.model_logprobs, choice.kept_mass)
        new = new.replace(top_ids=choice.top_ids, top_logprobs=choice.top_logprobs)
        chunk = jax.tree.map(lambda out, x: jax.lax.dynamic_update_index_in_dim(out, x, step, axis=1), chunk, new)
        remaining = jnp.where(is_open & ~stopped, remaining - 1, 0)
        last, positions = jnp.where(is_open, tokens, last), positions + is_open
        return step + 1, cache, last, positions, remaining, None if edits is None else edits.count(tokens), chunk

    carry = jnp.int32(0), cache, rows.last, rows.positions, rows.remaining, edits, chunk
    _, cache, last, positions, remaining, _, chunk = jax.lax.while_loop(goes_on, advance, carry)
    return _constrain_cache(cache), *_whole((last, positions, remaining, chunk))


def _make_row_keys(seeds_B, sample_ids_B2):
    """A key of each row's own. It depends on seed and sample id alone."""

    def make(seed, sample_id):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample_id[0]), sample_id[1])

    return jax.vmap(make)(seeds_B, sample_ids_B2)
