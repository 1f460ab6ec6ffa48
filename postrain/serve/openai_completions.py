"""POST /v1/completions: plain text continued, and the log-probabilities of a prompt (``echo``)."""

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from postrain.data.bad_row import BadRow, RowRef, check_string
from postrain.rollout.chat import encode_prompt
from postrain.rollout.requests import Completion
from postrain.serve.errors import wrong
from postrain.serve.schemas import (
    MAX_CHOICES,
    OPENAI,
    Fields,
    Job,
    Output,
    check_ids,
    check_name,
    describe,
    is_whole,
    make_usage,
    read_constraint,
    read_output,
    read_sampling,
)
from postrain.serve.served import Served
from postrain.serve.streams import DONE, Answers, Piece, TokenScore, find_spans, to_event

DEFAULT_TOKENS = 16


def read_completion(served: Served, body: dict) -> "CompletionReply":
    """Checks a body and encodes its prompts. Raises ApiError, with the field named."""
    fields = Fields(body)
    check_name(served, fields.text("model"))
    texts, n = _split_prompts(fields.take("prompt")), fields.whole("n", 1, 1, MAX_CHOICES)
    served.check_count(len(texts), n, "prompt")
    with_bos = fields.flag("add_special_tokens", True)
    prompts = [encode(served, text, "prompt", with_bos) for text in texts]
    room = min(served.check_prompt(ids, "prompt") for ids in prompts)
    echo, tops = fields.flag("echo"), fields.whole("logprobs", None, 0, 20)
    nothing_new = echo and fields.values.get("max_tokens") == 0
    if nothing_new:  # one token is chosen, and not shown
        fields.values["max_tokens"] = 1
    options = {"vocab_size": served.vocab_size, "stop_ids": served.stop_ids, "seed": served.draw_seed()}
    sampling = read_sampling(fields, OPENAI, **options, default_tokens=DEFAULT_TOKENS, room=room)
    sampling = dataclasses.replace(sampling, top_logprobs=tops or 0, prompt_logprobs=echo and tops is not None)
    wanted, as_ids = read_constraint(fields), fields.flag("return_tokens_as_token_ids")
    if wanted is not None and sampling.ignore_eos:
        raise wrong("ignore_eos", "an answer under a constraint ends where the constraint lets it")
    stream, output = fields.flag("stream"), read_output(fields)
    if stream and sampling.prompt_logprobs:
        raise wrong("echo", "with logprobs it comes whole: leave out stream")
    job = Job(tuple(map(tuple, prompts)), sampling, n, wanted, stream, tuple(fields.finish()))
    return CompletionReply(served, job, output, _Shown(echo, tops is not None, nothing_new, as_ids))


def _split_prompts(value: Any) -> list:
    """A prompt, or a list of them; each is a text or a list of ids."""
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(is_whole, value)))
    prompts = [value] if one else value
    if not isinstance(prompts, list) or not prompts:
        raise wrong("prompt", f"expected a text, a list of token ids, or a list of these, found {describe(value)}")
    return prompts


def encode(served: Served, prompt: Any, name: str, with_bos: bool = True) -> list[int]:
    """The ids of plain text; ids as they are, checked."""
    if isinstance(prompt, list) and all(map(is_whole, prompt)):
        check_ids(prompt, name, served.vocab_size)
        return prompt
    if not isinstance(prompt, str):
        raise wrong(name, f"expected a text or a list of token ids, found {describe(prompt)}")
    try:
        check_string(prompt, name, RowRef("", "", 0))
    except BadRow as error:
        raise wrong(name, error.reason) from None
    return encode_prompt(served.tokenizer, prompt, raw=True) if with_bos else served.tokenizer.encode_text(prompt)


@dataclasses.dataclass(frozen=True)
class _Shown:
    echo: bool
    logprobs: bool
    nothing_new: bool  # only the prompt is shown
    as_ids: bool  # tokens are written as token_id:7


class CompletionReply:
    """The answers of one request in OpenAI's form, whole or as chunks; choice i n + k is answer k to prompt i."""

    def __init__(self, served: Served, job: Job, output: Output, shown: _Shown):
        self.served, self.job, self.output, self.shown = served, job, output, shown
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.completions: dict[int, Completion] = {}
        self._num_tokens = 0

    async def collect(self, answers: Answers) -> dict:
        texts, lasts = [""] * self.job.count, {}
        scores: list[list[TokenScore]] = [[] for _ in texts]
        async for i, piece in answers.pieces():
            self._num_tokens += len(piece.scores)
            texts[i] += piece.text
            scores[i] += piece.scores
            if piece.completion is not None:
                lasts[i], self.completions[i] = piece, piece.completion
        choices = [self._choice(i, texts[i], scores[i], 0, lasts[i], True) for i in range(len(texts))]
        return self._object() | {"choices": choices, "usage": self._usage()}

    async def stream(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        ends, begun = [0] * self.job.count, [not self.shown.echo] * self.job.count
        async for i, piece in answers.pieces():
            self._num_tokens += len(piece.scores)
            if piece.completion is not None:
                self.completions[i] = piece.completion
            choice = self._choice(i, piece.text, piece.scores, ends[i], piece, not begun[i])
            begun[i], ends[i] = True, ends[i] + len(choice["text"])
            usage = {"usage": self._usage()} if self.output.usage_each else {}
            yield to_event(self._object() | {"choices": [choice], **usage})
        if self.output.stream_usage:
            yield to_event(self._object() | {"choices": [], "usage": self._usage()})
        yield DONE

    def _choice(self, i: int, text: str, scores: Sequence[TokenScore], start: int, last: Piece, first: bool) -> dict:
        prompt = list(self.job.prompts[i // self.job.n])
        echo = self.shown.echo and first
        if self.shown.nothing_new:
            text, scores = "", ()
        shown = self._score_prompt(prompt, self.completions.get(i)) if echo and self.shown.logprobs else []
        head = self.served.tokenizer.decode(prompt) if echo else ""
        choice = {
            "index": i,
            "text": head + text,
            "finish_reason": last.finish,
            "stop_reason": last.stop_reason,
            "logprobs": self._logprobs([*shown, *scores], start) if self.shown.logprobs else None,
        }
        if last.completion is not None:
            versions = last.completion.versions.tolist()
            choice["weight_versions"] = find_spans(versions, self.served.versions)
        if self.output.token_ids:
            choice["token_ids"] = [score.token for score in scores]
            choice["prompt_token_ids"] = prompt if first else None
        return choice

    def _score_prompt(self, prompt: list[int], completion: Completion) -> list[TokenScore]:
        """One for each token; the first has no log-probability."""
        logprobs, tops = completion.prompt_logprobs.tolist(), completion.prompt_top_logprobs
        scores = [TokenScore(prompt[0], None)]
        for k in range(1, len(prompt)):
            best = () if tops is None else zip(tops.ids[k - 1].tolist(), tops.logprobs[k - 1].tolist(), strict=True)
            scores.append(TokenScore(prompt[k], logprobs[k], tuple(best)))
        return scores

    def _logprobs(self, scores: Sequence[TokenScore], start: int) -> dict:
        def name(token: int) -> str:
            return f"token_id:{token}" if self.shown.as_ids else self.served.describe_token(token).text

        tops: list[dict | None] = []
        for score in scores:
            if score.logprob is None:
                tops.append(None)
                continue
            entry: dict[str, float] = {}
            # The most probable of several tokens that look the same; and always the token itself.
            for token, logprob in (*score.tops, (score.token, score.logprob)):
                entry.setdefault(name(token), max(logprob, -9999.0))
            tops.append(entry)
        # Clients compare the token's own number with the best one: it must be the same float.
        own = [dict(score.tops).get(score.token, score.logprob) for score in scores]
        own = [None if logprob is None else max(logprob, -9999.0) for logprob in own]
        tokens = [score.token for score in scores]
        return {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": self.served.find_offsets(tokens, start),
        }

    def _object(self) -> dict:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
        }

    def _usage(self) -> dict:
        return make_usage(self.job, self.completions, 0 if self.shown.nothing_new else self._num_tokens)
