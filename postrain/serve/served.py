"""The model that is served, and what every route needs of it."""

import codecs
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from postrain.data.rendering.tokenizer import compare_vocabularies
from postrain.errors import UserError
from postrain.rollout.chat import ChatModel, for_tokenizer, load_chat_model
from postrain.rollout.constraints import ConstraintFactory, WrongConstraint
from postrain.rollout.constraints.compile import compile_constraint
from postrain.rollout.constraints.token_bytes import read_token_bytes
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams
from postrain.rollout.text_stream import TextWindow
from postrain.serve.engine_thread import EngineThread, QueueFull, Submission
from postrain.serve.errors import ApiError, wrong
from postrain.serve.limits import Limits
from postrain.serve.metrics import Metrics
from postrain.serve.replies import find_tool_form
from postrain.serve.schemas import Job, has_half_pair
from postrain.serve.sessions import Sessions
from postrain.serve.streams import Answers, AnswerStream


class Token(NamedTuple):
    text: str  # what stands for it in an answer's log-probabilities
    bytes: bytes


class Served:
    """``name``: of the model, as clients call it."""

    def __init__(self, model: ChatModel, name: str, folder: str, limits: Limits):
        self.model, self.name, self.folder, self.limits = model, name, folder, limits
        self.names = {name, folder}  # all that a request may call the model
        self.tokenizer, self.vocab_size = model.tokenizer, model.config.vocab_size
        positions = model.config.max_positions
        if limits.max_length > positions:
            raise UserError(f"--max-length {limits.max_length}: the model was pre-trained for {positions} positions")
        self.max_length = limits.max_length or positions
        self.metrics, self.sessions, self.created = Metrics(), Sessions(), int(time.time())
        options = {"slots": limits.slots, "steps": limits.steps, "fill_first": False, "keep_answers": True}
        if limits.warm_length:
            options |= {"min_rows": limits.slots, "min_positions": limits.warm_length}
        engine = Engine(model.params, model.config, **options)
        self.engine = EngineThread(engine, limits.slots + limits.waiting)
        self.versions = {engine.version: "default"}  # of weights -> what clients call them
        # Beside the loop that serves; a constraint may take long, and then holds up constraints alone.
        self.workers = concurrent.futures.ThreadPoolExecutor(1, "requests")
        self.compilers = concurrent.futures.ThreadPoolExecutor(1, "constraints")
        fitted = for_tokenizer(SamplingParams(), self.tokenizer, model.config)
        self.stop_ids, self._banned = frozenset(fitted.stop_ids), fitted.banned_ids
        self.tool_form = find_tool_form(self.tokenizer)

    @property
    def version(self) -> str:
        return self.versions[self.engine.engine.version]

    def close(self) -> None:
        self.engine.stop()
        self.workers.shutdown(cancel_futures=True)
        self.compilers.shutdown(cancel_futures=True)

    def draw_seed(self) -> int:
        """For a request that names none."""
        return secrets.randbits(32)

    def update_weights(self, folder: str, version: str | None, caches: str) -> None:
        """Takes the weights of another folder of the same model; blocks. Raises UserError, and nothing has changed.

        The folder is read whole and compared before anything is swapped.
        """
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder on the server's machine")
        new = load_chat_model(folder)
        if new.config != self.model.config:
            names = [field.name for field in dataclasses.fields(new.config)]
            differing = [name for name in names if getattr(new.config, name) != getattr(self.model.config, name)]
            raise UserError(f"{folder} is another model than the one that is served: {', '.join(differing)} differ")
        if difference := compare_vocabularies(new.tokenizer, self.tokenizer):
            raise UserError(f"{folder} has another tokenizer: {difference}")
        if problem := find_not_finite(new.params):
            raise UserError(f"{folder}: {problem} has values that are not finite")

        def swap(engine: Engine) -> None:
            number = engine.version + 1
            names = (str(k) for k in itertools.count(number))
            self.versions[number] = version or next(one for one in names if one not in self.versions.values())
            try:
                engine.update_weights(new.params, number, caches=caches, base_changed=True)
            except Exception:  # the engine goes on with the weights of before
                del self.versions[number]
                raise
            self.model = self.model._replace(params=new.params)

        self.engine.call(swap).result()
        self.folder = folder
        self.names.add(folder)

    # --- requests ---

    def check_prompt(self, ids, name: str) -> int:
        """How many tokens the context has after a prompt."""
        if not ids:
            raise wrong(name, "is empty: expected at least one token")
        room = self.max_length - len(ids)
        if room < 1:
            message = f"{len(ids)} tokens leave no room for an answer in a context of {self.max_length}"
            raise wrong(name, message, "context_length_exceeded")
        return room

    def check_count(self, num_prompts: int, n: int, name: str) -> None:
        """Before anything is done for each of the answers. Raises ApiError."""
        if num_prompts * n > self.engine.most:
            message = f"{num_prompts * n} answers are more than this server takes ({self.engine.most})"
            raise wrong(name if num_prompts > 1 else "n", message)

    def compile(self, job: Job) -> ConstraintFactory:
        """The constraint that ``job.wanted`` asks for."""
        spec, param = job.wanted
        if has_half_pair(spec):
            raise wrong(param, "has half of a surrogate pair, which is no character")
        stop_ids = job.sampling.stop_ids or None
        try:
            return compile_constraint(spec, self.tokenizer, vocab_size=self.vocab_size, stop_ids=stop_ids)
        except WrongConstraint as error:
            raise wrong(param, str(error)) from None

    @contextlib.contextmanager
    def reserve(self) -> Iterator[None]:
        """Room for a request while it is read. Raises ApiError where there is none."""
        if not self.engine.is_alive:
            raise ApiError(503, "the engine has ended: the server must be started again", code="engine_dead")
        with self._refuse_when_full():
            self.engine.reserve()
        try:
            yield
        finally:
            self.engine.release()

    @contextlib.contextmanager
    def _refuse_when_full(self) -> Iterator[None]:
        try:
            yield
        except QueueFull:
            message = f"{self.engine.num_open} answers are under way or waiting: try again later"
            raise ApiError(429, message, code="queue_full") from None

    def open(self, job: Job, constraint: ConstraintFactory | None, end: float) -> Answers:
        """Has the engine begin, in the room that was reserved. ``end``: the time (``time.monotonic``) of a 408.

        Raises ApiError where the queue is full.
        """
        sampling = job.sampling
        banned = self._banned
        if not self.stop_ids.issuperset(sampling.stop_ids):
            banned = tuple(token for token in banned if token not in sampling.stop_ids)
        sampling = dataclasses.replace(sampling, banned_ids=banned)
        submissions, streams = [], []
        for i, prompt in enumerate(job.prompts):
            for k in range(job.n):
                until = TextWindow(self.tokenizer, sampling.stop).ends_with if sampling.stop else None
                submissions.append(Submission(prompt, sampling, i + (k << 32), constraint, until))
                streams.append(AnswerStream(self.tokenizer, sampling, self.stop_ids))
        with self._refuse_when_full():
            return Answers(self.engine, submissions, streams, end, self.limits.seconds)

    def note(self, answers: Answers, completions, num_prompt: int) -> None:
        """Counts a request that has ended."""
        add = self.metrics.add
        add("postrain_prompt_tokens_total", num_prompt)
        for one in completions:
            add("postrain_generated_tokens_total", len(one.tokens))
            add("postrain_cached_tokens_total", one.cached_tokens)
            add("postrain_answers_total", finish=one.finish)
        self.metrics.observe("postrain_time_to_first_token_seconds", answers.timing.first)
        self.metrics.observe("postrain_request_seconds", answers.timing.total)

    # --- tokens as text ---

    @functools.cached_property
    def _token_bytes(self) -> tuple[bytes, ...] | None:
        try:
            found = read_token_bytes(self.tokenizer)
        except WrongConstraint:  # a decoder that is not known
            return None
        return tuple(found.special[i].encode() if i in found.special else text for i, text in enumerate(found.texts))

    def describe_token(self, token: int) -> Token:
        """Bytes that are no text by themselves are written as ``bytes:\\xe6``, so that no two look the same."""
        texts = self._token_bytes
        if texts is not None and token < len(texts):
            data = texts[token]
        else:
            data = self.tokenizer.decode([token]).encode()
        try:
            return Token(data.decode(), data)
        except UnicodeDecodeError:
            return Token("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)

    def find_offsets(self, tokens: list[int], start: int) -> list[int]:
        """Of each token the number of characters before it, counted from ``start``."""
        decoder, offsets = codecs.getincrementaldecoder("utf-8")("replace"), []
        for token in tokens:
            offsets.append(start)
            start += len(decoder.decode(self.describe_token(token).bytes))
        return offsets


def find_not_finite(params: dict) -> str | None:
    """The path of an array that holds NaN or infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            return jax.tree_util.keystr(path, simple=True, separator=".")
    return None
