"""Text generation: answers to prompts of text or messages, for `postrain generate`, notebooks and samples of a run.

Prompts are rendered by the function that renders training rows, and fed as token ids.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from postrain.config import MeshConfig
from postrain.data.bad_row import RowRef
from postrain.data.messages import check_keys, parse_messages, parse_tools
from postrain.data.rendering.render import render_prompt
from postrain.data.rendering.template import REASONING_SWITCHES
from postrain.data.rendering.tokenizer import Tokenizer, load_tokenizer
from postrain.data.row_keys import MEDIA_KEYS, PROMPT_KEYS, Keys, is_empty
from postrain.errors import UserError
from postrain.files import check_writable, read_jsonl, write_whole
from postrain.hf.find_model import find_model
from postrain.hf.peft.adapter import load_model
from postrain.models.config import ModelConfig
from postrain.rollout.engine import Engine
from postrain.rollout.requests import Completion, SamplingParams
from postrain.rollout.text_stream import TextWindow
from postrain.sharding import make_mesh
from postrain.training.model import choose_compute_dtype

_ROW_KEYS = {key: Keys((key, "tools"), PROMPT_KEYS | MEDIA_KEYS) for key in ("prompt", "messages")}
GENERATED = "generated"  # the key of an answered line that holds its answer
RAW = "raw"  # the key in it that is true where the prompt was plain text to be continued


class ChatModel(NamedTuple):
    """A model with its tokenizer, ready to answer."""

    params: Any  # the whole tree
    config: ModelConfig
    tokenizer: Tokenizer


class Answer(NamedTuple):
    text: str  # without the stop token
    finished: bool  # the model stopped by itself


def load_chat_model(folder: str | os.PathLike) -> ChatModel:
    """A Hugging Face folder as a ChatModel, over all devices, in their fastest dtype.

    ``folder`` may be that of a PEFT adapter whose base model is here. Raises UserError where a file is missing.
    """
    dtype, found = choose_compute_dtype("auto"), find_model(folder)
    config, params = load_model(found, mesh=make_mesh(MeshConfig()), dtype=dtype)
    config = dataclasses.replace(config, compute_dtype=dtype)
    return ChatModel(params, config, load_tokenizer(found.tokenizer))


def generate(
    model: ChatModel | tuple | str | os.PathLike,
    prompts: Sequence[str | Sequence[dict]] | str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    system: str = "",
    thinking: bool | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Answers to prompts.

    Args:
        model: a Hugging Face folder, or (params, model_config, tokenizer) already loaded.
        prompts: user messages, or lists of ``{"role": ..., "content": ...}``; a single string is one prompt.
        max_new_tokens: an answer is cut there.
        temperature, top_p, top_k, seed: how tokens are sampled; temperature 0 takes the most probable one.
        system: a system message for prompts that are strings.
        thinking: whether to reason first, for chat templates with a switch for reasoning; None is the template's
            default. A run prints the setting that its answers were trained with.
        batch_size: prompts generated together.

    Returns:
        One text per prompt, in order, without the stop token.
    """
    model = _as_chat_model(model)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed
    )
    ids = [encode_prompt(model.tokenizer, prompt, system, thinking=thinking) for prompt in prompts]
    return [answer.text for answer in answer_ids(model, ids, sampling, batch_size)]


def _as_chat_model(model: ChatModel | tuple | str | os.PathLike) -> ChatModel:
    return load_chat_model(model) if isinstance(model, (str, os.PathLike)) else ChatModel(*model)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | Sequence[dict],
    system: str = "",
    *,
    tools=None,
    raw: bool = False,
    thinking: bool | None = None,
) -> list[int]:
    """Token ids of a prompt, as fed to the model.

    ``raw``: plain text to be continued. ``thinking``: the template's switch for reasoning; None is its default.
    Raises UserError where the prompt cannot be rendered, or the template has no such switch.
    """
    if thinking is not None:
        if raw:
            raise UserError(
                "thinking is switched by the chat template, which raw prompts leave out: leave out --thinking"
            )
        template = tokenizer.require_template()
        if not template.switches:
            names = " nor ".join(REASONING_SWITCHES)
            raise UserError(f"the chat template of {template.origin} reads neither {names}: leave out --thinking")
    if raw:
        if not isinstance(prompt, str):
            raise UserError("raw prompts are plain text, found messages: leave out --raw")
        if system or tools:
            raise UserError("raw prompts are fed as they are, without a system message or tools: leave out --raw")
        return [*tokenizer.prefix_ids, *tokenizer.encode_text(prompt)]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    ids = render_prompt(list(prompt), tokenizer, tools=tools, default_system=system, thinking=thinking)
    return [int(i) for i in ids]


def answer_ids(model: ChatModel, prompts: list, sampling: SamplingParams, batch_size: int = 32) -> list[Answer]:
    """Answers to prompts of token ids; stops at the tokenizer's stop ids."""
    answers = dict(iterate_answers(model, prompts, sampling, batch_size))
    return [answers[i] for i in range(len(prompts))]


def iterate_answers(
    model: ChatModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams, batch_size: int = 32
) -> Iterator[tuple[int, Answer]]:
    """(index, answer) of prompts of token ids as they come, the longest prompts first; stops as ``answer_ids`` does."""
    sampling = for_tokenizer(sampling, model.tokenizer, model.config)
    engine = Engine(model.params, model.config, slots=batch_size)

    def until(index: int) -> Callable[[int], bool]:
        stream = TextWindow(model.tokenizer, sampling.stop)
        return lambda token: stream.ends_with(token)

    for index, completion in engine.iterate(prompts, sampling, until=until if sampling.stop else None):
        yield index, to_answer(completion, model.tokenizer, sampling)


def for_tokenizer(sampling: SamplingParams, tokenizer: Tokenizer, config: ModelConfig) -> SamplingParams:
    """``sampling`` that never chooses an id of the model that is no token; with the tokenizer's stop ids too, unless it
    ignores them.

    Many models have more rows than their tokenizer has tokens. Decoding leaves those ids out without a word.
    """
    own = () if sampling.ignore_eos else [token for token in tokenizer.stop_ids if token < config.vocab_size]
    stops = {*sampling.stop_ids, *own}
    banned = set(range(config.vocab_size)) - tokenizer.ids - stops
    return dataclasses.replace(sampling, stop_ids=tuple(stops), banned_ids=tuple(banned.union(sampling.banned_ids)))


def to_answer(completion: Completion, tokenizer: Tokenizer, sampling: SamplingParams) -> Answer:
    """The text of a completion up to its stop id, or before the first of ``sampling.stop`` in it."""
    tokens = completion.tokens
    if completion.finished and tokens and tokens[-1] in sampling.stop_ids:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens)
    places = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
    return Answer(text[: min(places, default=len(text))], completion.finished)


def answer_prompt(
    model: ChatModel,
    prompt: str,
    sampling: SamplingParams,
    system: str = "",
    raw: bool = False,
    thinking: bool | None = None,
    write: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Answers one prompt; ``write`` is called with each piece of text as it is generated."""
    ids = encode_prompt(model.tokenizer, prompt, system, raw=raw, thinking=thinking)
    sampling = for_tokenizer(sampling, model.tokenizer, model.config)
    stream = TextWindow(model.tokenizer, sampling.stop)

    def take(token: int) -> bool:
        if token not in sampling.stop_ids:
            write(stream.push(token))
        return stream.stop is not None

    engine = Engine(model.params, model.config, slots=1, steps=1)
    [completion] = engine.generate([ids], sampling, until=lambda index: take)
    write(stream.end())
    return to_answer(completion, model.tokenizer, sampling)


def answer_file(
    model: ChatModel | tuple | str | os.PathLike,
    source: str,
    output: str | None,
    sampling: SamplingParams,
    system: str = "",
    raw: bool = False,
    thinking: bool | None = None,
    batch_size: int = 32,
) -> int:
    """Answers every line of a JSONL file; returns how many.

    A line is ``{"prompt": text or messages}`` or ``{"messages": [...]}``, of which a last assistant message is
    left out and answered anew. The same lines, each with ``"generated": {"text", "finished"}`` added, with ``raw``
    also ``"raw": true``, go to ``output``, written when all are complete, or to the terminal. Where something ends it
    earlier, the lines answered until then are in ``output`` + ".unfinished", or on the terminal. ``model``, where it is
    a folder, is loaded after the two files have been checked.

    Raises:
        UserError: naming the line that is not such a row, or has a key ``generated``; naming ``output`` where it
            cannot be written, or is ``source``.
    """
    if output is not None:
        check_writable(output, "--output")
        if os.path.exists(output) and os.path.exists(source) and os.path.samefile(source, output):
            raise UserError(f"--output {output} is the file of --input, which stays as it is: choose another place")
    rows = list(_read_rows(pathlib.Path(source), raw))
    if not rows:
        raise UserError(f"{source} has no rows: write one JSON object on each line")
    model = _as_chat_model(model)
    ids = []
    for row, key, ref in rows:
        prompt = row[key]
        if not isinstance(prompt, str):
            prompt = parse_messages(prompt, ref, weighted=True)
            if prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        tools = parse_tools(row.get("tools"), ref)
        ids.append(encode_prompt(model.tokenizer, prompt, system, tools=tools, raw=raw, thinking=thinking))
    form = {RAW: True} if raw else {}  # so that whoever reads the answers knows what they go on
    with keep_lines(output, len(rows)) as add:
        for i, answer in iterate_answers(model, ids, sampling, batch_size):
            add({i: json.dumps({**rows[i][0], GENERATED: answer._asdict() | form}, ensure_ascii=False)})
    return len(rows)


@contextlib.contextmanager
def keep_lines(output: str | None, total: int, what: str = "answers") -> Iterator[Callable[[dict[int, str]], None]]:
    """Takes the lines of a file by their index, in any order; the file is written when the block ends well.

    Those that have come are kept, and their number is said, where it does not: beside ``output`` as they come, so that
    not even a kill loses them, or on the terminal, where ``output`` is None. ``what``: is said to be in them.
    """
    lines: dict[int, str] = {}
    unfinished = None if output is None else pathlib.Path(f"{output}.unfinished")

    def add(new: dict[int, str]) -> None:
        if unfinished is not None:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("a" if lines else "w", encoding="utf-8", newline="") as file:
                file.writelines(f"{line}\n" for line in new.values())
        lines.update(new)

    done = False
    try:
        yield add
        text = "".join(f"{lines[i]}\n" for i in range(total))
        if unfinished is None:
            print(text, end="")
        else:
            write_whole(output, text)
            unfinished.unlink(missing_ok=True)
        done = True
    finally:
        if lines and not done:
            if unfinished is None:
                print("\n".join(lines[i] for i in sorted(lines)))
            where = "above" if unfinished is None else f"in {unfinished}"
            print(f"{len(lines):,} of {total:,} {what} are {where}", file=sys.stderr)


def _read_rows(path: pathlib.Path, raw: bool = False) -> Iterator[tuple[dict, str, RowRef]]:
    """The rows of a file, each with the key of its prompt, ``prompt`` or ``messages``."""
    for number, row in read_jsonl(path):
        ref = RowRef(path.stem, str(path), number)
        keys = [key for key in _ROW_KEYS if row.get(key) is not None]
        given = [key for key in keys if not is_empty(row[key])]
        if not keys:
            raise UserError(f"{ref}: expected an object with 'prompt' or 'messages'")
        if len(given) > 1:
            raise UserError(f"{ref}: has both 'prompt' and 'messages', of which one is answered: take the other out")
        if not given and not raw:
            raise UserError(f"{ref}: {keys[0]!r} is empty: write what the user says")
        if GENERATED in row:
            raise UserError(f"{ref}: has a key {GENERATED!r} already, which the answer goes to: rename it")
        key = (given or keys)[0]
        check_keys(row, _ROW_KEYS[key], ref, set())
        yield row, key, ref
