"""Beside each answer one to another prompt: what tells how far a model has moved from its reference everywhere.

A loss on labelled answers (KTO) compares what an answer has gained with the mean gain of answers that were given to
other prompts. So each document becomes a group of two sequences: its own, and its prompt with the answer of another
one. The second has the label MISMATCHED, which a loss knows by its sign.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from postrain.data.batches.epoch_order import permutation
from postrain.data.documents import Document, Field, Group, Rendered, cut_end
from postrain.data.kinds.labelled import FIELD
from postrain.errors import UserError

MISMATCHED = -1  # among the labels
_SALT = 11  # of the order in which answers are given away; other orders of the same seed have others


def add_mismatched(documents: Sequence[Document], slots: int, seed: int) -> list[Document]:
    """Each document with a mismatched one, in a group of at most ``slots`` slots.

    Every answer goes to one other document, whose prompt is another: ``seed`` decides which. It is cut where there is
    no room for all of it. Where there is none for any of it, or where one prompt has more than half of all rows, some
    documents stay alone.
    """
    sequences = [document.sequences[0] for document in documents]
    starts = [int(sequence.loss_mask.argmax()) for sequence in sequences]  # of the answers
    prompts = [sequence.tokens[:start].tobytes() for sequence, start in zip(sequences, starts, strict=True)]
    givers = _choose_givers(prompts, seed)
    groups: list[Document] = []
    for own, start, prompt, giver in zip(sequences, starts, prompts, givers, strict=True):
        pair, room = [own], slots - own.slots
        if prompts[giver] != prompt and room >= start:  # the prompt and a token of the answer to predict
            other = _join(own, start, sequences[giver], starts[giver])
            pair.append(cut_end(other, room) if other.slots > room else other)
        groups.append(Group(tuple(pair)))
    return groups


def check_mismatched(groups: Sequence[Document]) -> None:
    """Raises UserError where none of the documents of ``data.train`` has an answer to another prompt beside it."""
    if all(len(group.sequences) == 1 for group in groups):
        raise UserError(
            f"data.train: none of {len(groups):,} rows can be paired with the answer to another prompt: expected two "
            "prompts or more, and rows shorter than data.sequence_length: add rows, or use the loss 'bco', which needs "
            "none"
        )


def _choose_givers(prompts: Sequence[bytes], seed: int) -> list[int]:
    """Of each document the one whose answer it gets; everyone gives once.

    Documents of one prompt stand together in an order that is shifted by the size of the largest such block: so the
    giver is in another block, unless that one has more than half of all.
    """
    blocks: dict[bytes, list[int]] = collections.defaultdict(list)
    for i in permutation(len(prompts), (seed, _SALT)).tolist():
        blocks[prompts[i]].append(i)
    order = [i for block in blocks.values() for i in block]
    shift = max(map(len, blocks.values()))
    givers = [0] * len(order)
    for place, i in enumerate(order):
        givers[i] = order[(place + shift) % len(order)]
    return givers


def _join(own: Rendered, start: int, other: Rendered, other_start: int) -> Rendered:
    """The prompt of one sequence, its first ``start`` tokens, and the answer of another."""
    tokens = np.concatenate([own.tokens[:start], other.tokens[other_start:]])
    mask = np.concatenate([np.zeros(start, bool), other.loss_mask[other_start:]])
    label = Field(FIELD, np.full(len(tokens), MISMATCHED, np.int32), of="sequence")
    return dataclasses.replace(own, tokens=tokens, loss_mask=mask, template_switches=(), fields=(label,), weights=None)
