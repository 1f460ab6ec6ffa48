"""The place of a row, the error of a bad one, and what its errors share: strings and JSON, checked."""

import dataclasses
import json
import math
import re
from typing import Any

from postrain.errors import UserError

# They mark places in rendered text (trained_spans.py): Unicode reserves them for internal use, and no text holds them.
NONCHARACTERS = frozenset("\ufdd0\ufdd1\ufdd2")
# To the errors of rows that have no known form.
FUNCTION_ADVICE = (
    "rows of another shape are read by a function as the source's kind, which returns {'messages': [...]} for a row: "
    "see docs/data.md"
)


@dataclasses.dataclass(frozen=True)
class RowRef:
    """The place of a row; ``line`` counts from 1 (rows in a file without lines, such as Parquet).

    ``line`` is 0 for a row found in the middle of a file, whose earlier lines are not counted; ``byte`` is then its
    first byte, from 0.
    """

    source: str
    file: str
    line: int
    byte: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file}@{self.byte}"


class BadRow(UserError):
    """A row that cannot be used, in one line: ``file:line: what is wrong``, and advice where there is any.

    Attributes: ``ref`` and ``reason``; ``advice``, where more than this row is wrong, else empty.
    """

    def __init__(self, ref: RowRef, reason: str, advice: str = ""):
        reason, advice = " ".join(reason.split()), " ".join(advice.split())
        super().__init__(f"{ref}: {reason}" + (f": {advice}" if advice else ""))
        self.ref, self.reason, self.advice = ref, reason, advice

    def __reduce__(self):
        return BadRow, (self.ref, self.reason, self.advice)


def decode_json(text: str | bytes) -> Any:
    """``json.loads``, but a key that stands twice in an object is a ValueError: one of its values would be dropped."""
    return json.loads(text, object_pairs_hook=_make_object)


def explain_quotes(text: str) -> str:
    """A hint for text that is no JSON because Python wrote it: "; ..."; else ""."""
    if re.match(r"[\[{\s]*'\w+'\s*:", text):
        return "; it is Python's spelling of an object, as str() writes it: write it with json.dumps()"
    return ""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.60} stands twice in an object")
    return made


def checked_json(value: Any, where: str, ref: RowRef) -> Any:
    """The value, after checking that every string inside it can be encoded, and that every number is one of JSON.

    Python reads and writes NaN and Infinity, which JSON does not have: a model would learn to write them.
    """
    if isinstance(value, str):
        return check_string(value, where, ref)
    if isinstance(value, dict):
        return {check_string(k, where, ref): checked_json(v, where, ref) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [checked_json(v, where, ref) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(ref, f"{where} holds {json.dumps(value)}, which is not JSON: write a number, null or a string")
    return value


def check_string(value: Any, where: str, ref: RowRef) -> str:
    if not isinstance(value, str):
        raise BadRow(ref, f"{where} must be a string; found {describe_type(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise BadRow(ref, f"{where} has a lone surrogate (half of a \\uXXXX pair) at character {e.start}") from None
        if not NONCHARACTERS.isdisjoint(value):
            raise BadRow(ref, f"{where} holds one of the noncharacters U+FDD0 to U+FDD2, which are not text")
    return value


def describe_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return "nothing (null or missing)" if value is None else names.get(type(value), type(value).__name__)


def name_keys(raw: dict) -> str:
    return ", ".join(f"{k!r:.40}" for k in list(raw)[:8]) or "no keys"
