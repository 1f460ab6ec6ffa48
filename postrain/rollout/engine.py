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
"""

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from postrain.errors import UserError
from postrain.models.config import ModelConfig
from postrain.rollout import programs
from postrain.rollout.constraints import Constraint
from postrain.rollout.filling import Filler
from postrain.rollout.prefixes import PrefixStore
from postrain.rollout.programs import MAX_TOPS, STEPS
from postrain.rollout.requests import Completion, Event, Request, SamplingParams, TopLogprobs
from postrain.rollout.sampling import Edits
from postrain.rollout.slots import Slots
from postrain.rollout.weights import Weights
from postrain.sharding import find_mesh, num_row_shards, to_host

NOT_FINITE = "expected finite logits for its next token, found NaN: check the weights with `postrain verify`"
NOTHING_LEFT = (
    "no id is left that its next token could be: look at what the constraint, banned_ids and stop_ids with "
    "min_new_tokens leave"
)

T = TypeVar("T")


class Engine:
    """Slots, a queue and the weights. Not for several threads at once.

    ``params`` is the whole tree (``merge_params`` of trained and frozen parameters); products in float8 it makes in the
    dtype of the config, as a row must not depend on the largest number of another. At most ``slots`` requests are in
    work. ``steps``: tokens of a row between two looks at the queue, at most STEPS; fewer make prompt answers in pieces.
    ``fill_first``: free slots are filled before any row goes on; else one piece of a prompt and one call of ``steps``
    take turns, so that no row waits for more than a piece. ``prefix_bytes``: room for what prompts begin with.
    ``keep_answers``: answers stay in that room too, for the next turn of a conversation. ``min_rows`` and
    ``min_positions`` of the cache: where it need not grow, nothing is compiled (``warm_up``).
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
        min_positions: int = 64,
        version: int = 0,
    ):
        for name, value in (
            ("slots", slots),
            ("steps", steps),
            ("min_rows", min_rows),
            ("min_positions", min_positions),
        ):
            if value < 1:
                raise UserError(f"{name} must be at least 1, found {value}")
        config = dataclasses.replace(config, fp8=False)
        self.config, self.steps, self.fill_first = config, min(steps, STEPS), fill_first
        self.keep_answers = keep_answers
        self.prefixes = PrefixStore(prefix_bytes)
        self._mesh = find_mesh(params)
        shards = 1 if self._mesh is None else num_row_shards(self._mesh)
        with self._on_mesh():
            self._weights = Weights(params, config, version)
        self.slots = Slots(
            config,
            most=slots,
            least=(min_rows, min_positions),
            shards=shards,
            split=self._weights.is_split,
            device=None if self._mesh is not None else next(iter(jax.tree.leaves(params)[0].devices())),
        )
        self._queue: collections.deque[Request] = collections.deque()
        self._filler = Filler(config, self._weights, self.slots, self.prefixes)
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
        return len(self._queue) + len(self._filler.requests)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way, and no event to come."""
        return not self.num_waiting and not self.num_running and not self._ended

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams = SamplingParams(),
        *,
        sample_id: int = 0,
        constraint: Constraint | None = None,
        until: Callable[[int], bool | None] | None = None,
    ) -> int:
        """Queues a request; returns the handle under which its events come.

        ``sample_id`` (0 to 2**64 - 1) chooses, with the seed, what it draws: two requests of one prompt need two, and
        share the computation of the prompt. ``constraint``: what the answer must be; one for each request. ``until`` is
        called with each token and may end the answer after it, as a stop id does. What these two raise ends the request
        (finish "error"). Raises UserError for an empty prompt and for ids outside the vocabulary.
        """
        prompt = self._check(prompt_ids, sampling)
        if not 0 <= sample_id < 2**64:
            raise UserError(f"sample_id must be 0 to 2**64 - 1, found {sample_id}")
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._queue.append(Request(handle, prompt, sampling, sample_id, constraint, until))
        return handle

    def step(self) -> list[Event]:
        """Fills slots or chooses tokens; what that gave, at most one event for each request. Nothing where idle.

        After an exception, as where memory runs out, the cache may be lost: call ``reset``.
        """
        events, self._ended = self._ended, []
        with self._on_mesh():
            may_fill = self._filler.filling is not None or (self._queue and self.slots.num_free)
            if may_fill and (self.fill_first or not self.num_running or not self._is_rows_turn):
                self._is_rows_turn = True
                self._filler.fill(self._queue)
            elif self.num_running:
                self._is_rows_turn = False
                events += self._decode()
        return events

    def cancel(self, handle: int) -> Completion | None:
        """Ends a request; what it has until now, of finish "abort". None where no such request is under way."""
        for request in [*self._queue, *self._filler.requests, *self.slots.running]:
            if request.handle == handle:
                with self._on_mesh():
                    self._release(request)
                return request.complete("abort")
        return None

    def reset(self) -> None:
        """Forgets all requests, without events, and all that was computed; the weights stay."""
        self._filler.clear()
        self._queue.clear()
        self._ended.clear()
        self.slots.clear()
        self.prefixes.clear()

    def update_weights(self, params, version: int, *, caches: str = "recompute", base_changed: bool = False) -> float:
        """Other weights from the next token on; returns how far a probe's logprobs are from the trainer's forward.

        ``params`` is the whole tree again. Where the config has adapters or new rows, nothing else is read unless
        ``base_changed``. ``caches`` of answers under way: "recompute" runs their tokens through the new weights before
        they go on, "keep" lets them go on with keys and values of the old ones, "abort" ends them (finish "abort", in
        the events of the next step). Prompts that wait, or are half computed, begin anew except for "keep". Raises
        UserError where the probe shows other weights than ``params``: then nothing has changed, and answers under way
        go on with the old weights, whatever ``caches``.
        """
        if caches not in ("recompute", "keep", "abort"):
            raise ValueError(f"caches {caches!r}: expected one of recompute, keep, abort")
        if version <= self.version:
            raise ValueError(f"version {version}: expected more than {self.version}, that of the present weights")
        with self._on_mesh():
            difference = self._weights.update(params, version, base_changed=base_changed)
            self.prefixes.clear()
            if caches != "keep":
                self._restart(abort=caches == "abort")
        return difference

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
        first_sample: int = 0,
        longest_first: bool = True,
        until: Callable[[int], Callable[[int], bool | None]] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they come; sample k of prompt i has the index i n + k.

        Its sample id is ``first_sample`` + i + k 2**32: calls of one seed that shall draw other samples need another
        ``first_sample`` each. ``sampling``: one for all prompts, or one for each. ``longest_first``: of the prompts, so
        that those computed together are of about one length; else in order. ``until(index)``: that of ``submit``.
        Raises UserError for an empty prompt, an id outside the vocabulary, logits that are not finite and where no id
        is left to choose; what ``until`` raises; after any exception the engine is as ``reset`` leaves it. Warns where
        prompt and new tokens may pass ``config.max_positions``.
        """
        if not self.is_idle:
            raise RuntimeError("other requests are under way, whose events would be lost: use submit and step")
        settings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        pairs = enumerate(zip(prompts, settings, strict=True))
        prompts = [self._check(prompt, of_prompt, f"prompt {i}") for i, (prompt, of_prompt) in pairs]
        self._warn_of_positions(prompts, settings)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if longest_first else range(len(prompts))
        indices = {}
        try:
            for i in order:
                for k in range(n):
                    options = {"sample_id": first_sample + i + (k << 32), "until": until and until(i * n + k)}
                    indices[self.submit(prompts[i], settings[i], **options)] = i * n + k
            while indices:
                for event in self.step():
                    index = indices[event.handle]
                    if event.completion is not None:
                        if (error := event.completion.error) is not None:
                            raise UserError(f"prompt {index // n}: {error}") if isinstance(error, UserError) else error
                        del indices[event.handle]
                        yield index, event.completion
        except Exception:
            self.reset()
            raise
        finally:
            for handle in indices:
                self.cancel(handle)
            self._ended = [event for event in self._ended if event.handle not in indices]

    def warm_up(self) -> None:
        """Compiles all that requests can need, whatever they ask, as long as the cache need not grow.

        For ``slots`` rows of ``min_positions``: where ``min_rows`` is ``slots``, nothing is compiled afterwards for
        prompts and answers that fit.
        """
        assert self.is_idle
        with self._on_mesh():
            self._filler.warm_up()
            plain, greedy = SamplingParams(temperature=1.0), SamplingParams()
            top_p, tops = SamplingParams(temperature=1.0, top_p=0.5), SamplingParams(top_logprobs=1)
            edits, both = SamplingParams(min_new_tokens=1), SamplingParams(min_new_tokens=1, top_logprobs=1)
            for sampling in (greedy, plain, top_p, tops, edits, both):
                options, edits, allowed = self._choose_program([sampling], {})
                for bits in (allowed, self.slots.make_allowed({}, always=True)) if allowed is None else (allowed,):
                    arguments = np.int32(1), np.bool_(False), edits, bits
                    out = programs.decode(
                        self._weights.tree,
                        self.slots.cache,
                        self.slots.rows,
                        *arguments,
                        config=self.config,
                        **options,
                    )
                    self.slots.cache = out[0]
            self.slots.clear()

    # --- requests ---

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _check(self, prompt_ids: Sequence[int], sampling: SamplingParams, name: str = "the prompt") -> np.ndarray:
        """The prompt as int32 ids of the vocabulary; the settings' ids are looked at too."""
        prompt, size = np.asarray(prompt_ids), self.config.vocab_size
        if prompt.ndim != 1 or prompt.size == 0:
            raise UserError(f"{name} is empty: generation needs at least one token to start from")
        if prompt.dtype.kind not in "iu":
            raise UserError(f"{name} must be integer token ids, found {prompt[0]!r} ({prompt.dtype})")
        if prompt.min() < 0 or prompt.max() >= size:
            found = prompt.min() if prompt.min() < 0 else prompt.max()
            raise UserError(
                f"{name} has token id {found}, outside the model's vocabulary of {size}: encode it with this model's "
                "tokenizer"
            )
        biased = sorted(token for token, _ in sampling.logit_bias)
        for key, ids in (
            ("logit_bias", biased),
            ("stop_ids", sampling.stop_ids),
            ("banned_ids", sampling.banned_ids),
        ):
            for token in (*ids[:1], *ids[-1:]):  # they are sorted
                if not 0 <= token < size:
                    raise UserError(f"{name}: sampling.{key} has id {token}, outside the model's vocabulary of {size}")
        return prompt.astype(np.int32)

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
        elif request in self._filler.requests:
            self._filler.drop(request)
        else:
            self.slots.release(request)
        if not self.num_waiting and not self.num_running:
            self.slots.clear()

    def _restart(self, abort: bool) -> None:
        """Every cache is given up: what was in work waits first in the queue, or ends where ``abort``."""
        running, filling = self.slots.running, self._filler.clear()
        self.slots.clear()
        if abort:
            self._ended += [_end(request, "abort") for request in running]
            running = []
        self._queue.extendleft(reversed(sorted([*running, *filling], key=lambda request: request.handle)))

    # --- rows go on ---

    def _decode(self) -> list[Event]:
        """Tokens for every row that has a slot."""
        slots = self.slots
        masks, events = self._ask_constraints()
        if not slots.running:
            return events
        if not self.num_waiting:
            slots.shrink()
        limit = 1 if masks else self.steps
        slots.make_room_for(limit)
        options, edits, allowed = self._choose_program([request.sampling for request in slots.running], masks)
        slots.cache, *state, chunk = programs.decode(
            self._weights.tree,
            slots.cache,
            slots.rows,
            np.int32(limit),
            np.bool_(self.num_waiting > 0),
            edits,
            allowed,
            config=self.config,
            **options,
        )
        last, positions, remaining = (np.array(to_host(x)) for x in state)
        slots.rows = slots.rows.replace(last=last, positions=positions, remaining=remaining)
        chunk = jax.tree.map(to_host, chunk)
        for slot, request in enumerate(slots.occupants):
            if request is not None:
                events.append(self._take(slot, request, chunk))
        if not self.num_waiting and not self.num_running:
            slots.clear()
        return events

    def _choose_program(
        self, settings: Sequence[SamplingParams], masks: dict[int, np.ndarray]
    ) -> tuple[dict, Edits | None, np.ndarray | None]:
        """The static arguments of ``programs.decode``, the edits and the ids that are allowed.

        Few programs serve all: what is rarely asked goes with all that is asked often.
        """
        slots, edits = self.slots, any(one.edits for one in settings)
        tops = MAX_TOPS if any(one.top_logprobs for one in settings) else 0
        filtered = bool(edits or tops) or any(one.filters for one in settings)
        options = {"sampled": filtered or any(one.temperature > 0 for one in settings), "filtered": filtered}
        allowed = slots.make_allowed(masks, always=bool(edits or tops))
        return options | {"tops": tops}, slots.make_edits(masks) if edits else None, allowed

    def _take(self, slot: int, request: Request, chunk: programs.Chunk) -> Event:
        """The event of what one row chose; a row that has ended gives its slot back."""
        count = int((chunk.tokens[slot] >= 0).sum())
        values = chunk.model_logprobs[slot, :count]
        finite = np.isfinite(values)
        finish, request.is_sound = None, not (~finite).any()
        if not request.is_sound:
            count, finish = int(finite.argmin()), "error"
            request.error = UserError(NOTHING_LEFT if np.isneginf(values[count]) else NOT_FINITE)
        tokens = chunk.tokens[slot, :count].tolist()
        for i, token in enumerate(tokens):
            done = self._call(request, lambda token=token: self._ends(request, token))
            if done:
                request.error = None  # NaN came later
            if done or done is None:
                count, finish, tokens = i + 1, "error" if done is None else "stop", tokens[: i + 1]
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
        if self.keep_answers and request.is_sound and request.cache_version == self.version:
            self._filler.keep(request.context, self.slots.cache, slot)
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

    def _ask_constraints(self) -> tuple[dict[int, np.ndarray], list[Event]]:
        """(what rows with constraints may choose, by handle; the events of those that end, as nothing is left)."""
        masks, events = {}, []
        for request in self.slots.running:
            if request.constraint is None:
                continue
            mask = self._call(request, lambda request=request: self.slots.choosable(request))
            if mask is not None and mask.any():
                masks[request.handle] = mask
                continue
            request.error = request.error or UserError(NOTHING_LEFT)
            self.slots.release(request)
            events.append(_end(request, "error"))
        return masks, events

    def _call(self, request: Request, function: Callable[[], T]) -> T | None:
        """What ``function`` returns; None where it raises, which is then the error of the request."""
        try:
            return function()
        except Exception as error:
            request.error = error
            return None


def _end(request: Request, finish: str) -> Event:
    """The event of a request that ends without another token."""
    none = np.zeros(0, np.float32)
    return Event(request.handle, [], none, none, none, -1, completion=request.complete(finish))
