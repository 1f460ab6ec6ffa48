"""Which documents share a row of a fixed length.

``pack`` is best-fit decreasing: the longest document first, each into the fullest row that still takes it.
It looks at a window of documents at a time, so that a shuffled order stays shuffled at a larger scale. Rows are
kept by how full they are, and a bit of one integer says for each fill whether there is a row with it; the
fullest row that takes a document is then one ``and`` and one ``bit_length``. Documents of one length are
placed together where they go to the same kind of row. A million lengths take about a second.

Best-fit needs short documents to fill up with. Where all are of about one length and only a few fit in a row
(say 70 tokens, rows of 256), it leaves some 5% free. A window that comes out so is packed again by choosing for
each row the set of documents that fills it best, and the better of the two is taken.

At the end of a window some row is usually half empty (there was nothing left to put in). Such rows are taken
apart and their documents go to the next window; without this the padding of long rows is about ten times larger.

Sources: Johnson, "Near-optimal bin packing algorithms" (MIT, 1973): best-fit decreasing. Gupta and Ho, "A new
heuristic algorithm for the one-dimensional bin-packing problem" (1999): filling row by row with minimum slack.
"""

import numpy as np

# Part of the data fingerprint, to be counted up whenever the same lengths would be packed differently.
PACKING_VERSION = 2

METHODS = ("best_fit", "none")

# Rows with more than this share of free slots are taken apart at the end of a window, emptiest first, as long
# as their documents are no more than this share of a window (one row: up to half a window).
_REOPEN_FREE = 1 / 256
_REOPEN_WINDOW = 1 / 16

# Best-fit's result is good enough with this share of padding. With so few documents a row there are no sets to
# choose from, and filling row by row gains nothing.
_GOOD_PADDING = 0.005
_FEW_A_ROW = 2.2
_CHOICES = 64  # distinct lengths that are tried for filling a row


def pack(lengths: np.ndarray, capacity: int, *, window: int = 10_000, method: str = "best_fit") -> list[np.ndarray]:
    """Puts documents into rows; a document is never split.

    Args:
      lengths: int [N], slots that each document takes (its tokens less one), each from 1 to ``capacity``.
      capacity: slots of a row.
      window: documents looked at together.
      method: "best_fit", or "none" for one document a row.

    Returns:
      For each row the indices of its documents, ascending; every index stands in exactly one row. Rows are
      in the order in which their windows come; the result depends on the arguments alone.

    Raises:
      ValueError: a length below 1 or above ``capacity``, or an unknown method.
    """
    lengths = np.asarray(lengths, np.int64)
    if window < 1:
        raise ValueError(f"the packing window must be at least 1 document; found {window}")
    _check(lengths, capacity, method)
    if method == "none":
        return list(np.arange(lengths.size)[:, None])
    rows: list[np.ndarray] = []
    held = np.zeros(0, np.int64)  # documents of rows taken apart, for the next window
    start = 0
    while start < lengths.size:
        stop = min(start + max(window - held.size, 1), lengths.size)
        documents = np.concatenate([held, np.arange(start, stop)])
        start = stop
        packed, left = _pack_some(lengths[documents], capacity, window if start < lengths.size else 0)
        rows += [documents[row] for row in packed]
        held = documents[left]
    return rows


def pack_window(
    lengths: np.ndarray, capacity: int, *, method: str = "best_fit", last: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """``pack`` for a stream: of one window the rows that are full, and the documents to begin the next window with.

    ``last``: nothing comes after this window, so all of it goes into rows. The other arguments, the rows and the
    errors are those of ``pack``; what is left is int [M], ascending.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(lengths, capacity, method)
    if method == "none" or not lengths.size:
        return list(np.arange(lengths.size)[:, None]), np.zeros(0, np.int64)
    return _pack_some(lengths, capacity, 0 if last else lengths.size)


def _check(lengths: np.ndarray, capacity: int, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"packing method must be one of {', '.join(METHODS)}; found {method!r}")
    if lengths.size and not (1 <= lengths.min() and lengths.max() <= capacity):
        raise ValueError(f"lengths must be from 1 to {capacity}; found {lengths.min()} to {lengths.max()}")


def _pack_some(lengths: np.ndarray, capacity: int, window: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of these documents, and those of rows that are taken apart; none are where ``window`` is 0."""
    row_of = _best_fit_decreasing(lengths, capacity)
    num_rows, used = int(row_of.max()) + 1, int(lengths.sum())
    improvable = num_rows > -(-used // capacity) and used < (1 - _GOOD_PADDING) * num_rows * capacity
    if improvable and lengths.size > _FEW_A_ROW * num_rows:
        filled = _minimum_slack(lengths, capacity)
        row_of = filled if filled.max() + 1 < num_rows else row_of
    fill = np.bincount(row_of, weights=lengths).astype(np.int64)
    size = np.bincount(row_of)
    kept = np.ones(fill.size, bool)
    if window:  # the emptiest rows are taken apart, as many as hold few documents
        emptiest = np.argsort(fill, kind="stable")
        documents = np.cumsum(size[emptiest])
        few = documents <= max(window * _REOPEN_WINDOW, min(documents[0], window / 2))
        kept[emptiest[few & (fill[emptiest] < capacity * (1 - _REOPEN_FREE))]] = False
    by_row = np.argsort(row_of, kind="stable")
    in_kept = kept[row_of]
    documents = by_row[in_kept[by_row]]
    ends = np.cumsum(size[kept]).tolist()
    return [documents[a:b] for a, b in zip([0, *ends], ends, strict=False)], np.flatnonzero(~in_kept)


def _minimum_slack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row by row: the longest document left, and with it the set of others that leaves the fewest slots free."""
    order = np.argsort(-lengths, kind="stable")
    documents: dict[int, list[int]] = {}  # length -> documents left, longest first
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        documents.setdefault(length, []).append(index)
    row_of = np.empty(lengths.size, np.int64)
    row = 0
    while documents:
        longest = next(iter(documents))
        for length in [longest, *_best_subset(documents, longest, capacity - longest)]:
            row_of[documents[length].pop()] = row
            if not documents[length]:
                del documents[length]
        row += 1
    return row_of


def _best_subset(documents: dict[int, list[int]], taken: int, room: int) -> list[int]:
    """Lengths of a set of documents, beside one of length ``taken``, that add up to ``room`` or as near below as
    the tried lengths allow.

    Subset sums as bits of one integer: bit s of ``sums`` says that some set adds up to s.
    """
    lengths = [length for length in documents if length <= room]
    if len(lengths) > _CHOICES:  # spread evenly, the shortest included
        lengths = [lengths[(i + 1) * len(lengths) // _CHOICES - 1] for i in range(_CHOICES)]
    within = (2 << room) - 1
    sums, steps = 1, []
    for length in lengths:
        for _ in range(min(len(documents[length]) - (length == taken), room // length)):
            wider = (sums | sums << length) & within
            if wider == sums:
                break
            steps.append((length, sums))
            sums = wider
        if sums >> room:
            break
    chosen, rest = [], sums.bit_length() - 1
    for length, before in reversed(steps):
        if not before >> rest & 1:
            chosen.append(length)
            rest -= length
    return chosen


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row's number for each of ``lengths`` [N]."""
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    firsts = np.flatnonzero(np.diff(descending, prepend=0))
    counts = np.diff(firsts, append=descending.size)
    rows_by_fill: dict[int, list[int]] = {}
    occupied = 0  # bit f: rows_by_fill[f] is not empty
    placed: list[int] = []  # rows of the documents, in descending order of length
    num_rows = 0
    for length, left in zip(descending[firsts].tolist(), counts.tolist(), strict=True):
        takes_it = (2 << (capacity - length)) - 1  # bits of the fills that leave room for `length`
        while left:
            fitting = occupied & takes_it
            fill = fitting.bit_length() - 1 if fitting else 0
            each = (capacity - fill) // length  # documents of this length that one such row takes
            if fitting:
                rows = rows_by_fill[fill]
                if each > 1:
                    moved = [rows.pop()]
                elif len(rows) <= left:
                    moved, rows = rows, []
                else:
                    moved = rows[len(rows) - left :]
                    del rows[len(rows) - left :]
                if not rows:
                    del rows_by_fill[fill]
                    occupied ^= 1 << fill
            else:
                moved = list(range(num_rows, num_rows + (left if each == 1 else 1)))
                num_rows += len(moved)
            times = min(each, left) if each > 1 else 1
            placed += moved * times
            left -= len(moved) * times
            fill += length * times
            if fill in rows_by_fill:
                rows_by_fill[fill] += moved
            else:
                rows_by_fill[fill] = moved
                occupied |= 1 << fill
    row_of = np.empty(lengths.size, np.int64)
    row_of[order] = placed
    return row_of
