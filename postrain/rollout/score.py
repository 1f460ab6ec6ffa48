"""Scores of rows by a reward model or classifier: ``postrain score``.

A row is read as training reads it: rendered by the same functions, its end token with it, and packed with others. So a
score is the one that the head was trained to give. What rows may be is listed at ``parse_row_texts``.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from postrain.config import MeshConfig
from postrain.data.bad_row import BadRow, RowRef, check_string
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Rendered
from postrain.data.kinds.preference import parse_answers
from postrain.data.kinds.stepwise import FIELD, Steps, parse_completions, parse_step_prompt, render_steps
from postrain.data.messages import (
    Conversation,
    Example,
    PromptCompletion,
    check_last_answer,
    parse_messages,
    parse_row,
)
from postrain.data.rendering.render import TEMPLATE_DATE, render_many
from postrain.data.rendering.tokenizer import Tokenizer, load_tokenizer
from postrain.errors import UserError
from postrain.files import check_writable, read_jsonl
from postrain.hf.classifier import HEAD_NAME, TRAINED_ON, load_trunk, read_trunk
from postrain.hf.find_model import locate_model
from postrain.models.config import ModelConfig
from postrain.models.heads import HeadConfig
from postrain.rollout.chat import GENERATED, RAW, keep_lines
from postrain.sharding import batch_sharding, make_mesh, mesh_context, num_row_shards, replicated, to_host
from postrain.training.model import Forward, choose_compute_dtype
from postrain.training.rows import place_batch

SCORE = "score"  # the key of a scored line
LENGTH, STEP = 1024, 64  # slots of a packed row where no text is longer, and what lengths are rounded up to


class Scorer(NamedTuple):
    """A reward model or classifier with its tokenizer.

    ``labels``: of its outputs. ``trained_on``: as ``hf.classifier.Trunk`` has it.
    """

    params: Any
    config: ModelConfig
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    trained_on: str = ""

    @property
    def head(self) -> HeadConfig:
        return HeadConfig(HEAD_NAME, len(self.labels), "every")


class Texts(NamedTuple):
    """What of a row is scored: answers, each by itself, or one answer in steps.

    ``is_list``: whether its score is a list. ``is_generated``: a model's answer, which may be one that cannot be
    rendered. ``is_open``: it was cut off, so that it has no end token. ``is_message``: its prompt, a text, was made a
    message.
    """

    examples: tuple[Example, ...] = ()
    steps: Steps | None = None
    is_list: bool = False
    is_generated: bool = False
    is_open: bool = False
    is_message: bool = False


def load_scorer(folder: str | os.PathLike) -> Scorer:
    """A classifier's folder, over all devices, in their fastest dtype. Raises UserError for a language model."""
    found = locate_model(os.fspath(folder))
    _, _, labels, trained_on = read_trunk(found)
    if not labels:
        raise UserError(
            f"{folder}: expected a reward model or classifier (*ForSequenceClassification), found a language model: "
            "train one with a config like configs/reward.py, and give its export"
        )
    dtype = choose_compute_dtype("auto")
    config, params = load_trunk(found, mesh=make_mesh(MeshConfig()), dtype=dtype)
    return Scorer(params, dataclasses.replace(config, compute_dtype=dtype), labels, load_tokenizer(found), trained_on)


def score_file(
    model: Scorer | str | os.PathLike,
    source: str,
    output: str | None,
    *,
    system: str = "",
    raw: bool = False,
    steps: bool = False,
    batch_size: int = 8,
) -> int:
    """Scores every line of a JSONL file; returns how many.

    The same lines, each with ``score`` added (``format_score``), go to ``output`` in their order when all are complete,
    or to the terminal; where something ends it earlier they are kept as ``rollout.chat.keep_lines`` says. ``model``,
    where it is a folder, is loaded after the two files have been checked. ``system``: a system message for messages
    without one. ``raw``, ``steps``: see ``parse_row_texts``. ``batch_size``: packed rows that are scored together.

    Raises:
        UserError: naming the line that is not such a row, is of another form than the model was trained on, cannot be
            rendered, has a key ``score``, or whose score is not finite; naming ``output`` where it cannot be written,
            or is ``source``.
    """
    if output is not None:
        check_writable(output, "--output")
        if os.path.exists(output) and os.path.exists(source) and os.path.samefile(source, output):
            raise UserError(f"--output {output} is the file of the rows, which stays as it is: choose another place")
    path = pathlib.Path(source)
    rows = [(RowRef(path.stem, str(path), number), row) for number, row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{source} has no rows: write one JSON object on each line")
    texts = [parse_row_texts(row, ref, raw=raw, steps=steps) for ref, row in rows]
    model = model if isinstance(model, Scorer) else load_scorer(model)
    check_forms([ref for ref, _ in rows], texts, model.trained_on)
    if len(model.labels) > 1 and any(one.steps for one in texts):
        raise UserError(f"{source}: steps need a model of one output; this one has {', '.join(model.labels)}")
    results = list(_render(texts, model.tokenizer, system))
    rendered = [[] if isinstance(result, BadRow) else result for result in results]
    _warn(texts, results, model)
    owners = [i for i, documents in enumerate(rendered) for _ in documents]  # of every document its row
    found: dict[int, dict[int, np.ndarray]] = {}
    with keep_lines(output, len(rows), "scores") as add:
        line = lambda i, score: json.dumps({**rows[i][1], SCORE: score}, ensure_ascii=False)
        add({i: line(i, None) for i, documents in enumerate(rendered) if not documents})
        for number, outputs in compute_outputs(model, [one for of_row in rendered for one in of_row], batch_size):
            i = owners[number]
            if not np.isfinite(outputs).all():
                raise UserError(f"{rows[i][0]}: its score is not finite: check the model with `postrain verify`")
            of_row = found.setdefault(i, {})
            of_row[number] = outputs
            if len(of_row) == len(rendered[i]):
                in_order = [of_row[number] for number in sorted(found.pop(i))]
                add({i: line(i, format_score(in_order, texts[i], model.labels))})
    return len(rows)


def check_forms(refs: Sequence[RowRef], texts: Sequence[Texts], trained_on: str) -> None:
    """Raises UserError for a row of another form than ``trained_on``, where that is known: its score means nothing."""
    names = {"messages": "conversations, through the chat template", "text": "plain text, without the chat template"}
    for ref, one in zip(refs, texts, strict=True) if trained_on in names else ():
        found = {"messages" if isinstance(example, Conversation) else "text" for example in one.examples}
        if one.steps:
            found = {"messages" if one.steps.form == "messages" else "text"}
        if found <= {trained_on}:
            continue
        how = "write it as messages" if trained_on == "messages" else "write it as text"
        if one.is_message or (one.is_generated and trained_on == "messages"):
            how = f"run `postrain generate` and `postrain score` {'with' if trained_on == 'text' else 'without'} --raw"
        raise UserError(
            f"{ref}: would be scored as {names[found.pop()]}, but the model was trained on {names[trained_on]} "
            f"({TRAINED_ON!r} in its config.json): {how}"
        )


def _warn(texts: Sequence[Texts], results: Sequence[list[Rendered] | BadRow], model: Scorer) -> None:
    """Lines on standard error about rows whose score is null, or may not be of what the model was trained on."""
    if failed := [result for result in results if isinstance(result, BadRow)]:
        what = f"{len(failed):,} of the generated answers cannot be rendered, so that their score is null"
        print(f"warning: {what}; the first at {failed[0]}", file=sys.stderr)
    if not model.trained_on and (messages := sum(one.is_message for one in texts)):
        print(
            f"note: {messages:,} of the text prompts are put through the chat template, as `postrain generate` did; a "
            "model that was trained on rows of text has seen none: give both commands --raw",
            file=sys.stderr,
        )
    rendered = [one for result in results if not isinstance(result, BadRow) for one in result]
    if longer := sum(one.slots > model.config.max_positions for one in rendered):
        limit = f"the {model.config.max_positions:,} positions that the model was pre-trained for"
        print(f"warning: {longer:,} of the texts are longer than {limit}", file=sys.stderr)


def parse_row_texts(row: dict, ref: RowRef, *, raw: bool = False, steps: bool = False) -> Texts:
    """What is scored of a row. Raises BadRow.

    A row is one of kind sft, in any of its forms; a pair or a list of answers, with scores or without; an answer in
    steps (``completions`` with ``labels``, or with ``steps`` without); or a line that `postrain generate` has written,
    whose answer is scored. The prompt of such a line is a user's message, or plain text where it was that for
    `generate` (its key ``raw``), and with ``raw`` in any case. An empty answer of such a line has no score: there is
    nothing in it to end. Of a conversation the last message is scored, which must be an answer that is trained.
    """
    if SCORE in row:
        raise BadRow(ref, f"has a key {SCORE!r} already, which the score goes to: rename it")
    if row.get(GENERATED) is not None:
        return _parse_generated(row, ref, raw)
    if row.get("completions") is not None:
        if steps or row.get("labels") is not None:
            prompt, texts = parse_step_prompt(row, ref), parse_completions(row, ref)
            return Texts(steps=Steps(prompt, texts, (True,) * len(texts), ref), is_list=True)
        answers = row["completions"]
        if not isinstance(answers, list) or not answers:
            raise BadRow(ref, f"'completions' must be a list of answers; found {answers!r:.40}")
        names = [f"completions[{i}]" for i in range(len(answers))]
        return Texts(_judge_last(parse_answers(row, answers, names, ref, set())), is_list=True)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        names = ["chosen", "rejected"]
        answers = [row[name] for name in names]
        return Texts(_judge_last(parse_answers(row, answers, names, ref, set())), is_list=True)
    return Texts(_judge_last([parse_row(row, "sft", ref, set())]))


def _judge_last(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples with only their last answers trained, so that each becomes one sequence. Raises BadRow."""
    judged: list[Example] = []
    for example in examples:
        check_last_answer(example)
        if isinstance(example, Conversation):
            *before, last = example.messages
            example = dataclasses.replace(example, messages=(*map(_as_context, before), last))
        judged.append(example)
    return tuple(judged)


def _as_context(message: dict) -> dict:
    """A parsed message, of which nothing is trained."""
    if message["role"] != "assistant":
        return message
    return {key: value for key, value in message.items() if key != "weight"} | {"train": False}


def _parse_generated(row: dict, ref: RowRef, raw: bool) -> Texts:
    answer = row[GENERATED]
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        raise BadRow(ref, f"{GENERATED!r} must be an object with 'text', as `postrain generate` writes it")
    if not isinstance(answer.get(RAW, False), bool):
        raise BadRow(ref, f"'{GENERATED}.{RAW}' must be true or false; found {answer[RAW]!r:.40}")
    if not answer["text"].strip():
        return Texts()
    prompt = row.get("prompt") if row.get("messages") is None else row["messages"]
    is_text = isinstance(prompt, str)
    if is_text and (raw or answer.get(RAW)):  # a model's answer may repeat its prompt
        text = check_string(answer["text"], f"{GENERATED}.text", ref)
        example: Example = PromptCompletion(check_string(prompt, "prompt", ref), text, ref)
    else:
        messages = [{"role": "user", "content": prompt}] if is_text else prompt
        messages = parse_messages(messages, ref, weighted=True)
        before = [*map(_as_context, messages[:-1] if messages[-1]["role"] == "assistant" else messages)]
        completion = [{"role": "assistant", "content": answer["text"]}]
        made = {"prompt": before, "completion": completion, "tools": row.get("tools")}
        example = parse_row(made, "prompt_completion", ref, set())
    is_message = is_text and isinstance(example, Conversation)
    is_open = answer.get("finished") is False
    return Texts(_judge_last([example]), is_generated=True, is_open=is_open, is_message=is_message)


def _render(texts: Sequence[Texts], tokenizer: Tokenizer, system: str) -> Iterator[list[Rendered] | BadRow]:
    """The documents of each row, to their last tokens; the BadRow of a generated answer that cannot be rendered.

    Raises the BadRow of other rows.
    """
    options = {"template_date": TEMPLATE_DATE, "default_system": system}
    answers = render_many((example for one in texts for example in one.examples), tokenizer, **options)
    in_steps = render_steps((one.steps for one in texts if one.steps), tokenizer, **options)
    for one in texts:
        found = [next(in_steps)] if one.steps else [next(answers) for _ in one.examples]
        refusal = next((result for result in found if isinstance(result, BadRow)), None)
        if refusal is not None:
            if not one.is_generated:
                raise refusal
            yield refusal
            continue
        documents = []
        for result in found:
            (document,) = (dataclasses.replace(sequence, reads_last=True) for sequence in result)
            if one.is_open and int(document.tokens[-1]) in {*tokenizer.stop_ids, tokenizer.eos_id}:
                document = dataclasses.replace(document, tokens=document.tokens[:-1], loss_mask=document.loss_mask[:-1])
            documents.append(document)
        yield documents


def compute_outputs(
    model: Scorer, documents: Sequence[Rendered], batch_size: int = 8
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of a document, float32 [N, K]), in the order in which they are packed.

    N is 1, for the last token, or the number of a document's steps.
    """
    if not documents:
        return
    lengths = np.array([document.slots for document in documents], np.int64)
    length = -(-min(int(lengths.sum()), max(LENGTH, int(lengths.max()))) // STEP) * STEP
    rows = pack(lengths, length, window=len(documents), method="best_fit")
    mesh = make_mesh(MeshConfig())
    shards = num_row_shards(mesh)
    size = -(-min(batch_size, len(rows)) // shards) * shards
    run = _make_run(mesh, model.config, model.head)
    for start in range(0, len(rows), size):
        together = [rows[i] if i < len(rows) else np.zeros(0, np.int64) for i in range(start, start + size)]
        packed = [[_without_fields(documents[i]) for i in row] for row in together]
        outputs = to_host(run(model.params, place_batch(assemble_batch(packed, length), mesh)))
        for of_row, row in zip(outputs, together, strict=True):
            begin = 0
            for i in row.tolist():
                yield i, of_row[begin + _find_places(documents[i])]
                begin += documents[i].slots


@functools.cache
def _make_run(mesh, config: ModelConfig, head: HeadConfig):
    forward = Forward(config, chunk=1)

    def run(params, batch):
        with mesh_context(mesh):
            return forward.outputs(params, batch, head)[0]

    return jax.jit(run, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def _without_fields(document: Rendered) -> Rendered:
    return dataclasses.replace(document, fields=())


def _find_places(document: Rendered) -> np.ndarray:
    """The tokens of a document that are scored: the ends of its steps, or its last one."""
    steps = [field.values for field in document.fields if field.name == FIELD]
    return np.flatnonzero(steps[0]) if steps else np.array([document.slots - 1])


def format_score(outputs: Sequence[np.ndarray], texts: Texts, labels: tuple[str, ...]) -> Any:
    """A number for one output; of several ``{"label": name, "probabilities": {name: number}}``; lists of them.

    ``outputs``: [N, K] of each document of a row.
    """
    flat = np.concatenate(outputs)
    scores = [_format_number(one[0]) for one in flat] if len(labels) == 1 else [_classify(one, labels) for one in flat]
    return scores if texts.is_list else scores[0]


def _classify(logits: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    shifted = np.exp(logits - logits.max())
    shares = dict(zip(labels, map(_format_number, shifted / shifted.sum()), strict=True))
    return {"label": labels[int(logits.argmax())], "probabilities": shares}


def _format_number(value: np.floating) -> float:
    """The shortest decimal that reads back as this float32."""
    return float(str(np.float32(value)))


def score_rows(model: Scorer, rows: Sequence[dict], *, batch_size: int = 8) -> list[Any]:
    """Scores of rows, each as ``format_score`` writes it; null for a generated answer that cannot be rendered.

    Raises BadRow, whose ref has the number of the row, from 1; UserError for a score that is not finite.
    """
    texts = [parse_row_texts(row, RowRef("rows", "rows", number)) for number, row in enumerate(rows, 1)]
    if len(model.labels) > 1 and any(one.steps for one in texts):
        raise UserError(f"steps need a model of one output; this one has {', '.join(model.labels)}")
    results = [[] if isinstance(found, BadRow) else found for found in _render(texts, model.tokenizer, "")]
    documents = [document for of_row in results for document in of_row]
    outputs = dict(compute_outputs(model, documents, batch_size))
    scores, begin = [], 0
    for of_row, one in zip(results, texts, strict=True):
        found = [outputs[begin + k] for k in range(len(of_row))]
        begin += len(of_row)
        if not all(np.isfinite(values).all() for values in found):
            raise UserError("a score is not finite: check the model with `postrain verify`")
        scores.append(format_score(found, one, model.labels) if found else None)
    return scores
