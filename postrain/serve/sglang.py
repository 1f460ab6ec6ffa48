"""Tokens in, tokens out, in SGLang's words: POST /generate, and weights from a folder."""

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from postrain.errors import UserError, one_line
from postrain.rollout.requests import Completion
from postrain.serve.errors import ApiError, wrong
from postrain.serve.openai_completions import encode
from postrain.serve.schemas import (
    MAX_CHOICES,
    SGLANG,
    Fields,
    Job,
    Wanted,
    describe,
    is_whole,
    parse_body,
    parse_schema,
    read_sampling,
    write_ignored,
)
from postrain.serve.served import Served
from postrain.serve.streams import DONE, Answers, Piece, find_spans, to_event

DEFAULT_TOKENS = 128


def make_routes(served: Served, make_route: Callable) -> list[Route]:
    updates = WeightUpdates(served)
    return [
        Route("/generate", make_route(served, read_generate), methods=["POST"]),
        Route("/update_weights_from_disk", updates.from_disk, methods=["POST"]),
        Route("/model_info", lambda request: to_json(describe_model(served)), methods=["GET"]),
        Route("/get_model_info", lambda request: to_json(describe_model(served)), methods=["GET"]),
    ]


def to_json(value: Any, status: int = 200) -> Response:
    return Response(to_event(value)[6:-2], status, media_type="application/json")


def describe_model(served: Served) -> dict:
    return {"model_path": served.folder, "weight_version": served.version, "max_total_num_tokens": served.max_length}


def read_generate(served: Served, body: dict) -> "GenerateReply":
    """Checks a body. Raises ApiError, with the field named."""
    fields = Fields(body)
    if isinstance(body.get("sampling_params"), list):
        raise wrong("sampling_params", "a list of them is not supported: send one request for each")
    name = "input_ids" if "input_ids" in fields.values else "text"
    value = fields.take(name)
    other = fields.take("text" if name == "input_ids" else "input_ids")
    if other is not None or value is None:
        raise wrong("input_ids", "expected either input_ids or text")
    is_list = isinstance(value, list) and not (name == "input_ids" and all(map(is_whole, value)))
    if is_list and not value:
        raise wrong(name, "is empty")
    inner = fields.inner("sampling_params")
    n = inner.whole("n", 1, 1, MAX_CHOICES)
    served.check_count(len(value) if is_list else 1, n, name)
    prompts = [encode(served, one, name) for one in (value if is_list else [value])]
    room = min(served.check_prompt(ids, name) for ids in prompts)
    options = {"vocab_size": served.vocab_size, "stop_ids": served.stop_ids, "seed": served.draw_seed()}
    sampling = read_sampling(inner, SGLANG, **options, default_tokens=DEFAULT_TOKENS, room=room)
    with_logprobs, start = fields.flag("return_logprob"), fields.whole("logprob_start_len", -1, -1)
    tops = fields.whole("top_logprobs_num", 0, 0, 20) if with_logprobs else fields.whole("top_logprobs_num", 0) * 0
    scored = with_logprobs and start >= 0
    sampling = dataclasses.replace(sampling, top_logprobs=tops, prompt_logprobs=scored)
    wanted = None
    kinds = {"json_schema": "json_schema", "regex": "regex", "ebnf": "grammar"}
    found = [(kinds[kind], inner.take(kind)) for kind in kinds if kind in inner.values]
    if len(found) > 1:
        raise wrong("sampling_params", f"expected one of {', '.join(kinds)}")
    for kind, value in found:
        param = "sampling_params." + next(key for key in kinds if kinds[key] == kind)
        if sampling.ignore_eos:
            raise wrong("sampling_params.ignore_eos", "an answer under a constraint ends where the constraint lets it")
        value = parse_schema(value, param) if kind == "json_schema" else value
        wanted = Wanted({kind: value}, param)
    stream = fields.flag("stream")
    if stream and scored:
        raise wrong("logprob_start_len", "log-probabilities of the prompt come whole: leave out stream")
    rid, with_prompt = fields.text("rid"), fields.flag("return_prompt_token_ids")
    if misplaced := [name for name in fields.values if inner.reads(name) and not fields.reads(name)]:
        raise wrong(misplaced[0], "belongs into sampling_params")
    job = Job(tuple(map(tuple, prompts)), sampling, n, wanted, stream, tuple(fields.finish()))
    shown = _Shown(with_logprobs, start if scored else None, is_list or n > 1, with_prompt, rid or uuid.uuid4().hex)
    return GenerateReply(served, job, shown)


@dataclasses.dataclass(frozen=True)
class _Shown:
    logprobs: bool
    prompt_logprobs_from: int | None  # the prompt's first token that is scored
    is_list: bool
    prompt_ids: bool
    rid: str


class GenerateReply:
    """The answers of one request; in a stream each event has all of its answer until then, each token written once."""

    def __init__(self, served: Served, job: Job, shown: _Shown):
        self.served, self.job, self.shown = served, job, shown
        self.begin = time.monotonic()
        self.completions: dict[int, Completion] = {}
        self._texts, self._counts = [""] * job.count, [0] * job.count
        # JSON of what is written of each token, with commas between: ids, log-probabilities, the most probable ids.
        self._ids, self._logprobs, self._tops = ([""] * job.count for _ in range(3))

    async def collect(self, answers: Answers) -> bytes:
        lasts: dict[int, Piece] = {}
        async for i, piece in answers.pieces():
            self._take(i, piece)
            lasts[i] = piece
        results = [self._write(i, lasts[i]) for i in range(self.job.count)]
        return (f"[{', '.join(results)}]" if self.shown.is_list else results[0]).encode()

    async def stream(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        async for i, piece in answers.pieces():
            self._take(i, piece)
            yield b"data: " + self._write(i, piece).encode() + b"\n\n"
        yield DONE

    def _take(self, i: int, piece: Piece) -> None:
        self._texts[i] += piece.text
        self._counts[i] += len(piece.scores)
        if piece.completion is not None:
            self.completions[i] = piece.completion
        if piece.scores:
            comma = ", " if self._ids[i] else ""
            self._ids[i] += comma + _write_entries([score.token for score in piece.scores])
            if self.shown.logprobs:
                entries = [_entry(score.token, score.logprob) for score in piece.scores]
                self._logprobs[i] += comma + _write_entries(entries)
                best = [[_entry(*one) for one in score.tops] for score in piece.scores]
                self._tops[i] += comma + _write_entries(best)

    def _write(self, i: int, piece: Piece) -> str:
        """One answer until now, in JSON."""
        meta = json.dumps(self._describe(i, piece))[:-1]
        if self.shown.logprobs:
            meta += f', "output_token_logprobs": [{self._logprobs[i]}]'
            if self.job.sampling.top_logprobs:
                meta += f', "output_top_logprobs": [{self._tops[i]}]'
        index = f'"index": {i}, ' if self.shown.is_list and self.job.stream else ""
        return f'{{{index}"text": {json.dumps(self._texts[i])}, "output_ids": [{self._ids[i]}], "meta_info": {meta}}}}}'

    def _describe(self, i: int, piece: Piece) -> dict:
        prompt, done = self.job.prompts[i // self.job.n], piece.completion
        meta: dict[str, Any] = {
            "id": self.shown.rid if self.job.count == 1 else f"{self.shown.rid}_{i}",
            "finish_reason": self._finish(piece, self._counts[i]),
            "prompt_tokens": len(prompt),
            "completion_tokens": self._counts[i],
            "cached_tokens": 0 if done is None else done.cached_tokens,
            "weight_version": self.served.version,
            "e2e_latency": time.monotonic() - self.begin,
        }
        if done is not None:
            meta["weight_versions"] = find_spans(done.versions.tolist(), self.served.versions)
            if done.versions.size:
                meta["weight_version"] = self.served.versions[int(done.versions[-1])]
        if self.shown.logprobs and done is not None:
            meta |= self._finish_logprobs(prompt, done)
        if self.shown.prompt_ids:
            meta["prompt_token_ids"] = list(prompt)
        return meta

    def _finish(self, piece: Piece, count: int) -> dict | None:
        if piece.finish is None:
            return None
        if piece.finish == "length":
            return {"type": "length", "length": count}
        if piece.finish == "abort":
            return {"type": "abort", "message": "ended by an update of the weights"}
        matched = piece.stop_reason
        if matched is None and piece.completion.tokens:
            matched = piece.completion.tokens[-1]
        return {"type": "stop", "matched": matched}

    def _finish_logprobs(self, prompt: Sequence[int], done: Completion) -> dict:
        """Of what was sampled from: after filters, penalties and constraints. And those of the prompt."""
        out: dict[str, Any] = {"output_token_sampling_logprobs": done.logprobs.tolist()}
        if self.shown.prompt_logprobs_from is not None:
            first = self.shown.prompt_logprobs_from
            values = [None, *done.prompt_logprobs.tolist()[1:]]
            entries = [_entry(token, one) for one, token in zip(values, prompt, strict=True)]
            out["input_token_logprobs"] = entries[first:]
            if (tops := done.prompt_top_logprobs) is not None:
                rows = zip(tops.ids.tolist(), tops.logprobs.tolist(), strict=True)
                best = [[_entry(token, one) for token, one in zip(*row, strict=True)] for row in rows]
                out["input_top_logprobs"] = [None, *best][first:]
        return out


def _entry(token: int, logprob: float | None) -> list:
    """The log-probability is the model's at the request's temperature, over all ids."""
    return [logprob, token, None]


def _write_entries(entries: list) -> str:
    return json.dumps(entries)[1:-1]


class WeightUpdates:
    """POST /update_weights_from_disk, one at a time."""

    def __init__(self, served: Served):
        self.served, self._lock = served, asyncio.Lock()

    async def from_disk(self, request: Request) -> Response:
        fields = Fields(parse_body(await request.body()))
        folder, version = fields.text("model_path"), fields.text("weight_version")
        caches = "abort" if fields.flag("abort_all_requests") else fields.take("caches", "recompute")
        if folder is None:
            raise wrong("model_path", "is missing: expected a folder on the server's machine")
        if caches not in ("recompute", "keep", "abort"):
            raise wrong("caches", f"expected recompute, keep or abort, found {describe(caches)}")
        ignored = fields.finish()
        # A client that goes, or the time limit, does not let go of the lock while the folder is read.
        reply = await asyncio.shield(asyncio.ensure_future(self._update(folder, version, caches)))
        if ignored:
            reply.headers["x-ignored-fields"] = write_ignored(ignored)
        return reply

    async def _update(self, folder: str, version: str | None, caches: str) -> Response:
        served = self.served
        async with self._lock:
            if version in served.versions.values():
                raise wrong("weight_version", f"{version!r} is the name of weights that were here before")
            try:
                await asyncio.to_thread(served.update_weights, folder, version, caches)
            except UserError as error:
                found = ApiError(400, one_line(error), "model_path").to_dict()
                return to_json({"success": False, "message": one_line(error), **found}, 400)
            message = f"weights of {folder} are in use as version {served.version}"
        return to_json({"success": True, "message": message, "num_paused_requests": 0})
