"""Kind labelled: a row of kind sft with a label, of the whole of it.

Rows are those of kind sft, in any of their forms, with ``label``: true or false (or 1 and 0), the whole number of a
class from 0, or the name of one, where ``data.label_names`` lists the names in the order of their numbers. So trl's
unpaired rows, ``{"prompt", "completion", "label"}``, are read as they are. The array of a batch is ``labels``, the same
number at every place of a sequence. With ``data.label_numbers`` a label is any number, such as a rating, and the array
is float32.

A row becomes one sequence, and is not cut to a length: its label was given to all of it.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from postrain.data.bad_row import FUNCTION_ADVICE, BadRow, RowRef, describe_type, name_keys
from postrain.data.documents import Document, Field, Layout, Rendered
from postrain.data.kinds.ids import MAX_ID
from postrain.data.messages import SFT_FORMS, Conversation, Example, check_last_answer, parse_row
from postrain.data.rendering.render import render_many
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError, shorten

FIELD = "labels"
FORMS = {f"labelled_{form}": (*keys, "label") for form, keys in SFT_FORMS.items()}
LAYOUT = Layout({FIELD: (np.dtype(np.int32), ())})  # of its batches
NUMBERS = Layout({FIELD: (np.dtype(np.float32), ())})  # with ``data.label_numbers``
Label = int | float | str
_FUNCTION_ADVICE = FUNCTION_ADVICE.replace("[...]}", "[...], 'label': ...}")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A row of kind sft, and its label as it stands there: a number, or the name of one."""

    example: Example
    label: Label
    ref: RowRef


def parse_labelled(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Labelled:
    """One row, checked; ``form`` is one of FORMS, or "". ``unread`` takes the keys that are not read. Raises BadRow."""
    if raw.get("label") is None:
        found, advice = ("null", "") if "label" in raw else (name_keys(raw), _FUNCTION_ADVICE)
        reason = (
            f"expected a 'label' beside the text, true or false, or for recipe 'reward' also a class; found {found}"
        )
        raise BadRow(ref, reason, advice)
    label = _parse_label(raw["label"], ref)
    rest = {key: value for key, value in raw.items() if key != "label"}
    example = parse_row(rest, form.removeprefix("labelled_") or "sft", ref, unread)
    if example.weight != 1:
        raise BadRow(ref, f"the row has a weight of {example.weight:g}; rows of kind labelled all count the same")
    for message in example.messages if isinstance(example, Conversation) else ():
        if "weight" in message:
            raise BadRow(
                ref, f"an answer has a weight of {message['weight']:g}; the label is of the whole row: take it out"
            )
    check_last_answer(example)
    return Labelled(example, label, ref)


def _parse_label(label: Any, ref: RowRef) -> Label:
    if isinstance(label, np.generic):  # a user's function may return numpy's
        label = label.item()
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, float) and label.is_integer():  # as tables with gaps have them
        label = int(label)
    if isinstance(label, bool | int):
        return int(label)
    if isinstance(label, float):
        return label
    raise _refuse_label(label, ref)


def _refuse_label(label: Any, ref: RowRef) -> BadRow:
    found = repr(label) if isinstance(label, int | float | str) else describe_type(label)
    return BadRow(ref, f"'label' must be true or false, a whole number from 0, or a name; found {found:.40}")


def render_labelled(
    examples: Iterable[Labelled],
    tokenizer: Tokenizer,
    *,
    label_names: Sequence[str],
    label_numbers: bool,
    **options: Any,
) -> Iterator[list[Rendered] | BadRow]:
    """The sequence of each example with its ``labels``, or its BadRow. ``options``: of ``render_many``."""
    rows = list(examples)
    rendered = render_many((row.example for row in rows), tokenizer, **options)
    numbers = {name: number for number, name in enumerate(label_names)}
    for row, result in zip(rows, rendered, strict=True):
        try:
            if isinstance(result, BadRow):
                raise result
            label = _find_number(row) if label_numbers else _find_class(row, numbers)
            yield [_add_label(row, result, label)]
        except BadRow as error:
            yield error


def _find_number(row: Labelled) -> np.ndarray:
    """The label, float32 []."""
    with contextlib.suppress(ValueError, OverflowError):  # a name, or an integer beyond all floats
        label = np.asarray(float(row.label), np.float32)
        if np.isfinite(label):
            return label
    raise BadRow(row.ref, f"'label' must be a finite number (data.label_numbers); found {row.label!r:.40}")


def _find_class(row: Labelled, numbers: dict[str, int]) -> np.ndarray:
    """The number of the label, int32 []."""
    label = row.label
    if isinstance(label, str) and not numbers:  # as tables of text have them
        label = {"true": 1, "false": 0}.get(label.lower(), int(label) if label.isdecimal() else label)
    if isinstance(label, str):
        if label not in numbers:
            known = f"one of data.label_names, {shorten(numbers, 8)}" if numbers else "true or false, or a number"
            advice = "" if numbers else "names need data.label_names, which lists them in the order of their numbers"
            raise BadRow(row.ref, f"'label' must be {known}; found {label!r:.40}", advice)
        label = numbers[label]
    elif numbers and label >= len(numbers):
        raise BadRow(row.ref, f"'label' must be below {len(numbers)}, the number of data.label_names; found {label}")
    if isinstance(label, float) or not 0 <= label <= MAX_ID:
        raise _refuse_label(label, row.ref)
    return np.asarray(label, np.int32)


def _add_label(row: Labelled, sequences: list[Rendered], label: np.ndarray) -> Rendered:
    if len(sequences) > 1:
        raise BadRow(
            row.ref,
            f"the chat template renders earlier turns of the row in another way than its last, so that it becomes "
            f"{len(sequences)} sequences, and the label is of one",
            "give all assistant messages but the last train: false",
        )
    (sequence,) = sequences
    return dataclasses.replace(sequence, fields=(Field(FIELD, np.full(len(sequence.tokens), label), of="sequence"),))


def check_two_labels(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where ``labels`` int32 [B, T] of a numpy batch has a class other than false and true."""
    if (largest := int(arrays[FIELD].max())) > 1:
        raise UserError(f"the label is {largest}; expected true or false (1 or 0): was the answer a desirable one?")


def count_labels(documents: Iterable[Document]) -> collections.Counter[int]:
    """How many documents have which label. Raises UserError where all have the same: nothing is told apart."""
    counts = collections.Counter(int(document.sequences[0].fields[0].values[0]) for document in documents)
    if len(counts) == 1:
        ((label, number),) = counts.items()
        raise UserError(
            f"data.train: all {number:,} rows have the label {bool(label)}; expected both: give rows with the label "
            f"{not label}, or train on the desirable ones with recipe 'sft'"
        )
    return counts
