"""Generation with a key-value cache, by the forward code that trains.

Prompts are sorted by length and taken ``batch_size`` at a time. Of each batch, all tokens but the last of
every prompt fill the cache, in pieces of up to PREFILL tokens. A common beginning of all prompts (a system message)
is computed once, and so is a prompt that occurs several times (a group of samples). Then compiled
calls of up to CHUNK steps feed the newest token of every row and choose the next one, until every row has
met a stop id or its limit. Rows are right-padded, and each has its own position: nothing is computed for
padding that a result could depend on.

Shapes come from a short list of sizes (``bucket``), so that calls with other prompts reuse compiled programs.
The cache starts with room for GROWTH new tokens and grows by half or a third when a row needs more: short
answers do not pay, at every step, for the longest one allowed.

The random numbers of a row depend on (seed, its index among the prompts, position) alone: not on ``batch_size``, the
other prompts or streaming. Rounding may still differ between batch sizes, as it does in any matrix product.

Under a mesh (parameters placed by ``postrain.sharding``) rows are split over ``data`` and ``fsdp``, key heads
over ``tensor``. Adapters may stand beside their kernels; on CPU they are merged into a copy on the way.

Legend: B rows, S new positions, M slots of the cache.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.models.cache import KVCache, grow_cache, init_cache, take_rows
from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden_cached, compute_logits, split_layers
from postrain.rollout.sampling import choose_greedy, choose_sampled, make_uniforms
from postrain.sharding import constrain, find_mesh, num_row_shards, to_host

PREFILL = 128  # prompt tokens per compiled call: bounds the scores held at once, [B, N, PREFILL, M]
MIN_SHARED = 32  # shortest common beginning of prompts that is computed once
CHUNK = 32  # decode steps per compiled call
GROWTH = 256  # new tokens that the first cache of a batch has room for
NOT_FINITE = "expected finite logits for its next token, found NaN: check the weights with `postrain verify`"
MAX_NEW_TOKENS = 2**24  # beyond any model's context: a typing error
CACHE_AXES = ("batch", "kv_heads", None, None)


class WrongSetting(UserError):
    """A value out of range. ``name``: its field of SamplingParams; ``rule``: what is expected."""

    def __init__(self, name: str, rule: str, value: float):
        super().__init__(f"sampling.{name} must be {rule}, found {value!r}")
        self.name, self.rule, self.value = name, rule, value


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy. Raises WrongSetting for values out of range."""

    temperature: float = 0.0
    top_p: float = 1.0  # the fewest most probable ids that reach this probability; 1: all
    top_k: int = 0  # at most this many most probable ids; 0: all
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()  # a row ends after the first of these, which is part of its tokens
    banned_ids: tuple[int, ...] = ()  # of the model's ids those that are never chosen
    seed: int = 0

    def __post_init__(self):
        rules = {
            # Below, float32 divides by 0; above, every token is as likely as any other.
            "temperature": ("0 (greedy), or 1e-6 to 1e6", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "top_k": ("at least 0", self.top_k >= 0),
            "max_new_tokens": (f"1 to {MAX_NEW_TOKENS}", 1 <= self.max_new_tokens <= MAX_NEW_TOKENS),
            "seed": ("0 to 2**32 - 1", 0 <= self.seed < 2**32),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise WrongSetting(name, rule, getattr(self, name))
        for name in ("stop_ids", "banned_ids"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens generated for one prompt. Arrays are float32 [len(tokens)]."""

    tokens: list[int]  # with the stop id, when one was met
    logprobs: np.ndarray  # under what was sampled from, after temperature, banned ids, top-k, top-p; 0 when greedy
    model_logprobs: np.ndarray  # under the model at that temperature, whole vocabulary; greedy: at temperature 1
    finished: bool  # by a stop id; False: cut at max_new_tokens


def generate(
    params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams = SamplingParams(),
    *,
    batch_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One completion per prompt of token ids, in the order given.

    ``params`` is the whole tree (``merge_params`` of trained and frozen parameters). ``batch_size`` rows are
    generated together (default 32). ``on_token(row, token_id)`` is called for each token as soon as it is
    known, stop ids too; it makes every step a call of its own.
    Raises UserError for an empty prompt, an id outside the vocabulary, and logits that are not finite. Warns
    where prompt and new tokens may pass ``config.max_positions``.
    """
    batches = generate_batches(params, config, prompts, sampling, batch_size=batch_size, on_token=on_token)
    completions = {row: completion for batch in batches for row, completion in batch.items()}
    return [completions[row] for row in range(len(prompts))]


def generate_batches(
    params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams = SamplingParams(),
    *,
    batch_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Iterator[dict[int, Completion]]:
    """As ``generate``; yields prompt's index -> completion, ``batch_size`` at a time, the longest prompts first."""
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    _check_prompts(prompts, config, sampling)
    batch_size = 32 if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, found {batch_size}")
    mesh = find_mesh(params)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    if jax.default_backend() == "cpu":
        params = split_layers(params, config)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            batch = _generate_batch(params, config, prompts, rows, sampling, on_token)
        yield dict(zip(rows, batch, strict=True))


def bucket(size: int, smallest: int = 64) -> int:
    """The least of smallest * (1, 1.5, 2, 3, 4, 6, 8, ...) that holds ``size``; for smallest 1: 1, 2, 3, 4, 6 ..."""
    power = smallest
    while power < size:
        power *= 2
    three_quarters = power * 3 // 4
    return three_quarters if size <= three_quarters and three_quarters > smallest else power


def _check_prompts(prompts, config, sampling):
    for row, prompt in enumerate(prompts):
        if prompt.ndim != 1 or prompt.size == 0:
            raise UserError(f"prompt {row} is empty: generation needs at least one token to start from")
        low, high = prompt.min(), prompt.max()
        if low < 0 or high >= config.vocab_size:
            found = low if low < 0 else high
            raise UserError(
                f"prompt {row} has token id {found}, outside the model's vocabulary of {config.vocab_size}: "
                "encode it with this model's tokenizer"
            )
    longest = max(map(len, prompts), default=0)
    if longest + sampling.max_new_tokens > config.max_positions:
        warnings.warn(
            f"{longest} prompt tokens + {sampling.max_new_tokens} new ones may pass the {config.max_positions} "
            "positions that the model was pre-trained for: text beyond them may be poor",
            stacklevel=4,
        )


def _generate_batch(params, config, prompts, rows, sampling, on_token):
    num_rows = _num_rows(len(rows))
    lengths = np.zeros(num_rows, np.int32)
    lengths[: len(rows)] = [len(prompts[row]) for row in rows]
    last = np.zeros(num_rows, np.int32)
    last[: len(rows)] = [prompts[row][-1] for row in rows]
    last_slot = int(lengths.max()) + sampling.max_new_tokens
    num_slots = bucket(min(last_slot, int(lengths.max()) + GROWTH))
    cache = _prefill(params, config, [prompts[row][:-1] for row in rows], num_slots)
    chunks = []
    for chunk in _decode(params, config, cache, last, lengths - 1, rows, last_slot, sampling, on_token is not None):
        chunks.append(chunk)
        for step, i in np.argwhere(chunk[0].T >= 0):
            if not np.isfinite(chunk[2][i, step]):
                raise UserError(f"prompt {rows[i]}: {NOT_FINITE}")
            if on_token is not None:
                on_token(rows[i], int(chunk[0][i, step]))
    tokens, logprobs, model_logprobs = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    completions = []
    for i in range(len(rows)):
        length = (tokens[i] >= 0).sum()
        ids = tokens[i, :length].tolist()
        finished = ids[-1] in sampling.stop_ids
        completions.append(Completion(ids, logprobs[i, :length], model_logprobs[i, :length], finished))
    return completions


def _num_rows(count: int) -> int:
    """Rows of the arrays that hold ``count``: a bucket, and a multiple of the mesh's row shards."""
    mesh = jax.sharding.get_abstract_mesh()
    num_rows = bucket(count, 1)
    return num_rows if mesh.empty else num_rows + -num_rows % num_row_shards(mesh)


def _prefill(params, config, contexts, num_slots) -> KVCache:
    """A cache whose row i holds ``contexts[i]`` (int32 ids, may be none); ``_num_rows(len(contexts))`` rows."""
    distinct = list({context.tobytes(): context for context in contexts}.values())
    # The ids that all of them begin with are computed once.
    shortest = min(map(len, distinct))
    heads = np.stack([context[:shortest] for context in distinct])
    differ = (heads != heads[0]).any(0)
    shared = int(differ.argmax()) if differ.any() else shortest
    split = isinstance(params["layers"], tuple)
    if len(distinct) > 1 and shared >= MIN_SHARED:
        cache = _make_cache(config, 1, num_slots, split)
        cache = _fill(params, config, cache, [distinct[0][:shared]], 0)
        cache = _take_rows(cache, np.zeros(_num_rows(len(distinct)), np.int32))
    else:
        shared, cache = 0, _make_cache(config, _num_rows(len(distinct)), num_slots, split)
    cache = _fill(params, config, cache, distinct, shared)
    if len(distinct) == len(contexts):
        return cache
    index = {context.tobytes(): i for i, context in enumerate(distinct)}
    rows = np.zeros(_num_rows(len(contexts)), np.int32)
    rows[: len(contexts)] = [index[context.tobytes()] for context in contexts]
    return _take_rows(cache, rows)


def _fill(params, config, cache, contexts, start) -> KVCache:
    """Writes ``contexts`` from position ``start`` on, which the cache holds up to there."""
    counts = np.zeros(cache.num_rows, np.int32)
    counts[: len(contexts)] = [len(context) for context in contexts]
    while start < counts.max():
        size = min(PREFILL, bucket(int(counts.max()) - start, 16))
        positions = np.arange(start, start + size, dtype=np.int32)
        tokens = np.zeros((cache.num_rows, size), np.int32)
        for row, context in enumerate(contexts):
            part = context[start : start + size]
            tokens[row, : len(part)] = part
        positions = np.where(positions < counts[:, None], positions, -1)
        cache = _prefill_piece(params, tokens, positions, cache, config=config)
        start += size
    return cache


def _decode(params, config, cache, last, positions, rows, last_slot, sampling, streaming) -> Iterator[tuple]:
    """Yields (tokens, logprobs, model_logprobs) [B, steps] of each compiled call; token -1: none, the row is done."""
    num_rows = last.shape[0]
    remaining = np.where(np.arange(num_rows) < len(rows), sampling.max_new_tokens, 0).astype(np.int32)
    row_ids = np.zeros(num_rows, np.int32)
    row_ids[: len(rows)] = rows
    keys = _make_row_keys(np.uint32(sampling.seed), row_ids)
    steps = 1 if streaming else CHUNK
    stop_ids = np.full(bucket(len(sampling.stop_ids), 8), -1, np.int32)
    stop_ids[: len(sampling.stop_ids)] = sampling.stop_ids
    allowed = None
    if sampling.banned_ids:
        allowed = np.ones(config.vocab_size, bool)
        allowed[list(sampling.banned_ids)] = False
    choose = {
        "temperature": np.float32(sampling.temperature) if sampling.temperature > 0 else None,
        "top_p": np.float32(sampling.top_p) if sampling.top_p < 1 else None,
        "top_k": sampling.top_k,
        "allowed": allowed,
    }
    while remaining.any():
        needed = min(int(positions[remaining > 0].max()) + 1 + steps, last_slot)
        if needed > cache.num_slots:
            cache = _grow_cache(cache, num_slots=bucket(needed))
        cache, *state, chunk = _decode_chunk(
            params, cache, last, positions, remaining, keys, stop_ids, config=config, steps=steps, **choose
        )
        last, positions, remaining = map(to_host, state)
        yield tuple(map(to_host, chunk))


def _constrain_cache(cache: KVCache) -> KVCache:
    return jax.tree.map(lambda x: constrain(x, (None,) * (x.ndim - 4) + CACHE_AXES), cache)


@functools.partial(jax.jit, static_argnames=("config", "num_rows", "num_slots", "split"))
def _make_cache(config, num_rows, num_slots, split):
    return _constrain_cache(init_cache(config, num_rows, num_slots, split=split))


@functools.partial(jax.jit, static_argnames="num_slots")
def _grow_cache(cache, num_slots):
    return _constrain_cache(grow_cache(cache, num_slots))


@jax.jit
def _take_rows(cache, rows):
    return _constrain_cache(take_rows(cache, rows))


@jax.jit
def _make_row_keys(seed, row_ids_B):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(row_ids_B)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill_piece(params, tokens_BS, positions_BS, cache, *, config):
    _, cache = compute_hidden_cached(params, config, tokens_BS, positions_BS, cache)
    return _constrain_cache(cache)


@functools.partial(jax.jit, static_argnames=("config", "steps", "top_k"), donate_argnames="cache")
def _decode_chunk(
    params,
    cache,
    last_B,
    positions_B,
    remaining_B,
    row_keys_B,
    stop_ids,
    *,
    config,
    steps,
    allowed,
    temperature,
    top_k,
    top_p,
):
    """Up to ``steps`` tokens for every row whose ``remaining`` is above 0, which becomes 0 at a stop id.

    ``last_B`` is the newest token of each row, at ``positions_B``, not yet in the cache.
    """
    shape = last_B.shape[0], steps
    chosen = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)

    def is_open(carry):
        step, _, _, _, remaining, _ = carry
        return (step < steps) & (remaining > 0).any()

    def advance(carry):
        step, cache, last, positions, remaining, chosen = carry
        active = remaining > 0
        hidden, cache = compute_hidden_cached(
            params, config, last[:, None], jnp.where(active, positions, -1)[:, None], cache
        )
        logits = compute_logits(params, config, hidden[:, 0])
        if temperature is None:
            choice = choose_greedy(logits, vocab_size=config.vocab_size, allowed_V=allowed)
        else:
            choice = choose_sampled(
                logits,
                make_uniforms(row_keys_B, positions + 1),
                vocab_size=config.vocab_size,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                allowed_V=allowed,
            )
        tokens = jnp.where(active, choice.tokens, -1)
        stopped = (tokens[:, None] == stop_ids).any(-1)
        chosen = tuple(
            jax.lax.dynamic_update_slice_in_dim(out, new[:, None], step, axis=1)
            for out, new in zip(chosen, (tokens, choice.logprobs, choice.model_logprobs), strict=True)
        )
        remaining = jnp.where(active & ~stopped, remaining - 1, 0)
        return step + 1, cache, jnp.where(active, tokens, last), positions + active, remaining, chosen

    carry = jnp.int32(0), cache, last_B, positions_B, remaining_B, chosen
    _, cache, last, positions, remaining, chosen = jax.lax.while_loop(is_open, advance, carry)
    small = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), (last, positions, remaining, chosen))
    return _constrain_cache(cache), *small
