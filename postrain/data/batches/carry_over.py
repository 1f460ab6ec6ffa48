"""A data position taken over by a pipeline that is not the one it was saved with, where the user has accepted that.

Nothing makes such a run equal to one that had the new data from its first step. What is kept is how far it has come:
the updates, the part of the epoch, and the place in every source that is still read in the same way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Keys of a fingerprint's "data" that decide where the place in a source is; the others decide what is made of its rows.
_PLACE_KEYS = ("shuffle", "seed", "stream.lanes", "stream.block_mebibytes")
_DOCUMENT_KEYS = ("sequence_length", "too_long", "on_bad_row", "template_date", "default_system")


def count_updates(position: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> int:
    """Batches that were given up to ``position``; ``fingerprint``: of the pipeline that gave them."""
    if "lanes" not in position:
        return position["grain"]["next_index"]
    rows_a_batch = fingerprint["data"]["batch_size"] // len(position["lanes"])
    state = next(iter(position["lanes"].values()))
    return (state["first_row"] + state["given"]) // rows_a_batch if state else 0


def carry_over_lanes(
    position: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], lanes: Sequence[int], count: int
) -> dict[str, Any]:
    """The position of ``lanes`` out of ``count`` in pipeline ``after``, for one of pipeline ``before``.

    A lane begins the window that it had drawn anew: its documents may come again. A source whose files changed, or that
    is cut into other parts, begins anew as a whole.
    """
    first_row = count_updates(position, before) * (after["data"]["batch_size"] // count)
    streams = "stream.lanes" in after["data"]
    kept = _find_kept(before, after, streams=streams)
    saved = position.get("lanes", {})
    names = [source["name"] for source in before["sources"]]
    same_lanes, same_carry = len(saved) == count, _same_documents(before, after)
    same_carry &= streams or before.get("documents") == after.get("documents")
    moved = {}
    for lane in lanes:
        state = saved.get(str(lane)) if same_lanes else None
        keeps = [bool(state) and keep for keep in kept]
        totals = [[0, 0] for _ in kept]
        for i, source in enumerate(after["sources"]):
            if state and source["name"] in names:
                same_place = source["name"] in names[i : i + 1]
                totals[i] = list(state["totals"][i if same_place else names.index(source["name"])])
        carried = state["carry"] if state and same_carry else []
        carry = [item for item in carried if item[0] < len(keeps) and keeps[item[0]]]
        moved[str(lane)] = {
            "window": state["window"] if state else 0,
            "first_row": first_row,
            "positions": [state["positions"][i] if keep else None for i, keep in enumerate(keeps)],
            "drawn": [0.0] * len(kept),
            "phase": -1,  # whichever it is: what is drawn counts from here
            "size": 0,
            "carry": carry,
            "given": 0,
            "totals": totals,
            "counts": [{} for _ in kept],
        }
    return {"lanes": moved}


def _find_kept(before: Mapping[str, Any], after: Mapping[str, Any], *, streams: bool) -> list[bool]:
    """For each source of ``after`` whether a place in it is what it was in ``before``."""
    same = all(before["data"].get(key) == after["data"].get(key) for key in _PLACE_KEYS)
    if not streams:  # places count documents, not rows of files
        same &= _same_documents(before, after)
        same &= before["sources"] != after["sources"] or before.get("documents") == after.get("documents")
    old = [*before["sources"], *[None] * len(after["sources"])]
    return [same and source == was for source, was in zip(after["sources"], old, strict=False)]


def _same_documents(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a row gives the documents that it gave, as far as settings tell."""
    keys = all(before["data"].get(key) == after["data"].get(key) for key in _DOCUMENT_KEYS)
    return keys and all(before.get(part) == after.get(part) for part in ("tokenizer", "chat_template"))
