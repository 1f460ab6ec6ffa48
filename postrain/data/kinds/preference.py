"""Kind preference: answers to one prompt, and their scores.

Rows are ``{"prompt", "chosen", "rejected"}``; ``{"chosen", "rejected"}``, two conversations whose common beginning is
the prompt; or ``{"prompt", "completions": [...], "scores": [...]}``, two answers or more. A pair may have a ``margin``,
by how much the chosen answer is better; it stands for 1 where there is none. Text is plain text, without
any template; a list of messages is rendered. Only the answers are trained (``loss_mask``). They stay together in
packing: a ``Group``, each with its score in the array ``scores``, of a pair the margin and 0.

A group cannot be cut to a length: its scores were given to whole answers.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from postrain.data.bad_row import FUNCTION_ADVICE, BadRow, RowRef, name_keys
from postrain.data.documents import Document, Field, Group, Layout, Rendered
from postrain.data.messages import (
    REPEATED,
    Example,
    check_answers,
    check_keys,
    parse_messages,
    parse_prompt_completion,
    repeats_prompt,
)
from postrain.data.other_tools import to_number
from postrain.data.rendering.render import render_many
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.row_keys import INPUT_KEYS, LOSS_KEYS, MEDIA_KEYS, PROMPT_KEYS, REASONING_KEYS, Keys, is_empty
from postrain.errors import UserError

FORMS = {"pair": ("chosen", "rejected"), "scored_list": ("completions", "scores")}
_REFUSED = PROMPT_KEYS | MEDIA_KEYS | INPUT_KEYS | REASONING_KEYS | LOSS_KEYS
_KEYS = {form: Keys(("prompt", *keys, "tools"), _REFUSED) for form, keys in FORMS.items()}
_KEYS["pair"] = Keys(("prompt", *FORMS["pair"], "margin", "tools"), _REFUSED)
_KEYS[""] = Keys(("prompt", *(key for keys in FORMS.values() for key in keys), "tools"))
_LARGEST = float(np.finfo(np.float32).max)
_LEAST = 1e-30  # nothing beside any margin, and enough for an order
LAYOUT = Layout({"scores": (np.dtype(np.float32), ()), "group_ids": (np.dtype(np.int32), ())})  # of its batches


@dataclasses.dataclass(frozen=True)
class Preference:
    """Answers to one prompt, each with the prompt as a row of kind sft, and their scores."""

    answers: tuple[Example, ...]
    scores: tuple[float, ...]
    names: tuple[str, ...]  # of the answers, in the row
    ref: RowRef


def parse_preference(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Preference:
    """One row, checked; ``form`` is one of FORMS, or "". ``unread`` takes the keys that are not read. Raises BadRow."""
    check_keys(raw, _KEYS[form], ref, unread)
    missing = [name for name in FORMS.get(form, ()) if raw.get(name) is None]
    if missing:
        raise BadRow(ref, f"{missing[0]!r} is missing or null")
    if form == "pair":
        answers = [raw["chosen"], raw["rejected"]]
        names: tuple[str, ...] = ("chosen", "rejected")
        scores: tuple[float, ...] = _parse_margin(raw.get("margin"), ref)
    elif form == "scored_list":
        answers, scores = raw["completions"], _parse_scores(raw["completions"], raw["scores"], ref)
        names = tuple(f"completions[{i}]" for i in range(len(answers)))
    else:
        raise BadRow(
            ref,
            f"expected the keys 'chosen' and 'rejected', or 'completions' and 'scores'; found {name_keys(raw)}",
            FUNCTION_ADVICE,
        )
    return Preference(parse_answers(raw, answers, names, ref, unread), scores, names, ref)


def parse_answers(
    raw: dict, answers: Sequence[Any], names: Sequence[str], ref: RowRef, unread: set[str]
) -> tuple[Example, ...]:
    """Each of the answers after the prompt of a row, or after what they have in common; ``names``: of them, in the row.

    Raises BadRow.
    """
    if len({isinstance(answer, str) for answer in answers}) > 1:
        raise BadRow(ref, "expected answers that are all text or all lists of messages; found both")
    prompt = raw.get("prompt")
    if prompt is None:
        prompt, answers = _split_prompt(answers, names, ref, unread)
    elif is_empty(prompt):
        raise BadRow(ref, "'prompt' is empty: the answers have no prompt in common")
    elif isinstance(answers[0], str):
        if isinstance(prompt, str) and all(repeats_prompt(prompt, answer) for answer in answers):
            raise BadRow(ref, f"each of the answers {REPEATED}")
    else:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = parse_messages(prompt, ref, unread, "prompt")
        answers = [
            _without_prompt(prompt, answer, name, ref, unread) for answer, name in zip(answers, names, strict=True)
        ]
    rows = [{"prompt": prompt, "completion": answer, "tools": raw.get("tools")} for answer in answers]
    parsed = []
    for row, name in zip(rows, names, strict=True):
        try:
            parsed.append(parse_prompt_completion(row, ref, set()))
        except BadRow as e:
            raise BadRow(ref, f"{name}: {e.reason}") from None
    return tuple(parsed)


def _parse_margin(margin: Any, ref: RowRef) -> tuple[float, float]:
    """The scores of the chosen and the rejected answer, which differ by the margin, also where it is 0."""
    number = 1.0 if is_empty(margin) else to_number(margin)
    if not 0 <= number < _LARGEST:
        raise BadRow(ref, f"'margin' must be a finite number, at least 0; found {margin!r:.40}")
    return number, 0.0 if number > _LEAST else -_LEAST


def _parse_scores(answers: Any, scores: Any, ref: RowRef) -> tuple[float, ...]:
    for name, values in (("completions", answers), ("scores", scores)):
        if not isinstance(values, list | tuple):
            raise BadRow(ref, f"{name!r} must be a list; found {values!r:.40}")
    if len(answers) != len(scores):
        raise BadRow(ref, f"{len(answers)} completions and {len(scores)} scores: expected one score for each")
    if len(answers) < 2:
        raise BadRow(ref, f"expected at least 2 completions to compare; found {len(answers)}")
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < _LARGEST:
            raise BadRow(ref, f"scores[{i}] must be a finite number; found {score!r:.40}")
    if len(set(scores)) == 1:
        raise BadRow(ref, f"all scores are {scores[0]}: nothing is preferred")
    return tuple(map(float, scores))


def _split_prompt(answers: Sequence[Any], names: Sequence[str], ref: RowRef, unread: set[str]) -> tuple[list, list]:
    """The common beginning of whole conversations, and the rest of each."""
    if isinstance(answers[0], str):
        raise BadRow(ref, "the row has no 'prompt', and answers that are text have no prompt in common")
    answers = [parse_messages(answer, ref, unread, name) for answer, name in zip(answers, names, strict=True)]
    common = next(
        (i for i, turns in enumerate(zip(*answers, strict=False)) if any(turn != turns[0] for turn in turns)),
        min(map(len, answers)),
    )
    rests = [answer[common:] for answer in answers]
    if not any(rests):
        raise BadRow(ref, f"{' and '.join(names)} are equal: nothing is preferred")
    if not common:
        raise BadRow(ref, "the answers have no prompt in common: their first messages differ")
    for name, rest in zip(names, rests, strict=True):
        check_answers(rest, name, ref, common)
        if not rest or rest[0]["role"] != "assistant":
            found = rest[0]["role"] if rest else "nothing"
            raise BadRow(
                ref,
                f"{name}[{common}]: where the conversations part, each must go on with an assistant message; found "
                f"{found}",
            )
    return answers[0][:common], rests


def _without_prompt(prompt: list[dict], answer: Any, name: str, ref: RowRef, unread: set[str]) -> list[dict]:
    """The messages of an answer; where it repeats the prompt, those after the prompt."""
    answer = parse_messages(answer, ref, unread, name)
    start = len(prompt) if answer[: len(prompt)] == prompt else 0
    answer = answer[start:]
    check_answers(answer, name, ref, start)
    if not answer or answer[0]["role"] != "assistant":
        found = answer[0]["role"] if answer else "nothing"
        raise BadRow(ref, f"{name} must go on after the prompt with an assistant message; found {found}")
    return answer


def render_preferences(
    examples: Iterable[Preference], tokenizer: Tokenizer, *, template_date: str, default_system: str
) -> Iterator[list[Group] | BadRow]:
    """One group of each example, or its BadRow. The sequences of a group begin with the ids of the prompt."""
    pending: collections.deque[Preference] = collections.deque()

    def answers() -> Iterator[Example]:
        for example in examples:
            pending.append(example)
            yield from example.answers

    options = {"template_date": template_date, "default_system": default_system}
    rendered = render_many(answers(), tokenizer, **options)
    for first in rendered:
        example = pending.popleft()
        results = [first, *itertools.islice(rendered, len(example.answers) - 1)]
        try:
            yield [_make_group(example, results)]
        except BadRow as e:
            yield e


def _make_group(example: Preference, results: list[list[Rendered] | BadRow]) -> Group:
    sequences: list[Rendered] = []
    for name, result in zip(example.names, results, strict=True):
        if isinstance(result, BadRow):
            raise BadRow(example.ref, f"{name}: {result.reason}", result.advice)
        if len(result) > 1:
            raise BadRow(
                example.ref,
                f"{name}: the chat template renders earlier turns of an answer in another way than its last, so that "
                f"it becomes {len(result)} sequences; expected one",
                "let the prompt hold all but the last turn",
            )
        sequences += result
    prompts = [sequence.tokens[: int(sequence.loss_mask.argmax())].tolist() for sequence in sequences]
    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow(
            example.ref,
            "the chat template gives the answers different prompts (of answers with and without reasoning, for "
            "instance): they cannot be compared",
        )
    if len(prompts[0]) < 1:
        raise BadRow(example.ref, "the answers have no prompt in common: it has no tokens")
    seen: dict[tuple[int, ...], int] = {}
    for i, sequence in enumerate(sequences):
        j = seen.setdefault(tuple(sequence.tokens.tolist()), i)
        if example.scores[i] != example.scores[j]:
            raise BadRow(example.ref, f"{example.names[j]} and {example.names[i]} are equal: nothing is preferred")
    return Group(
        tuple(
            dataclasses.replace(one, fields=(Field("scores", np.full(len(one.tokens), score, np.float32), "sequence"),))
            for one, score in zip(sequences, example.scores, strict=True)
        )
    )


def format_distances(documents: Iterable[Document]) -> str:
    """A line about rows whose margins or scores say more than an order, which nothing else is read of; "" of none."""
    scores = [[sequence.fields[0].values[0] for sequence in document.sequences] for document in documents]
    number = sum(float(max(of_row) - min(of_row)) not in (1.0, float(np.float32(_LEAST))) for of_row in scores)
    if not number:
        return ""
    return (
        f"scores      only their order is read; in {number:,} of {len(scores):,} rows the best and the worst are not 1 "
        "apart (of pairs by 'margin')"
    )


def check_groups(
    arrays: Mapping[str, np.ndarray], *, lists: bool, advice: str = "set 'preference.loss' to 'softmax'"
) -> None:
    """Raises UserError where a group of a numpy batch is not a pair, or not a list with one best answer.

    ``arrays``: ``group_ids`` and ``segment_ids`` int32 [B, T], ``scores`` float32 [B, T]. A loss could not tell.
    ``advice``: to whoever has lists, and wants pairs.
    """
    inside, size = arrays["group_ids"] > 0, arrays["group_ids"].shape[1] + 1
    rows = np.arange(len(inside), dtype=np.int64)[:, None]
    keys = ((rows * size + arrays["group_ids"]) * size + arrays["segment_ids"])[inside]
    answers, first = np.unique(keys, return_index=True)
    scores = arrays["scores"][inside][first]
    _, group, sizes = np.unique(answers // size, return_inverse=True, return_counts=True)
    if not lists and (sizes != 2).any():
        raise UserError(
            f"a row of preferences has {sizes[sizes != 2][0]} answers; expected 2, a chosen and a rejected one; make "
            f"rows of two out of longer lists, or {advice}"
        )
    best = np.full(len(sizes), -np.inf)
    np.maximum.at(best, group, scores)
    if (np.bincount(group, scores == best[group]) > 1).any():
        raise UserError("a row of preferences has several answers of the highest score; expected one that is the best")
