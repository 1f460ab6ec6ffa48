"""One shard of the data: documents of the sources, mixed, packed window by window, endless, from any saved position.

The rows of a global batch are dealt to a fixed number of shards, whatever the number of processes; a shard is the same
stream wherever it runs. It draws documents from its sources (``choose`` says from which), packs a window of them, and
yields the rows in a seeded order. Documents of rows that came out poorly filled begin the next window. Where the
weights change at an update, the window ends there: the few documents that were drawn too early come first in the next
phase and are counted to it.

The next row is of the source that has the least of what is its due, drawn over weight: weighted fair queueing (Demers,
Keshav, Shenker 1989). Nothing is drawn at random, so shares hold at every moment and not only on average: after any
number of rows each source has its share up to one row, and a resume needs no more than the amounts. Weights may change
at given updates (``Phase``); from there on the new shares hold.

Mixing and packing are one stage, not two of Grain's: only packing knows at which document an update begins, and with it
other weights. The position is where the window began and how many of its rows were consumed: a restore draws that
window again.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.data.batches.epoch_order import permutation
from postrain.data.batches.packing import pack_window
from postrain.data.batches.resumable import ResumableDataset
from postrain.data.batches.row_filter import RowCounts
from postrain.data.documents import Document
from postrain.errors import UserError

# Part of the data fingerprint: to be counted up whenever the same data would come in another order, or positions in it
# are written otherwise. 4: they name shards, and the place in a source is the state of a Grain dataset.
SHARD_VERSION = 4

_FIRST_WINDOW = 64  # documents, of a phase; up to twice as many for the last of several shards
_NEAR = 64  # rows that are read on, to get from one carried document to the next


@dataclasses.dataclass(frozen=True)
class Phase:
    """``weights`` of the sources, which add up to 1, from update ``step`` (from 1) on."""

    step: int
    weights: tuple[float, ...]


def make_phases(config: DataConfig, sizes: Sequence[float]) -> list[Phase]:
    """The phases of ``config``, the first from update 1; ``sizes`` of the sources, of whatever is counted.

    Sources without weights have those of their sizes, to the power of 1 / ``mixture.temperature``.
    """
    given = [source.weight for source in config.train]
    if any(given):
        first = given
    else:
        largest = max(sizes)
        first = [(size / largest) ** (1 / config.mixture.temperature) for size in sizes]
    phases = [Phase(1, tuple(first))]
    phases += [Phase(phase.step, phase.weights) for phase in config.mixture.phases]
    return [Phase(phase.step, tuple(w / sum(phase.weights) for w in phase.weights)) for phase in phases]


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """Index of the phase that update ``step`` belongs to."""
    return max(i for i, phase in enumerate(phases) if phase.step <= step)


def choose(phase: Phase, drawn: Sequence[float], available: Collection[int]) -> int:
    """The source to draw from next; -1 where none of ``available`` has a weight. ``drawn`` so far, in this phase."""
    due = [(drawn[i] / phase.weights[i], i) for i in available if phase.weights[i] > 0]
    return min(due)[1] if due else -1


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A document, and where to find it again: ``part`` of the row that source ``source`` has after ``position``."""

    source: int
    position: Any
    part: int
    document: Document


@dataclasses.dataclass
class Window:
    """Where a window began: what its rows depend on besides the config.

    Attributes:
      number: of the window.
      first_row: in the stream of this shard.
      size: documents to pack together.
      phase: of the mixture, that of the window before.
      amounts: consumed of each source in that phase.
      positions: in the sources.
      counts: of the rows of each source up to there.
      carried: [source, position, part] of the documents left by the window before.
    """

    number: int
    first_row: int
    size: int
    phase: int
    amounts: list[float]
    positions: list[Any]
    counts: list[dict[str, int]]
    carried: list[list]


class Shard(ResumableDataset):
    """Packed rows without end, list[Document] each; see above.

    Args:
      open_sources: one dataset for each source, whose elements are the documents of a row (list[Document]). Its
        argument is where each counts its rows; None: rows that were counted before.
      counts: of each source.
      phases: from ``make_phases``.
      rows_a_batch: rows of each update that are of this shard.
      window: documents that are packed together. The first windows of a phase have fewer, each twice as many as the
        one before, so that the rows of its first updates have the shares of its weights, too, and come soon. Shards
        begin with different numbers, so that not all of them draw their windows before the same update.
    """

    def __init__(
        self,
        open_sources: Callable[[Sequence[RowCounts] | None], Sequence[grain.IterDataset]],
        counts: Sequence[RowCounts],
        phases: Sequence[Phase],
        config: DataConfig,
        *,
        index: int,
        shards: int,
        rows_a_batch: int,
        window: int,
    ):
        super().__init__()
        self._open_sources, self._counts, self._phases, self._config = open_sources, counts, phases, config
        self._index, self._rows_a_batch, self._window = index, rows_a_batch, window
        self._first_size = min(_FIRST_WINDOW * (shards + index) // shards, window)

    def first_position(self) -> dict[str, Any]:
        return self.position_at(0)

    def position_at(self, update: int) -> dict[str, Any]:
        """Before the first row of every source, ``update`` updates of the run being done with other data."""
        sources = len(self._counts)
        window = Window(
            number=0,
            first_row=update * self._rows_a_batch,
            size=self._first_size,
            phase=0,
            amounts=[0.0] * sources,
            positions=[None] * sources,
            counts=[RowCounts("").to_json()] * sources,
            carried=[],
        )
        totals, counts = [[0, 0]] * sources, window.counts
        return {"window": dataclasses.asdict(window), "rows": 0, "totals": totals, "counts": counts}

    def read(self, position: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[Document]]]:
        window, done = Window(**position["window"]), position["rows"]
        totals = [list(total) for total in position["totals"]]  # documents and tokens consumed of each source
        carried = fetch(self._open_sources(None), window.carried)
        sources = [iter(source) for source in self._open_sources(self._counts)]
        for source, counts, place, known in zip(sources, self._counts, window.positions, window.counts, strict=True):
            counts.set(known)
            if place is not None:
                source.set_state(place)
        while True:
            rows, left, window_after = self._pack_window(window, sources, carried)
            start = dataclasses.asdict(window)
            for row in rows[done:]:
                done += 1
                for drawn in row:
                    totals[drawn.source][0] += 1
                    totals[drawn.source][1] += drawn.document.num_tokens
                after = {
                    "window": start,
                    "rows": done,
                    "totals": [list(total) for total in totals],
                    "counts": [counted.to_json() for counted in self._counts],
                }
                yield after, [drawn.document for drawn in row]
            window, carried, done = window_after, left, 0

    def _pack_window(
        self, window: Window, sources: Sequence[grain.DatasetIterator], carried: list[Drawn]
    ) -> tuple[list[list[Drawn]], list[Drawn], Window]:
        """The rows of a window, the documents left for the next one, and the beginning of that one."""
        update = window.first_row // self._rows_a_batch + 1
        phase, amounts, size = phase_at(self._phases, update), list(window.amounts), window.size
        if phase != window.phase:
            amounts, size = [0.0] * len(sources), self._first_size
            for drawn in carried:
                amounts[drawn.source] += self._amount(drawn)
        # Rows before the next phase; at least one, as a phase begins with a window.
        rows_left = math.inf
        if phase + 1 < len(self._phases):
            rows_left = (self._phases[phase + 1].step - 1) * self._rows_a_batch - window.first_row
        documents, is_last = self._draw_window(sources, carried, size, phase, amounts, rows_left)
        if not documents:
            raise UserError(self._format_end(update))
        rows, left = self._pack(documents, last=is_last)
        config = self._config
        if config.shuffle:
            rows = [rows[i] for i in permutation(len(rows), (config.seed, self._index, window.number, 1))]
        else:
            rows.sort(key=lambda row: int(row[0]))
        stop = int(min(len(rows), rows_left))
        late = [documents[i] for i in np.sort(np.concatenate([left, *rows[stop:]])).astype(np.int64)]
        window_after = Window(
            number=window.number + 1,
            first_row=window.first_row + stop,
            size=min(2 * size, self._window),
            phase=phase,
            amounts=amounts,
            positions=[source.get_state() for source in sources],
            counts=[counts.to_json() for counts in self._counts],
            carried=[[drawn.source, drawn.position, drawn.part] for drawn in late],
        )
        return [[documents[i] for i in row] for row in rows[:stop]], late, window_after

    def _draw_window(
        self, sources, carried: list[Drawn], size: int, phase: int, amounts: list[float], rows_left: float
    ) -> tuple[list[Drawn], bool]:
        """The carried documents and as many more as make a window, and whether these are the last of the phase."""
        documents = list(carried)
        size = max(size, len(documents) + 1)
        while (goal := self._next_goal(documents, size, rows_left)) > len(documents):
            if not self._draw_until(goal, documents, sources, self._phases[phase], amounts):
                return documents, True
        return documents, len(documents) < size

    def _next_goal(self, documents: list[Drawn], size: int, rows_left: float) -> int:
        """How many documents to have before looking again; as many as there are: these are enough.

        The last window of a phase has hardly more rows than the phase: what is drawn beyond is of the wrong weights.
        """
        if rows_left == math.inf:
            return size
        if not documents:
            return min(size, math.ceil(rows_left / 2))
        rows = len(self._pack(documents, last=True)[0])
        if rows >= rows_left:
            return len(documents)
        return min(size, len(documents) + max(1, int(0.9 * (rows_left - rows) * len(documents) / rows)))

    def _draw_until(self, goal: int, documents: list[Drawn], sources, phase: Phase, amounts: list[float]) -> bool:
        """Draws from the sources until there are ``goal`` documents; False where the sources have no more."""
        available = set(range(len(sources)))
        while len(documents) < goal:
            source = choose(phase, amounts, available)
            if source < 0:
                return False
            position = sources[source].get_state()
            row = next(sources[source], None)
            if row is None:
                available.remove(source)
                continue
            parts = [Drawn(source, position, part, document) for part, document in enumerate(row)]
            amounts[source] += sum(map(self._amount, parts))
            documents += parts
        return True

    def _amount(self, drawn: Drawn) -> float:
        return drawn.document.num_tokens if self._config.mixture.by == "tokens" else float(drawn.part == 0)

    def _pack(self, documents: list[Drawn], *, last: bool) -> tuple[list[np.ndarray], np.ndarray]:
        lengths = np.array([drawn.document.slots for drawn in documents], np.int64)
        return pack_window(lengths, self._config.sequence_length, method=self._config.packing, last=last)

    def _format_end(self, update: int) -> str:
        losses = [counts.format_losses() for counts in self._counts]
        names = [source.path or source.name for source in self._config.train]
        why = "".join(f"; {name}: {loss}" for name, loss in zip(names, losses, strict=True) if loss)
        streaming = self._config.streaming
        return (
            (f"shard {self._index} of data.stream.shards has" if streaming else "data.train has")
            + f" no more rows for update {update}{why}: set train.steps below it, raise max_epochs of a source"
            + (", or have fewer shards" if streaming else "")
        )


def fetch(sources: Sequence[grain.IterDataset], carried: Sequence[Sequence]) -> list[Drawn]:
    """The documents of ``carried``, [source, position, part] each, those of a source in the order of its rows."""
    readers = [iter(source) for source in sources]
    rows: dict[int, tuple[Any, list[Document]]] = {}  # of each source the last position, and the row after it
    found = []
    for source, position, part in carried:
        if source not in rows:
            readers[source].set_state(position)
        if source not in rows or rows[source][0] != position:
            _seek(readers[source], position)
            rows[source] = position, next(readers[source])
        found.append(Drawn(source, position, part, rows[source][1][part]))
    return found


def _seek(reader: grain.DatasetIterator, position: Any) -> None:
    """Goes to a position after this one. Where it is near the rows up to it are read: quicker than to begin anew."""
    for _ in range(_NEAR):
        if reader.get_state() == position:
            return
        if next(reader, None) is None:
            break
    reader.set_state(position)
