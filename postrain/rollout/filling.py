"""Prompts on their way into the cache: small caches, in pieces, with what the prefix store has.

All tokens of a prompt but the last go through the model in pieces of up to PREFILL tokens, up to MAX_FILL prompts at a
time. A group of samples and a common beginning of prompts are computed once.

Legend: P rows of a small cache, S new positions.
"""

import collections
import dataclasses

import numpy as np

from postrain.models.cache import KVCache
from postrain.models.config import ModelConfig
from postrain.rollout import programs
from postrain.rollout.prefixes import BLOCK, PrefixStore, count_common
from postrain.rollout.programs import MAX_TOPS, PREFILL
from postrain.rollout.requests import Request, TopLogprobs
from postrain.rollout.slots import Slots, as_moves
from postrain.rollout.weights import Weights
from postrain.sharding import to_host

MAX_FILL = 8  # prompts that go through the model together
MIN_FILL = 32  # positions of a piece at least
MIN_SHARED = 32  # shortest common beginning of prompts that is computed once


@dataclasses.dataclass
class Filling:
    """Prompts on their way into the cache."""

    requests: list[Request]
    contexts: list[np.ndarray]  # distinct, each a row of ``cache``
    rows: dict[int, int]  # handle -> row
    done: np.ndarray  # positions of each that the cache holds
    cache: KVCache | None
    version: int  # of the weights, when it began
    scores: list[tuple] = dataclasses.field(default_factory=list)  # of the prompt's tokens, piece by piece


class Filler:
    """Takes requests out of the queue, computes what their prompts need, and gives them their slots."""

    def __init__(self, config: ModelConfig, weights: Weights, slots: Slots, prefixes: PrefixStore):
        self.config, self.weights, self.slots, self.prefixes = config, weights, slots, prefixes
        self.filling: Filling | None = None

    @property
    def requests(self) -> list[Request]:
        """Those that are no longer in the queue, and not in a slot yet."""
        return [] if self.filling is None else self.filling.requests

    def drop(self, request: Request) -> None:
        """Takes a request out; the filling goes on for the others."""
        self.requests.remove(request)
        if not self.requests:
            self.filling = None

    def clear(self) -> list[Request]:
        """Takes all requests out, which have to begin anew."""
        requests, self.filling = self.requests, None
        return requests

    def fill(self, queue: collections.deque[Request]) -> None:
        """One piece of the prompts that are next; those that are whole get their slots.

        After an exception they wait at the head of the queue again: their small cache may be lost.
        """
        filling = self.filling = self.filling or self._begin(queue)
        try:
            left = np.array([len(context) for context in filling.contexts]) - filling.done
            if left.max() > 0:
                self._fill_piece(filling, min(PREFILL, power_of_two(int(left.max()), MIN_FILL)))
            if all(len(context) == done for context, done in zip(filling.contexts, filling.done, strict=True)):
                self._finish(filling, len(queue))
                self.filling = None
        except Exception:
            queue.extendleft(reversed(self.clear()))
            raise

    def _begin(self, queue: collections.deque[Request]) -> Filling:
        """Takes the next requests from the queue, or only computes what several begin with.

        Requests go together while slots are free, their prompts, each counted once, are at most MAX_FILL, and take as
        many pieces as the first. One whose prompt is scored goes alone.
        """
        requests, contexts = [], {}
        for request in queue:
            context, scored = request.context, _is_scored(request)
            if len(requests) == self.slots.num_free or (requests and (scored or _is_scored(requests[0]))):
                break
            if context.tobytes() not in contexts:
                first = next(iter(contexts.values()), context)
                if len(contexts) == MAX_FILL or -(-len(context) // PREFILL) != -(-len(first) // PREFILL):
                    break
            contexts.setdefault(context.tobytes(), context)
            requests.append(request)
        distinct = list(contexts.values())
        found = [
            (0, None) if _is_scored(requests[0]) else self.prefixes.find(self.weights.version, c) for c in distinct
        ]
        shared = min((count_common(distinct[0], context) for context in distinct[1:]), default=0) // BLOCK * BLOCK
        is_new = shared - min(done for done, _ in found) >= MIN_SHARED
        is_new = is_new and not self.prefixes.has(self.weights.version, distinct[0][:shared])  # but not finite
        if is_new and self.slots.row_bytes(shared) <= self.prefixes.max_bytes:
            return self._make_filling([], [distinct[0][:shared]], found[:1])
        filling = self._make_filling(requests, distinct, found)
        for _ in requests:
            queue.popleft()
        return filling

    def _make_filling(self, requests, contexts, found) -> Filling:
        """A small cache with what the prefix store has of each context."""
        done = np.array([min(done, len(context)) for (done, _), context in zip(found, contexts, strict=True)], np.int32)
        longest = max(map(len, contexts))
        if longest == 0:
            cache = None
        elif len(contexts) == 1 and done[0] == longest and self.slots.shards == 1:
            cache = found[0][1]
        else:
            cache = self.slots.make_cache(self._count_rows(len(contexts)), self.slots.round_up(longest))
            for row, (count, kept) in enumerate(found):
                if count:
                    cache = programs.insert(cache, kept, *as_moves([0], [row], 1))
        rows: dict[bytes, int] = {context.tobytes(): row for row, context in enumerate(contexts)}
        of_request = [rows[request.context.tobytes()] for request in requests]
        for i, (request, row) in enumerate(zip(requests, of_request, strict=True)):
            if not request.tokens:  # of a group, all but the first take over the whole of it
                request.cached_tokens = int(done[row]) if row not in of_request[:i] else len(contexts[row])
            request.cache_version = self.weights.version
        handles = [request.handle for request in requests]
        return Filling(
            requests, contexts, dict(zip(handles, of_request, strict=True)), done, cache, self.weights.version
        )

    def _fill_piece(self, filling: Filling, size: int) -> None:
        shape = filling.cache.num_rows, size
        tokens, positions, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        for row, (context, done) in enumerate(zip(filling.contexts, filling.done, strict=True)):
            part = context[done : done + size]
            tokens[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(done, done + len(part))
        params, config = self.weights.tree, self.config
        scored = filling.requests[0] if filling.requests and _is_scored(filling.requests[0]) else None
        if scored is None:
            filling.cache = programs.prefill(params, filling.cache, tokens, positions, config=config)
        else:
            done = int(filling.done[0])
            part = scored.prompt[done + 1 : done + 1 + size]
            targets[0, : len(part)] = part
            filling.cache, scores = programs.prefill_scored(
                params, filling.cache, tokens, positions, targets, config=config, tops=MAX_TOPS
            )
            filling.scores.append(tuple(to_host(x)[0, : len(part)] for x in scores))
        filling.done = np.minimum(filling.done + size, [len(context) for context in filling.contexts])

    def _finish(self, filling: Filling, waiting: int) -> None:
        """Rows of the small cache go to the slots of their requests, and into the prefix store."""
        for row, context in enumerate(filling.contexts):
            if len(context) and filling.version == self.weights.version and filling.cache is not None:
                self.keep(context, filling.cache, row, filled=True)
        if not filling.requests:
            return
        for request in filling.requests:
            if _is_scored(request):
                _note_scores(request, filling.scores)
        sources = [filling.rows[request.handle] for request in filling.requests]
        self.slots.insert(filling.requests, filling.cache, sources, waiting)

    def keep(self, ids: np.ndarray, cache: KVCache, row: int, *, filled: bool = False) -> None:
        """Puts the row of ``cache`` that holds ``ids`` into the prefix store: a copy, but of a cache that is ``filled``
        and changes no more."""
        length = min(self.slots.round_up(len(ids)), cache.num_slots)
        if self.slots.row_bytes(length) <= self.prefixes.max_bytes and not self.prefixes.has(self.weights.version, ids):
            alone = filled and cache.num_rows == 1 and cache.num_slots == length
            kept = cache if alone else programs.extract(cache, np.int32(row), length=length)
            # An answer that is kept has been looked at; what a prompt gave is only known when it is needed.
            self.prefixes.put(self.weights.version, ids, kept, programs.is_finite(kept) if filled else True)

    def _count_rows(self, prompts: int) -> int:
        rows = power_of_two(prompts, 1)
        return rows + -rows % self.slots.shards

    def warm_up(self) -> None:
        """Compiles all that prompts need in the smallest cache, and puts rows of it into that of the slots."""
        length = self.slots.round_up(1)
        sizes = [size for size in (MIN_FILL * 2**i for i in range(8)) if size <= PREFILL]
        for rows in sorted({self._count_rows(count) for count in range(1, min(MAX_FILL, self.slots.most) + 1)}):
            small = self.slots.make_cache(rows, length)
            for size in sizes:
                none = np.zeros((rows, size), np.int32), np.full((rows, size), -1, np.int32)
                small = programs.prefill(self.weights.tree, small, *none, config=self.config)
                if rows == self.slots.shards:
                    options = {"config": self.config, "tops": MAX_TOPS}
                    small, _ = programs.prefill_scored(self.weights.tree, small, *none, none[0], **options)
            kept = programs.extract(small, np.int32(0), length=length)
            small = programs.insert(small, kept, *as_moves([0], [0], 1))
            programs.is_finite(kept)
            self.slots.warm_up(small)


def power_of_two(size: int, smallest: int) -> int:
    power = smallest
    while power < size:
        power *= 2
    return power


def _is_scored(request: Request) -> bool:
    """Whether the prompt goes through the model for its log-probabilities too."""
    return request.sampling.prompt_logprobs and request.prompt_logprobs is None


def _note_scores(request: Request, scores: list[tuple]) -> None:
    """Puts the scores of the pieces of a prompt together."""
    logprobs = [np.full(1, np.nan, np.float32), *(piece[0] for piece in scores)]
    request.prompt_logprobs = np.concatenate(logprobs)
    if (wanted := request.sampling.top_logprobs) and scores:
        ids, values = (np.concatenate([piece[i] for piece in scores])[:, :wanted] for i in (1, 2))
        request.prompt_top_logprobs = TopLogprobs(ids, values)
