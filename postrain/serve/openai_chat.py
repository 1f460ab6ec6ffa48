"""POST /v1/chat/completions."""

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.messages import parse_tools
from postrain.data.rendering.template import REASONING_SWITCHES
from postrain.errors import UserError
from postrain.rollout.chat import encode_prompt
from postrain.serve.errors import ApiError, wrong
from postrain.serve.replies import THINK, Delta, ReplyParser, write_call_grammar
from postrain.serve.schemas import (
    MAX_CHOICES,
    OPENAI,
    Fields,
    Job,
    Output,
    Wanted,
    check_name,
    describe,
    make_usage,
    read_constraint,
    read_output,
    read_sampling,
)
from postrain.serve.served import Served
from postrain.serve.streams import DONE, Answers, Piece, TokenScore, find_spans, to_event


def read_chat(served: Served, body: dict) -> "ChatReply":
    """Checks a body and renders its prompt. Raises ApiError, with the field named."""
    fields = Fields(body)
    check_name(served, fields.text("model"))
    n = fields.whole("n", 1, 1, MAX_CHOICES)
    served.check_count(1, n, "n")
    tools = _read_tools(fields, served)
    ids = _render(fields, served, tools.tools)
    room = served.check_prompt(ids, "messages")
    options = {"vocab_size": served.vocab_size, "stop_ids": served.stop_ids, "seed": served.draw_seed()}
    sampling = read_sampling(fields, OPENAI, **options, default_tokens=room, room=room)
    with_logprobs, tops = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, 20)
    if tops and not with_logprobs:
        raise wrong("top_logprobs", "goes with logprobs: true")
    sampling = dataclasses.replace(sampling, top_logprobs=tops)
    wanted = read_constraint(fields)
    if tools.forced:
        if wanted is not None or sampling.ignore_eos:
            raise wrong("tool_choice", "a call that is forced leaves no room for response_format, or for ignore_eos")
        wanted = Wanted({"grammar": write_call_grammar(served.tool_form, tools.forced)}, "tools")
    elif wanted is not None and sampling.ignore_eos:
        raise wrong("ignore_eos", "an answer under a constraint ends where the constraint lets it")
    stream, output = fields.flag("stream"), read_output(fields)
    ignored = tuple(fields.finish())
    job = Job((tuple(ids),), sampling, n, wanted, stream, ignored)
    # The template may begin the reasoning in the prompt; a constraint is on the answer, which then begins at once.
    begun = served.tokenizer.decode(ids[-16:]).rstrip().endswith(THINK)
    reads = served.tokenizer.template.reads_reasoning
    reasoning = "none" if begun and wanted else "open" if begun else "may come" if reads else "none"
    form = served.tool_form if tools.tools else None
    parsers = [ReplyParser(form, tools.names, reasoning) for _ in range(n)]
    return ChatReply(served, job, output, with_logprobs, parsers, tools.one_call)


@dataclasses.dataclass(frozen=True)
class _Tools:
    """``tools``: of the prompt, None where there are none or none may be called."""

    tools: list | None = None
    functions: tuple[dict, ...] = ()  # with their schemas
    forced: tuple[dict, ...] = ()  # those of which one must be called
    one_call: bool = False

    @property
    def names(self) -> set[str]:
        return {function["name"] for function in self.functions}


def _read_tools(fields: Fields, served: Served) -> _Tools:
    tools, choice = fields.take("tools", []), fields.take("tool_choice", "auto")
    one_call = not fields.flag("parallel_tool_calls", True)
    if not isinstance(tools, list):
        raise wrong("tools", f"expected a list, found {describe(tools)}")
    try:
        functions = tuple(tool["function"] for tool in parse_tools(tools, RowRef("tools", "tools", 1)) or ())
    except BadRow as error:
        raise wrong("tools", error.reason) from None
    named = choice.get("function", {}) if isinstance(choice, dict) else {}
    name = named.get("name") if isinstance(named, dict) else None
    if choice not in ("auto", "none", "required") and not isinstance(name, str):
        raise wrong("tool_choice", f"expected auto, none, required or a function, found {describe(choice)}")
    forced = functions if choice == "required" else tuple(one for one in functions if one["name"] == name)
    if not forced and choice not in ("auto", "none"):
        raise wrong("tool_choice", f"there is no such tool: {describe(choice)}")
    if not functions or choice == "none":
        return _Tools()
    if served.tool_form is None:
        raise wrong("tools", "the model's chat template writes calls in no form that can be read back")
    return _Tools(tools, functions, forced, one_call)


def _render(fields: Fields, served: Served, tools: list | None) -> list[int]:
    messages, kwargs = fields.take("messages"), fields.object("chat_template_kwargs")
    if not isinstance(messages, list):
        raise wrong("messages", f"expected a list of messages, found {describe(messages)}")
    thinking = None
    for name, value in kwargs.items():
        param = f"chat_template_kwargs.{name}"
        if name not in REASONING_SWITCHES:
            raise wrong(param, f"is not supported: there are {' and '.join(REASONING_SWITCHES)}")
        if not isinstance(value, bool):
            raise wrong(param, f"expected true or false, found {describe(value)}")
        thinking = value
    try:
        served.tokenizer.require_template()
    except UserError as error:
        raise wrong("messages", f"{error}; plain text goes to /v1/completions") from None
    if thinking is not None and not served.tokenizer.template.switches:
        raise wrong("chat_template_kwargs", "the model's chat template has no switch for reasoning")
    try:
        return encode_prompt(served.tokenizer, messages, tools=tools, thinking=thinking)
    except BadRow as error:
        param = "tools" if error.reason.startswith(("tools", "'tools'")) else "messages"
        raise ApiError(400, f"{error.reason} {error.advice}", param) from None
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None


class ChatReply:
    """The answers of one request in OpenAI's form, whole or as chunks."""

    def __init__(
        self,
        served: Served,
        job: Job,
        output: Output,
        with_logprobs: bool,
        parsers: Sequence[ReplyParser],
        one_call: bool,
    ):
        self.served, self.job, self.output, self.with_logprobs = served, job, output, with_logprobs
        self.parsers, self.one_call = parsers, one_call
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.completions: dict[int, Any] = {}
        self._num_tokens = 0

    async def collect(self, answers: Answers) -> dict:
        choices = [_Choice() for _ in range(self.job.n)]
        async for i, piece in answers.pieces():
            choices[i].add(self._parse(i, piece), piece)
            self._note(i, piece)
        return self._object("chat.completion") | {
            "choices": [self._to_dict(i, choice) for i, choice in enumerate(choices)],
            "usage": self._usage(),
            **({"prompt_token_ids": list(self.job.prompts[0])} if self.output.token_ids else {}),
        }

    async def stream(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        first = {"prompt_token_ids": list(self.job.prompts[0])} if self.output.token_ids else {}
        for i in range(self.job.n):
            yield self._chunk(i, {"role": "assistant", "content": ""}, **first)
        async for i, piece in answers.pieces():
            deltas = self._parse(i, piece)
            self._note(i, piece)
            extra: dict = {"logprobs": self._logprobs(piece.scores)} if self.with_logprobs and piece.scores else {}
            if self.output.token_ids:
                extra["token_ids"] = [score.token for score in piece.scores]
            for delta in deltas or ([Delta("content", "")] if extra and piece.scores else []):
                value = [delta.value] if delta.kind == "tool_calls" else delta.value
                yield self._chunk(i, {delta.kind: value}, **extra)
                extra = {}
            if piece.finish is not None:
                finish = self._finish(piece.finish, self.parsers[i])
                yield self._chunk(i, {}, finish, stop_reason=piece.stop_reason, **self._versions(piece))
        if self.output.stream_usage:
            yield to_event(self._object("chat.completion.chunk") | {"choices": [], "usage": self._usage()})
        yield DONE

    def _parse(self, i: int, piece: Piece) -> list[Delta]:
        parser = self.parsers[i]
        deltas = parser.feed(piece.text, piece.finish is not None)
        if self.one_call:
            deltas = [delta for delta in deltas if delta.kind != "tool_calls" or delta.value["index"] == 0]
        return deltas

    def _note(self, i: int, piece: Piece) -> None:
        self._num_tokens += len(piece.scores)
        if piece.completion is not None:
            self.completions[i] = piece.completion

    def _to_dict(self, i: int, choice: "_Choice") -> dict:
        message: dict = {"role": "assistant", "content": choice.content}
        if choice.calls:
            message |= {"content": choice.content or None, "tool_calls": choice.calls}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        out = {
            "index": i,
            "message": message,
            "finish_reason": self._finish(choice.last.finish, self.parsers[i]),
            "logprobs": self._logprobs(choice.scores) if self.with_logprobs else None,
            "stop_reason": choice.last.stop_reason,
            **self._versions(choice.last),
        }
        if self.output.token_ids:
            out["token_ids"] = choice.last.completion.tokens
        return out

    def _finish(self, finish: str, parser: ReplyParser) -> str:
        return "tool_calls" if finish == "stop" and parser.num_calls else finish

    def _versions(self, piece: Piece) -> dict:
        return {"weight_versions": find_spans(piece.completion.versions.tolist(), self.served.versions)}

    def _object(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def _chunk(self, i: int, delta: dict, finish: str | None = None, **extra) -> bytes:
        choice = {"index": i, "delta": delta, "finish_reason": finish, **extra}
        usage = {"usage": self._usage()} if self.output.usage_each else {}
        return to_event(self._object("chat.completion.chunk") | {"choices": [choice], **usage})

    def _usage(self) -> dict:
        return make_usage(self.job, self.completions, self._num_tokens)

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict:
        def describe_one(token: int, logprob: float) -> dict:
            text, data = self.served.describe_token(token)
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

        entries = [
            {
                **describe_one(score.token, score.logprob),
                "top_logprobs": [describe_one(token, logprob) for token, logprob in score.tops],
            }
            for score in scores
        ]
        return {"content": entries}


class _Choice:
    """What has come of one answer."""

    def __init__(self):
        self.content, self.reasoning, self.calls, self.scores = "", "", [], []
        self.last: Piece | None = None

    def add(self, deltas: list[Delta], piece: Piece) -> None:
        for kind, value in deltas:
            if kind == "content":
                self.content += value
            elif kind == "reasoning_content":
                self.reasoning += value
            else:
                self.calls.append({key: one for key, one in value.items() if key != "index"})
        self.scores += piece.scores
        self.last = piece
