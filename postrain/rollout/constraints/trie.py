"""A trie of allowed sequences of ids, such as the semantic ids of a catalogue, as arrays in CSR form.

Nodes are numbered level by level, each level in the order of its paths, so that edge e leads to node e + 1: a node's
children are a slice of one array, in ascending order of their ids, and a state is one whole number. A path through it
on the host is a ``Constraint``; ``device_trie.py`` walks many at once on the device.

Legend: E edges.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from postrain.rollout.constraints import WrongConstraint, pack_ids


@dataclasses.dataclass(frozen=True)
class Trie:
    """The sequences that may be generated; made by ``build_trie``. State 0 is the beginning."""

    offsets: np.ndarray  # int32 [E + 2]: node s has the edges offsets[s] to offsets[s + 1]
    tokens: np.ndarray  # int32 [E]: the id of each edge, which leads to node e + 1
    rows: np.ndarray  # int32 [E + 1]: of a node that ends a sequence its row among those given, else -1
    level_starts: np.ndarray  # int32 [depth + 2]: the first node of each level, and one more than the last
    vocab_size: int
    stop_id: int | None

    @property
    def depth(self) -> int:
        """Ids of the longest sequence, its stop id included."""
        return len(self.level_starts) - 2

    @property
    def num_sequences(self) -> int:
        return int((self.rows >= 0).sum())

    def children(self, state: int) -> np.ndarray:
        """The ids that may follow, in ascending order."""
        return self.tokens[self.offsets[state] : self.offsets[state + 1]]

    def constraint(self) -> "TrieConstraint":
        """A new ``Constraint`` at the beginning of the trie."""
        return TrieConstraint(self)


class TrieConstraint:
    """A ``Constraint``: the path of one sequence through a trie. ``state``: its node."""

    def __init__(self, trie: Trie):
        self.trie, self.state = trie, 0

    def allowed(self) -> np.ndarray:
        return pack_ids(self.trie.children(self.state), self.trie.vocab_size)

    def advance(self, token: int) -> None:
        children = self.trie.children(self.state)
        i = int(np.searchsorted(children, token))
        if i == len(children) or children[i] != token:
            raise ValueError(f"id {token} is not allowed here by the trie")
        self.state = int(self.trie.offsets[self.state]) + i + 1

    def is_done(self) -> bool:
        return len(self.trie.children(self.state)) == 0


def build_trie(sequences: np.ndarray | Sequence[Sequence[int]], *, vocab_size: int, stop_id: int | None = None) -> Trie:
    """A trie of ``sequences``: int [N, L], or N lists of ids.

    ``stop_id`` follows each of them; None: a sequence ends with its last id. Raises WrongConstraint, with the row, for
    no sequences, an empty one, an id outside the vocabulary, the stop id inside one, a sequence that comes twice, and,
    without a stop id, one that is the beginning of another.
    """
    ids, lengths = _as_matrix(sequences)
    _check_ids(ids, lengths, vocab_size, stop_id)
    if stop_id is not None:
        ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=-1)
        ids[np.arange(len(ids)), lengths] = stop_id
        lengths = lengths + 1
    order = np.lexsort(ids.T[::-1])
    ids, lengths = ids[order], lengths[order]
    _check_distinct(ids, lengths, order)
    differs = np.zeros(len(ids), bool)  # from the row before, in the ids up to this level
    differs[0] = True
    node, nodes, level_starts = np.zeros(len(ids), np.int64), 1, [0, 1]
    tokens, counts, rows = [], [], [np.array([-1])]
    for level in range(ids.shape[1]):
        differs[1:] |= ids[1:, level] != ids[:-1, level]
        is_new = differs & (lengths > level)
        tokens.append(ids[is_new, level])
        counts.append(np.bincount(node[is_new] - level_starts[-2], minlength=level_starts[-1] - level_starts[-2]))
        node = np.where(lengths > level, nodes - 1 + np.cumsum(is_new), node)
        ends = np.full(int(is_new.sum()), -1)
        last = lengths == level + 1
        ends[node[last] - nodes] = order[last]
        rows.append(ends)
        nodes += len(ends)
        level_starts.append(nodes)
    counts.append(np.zeros(level_starts[-1] - level_starts[-2], np.int64))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    as_int32 = lambda parts: np.concatenate(parts).astype(np.int32)
    return Trie(
        offsets.astype(np.int32),
        as_int32(tokens),
        as_int32(rows),
        np.array(level_starts, np.int32),
        vocab_size,
        stop_id,
    )


def _as_matrix(sequences) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N, longest], filled up with -1, and the lengths [N]."""
    if isinstance(sequences, np.ndarray) and sequences.ndim == 2 and np.issubdtype(sequences.dtype, np.integer):
        ids, lengths = sequences.astype(np.int64), np.full(len(sequences), sequences.shape[1])
    else:
        try:
            lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        except TypeError:
            raise WrongConstraint("trie", f"expected sequences of ids, found {sequences!r:.60}") from None
        ids = np.full((len(lengths), lengths.max(initial=0)), -1, np.int64)
        flat = [i for sequence in sequences for i in sequence]
        if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in flat):
            raise WrongConstraint("trie", "expected sequences of ids, found what is no whole number")
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.array(flat, np.int64)
    if not len(ids):
        raise WrongConstraint("trie", "expected at least one sequence, found none")
    if not lengths.all():
        raise WrongConstraint("trie", f"row {int(np.argmin(lengths))} is empty: expected at least one id")
    return ids, lengths


def _check_ids(ids: np.ndarray, lengths: np.ndarray, vocab_size: int, stop_id: int | None) -> None:
    if stop_id is not None and not 0 <= stop_id < vocab_size:
        raise WrongConstraint("trie", f"the stop id {stop_id} is outside the vocabulary of {vocab_size}")
    is_given = np.arange(ids.shape[1]) < lengths[:, None]
    for row, place in np.argwhere(is_given & ((ids < 0) | (ids >= vocab_size)))[:1]:
        raise WrongConstraint("trie", f"row {row} has id {ids[row, place]}, outside the vocabulary of {vocab_size}")
    for row, _ in np.argwhere(ids == stop_id)[:1] if stop_id is not None else ():
        raise WrongConstraint(
            "trie", f"row {row} has the stop id {stop_id} inside: leave it out, it is added at the end"
        )


def _check_distinct(ids: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> None:
    """Sorted rows: a sequence comes just before those that begin with it."""
    begins = np.arange(ids.shape[1]) < lengths[:-1, None]
    (found,) = np.nonzero(((ids[:-1] == ids[1:]) | ~begins).all(-1))
    if not len(found):
        return
    first, second = sorted(order[found[0] : found[0] + 2].tolist())
    if lengths[found[0]] == lengths[found[0] + 1]:
        raise WrongConstraint("trie", f"row {second} is the same sequence as row {first}: {_show(ids[found[0]])}")
    begin, whole = order[found[0]], order[found[0] + 1]
    raise WrongConstraint(
        "trie",
        f"row {begin} is the beginning of row {whole} ({_show(ids[found[0]])}), so that it could not be told where it "
        "ends: give a stop_id, which then follows each sequence",
    )


def _show(ids: np.ndarray) -> str:
    return " ".join(str(i) for i in ids[ids >= 0][:8])
