"""Kinds kd and events: rows of ids, which no tokenizer reads.

kd: ``{"tokens": [L ids], "loss_mask": [L of 0 and 1], "top_ids": [L][K], "top_logprobs": [L][K]}``. Entry t is the
teacher's distribution of token t, given the tokens before it, as far as its K likeliest ids go; it is read where
``loss_mask`` is 1, without a mask everywhere but for the first token. Arrays ``teacher_ids`` and ``teacher_logprobs``.

events: ``{"items": [L ids], "times": [L unix seconds], "actions": [L ids]}``, one member's interactions in the order of
their times; the last two may be left out, by all rows. Every item after the first is trained. Arrays ``seconds`` since
the first event of the sequence and ``actions``, of the event that is read.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from postrain.data.documents import Field, Rendered
from postrain.data.messages import BadRow, RowRef, check_keys

KD_FORMS = {"kd": ("tokens", "top_ids", "top_logprobs")}
EVENT_FORMS = {"events": ("items",)}
_KD_KEYS = ("tokens", "loss_mask", "top_ids", "top_logprobs")
_EVENT_KEYS = ("items", "times", "actions")
_LARGEST = 2**31 - 1  # int32
_ABOVE_ONE = 1e-3  # that rounded logprobs may be above 0, and their probabilities sum to above 1


def parse_teacher_row(raw: dict, form: str, ref: RowRef) -> Rendered:
    """Checks one row of kind kd. Raises BadRow."""
    check_keys(raw, _KD_KEYS, ref, is_text=True)
    tokens = _parse_ids(raw.get("tokens"), "tokens", ref, least=2)
    mask = np.ones(len(tokens), bool)
    if raw.get("loss_mask") is not None:
        mask = _parse_ids(raw["loss_mask"], "loss_mask", ref, length=len(tokens), largest=1).astype(bool)
    mask[0] = False  # nothing predicts it
    if not mask.any():
        raise BadRow(ref, "it has no token to train on: 'loss_mask' is 0 after the first")
    ids = _parse_table(raw.get("top_ids"), "top_ids", len(tokens), ref)
    logprobs = _parse_table(raw.get("top_logprobs"), "top_logprobs", len(tokens), ref).astype(np.float32)
    if ids.shape != logprobs.shape:
        raise BadRow(ref, f"top_ids has {ids.shape[1]} entries a token and top_logprobs {logprobs.shape[1]}")
    if ids.dtype.kind not in "iu" or ids[mask].min() < 0 or ids[mask].max() > _LARGEST:
        raise BadRow(ref, "top_ids must be ids of the vocabulary, whole numbers from 0 on")
    logprobs[~mask], ids[~mask] = 0, 0
    _check_logprobs(logprobs, mask, ref)
    twice = mask & (np.diff(np.sort(ids, 1), axis=1) == 0).any(1)
    if twice.any():
        at = int(twice.argmax())
        raise BadRow(ref, f"top_ids[{at}] must be K different ids; found {ids[at].tolist()}")
    logprobs[logprobs > 0] = 0  # rounded ones
    fields = Field("teacher_ids", ids.astype(np.int32), True), Field("teacher_logprobs", logprobs, True)
    return Rendered(tokens, mask, ref, fields=fields)


def _check_logprobs(logprobs: np.ndarray, mask: np.ndarray, ref: RowRef) -> None:
    wrong = np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= _ABOVE_ONE)).all(1))
    if len(wrong):
        raise BadRow(ref, f"top_logprobs[{wrong[0]}] must be finite and at most 0; found {logprobs[wrong[0]].tolist()}")
    total = np.where(mask, np.exp(logprobs.astype(np.float64)).sum(1), 0)
    if total.max() > 1 + _ABOVE_ONE:
        at = int(total.argmax())
        raise BadRow(ref, f"top_logprobs[{at}]: the probabilities of the K ids sum to {total[at]:.4f}, above 1")


def parse_events(raw: dict, form: str, ref: RowRef) -> Rendered:
    """Checks one row of kind events. Raises BadRow."""
    check_keys(raw, _EVENT_KEYS, ref, is_text=True)
    items = _parse_ids(raw.get("items"), "items", ref, least=2)
    fields = []
    if raw.get("times") is not None:
        times = _parse_ids(raw["times"], "times", ref, length=len(items), largest=2**62)
        back = np.flatnonzero(np.diff(times) < 0)
        if len(back):
            at = int(back[0])
            raise BadRow(ref, f"times go backwards: times[{at + 1}] = {times[at + 1]} after {times[at]}")
        if times[-1] - times[0] > _LARGEST:
            raise BadRow(ref, f"times span {times[-1] - times[0]:,} seconds: expected unix seconds, not parts of them")
        fields.append(Field("seconds", (times - times[0]).astype(np.int32), False))
    if raw.get("actions") is not None:
        fields.append(Field("actions", _parse_ids(raw["actions"], "actions", ref, length=len(items)), False))
    return Rendered(items, np.arange(len(items)) > 0, ref, fields=tuple(fields))


def keep_latest(document: Rendered, slots: int) -> Rendered:
    """The end of a sequence of events, ``slots`` long; its seconds begin anew."""
    fields = [field._replace(values=field.values[-slots - 1 :]) for field in document.fields]
    fields = [f._replace(values=f.values - f.values[0]) if f.name == "seconds" else f for f in fields]
    tokens = document.tokens[-slots - 1 :]
    return dataclasses.replace(
        document, tokens=tokens, loss_mask=np.arange(len(tokens)) > 0, truncated=True, fields=tuple(fields)
    )


def render_as_is(examples: Iterable[Rendered], tokenizer: Any, **_: Any) -> Iterator[list[Rendered] | BadRow]:
    """Rows of ids are what they will be once they are parsed."""
    return ([example] for example in examples)


def _parse_ids(
    values: Any, where: str, ref: RowRef, *, least: int = 0, length: int | None = None, largest: int = _LARGEST
) -> np.ndarray:
    """int [L] (int32 where ``largest`` allows) from a list of whole numbers from 0 to ``largest``."""
    array = _to_array(values, where, ref)
    if array.ndim != 1:
        raise BadRow(ref, f"{where} must be a list of numbers; found lists in it")
    if length is not None and len(array) != length:
        raise BadRow(ref, f"{where} has {len(array)} entries, expected {length}: one for each")
    if len(array) < least:
        raise BadRow(ref, f"{where} must have at least {least} entries; found {len(array)}")
    if len(array) and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() > largest):
        raise BadRow(ref, f"{where} must be whole numbers from 0 to {largest:,}; found {_find_odd(array, largest)}")
    return array.astype(np.int32) if largest <= _LARGEST else array.astype(np.int64)


def _parse_table(values: Any, where: str, length: int, ref: RowRef) -> np.ndarray:
    """[L, K] numbers, which may be written to."""
    table = _to_array(values, where, ref)
    if len(table) != length:
        raise BadRow(ref, f"{where} has {len(table)} entries, expected {length}: one for each token")
    if table.ndim != 2 or not table.shape[1] or table.dtype.kind not in "iuf":
        raise BadRow(ref, f"{where} must be a list of K numbers for each token")
    return table


def _to_array(values: Any, where: str, ref: RowRef) -> np.ndarray:
    is_list = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim > 0)
    if not is_list:  # a function may well give arrays
        raise BadRow(ref, f"{where} must be a list; found {'nothing' if values is None else repr(values)[:40]}")
    try:
        return np.array(values)
    except (ValueError, OverflowError):
        raise BadRow(
            ref, f"{where} must have as many numbers in each entry; found entries of different length"
        ) from None


def _find_odd(array: np.ndarray, largest: int) -> Any:
    return next((v for v in array.tolist() if not isinstance(v, int) or not 0 <= v <= largest), array.tolist()[0])
