"""The events of a request on their way to the client: pieces of text, server-sent events, a client that has gone."""

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.rollout.requests import Completion, Event, SamplingParams
from postrain.rollout.text_stream import TextWindow
from postrain.serve.engine_thread import EngineThread, Submission
from postrain.serve.errors import ApiError


class TokenScore(NamedTuple):
    """A token with its log-probability under the model, and those of the most probable ids."""

    token: int
    logprob: float
    tops: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What came of one answer since the last piece."""

    text: str
    scores: tuple[TokenScore, ...]
    finish: str | None = None  # "stop", "length" or "abort", with the last piece
    stop_reason: int | str | None = None  # the stop id, but for the model's own, or the text that ended it
    completion: Completion | None = None  # the whole, with the last piece


class AnswerStream:
    """The events of one answer -> pieces. ``own_stops``: the stop ids of the model, which are no news to a client."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, own_stops: frozenset[int]):
        self.sampling, self.own_stops = sampling, own_stops
        self._text = TextWindow(tokenizer, sampling.stop)

    def take(self, event: Event) -> Piece:
        tokens, done = event.tokens, event.completion
        finish, reason = None if done is None else done.finish, None
        if finish == "error":
            print(f"an answer failed: {done.error}", file=sys.stderr)
            raise ApiError(500, f"the model gave no answer: {done.error}"[:300])
        at_stop_id = finish == "stop" and done.tokens and done.tokens[-1] in self.sampling.stop_ids
        text = "".join(map(self._text.push, tokens[:-1] if at_stop_id else tokens))
        if done is not None:
            text += self._text.end()
            reason = self._text.stop
            if at_stop_id and reason is None and done.tokens[-1] not in self.own_stops:
                reason = done.tokens[-1]
        return Piece(text, _score(event), finish, reason, done)


def _score(event: Event) -> tuple[TokenScore, ...]:
    logprobs = event.model_logprobs.tolist()
    if event.top_logprobs is None:
        return tuple(map(TokenScore, event.tokens, logprobs))
    tops = zip(event.top_logprobs.ids.tolist(), event.top_logprobs.logprobs.tolist(), strict=True)
    tops = (tuple(zip(*one, strict=True)) for one in tops)
    return tuple(map(TokenScore, event.tokens, logprobs, tops))


@dataclasses.dataclass
class Timing:
    """Of one request, in seconds from its beginning."""

    first: float | None = None  # to the first token
    total: float | None = None


class Answers:
    """The answers of one request, under way in the engine: iterate ``pieces``, and at last ``close``, which cancels
    what has not ended. Raises QueueFull where the engine has no room for them."""

    def __init__(
        self,
        engine: EngineThread,
        submissions: list[Submission],
        streams: list[AnswerStream],
        end: float,
        seconds: float,
    ):
        self._engine, self._streams, self._end, self._seconds = engine, streams, end, seconds
        self._begin, self.timing = time.monotonic(), Timing()
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(i: int, event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

        self._ticket = engine.submit(submissions, sink, num_reserved=1)

    def close(self) -> None:
        self.timing.total = time.monotonic() - self._begin
        self._engine.cancel(self._ticket)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(index of the answer, piece). Raises ApiError where time is up, or the engine failed."""
        left = len(self._streams)
        while left:
            try:
                i, event = await asyncio.wait_for(self._events.get(), max(self._end - time.monotonic(), 0))
            except TimeoutError:
                raise out_of_time(self._seconds) from None
            if isinstance(event, Exception):
                raise ApiError(500, f"the engine failed: {event}"[:300])
            if self.timing.first is None and event.tokens:
                self.timing.first = time.monotonic() - self._begin
            left -= event.completion is not None
            yield i, self._streams[i].take(event)


def out_of_time(seconds: float) -> ApiError:
    return ApiError(408, f"no answer within {seconds:g} seconds: ask for fewer tokens", code="timeout")


async def unless_gone(receive, work: Awaitable) -> Any:
    """The result of ``work``; None where the client goes before, and the work is cancelled."""
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (gone, working):
            task.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _wait_for_disconnect(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events. An error on the way is the last of them, as OpenAI's clients expect it.

    ``close`` is called at the end, whatever it is.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None], headers: Mapping[str, str]):
        self.events, self.close, self.headers = events, close, headers

    async def __call__(self, scope, receive, send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **self.headers}
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await unless_gone(receive, self._write(send))
        finally:
            self.close()

    async def _write(self, send) -> None:
        async with contextlib.aclosing(self.events):
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except ApiError as error:
                last = b"data: " + error.to_bytes() + b"\n\n"
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def to_event(value: Any) -> bytes:
    """A server-sent event. JSON is written in ASCII: no character of an answer can look like the end of a line."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def find_spans(versions: list[int], names: dict[int, str]) -> list[dict]:
    """Which weights chose which tokens: {version, start, end} of tokens start to end - 1."""
    spans: list[dict] = []
    for i, version in enumerate(versions):
        if not spans or versions[i - 1] != version:
            spans.append({"version": names[version], "start": i, "end": i})
        spans[-1]["end"] = i + 1
    return spans
