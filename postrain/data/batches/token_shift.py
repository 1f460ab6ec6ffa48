"""The arrays of a batch: tokens and targets shifted against each other by one, documents side by side in a row."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from postrain.data.documents import NO_LAYOUT, Document, Group, Layout, Rendered


def shift(rendered: Rendered) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The only place where tokens and targets are shifted against each other.

    Returns:
      ``tokens`` int32 [L-1], ``targets`` int32 [L-1], ``loss_mask`` float32 [L-1]: at slot ``t`` the model
      has read token ``t`` and predicts token ``t + 1``, which counts ``rendered.weight`` (times its factor in
      ``rendered.weights``) if it is trained, else 0. One slot more where the last token is read, with nothing to
      predict.
    """
    tokens = np.asarray(rendered.tokens, np.int32)
    targets, loss_mask = tokens[1:], np.asarray(rendered.loss_mask[1:], np.float32)
    loss_mask = loss_mask if rendered.weight == 1 else loss_mask * np.float32(rendered.weight)
    loss_mask = loss_mask if rendered.weights is None else loss_mask * rendered.weights[1:]
    if rendered.reads_last:  # and what follows it is not known
        return tokens, np.append(targets, np.int32(0)), np.append(loss_mask, np.float32(0))
    return tokens[:-1], targets, loss_mask


def assemble_row(documents: Sequence[Document], capacity: int, layout: Layout = NO_LAYOUT) -> dict[str, np.ndarray]:
    """The arrays of one row, each [capacity, ...]; no documents: an empty row, which counts for nothing.

    ``tokens``, ``targets``, ``segment_ids`` (0 = padding, segments 1, 2, ... in order) and ``positions``
    (from 0 in every sequence) are int32, ``loss_mask`` is float32. Besides those of ``layout``; of them ``group_ids``
    int32 says for documents of several sequences which are of one document (0 = padding, 1, 2, ... in order).

    A sequence is a segment. What a group shares is a segment of its own before the rest of each of its sequences. It
    trains nothing and is not part of the group (``group_ids`` and fields of targets and sequences are 0); the segments
    of the rests see it (``prefix_starts``, ``prefix_ends``), and their positions go on from its end.

    Raises:
      ValueError: the documents do not fit.
    """
    row = {name: np.zeros(capacity, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    row["loss_mask"] = np.zeros(capacity, np.float32)
    row |= {name: np.zeros((capacity, *shape), dtype) for name, (dtype, shape) in layout.arrays.items()}
    places, start, segment = np.arange(capacity), 0, 0
    for number, document in enumerate(documents, 1):
        shared = (document.shared_slots or 0) if isinstance(document, Group) else 0
        prefix = start, start + shared
        for sequence, part in _split_into_segments(document, shared):
            tokens, targets, loss_mask = (array[part] for array in shift(sequence))
            stop, segment, is_prefix = start + len(tokens), segment + 1, part.stop is not None
            if stop > capacity:
                raise ValueError(f"{document.ref}: documents of {stop} slots in a row of {capacity}")
            row["tokens"][start:stop] = tokens
            row["targets"][start:stop] = targets
            row["loss_mask"][start:stop] = loss_mask
            row["segment_ids"][start:stop] = segment
            row["positions"][start:stop] = places[part.start : part.start + len(tokens)]
            for name, values, of in sequence.fields:
                if of == "target" and not is_prefix:
                    row[name][start : start + len(values) - 1 - part.start] = values[part.start + 1 :]
                elif of == "token" or (of == "sequence" and not is_prefix):
                    row[name][start:stop] = values[part.start : part.start + len(tokens)]
            if "group_ids" in row and not is_prefix:
                row["group_ids"][start:stop] = number
            if shared and not is_prefix:
                row["prefix_starts"][start:stop], row["prefix_ends"][start:stop] = prefix
            start = stop
    return row


def _split_into_segments(document: Document, shared: int) -> Iterator[tuple[Rendered, slice]]:
    """The sequences of a document and which of their slots are a segment; first, where there are any, those shared."""
    if shared:
        yield document.sequences[0], slice(0, shared)
    for sequence in document.sequences:
        yield sequence, slice(shared, None)


def assemble_batch(rows: Sequence[Sequence[Document]], capacity: int, layout: Layout = NO_LAYOUT) -> dict[str, Any]:
    """The arrays of ``rows``, [B, capacity, ...] each; of prompts also ``metadata``, a list of dicts for each row."""
    assembled = [assemble_row(row, capacity, layout) for row in rows]
    batch: dict[str, Any] = {name: np.stack([row[name] for row in assembled]) for name in assembled[0]}
    if layout.has_metadata:  # of prompts, which are one sequence each
        batch["metadata"] = [[document.sequences[0].metadata for document in row] for row in rows]
    return batch
