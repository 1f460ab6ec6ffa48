"""Generation with a key-value cache, by the forward code that trains: requests come and go, the batch goes on.

Every request in work has a slot, a row of the cache. ``step`` fills slots that are free, in the order of submission:
all tokens of a prompt but the last go through the model in pieces of up to PREFILL tokens, up to 8 prompts at a time,
and what was computed before comes out of the prefix store (``rollout.prefixes``); a group of samples and a common
beginning of prompts are computed once. Else it lets all rows choose up to STEPS tokens in one compiled call. A row
leaves when it has ended, and the next request takes its slot. Rows have their own positions: nothing is computed for
padding that a result could depend on.

The cache grows by need, in rows up to ``slots`` and in positions, and shrinks when a quarter would do: short answers do
not pay, at every step, for the longest one allowed, and the last few rows not for all that went before.

The random numbers of a row depend on (seed, sample id, position) alone: not on the slot, other requests or the order of
submission. Rounding may still differ between numbers of rows, as it does in any matrix product.

Under a mesh (parameters placed by ``postrain.sharding``) rows are split over ``data`` and ``fsdp``, key heads over
``tensor``. Several processes call the same methods in the same order.

Legend: B rows, P rows of a small cache, S new positions.
"""

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from postrain.errors import UserError
from postrain.models.cache import KVCache
from postrain.models.config import ModelConfig
from postrain.rollout import programs
from postrain.rollout.prefixes import BLOCK, PrefixStore, count_common
from postrain.rollout.programs import PREFILL, STEPS, bucket
from postrain.rollout.requests import Completion, Constraint, Event, Request, SamplingParams, TopLogprobs
from postrain.rollout.slots import Slots, as_moves
from postrain.rollout.weights import Weights
from postrain.sharding import find_mesh, num_row_shards, to_host

MAX_FILL = 8  # prompts that go through the model together
MIN_SHARED = 32  # shortest common beginning of prompts that is computed once
MAX_TOPS = 20  # most probable ids that a compiled step finds where any row wants some
NOT_FINITE = "expected finite logits for its next token, found NaN: check the weights with `postrain verify`"


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


class Engine:
    """Slots, a queue and the weights. Not for several threads at once.

    ``params`` is the whole tree (``merge_params`` of trained and frozen parameters). At most ``slots`` requests are in
    work. ``steps``: tokens of a row between two looks at the queue, at most STEPS; fewer make prompt answers in pieces.
    ``fill_first``: free slots are filled before any row goes on; else one piece of a prompt and one call of ``steps``
    take turns, so that no row waits for more than a piece. ``prefix_bytes``: room for what prompts begin with.
    ``keep_answers``: answers stay in that room too, for the next turn of a conversation. ``min_rows``: of the cache, so
    that a server at the beginning of its load compiles nothing.
    """

    def __init__(
        self,
        params,
        config: ModelConfig,
        *,
        slots: int = 32,
        steps: int = STEPS,
        fill_first: bool = True,
        prefix_bytes: int = 2**28,
        keep_answers: bool = False,
        min_rows: int = 1,
        version: int = 0,
    ):
        for name, value in (("slots", slots), ("steps", steps), ("min_rows", min_rows)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, found {value}")
        self.config, self.steps, self.fill_first = config, min(steps, STEPS), fill_first
        self.keep_answers = keep_answers
        self.prefixes = PrefixStore(prefix_bytes)
        self._mesh = find_mesh(params)
        self._shards = 1 if self._mesh is None else num_row_shards(self._mesh)
        with self._on_mesh():
            self._weights = Weights(params, config, version)
        self.slots = Slots(config, most=slots, least=min_rows, shards=self._shards, split=self._weights.is_split)
        self._queue: collections.deque[Request] = collections.deque()
        self._filling: Filling | None = None
        self._ended: list[Event] = []  # since the last step
        self._is_rows_turn = False  # where fill_first is off
        self._next_handle = 0

    # --- what callers see ---

    @property
    def version(self) -> int:
        """Of the weights that choose the next token."""
        return self._weights.version

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self.slots.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._queue) + (len(self._filling.requests) if self._filling else 0)

    @property
    def is_idle(self) -> bool:
        return not self.num_waiting and not self.num_running

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        *,
        sample_id: int = 0,
        group: int | None = None,
        constraint: Constraint | None = None,
        until: Callable[[int], bool | None] | None = None,
    ) -> int:
        """Queues a request; returns the handle under which its events come.

        ``sample_id`` (0 to 2**64 - 1) chooses, with the seed, what it draws: two requests of one prompt need two.
        ``group``: requests that share a prompt wait for each other's prefill. ``until`` is called with each token and
        may end the answer after it, as a stop id does. Raises UserError for an empty prompt and for ids outside the
        vocabulary.
        """
        prompt = np.asarray(prompt_ids, np.int32)
        self._check(prompt, sampling)
        if not 0 <= sample_id < 2**64:
            raise UserError(f"sample_id must be 0 to 2**64 - 1, found {sample_id}")
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._queue.append(Request(handle, prompt, sampling, sample_id, group, constraint, until))
        return handle

    def step(self) -> list[Event]:
        """Fills slots or chooses tokens; what that gave, at most one event for each request. Nothing where idle."""
        events, self._ended = self._ended, []
        with self._on_mesh():
            may_fill = self._filling is not None or (self._queue and self.slots.num_free)
            if may_fill and (self.fill_first or not self.num_running or not self._is_rows_turn):
                self._is_rows_turn = True
                self._fill()
            elif self.num_running:
                self._is_rows_turn = False
                events += self._decode()
        return events

    def cancel(self, handle: int) -> Completion | None:
        """Ends a request; what it has until now, of finish "abort". None where no such request is under way."""
        for request in [*self._queue, *(self._filling.requests if self._filling else ()), *self.slots.running]:
            if request.handle == handle:
                self._release(request)
                return request.complete("abort")
        return None

    def update_weights(self, params, version: int, *, caches: str = "recompute", base_changed: bool = False) -> float:
        """Other weights from the next token on; returns how far a probe's logprobs are from the trainer's forward.

        ``params`` is the whole tree again. Where the config has adapters or new rows, nothing else is read unless
        ``base_changed``. ``caches`` of answers under way: "recompute" runs their tokens through the new weights before
        they go on, "keep" lets them go on with keys and values of the old ones, "abort" ends them (finish "abort", in
        the events of the next step). Prompts that wait, or are half computed, begin anew except for "keep". Raises
        UserError where the probe shows other weights than ``params``.
        """
        if caches not in ("recompute", "keep", "abort"):
            raise ValueError(f"caches {caches!r}: expected one of recompute, keep, abort")
        if version <= self.version:
            raise ValueError(f"version {version}: expected more than {self.version}, that of the present weights")
        with self._on_mesh():
            self._weights.update(params, version, base_changed=base_changed)
            self.prefixes.clear()
            if caches != "keep":
                self._restart(abort=caches == "abort")
            return self._weights.check(params)

    def generate(self, prompts: Sequence[Sequence[int]], sampling=SamplingParams(), **options) -> list[Completion]:
        """``n`` completions of each prompt, one prompt after the other. The rest as in ``iterate``."""
        completions = dict(self.iterate(prompts, sampling, **options))
        return [completions[i] for i in range(len(completions))]

    def iterate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        n: int = 1,
        longest_first: bool = True,
        until: Callable[[int], Callable[[int], bool | None]] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they come; sample k of prompt i has the index i n + k and the sample id i + k 2**32.

        ``sampling``: one for all prompts, or one for each. ``longest_first``: of the prompts, so that those that are
        computed together are of about one length; else in order. ``until(index)``: that of ``submit``.
        Raises UserError for an empty prompt, an id outside the vocabulary, and logits that are not finite. Warns where
        prompt and new tokens may pass ``config.max_positions``.
        """
        if not self.is_idle:
            raise RuntimeError("other requests are under way, whose events would be lost: use submit and step")
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        settings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        for i, (prompt, of_prompt) in enumerate(zip(prompts, settings, strict=True)):
            self._check(prompt, of_prompt, f"prompt {i}")
        self._warn_of_positions(prompts, settings)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if longest_first else range(len(prompts))
        indices = {}
        for i in order:
            for k in range(n):
                options = {"sample_id": i + (k << 32), "group": i, "until": until and until(i * n + k)}
                indices[self.submit(prompts[i], settings[i], **options)] = i * n + k
        try:
            while indices:
                for event in self.step():
                    index = indices[event.handle]
                    if event.completion is not None:
                        if event.completion.finish == "error":
                            raise UserError(f"prompt {index // n}: {NOT_FINITE}")
                        del indices[event.handle]
                        yield index, event.completion
        finally:
            for handle in indices:
                self.cancel(handle)

    # --- requests ---

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _check(self, prompt: np.ndarray, sampling: SamplingParams, name: str = "the prompt") -> None:
        if prompt.ndim != 1 or prompt.size == 0:
            raise UserError(f"{name} is empty: generation needs at least one token to start from")
        size = self.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= size:
            found = prompt.min() if prompt.min() < 0 else prompt.max()
            raise UserError(
                f"{name} has token id {found}, outside the model's vocabulary of {size}: encode it with this model's "
                "tokenizer"
            )
        if outside := [token for token, _ in sampling.logit_bias if not 0 <= token < size]:
            raise UserError(f"sampling.logit_bias has id {outside[0]}, outside the model's vocabulary of {size}")

    def _warn_of_positions(self, prompts, settings) -> None:
        ends = [(len(prompt), of_prompt.max_new_tokens) for prompt, of_prompt in zip(prompts, settings, strict=True)]
        longest, new = max(ends, key=sum, default=(0, 0))
        if longest + new > self.config.max_positions:
            warnings.warn(
                f"{longest} prompt tokens + {new} new ones may pass the {self.config.max_positions} positions that the "
                "model was pre-trained for: text beyond them may be poor",
                stacklevel=4,
            )

    def _release(self, request: Request) -> None:
        """Takes a request out of the queue, its slot, or a filling, which goes on for the others."""
        if request in self._queue:
            self._queue.remove(request)
        elif self._filling is not None and request in self._filling.requests:
            self._filling.requests.remove(request)
            if not self._filling.requests:
                self._filling = None
        else:
            self.slots.release(request)
        if self.is_idle:
            self.slots.clear()

    def _restart(self, abort: bool) -> None:
        """Every cache is given up: what was in work waits first in the queue, or ends where ``abort``."""
        running, filling = self.slots.running, self._filling.requests if self._filling is not None else []
        self._filling = None
        self.slots.clear()
        if abort:
            self._ended += [_end(request, "abort") for request in running]
            running = []
        self._queue.extendleft(reversed(sorted([*running, *filling], key=lambda request: request.handle)))

    # --- slots are filled ---

    def _fill(self) -> None:
        """One piece of the prompts that are next; those that are whole get their slots."""
        if self._filling is None:
            self._filling = self._begin_filling()
        filling = self._filling
        left = np.array([len(context) for context in filling.contexts]) - filling.done
        if left.max() > 0:
            self._fill_piece(filling, min(PREFILL, _power_of_two(int(left.max()), 16)))
        if all(len(context) == done for context, done in zip(filling.contexts, filling.done, strict=True)):
            self._filling = None
            self._finish_filling(filling)

    def _begin_filling(self) -> Filling:
        """Takes the next requests from the queue, or only computes what several begin with.

        Requests go together while slots are free, their prompts, each counted once, are at most MAX_FILL, and take as
        many pieces as the first. One whose prompt is scored goes alone.
        """
        requests, contexts = [], {}
        for request in self._queue:
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
        found = [(0, None) if _is_scored(requests[0]) else self.prefixes.find(self.version, c) for c in distinct]
        shared = min((count_common(distinct[0], context) for context in distinct[1:]), default=0) // BLOCK * BLOCK
        is_new = shared - min(done for done, _ in found) >= MIN_SHARED
        if is_new and self.slots.row_bytes(shared) <= self.prefixes.max_bytes:
            return self._make_filling([], [distinct[0][:shared]], found[:1])
        for _ in requests:
            self._queue.popleft()
        return self._make_filling(requests, distinct, found)

    def _make_filling(self, requests, contexts, found) -> Filling:
        """A small cache with what the prefix store has of each context."""
        done = np.array([min(done, len(context)) for (done, _), context in zip(found, contexts, strict=True)], np.int32)
        longest = max(map(len, contexts))
        if longest == 0:
            cache = None
        elif len(contexts) == 1 and done[0] == longest and self._shards == 1:
            cache = found[0][1]
        else:
            rows = _power_of_two(len(contexts), 1)
            cache = self.slots.make_cache(rows + -rows % self._shards, bucket(longest))
            for row, (count, kept) in enumerate(found):
                if count:
                    cache = programs.insert(cache, kept, *as_moves([0], [row], 1))
        rows: dict[bytes, int] = {context.tobytes(): row for row, context in enumerate(contexts)}
        of_request = [rows[request.context.tobytes()] for request in requests]
        for i, (request, row) in enumerate(zip(requests, of_request, strict=True)):
            if not request.tokens:  # of a group, all but the first take over the whole of it
                request.cached_tokens = int(done[row]) if row not in of_request[:i] else len(contexts[row])
            request.cache_version = self.version
        handles = [request.handle for request in requests]
        return Filling(requests, contexts, dict(zip(handles, of_request, strict=True)), done, cache, self.version)

    def _fill_piece(self, filling: Filling, size: int) -> None:
        shape = filling.cache.num_rows, size
        tokens, positions, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        for row, (context, done) in enumerate(zip(filling.contexts, filling.done, strict=True)):
            part = context[done : done + size]
            tokens[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(done, done + len(part))
        params, config = self._weights.tree, self.config
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

    def _finish_filling(self, filling: Filling) -> None:
        """Rows of the small cache go to the slots of their requests, and into the prefix store."""
        for row, context in enumerate(filling.contexts):
            if len(context) and filling.version == self.version and filling.cache is not None:
                self._keep(context, filling.cache, row)
        if not filling.requests:
            return
        for request in filling.requests:
            if _is_scored(request):
                _note_scores(request, filling.scores)
        sources = [filling.rows[request.handle] for request in filling.requests]
        self.slots.insert(filling.requests, filling.cache, sources, len(self._queue))

    def _keep(self, ids: np.ndarray, cache: KVCache, row: int) -> None:
        """Puts the row of ``cache`` that holds ``ids`` into the prefix store."""
        length = min(bucket(len(ids)), cache.num_slots)
        if self.slots.row_bytes(length) <= self.prefixes.max_bytes and not self.prefixes.has(self.version, ids):
            alone = cache.num_rows == 1 and cache.num_slots == length
            kept = cache if alone else programs.extract(cache, np.int32(row), length=length)
            self.prefixes.put(self.version, ids, kept)

    # --- rows go on ---

    def _decode(self) -> list[Event]:
        """Tokens for every row that has a slot."""
        events, slots = self._end_impossible(), self.slots
        if not slots.running:
            return events
        if not self.num_waiting:
            slots.shrink()
        settings = [request.sampling for request in slots.running]
        limit = 1 if any(request.constraint is not None for request in slots.running) else self.steps
        slots.make_room_for(limit)
        slots.cache, *state, chunk = programs.decode(
            self._weights.tree,
            slots.cache,
            slots.rows,
            np.int32(limit),
            np.bool_(self.num_waiting > 0),
            slots.make_edits() if any(one.edits for one in settings) else None,
            slots.make_allowed(),
            config=self.config,
            sampled=any(one.temperature > 0 for one in settings),
            filtered=any(one.filters for one in settings),
            tops=MAX_TOPS if any(one.top_logprobs for one in settings) else 0,
        )
        last, positions, remaining = (np.array(to_host(x)) for x in state)
        slots.rows = slots.rows.replace(last=last, positions=positions, remaining=remaining)
        chunk = jax.tree.map(to_host, chunk)
        for slot, request in enumerate(slots.occupants):
            if request is not None:
                events.append(self._take(slot, request, chunk))
        if self.is_idle:
            slots.clear()
        return events

    def _take(self, slot: int, request: Request, chunk: programs.Chunk) -> Event:
        """The event of what one row chose; a row that has ended gives its slot back."""
        count = int((chunk.tokens[slot] >= 0).sum())
        finite = np.isfinite(chunk.model_logprobs[slot, :count])
        finish = None
        if not finite.all():
            count, finish = int(finite.argmin()), "error"
        tokens = chunk.tokens[slot, :count].tolist()
        for i, token in enumerate(tokens):
            if self._ends(request, token):
                count, finish, tokens = i + 1, "stop", tokens[: i + 1]
                break
        if finish is None and len(request.tokens) + count == request.sampling.max_new_tokens:
            finish = "length"
        tops = None
        if wanted := request.sampling.top_logprobs:
            tops = TopLogprobs(chunk.top_ids[slot, :count, :wanted], chunk.top_logprobs[slot, :count, :wanted])
        arrays = (x[slot, :count].copy() for x in (chunk.logprobs, chunk.model_logprobs, chunk.kept_mass))
        event = Event(request.handle, tokens, *arrays, self.version, tops)
        request.events.append(event)
        request.tokens += tokens
        if finish is None:
            return event
        if finish == "error":
            self.slots.wipe(request)
        elif self.keep_answers and request.cache_version == self.version:
            self._keep(request.context, self.slots.cache, slot)
        self.slots.release(request)
        return dataclasses.replace(event, completion=request.complete(finish))

    def _ends(self, request: Request, token: int) -> bool:
        """Whether the request ends with this token, which its constraint and its caller take."""
        done = token in request.sampling.stop_ids
        if request.constraint is not None:
            request.constraint.advance(token)
            done |= request.constraint.is_done()
        if request.until is not None:
            done |= bool(request.until(token))
        return done

    def _end_impossible(self) -> list[Event]:
        """Ends rows whose constraint leaves nothing to choose."""
        stuck = [
            request
            for request in self.slots.running
            if request.constraint is not None and not request.constraint.allowed().any()
        ]
        for request in stuck:
            self.slots.release(request)
        return [_end(request, "error") for request in stuck]


def _power_of_two(size: int, smallest: int) -> int:
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


def _end(request: Request, finish: str) -> Event:
    """The event of a request that ends without another token."""
    none = np.zeros(0, np.float32)
    return Event(request.handle, [], none, none, none, -1, completion=request.complete(finish))
