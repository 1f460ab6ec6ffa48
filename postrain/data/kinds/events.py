"""Kind events: one member's interactions with items, in the order of their times.

Rows are ``{"items": [L ids], "times": [L unix seconds], "actions": [L ids]}``; the last two may be left out, by all
rows. Every item after the first is trained. The arrays of a batch are ``seconds``, since the first event of the
sequence, and ``actions``, each of the event that is read.
"""

import dataclasses

import numpy as np

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.documents import Field, Rendered
from postrain.data.kinds.ids import MAX_ID, parse_ids
from postrain.data.messages import check_keys
from postrain.data.row_keys import LOSS_KEYS, Keys

FORMS = {"events": ("items",)}
_KEYS = Keys(("items", "times", "actions"), LOSS_KEYS)


def parse_events(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Rendered:
    """One row of kind events, checked, as a document. Raises BadRow."""
    check_keys(raw, _KEYS, ref, unread)
    items = parse_ids(raw.get("items"), "items", ref, least=2)
    fields = []
    if raw.get("times") is not None:
        times = parse_ids(raw["times"], "times", ref, length=len(items), largest=2**62)
        backwards = np.flatnonzero(np.diff(times) < 0)
        if len(backwards):
            at = int(backwards[0])
            raise BadRow(ref, f"times go backwards: times[{at + 1}] = {times[at + 1]} after {times[at]}")
        span = int(times[-1] - times[0])
        if span > MAX_ID:
            raise BadRow(ref, f"times span {span:,} seconds: expected unix seconds, not milliseconds or smaller units")
        fields.append(Field("seconds", (times - times[0]).astype(np.int32), "token"))
    if raw.get("actions") is not None:
        fields.append(Field("actions", parse_ids(raw["actions"], "actions", ref, length=len(items)), "token"))
    return Rendered(items, np.arange(len(items)) > 0, ref, fields=tuple(fields))


def keep_latest(document: Rendered, slots: int) -> Rendered:
    """The last ``slots`` + 1 events of a sequence; ``seconds`` count from the first of them."""
    fields = [field._replace(values=field.values[-slots - 1 :]) for field in document.fields]
    fields = [f._replace(values=f.values - f.values[0]) if f.name == "seconds" else f for f in fields]
    tokens = document.tokens[-slots - 1 :]
    return dataclasses.replace(
        document, tokens=tokens, loss_mask=np.arange(len(tokens)) > 0, truncated=True, fields=tuple(fields)
    )
