"""Beam search by the forward code that trains, with a key-value cache; exact over a trie of allowed sequences.

All tokens but the last of every prompt fill one cache, a row for each prompt. Then each step takes the rows that the
chosen beams go on from, feeds the newest token of each, and hands to the host the log-probabilities of what may come
next: the best ids of each row, or the children of its node in the trie. The host ranks them.

Scores are sums of the model's own log-probabilities over its whole vocabulary, also under a trie or with banned ids:
what may not be generated is left out, and the rest is not renormalised. With as many beams as a trie has sequences,
none is ever dropped, and the result is the ranking of all of them by full log-likelihood.

Without a trie the search is that of transformers' ``generate(num_beams=..., early_stopping=False)``: a beam that ends
counts only where it is among the best ``num_beams`` continuations of its step, and a prompt is done when no open beam
is better than the worst of ``num_beams`` that have ended.

Legend: P prompts, K beams, R rows (P, then P K), C candidates of a row, V' padded vocabulary.
"""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.models.cache import KVCache, init_cache, resize_cache
from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden_cached, compute_logits, split_layers
from postrain.rollout.constraints.trie import Trie
from postrain.rollout.engine import NOT_FINITE
from postrain.rollout.programs import CACHE_AXES, PREFILL, bucket
from postrain.sharding import constrain, find_mesh, num_row_shards, to_host

BLOCK = 32  # rows whose logits are held at once
ROWS = 64  # beams of several prompts that are fed together, where batch_size is not given


class Beam(NamedTuple):
    """A sequence that the search has found."""

    tokens: list[int]  # with the stop id, where one was met
    logprob: float  # the sum of the model's log p of the tokens, at temperature 1
    score: float  # logprob / len(tokens) ** length_penalty, by which beams are ranked
    finished: bool  # by a stop id, or at the end of a sequence of the trie; False: cut at max_new_tokens
    row: int = -1  # of the trie's sequences


@dataclasses.dataclass(frozen=True)
class _Settings:
    num_beams: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    length_penalty: float


def search_beams(
    params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    trie: Trie | None = None,
    length_penalty: float = 0.0,
    batch_size: int | None = None,
) -> list[list[Beam]]:
    """The best continuations of each prompt of token ids, best first.

    Args:
        params: the whole tree (``merge_params`` of trained and frozen parameters).
        config: of the model.
        prompts: ids; those of one call may differ in length.
        num_beams: sequences that are followed, and returned; fewer come back where the trie has fewer.
        max_new_tokens: a sequence is cut there. At least the depth of the trie.
        stop_ids: a sequence ends after the first of these. A trie has its own.
        banned_ids: ids that are never chosen, such as those of the model that are no tokens.
        trie: of the sequences that may be generated; None: all.
        length_penalty: scores are divided by the length to this power; 0: the log-likelihood itself.
        batch_size: prompts that are searched together.

    Raises UserError for an empty prompt, an id outside the vocabulary, a setting out of range, a trie of another
    vocabulary, that is deeper than ``max_new_tokens`` or has banned ids, more keys and values than there is memory for,
    and logits that are not finite. Warns where prompts and new tokens may pass ``config.max_positions``.
    """
    settings = _Settings(num_beams, max_new_tokens, tuple(stop_ids), float(length_penalty))
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    _check(prompts, config, settings, trie, banned_ids)
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > config.max_positions:
        warnings.warn(
            f"{longest} prompt tokens + {max_new_tokens} new ones may pass the {config.max_positions} positions that "
            "the model was pre-trained for: scores beyond them may be poor",
            stacklevel=2,
        )
    batch_size = max(1, ROWS // num_beams) if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, found {batch_size}")
    allowed = np.ones(config.vocab_size, bool)
    allowed[list(banned_ids)] = False
    mesh = find_mesh(params)
    if jax.default_backend() == "cpu":
        params = split_layers(params, config)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    found: dict[int, list[Beam]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            batch = _search_batch(params, config, [prompts[row] for row in rows], rows, settings, trie, allowed)
        found |= dict(zip(rows, batch, strict=True))
    return [found[row] for row in range(len(prompts))]


def _check(prompts, config: ModelConfig, settings: _Settings, trie: Trie | None, banned_ids) -> None:
    for row, prompt in enumerate(prompts):
        if prompt.ndim != 1 or prompt.size == 0:
            raise UserError(f"prompt {row} is empty: a search needs at least one token to start from")
        if prompt.min() < 0 or prompt.max() >= config.vocab_size:
            found = prompt.min() if prompt.min() < 0 else prompt.max()
            raise UserError(f"prompt {row} has token id {found}, outside the model's vocabulary of {config.vocab_size}")
    if settings.num_beams < 1 or settings.max_new_tokens < 1:
        raise UserError(
            f"num_beams and max_new_tokens must be at least 1, found {settings.num_beams} and {settings.max_new_tokens}"
        )
    for name, ids in (("stop_ids", settings.stop_ids), ("banned_ids", banned_ids)):
        if wrong := [i for i in ids if not 0 <= i < config.vocab_size]:
            raise UserError(f"{name} has {wrong[0]}, outside the model's vocabulary of {config.vocab_size}")
    if trie is None:
        return
    if trie.vocab_size != config.vocab_size:
        raise UserError(f"the trie is of a vocabulary of {trie.vocab_size}, the model of {config.vocab_size}")
    if trie.depth > settings.max_new_tokens:
        raise UserError(
            f"the longest sequence of the trie has {trie.depth} ids, max_new_tokens is {settings.max_new_tokens}: "
            "raise it, or the search could end nowhere"
        )
    if (wrong := np.intersect1d(trie.tokens, np.asarray(banned_ids, np.int64))).size:
        raise UserError(f"the trie has id {wrong[0]}, which is banned: it may be no token of the tokenizer")


def _check_memory(config: ModelConfig, num_rows: int, num_slots: int, mesh) -> None:
    """Raises UserError where the keys and values of two steps, which are held together, exceed all of the memory."""
    device = jax.devices()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if stats := device.memory_stats():
        memory = stats["bytes_limit"] * max(1, mesh.size)
    cache = jax.eval_shape(functools.partial(init_cache, config, num_rows, num_slots))
    needed = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    if needed > memory:
        raise UserError(
            f"{num_rows:,} beams of {num_slots:,} tokens need {needed / 1e9:,.1f} GB for their keys and values, there "
            f"are {memory / 1e9:,.1f} GB: lower num_beams, max_new_tokens or batch_size"
        )


def _search_batch(params, config, prompts, numbers, settings: _Settings, trie, allowed) -> list[list[Beam]]:
    mesh = jax.sharding.get_abstract_mesh()
    num_prompts = bucket(len(prompts), 1)
    num_prompts += 0 if mesh.empty else -num_prompts % num_row_shards(mesh)
    lengths = np.zeros(num_prompts, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    num_slots = bucket(int(lengths.max()) + settings.max_new_tokens)
    _check_memory(config, num_prompts * settings.num_beams, num_slots, mesh)
    cache = _prefill(params, config, prompts, num_prompts, num_slots)
    searches = [_Search(settings, trie) for _ in prompts]
    rows, tokens, positions = np.arange(num_prompts, dtype=np.int32), np.zeros(num_prompts, np.int32), lengths - 1
    tokens[: len(prompts)] = [prompt[-1] for prompt in prompts]
    width = 1  # rows of a prompt
    for step in range(settings.max_new_tokens):
        children = None if trie is None else _gather_children(searches, num_prompts, width)
        ids = None if children is None else children[0]
        size = min(config.vocab_size, max(2, 1 + len(settings.stop_ids)) * settings.num_beams)
        values, chosen, cache = _step(
            params, cache, rows, tokens, positions, ids, allowed, config=config, size=size, in_blocks=mesh.empty
        )
        values, chosen = to_host(values), to_host(chosen)
        for i, search in enumerate(searches):
            of_prompt = slice(i * width, i * width + len(search.scores))
            if np.isnan(values[of_prompt]).any():
                raise UserError(f"prompt {numbers[i]}: {NOT_FINITE}")
            states = None if children is None else children[1][of_prompt]
            search.advance(values[of_prompt], chosen[of_prompt], states, step)
        if not any(len(search.scores) for search in searches):
            break
        # A row for each beam of each prompt; those that no beam has are fed nothing.
        beams, before, width = settings.num_beams, width, settings.num_beams
        rows, tokens, positions = (np.zeros(num_prompts * beams, np.int32) for _ in range(3))
        positions[:] = -1
        for i, search in enumerate(searches):
            part = slice(i * beams, i * beams + len(search.scores))
            rows[part] = i * before + search.parents
            tokens[part] = [path[-1] for path in search.paths]
            positions[part] = lengths[i] + step
    return [search.ended for search in searches]


def _gather_children(searches: "list[_Search]", num_prompts: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and states that follow the nodes of all beams, int32 [R, C], -1 where a node has fewer."""
    states = np.full(num_prompts * width, -1, np.int64)
    for i, search in enumerate(searches):
        states[i * width : i * width + len(search.scores)] = search.states
    trie = searches[0].trie
    starts = np.where(states < 0, 0, trie.offsets[states])
    counts = np.where(states < 0, 0, trie.offsets[states + 1] - starts)
    steps = np.arange(bucket(int(counts.max()), 8))
    edges, exists = starts[:, None] + steps, steps < counts[:, None]
    ids = np.where(exists, trie.tokens[np.minimum(edges, len(trie.tokens) - 1)], -1)
    return ids.astype(np.int32), np.where(exists, edges + 1, -1)


class _Search:
    """The beams of one prompt: those that go on, and the best of those that have ended."""

    def __init__(self, settings: _Settings, trie: Trie | None):
        self.settings, self.trie = settings, trie
        self.ended: list[Beam] = []  # best first
        self.scores = np.zeros(1)  # of open beams, their log p
        self.paths: list[list[int]] = [[]]
        self.parents = np.zeros(1, np.int64)  # the place of each open beam's beginning among those before
        self.states = np.zeros(1, np.int64)

    def advance(self, values: np.ndarray, ids: np.ndarray, states: np.ndarray | None, step: int) -> None:
        """Takes the log p [k, C] of ``ids`` after each of the k open beams, -inf for what may not come."""
        if not len(self.scores):
            return
        num_beams, width = self.settings.num_beams, values.shape[1]
        totals = (self.scores[:, None] + values.astype(np.float64)).ravel()
        ranked = np.argsort(-totals, kind="stable")
        ranked = ranked[totals[ranked] > -np.inf]
        tokens = ids.ravel()[ranked]
        if states is None:
            ranked = ranked[: max(2, 1 + len(self.settings.stop_ids)) * num_beams]
            tokens = tokens[: len(ranked)]
            is_stop = np.isin(tokens, self.settings.stop_ids)
            is_end = is_stop | (step + 1 == self.settings.max_new_tokens)
            enters = is_end & (np.arange(len(ranked)) < num_beams)
            after = rows = np.full(len(ranked), -1)
        else:
            after = states.ravel()[ranked]
            rows = self.trie.rows[after]
            is_stop = is_end = enters = rows >= 0
        for place in np.flatnonzero(enters)[:num_beams]:
            path = [*self.paths[ranked[place] // width], int(tokens[place])]
            total = float(totals[ranked[place]])
            score = total / len(path) ** self.settings.length_penalty
            self.ended.append(Beam(path, total, score, bool(is_stop[place]), int(rows[place])))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:num_beams]  # stable: the earlier one first
        open_ones = np.flatnonzero(~is_end)[:num_beams]
        self.parents = ranked[open_ones] // width
        self.paths = [
            [*self.paths[parent], int(token)] for parent, token in zip(self.parents, tokens[open_ones], strict=True)
        ]
        self.scores, self.states = totals[ranked[open_ones]], after[open_ones]
        if self._is_settled(step + 1):
            self.scores, self.paths, self.parents = self.scores[:0], [], self.parents[:0]
            self.states = self.states[:0]

    def _is_settled(self, length: int) -> bool:
        """Whether no open beam can be better than the worst that has ended."""
        penalty = self.settings.length_penalty
        if len(self.ended) < self.settings.num_beams or not len(self.scores):
            return False
        if self.trie is not None and penalty != 0:
            return False  # a longer sequence may have a better score
        return self.scores[0] / length**penalty <= self.ended[-1].score


# --- on the device ---


def _prefill(params, config, prompts, num_prompts: int, num_slots: int) -> KVCache:
    """A cache whose row i holds all of ``prompts[i]`` but its last token."""
    cache = _make_cache(config, num_prompts, num_slots, isinstance(params["layers"], tuple))
    counts = np.zeros(num_prompts, np.int32)
    counts[: len(prompts)] = [len(prompt) - 1 for prompt in prompts]
    start = 0
    while start < counts.max():
        size = min(PREFILL, bucket(int(counts.max()) - start, 16))
        positions = np.arange(start, start + size, dtype=np.int32)
        tokens = np.zeros((num_prompts, size), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[:-1][start : start + size]
            tokens[row, : len(part)] = part
        positions = np.where(positions < counts[:, None], positions, -1)
        cache = _prefill_piece(params, cache, tokens, positions, config=config)
        start += size
    return cache


def _constrain_cache(cache: KVCache) -> KVCache:
    return jax.tree.map(lambda x: constrain(x, (None,) * (x.ndim - 4) + CACHE_AXES), cache)


@functools.partial(jax.jit, static_argnames=("config", "num_rows", "num_slots", "split"))
def _make_cache(config, num_rows, num_slots, split):
    return _constrain_cache(init_cache(config, num_rows, num_slots, split=split))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill_piece(params, cache, tokens_PS, positions_PS, *, config):
    _, cache = compute_hidden_cached(params, config, tokens_PS, positions_PS, cache)
    return _constrain_cache(cache)


# The cache is not donated: its rows change places, so that the new one can never be written over it.
@functools.partial(jax.jit, static_argnames=("config", "size", "in_blocks"))
def _step(params, cache, rows_R, tokens_R, positions_R, children_RC, allowed_V, *, config, size, in_blocks):
    """Feeds one token to each row, which goes on from row ``rows_R`` of the cache.

    Returns log p [R, C] and ids [R, C] of what may come next: ``children_RC``, -inf where they are -1, or without them
    the ``size`` best of ``allowed_V``; and the cache of the R rows.
    """
    cache = _constrain_cache(resize_cache(cache, rows_R, cache.num_slots))
    hidden, cache = compute_hidden_cached(params, config, tokens_R[:, None], positions_R[:, None], cache)

    def rank(inputs):
        hidden_RD, children = inputs
        logits = compute_logits(params, config, hidden_RD)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        if children is not None:
            chosen = jnp.take_along_axis(logits, jnp.maximum(children, 0), axis=-1)
            return jnp.where(children >= 0, chosen - total, -jnp.inf), children
        may_come = jnp.pad(allowed_V, (0, logits.shape[-1] - allowed_V.shape[0]))
        best, ids = jax.lax.top_k(jnp.where(may_come, logits, -jnp.inf), size)
        return best - total, ids

    inputs = hidden[:, 0], children_RC
    num_rows = hidden.shape[0]
    if in_blocks and num_rows > BLOCK:  # logits of a block of rows at a time
        pad = lambda x: jnp.pad(x, ((0, -num_rows % BLOCK), (0, 0))).reshape(-1, BLOCK, x.shape[-1])
        values, ids = jax.lax.map(rank, jax.tree.map(pad, inputs))
        values, ids = (x.reshape(-1, x.shape[-1])[:num_rows] for x in (values, ids))
    else:
        values, ids = rank(inputs)
    values, ids = (constrain(x, (None, None)) for x in (values, ids))
    return values, ids, _constrain_cache(cache)
