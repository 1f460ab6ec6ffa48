"""One shard of the data: rows of the sources, mixed, packed window by window, endless, from any saved position.

The rows of a global batch are dealt to a fixed number of shards, whatever the number of processes; a shard is the same
stream wherever it runs. It draws documents from its sources (``mixture`` says from which), packs a window
of them, and gives the rows in a seeded order. Documents of rows that came out poorly filled begin the next window.
Where the weights change at an update, the window ends there: the few documents that were drawn too early come first in
the next phase and are counted to it.

The position is where the window began and how many of its rows were given: a restore draws that window again.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from postrain.config import DataConfig
from postrain.data.batches.epoch_order import permutation
from postrain.data.batches.mixture import Phase, choose, phase_at
from postrain.data.batches.packing import pack_window
from postrain.data.batches.report import SourceReport
from postrain.data.documents import Document
from postrain.errors import UserError

# Part of the data fingerprint: to be counted up whenever the same data would come in another order.
SHARD_VERSION = 4

_FIRST_WINDOW = 64  # documents, of a phase; up to twice as many for the last of several shards


class Reader(Protocol):
    """A shard's share of a source, row by row. ``position`` (JSON-able) is after the last row drawn."""

    position: Any
    counts: dict[str, int]  # what became of the rows up to it (``SourceReport``); {} where that is known beforehand

    def draw(self) -> tuple[Any, list[Document]] | None:
        """Key (JSON-able) and documents, at least one, of the next row that has any; None where there is no more."""

    def seek(self, position: Any) -> None:
        """Goes on where ``position`` was taken."""

    def fetch(self, keys: Sequence[Any]) -> list[list[Document]]:
        """The documents of rows drawn before, by their keys."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A document and where it is to be found again: part ``part`` of row ``key`` of a source."""

    source: int
    key: Any
    part: int
    document: Document

    @property
    def slots(self) -> int:
        return self.document.slots


class Shard:
    """Packed rows without end, see above.

    Args:
      readers: one for each source.
      phases: from ``make_phases``.
      rows_a_batch: rows of each update that are of this shard.
      window: documents that are packed together. The first windows of a phase have fewer, each twice as many as the
        one before, so that the rows of its first updates have the shares of its weights, too, and come soon. Shards
        begin with different numbers, so that not all of them draw their windows before the same update.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        phases: Sequence[Phase],
        config: DataConfig,
        *,
        index: int,
        shards: int,
        rows_a_batch: int,
        window: int,
    ):
        self._readers, self._phases, self._config = readers, phases, config
        self._index, self._shards, self._rows_a_batch, self._window = index, shards, rows_a_batch, window
        self._number = -1  # of the window
        self._size = self._first_size = min(_FIRST_WINDOW * (shards + index) // shards, window)  # of the next one
        self._first_row = 0  # of the window, in the stream of this shard
        self._drawn = [0.0] * len(readers)  # in this phase
        self._phase = 0
        self._totals = [[0, 0] for _ in readers]  # documents and tokens given of each source
        self._carry: list[Drawn] = []
        self._rows: list[list[Drawn]] = []
        self._given = 0
        self._start: dict[str, Any] = {}

    def next_rows(self, count: int) -> list[list[Document]]:
        """Raises UserError where the sources have no more rows."""
        rows: list[list[Document]] = []
        while len(rows) < count:
            if self._given == len(self._rows):
                self._next_window()
            piece = self._rows[self._given : self._given + count - len(rows)]
            rows += [[drawn.document for drawn in row] for row in piece]
            for drawn in (drawn for row in piece for drawn in row):
                self._totals[drawn.source][0] += 1
                self._totals[drawn.source][1] += drawn.document.num_tokens
            self._given += len(piece)
        return rows

    def get_state(self) -> dict[str, Any]:
        """The position after the last row that was given, JSON-able."""
        if not self._start:
            return {"update": self._first_row // self._rows_a_batch} if self._first_row else {}
        totals, counts = [list(total) for total in self._totals], [reader.counts for reader in self._readers]
        return self._start | {"given": self._given, "totals": totals, "counts": counts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken, with the same rows. A source whose position is None begins anew."""
        if not state:
            return
        if "update" in state:
            self._first_row = state["update"] * self._rows_a_batch
            return
        for reader, position in zip(self._readers, state["positions"], strict=True):
            if position is not None:
                reader.seek(position)
        self._number, self._first_row = state["window"] - 1, state["first_row"]
        self._drawn, self._phase, self._size = list(state["drawn"]), state["phase"], state["size"]
        self._totals = [list(total) for total in state["totals"]]
        self._carry = self._fetch(state["carry"])
        self._rows = []
        self._next_window()
        self._given = state["given"]

    def _next_window(self) -> None:
        self._first_row += len(self._rows)
        self._number += 1
        self._start = {
            "window": self._number,
            "first_row": self._first_row,
            "positions": [reader.position for reader in self._readers],
            "drawn": list(self._drawn),
            "phase": self._phase,
            "size": self._size,
            "carry": [[drawn.source, drawn.key, drawn.part] for drawn in self._carry],
        }
        phase = phase_at(self._phases, self._first_row // self._rows_a_batch + 1)
        if phase != self._phase:
            self._phase, self._drawn, self._size = phase, [0.0] * len(self._readers), self._first_size
            for drawn in self._carry:
                self._drawn[drawn.source] += self._amount(drawn)
        documents, is_last = self._draw_window()
        self._size = min(2 * self._size, self._window)
        rows_left = self._rows_of_phase()
        config = self._config
        rows, left = self._pack(documents, last=is_last)
        if config.shuffle:
            rows = [rows[i] for i in permutation(len(rows), (config.seed, self._index, self._number, 1))]
        else:
            rows.sort(key=lambda row: int(row[0]))
        stop = int(min(len(rows), rows_left))
        late = np.sort(np.concatenate([left, *rows[stop:]])).astype(np.int64)
        self._carry = [documents[i] for i in late]
        self._rows, self._given = [[documents[i] for i in row] for row in rows[:stop]], 0

    def _draw_window(self) -> tuple[list[Drawn], bool]:
        """The carried documents and as many more as make a window, and whether these are the last."""
        documents = list(self._carry)
        window = max(self._size, len(documents) + 1)
        while (goal := self._next_goal(documents, window)) > len(documents):
            if not self._draw_until(goal, documents):
                if not documents:
                    raise UserError(self._describe_end())
                return documents, True
        return documents, len(documents) < window

    def _describe_end(self) -> str:
        update, sources = self._first_row // self._rows_a_batch + 1, self._config.train
        losses = [SourceReport("", **reader.counts).describe_losses() for reader in self._readers]
        said = "".join(f"; {source.path}: {loss}" for source, loss in zip(sources, losses, strict=True) if loss)
        shard = f"shard {self._index} of data.stream.shards has" if self._config.streaming else "data.train has"
        fewer = ", or have fewer shards" if self._config.streaming else ""
        advice = f"set train.steps below it, raise max_epochs of a source{fewer}"
        return f"{shard} no more rows for update {update}{said}: {advice}"

    def _next_goal(self, documents: list[Drawn], window: int) -> int:
        """How many documents to have before looking again; as many as there are: these are enough.

        The last window of a phase has hardly more rows than the phase: what is drawn beyond is of the wrong weights.
        """
        rows_left = self._rows_of_phase()
        if rows_left == math.inf or not documents:
            return window if rows_left == math.inf else min(window, math.ceil(rows_left / 2))
        rows = len(self._pack(documents, last=True)[0])
        if rows >= rows_left:
            return len(documents)
        return min(window, len(documents) + max(1, int(0.9 * (rows_left - rows) * len(documents) / rows)))

    def _pack(self, documents: list[Drawn], *, last: bool) -> tuple[list[np.ndarray], np.ndarray]:
        lengths = np.array([drawn.slots for drawn in documents], np.int64)
        return pack_window(lengths, self._config.sequence_length, method=self._config.packing, last=last)

    def _draw_until(self, goal: int, documents: list[Drawn]) -> bool:
        """Whether there were as many."""
        available = set(range(len(self._readers)))
        while len(documents) < goal:
            source = choose(self._phases[self._phase], self._drawn, available)
            if source < 0:
                return False
            row = self._readers[source].draw()
            if row is None:
                available.remove(source)
                continue
            drawn = [Drawn(source, row[0], part, document) for part, document in enumerate(row[1])]
            self._drawn[source] += sum(map(self._amount, drawn))
            documents += drawn
        return True

    def _rows_of_phase(self) -> float:
        """Rows that are still to come before the next phase; at least one: a phase begins with a window."""
        if self._phase + 1 == len(self._phases):
            return math.inf
        return (self._phases[self._phase + 1].step - 1) * self._rows_a_batch - self._first_row

    def _amount(self, drawn: Drawn) -> float:
        return drawn.document.num_tokens if self._config.mixture.by == "tokens" else float(drawn.part == 0)

    def _fetch(self, carried: list) -> list[Drawn]:
        found: dict[int, Drawn] = {}
        for source, reader in enumerate(self._readers):
            places = [i for i, item in enumerate(carried) if item[0] == source]
            rows = reader.fetch([carried[i][1] for i in places])
            for i, documents in zip(places, rows, strict=True):
                _, key, part = carried[i]
                found[i] = Drawn(source, key, part, documents[part])
        return [found[i] for i in range(len(carried))]
