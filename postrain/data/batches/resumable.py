"""Our own Grain datasets, read from any saved position: their base, and the stages that render rows and count epochs.

Grain's transformations save a position by the number of elements before it, or by the state of one parent. Here a
position also says where in which file reading stands, which epoch of a source it is, and where the window of
documents began that is packed at the moment.
"""

import abc
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain

from postrain.config import DataConfig
from postrain.data.batches.row_filter import RowFilter
from postrain.data.documents import Document
from postrain.data.kinds.registry import RowParser
from postrain.data.rendering.render import BATCH
from postrain.data.rendering.tokenizer import Tokenizer

_FIRST_BATCH = 4  # rows that are rendered together after a position was set; each time twice as many, up to BATCH
_EMPTY_EPOCHS = 3  # consecutive epochs without a document after which a source counts as exhausted


class ResumableDataset(grain.IterDataset):
    """A ``grain.IterDataset`` described by one generator: what comes after a position, each element with the next one.

    Positions are JSON-able and are never changed once they were handed out.
    """

    @abc.abstractmethod
    def first_position(self) -> Any:
        """The position before the first element."""

    @abc.abstractmethod
    def read(self, position: Any) -> Iterator[tuple[Any, Any]]:
        """(position after it, element) of each element after ``position``. What it returns is the position at the end,
        None: that after the last element."""

    def __iter__(self) -> "ResumableIterator":
        return ResumableIterator(self)


class ResumableIterator(grain.DatasetIterator):
    """Reads a ``ResumableDataset``; nothing is read before the first element is asked for."""

    def __init__(self, dataset: ResumableDataset):
        super().__init__()
        self._dataset = dataset
        self._elements: Iterator[tuple[Any, Any]]
        self.set_state(dataset.first_position())

    def __next__(self) -> Any:
        try:
            self._position, element = next(self._elements)
        except StopIteration as end:
            self._position = self._position if end.value is None else end.value
            raise
        return element

    def get_state(self) -> Any:
        """The position after the last element."""
        return self._position

    def set_state(self, state: Any) -> None:
        """Continues after the element after which ``state`` was taken."""
        self._position = state
        self._elements = self._dataset.read(state)


class RenderedRows(ResumableDataset):
    """``Row`` -> the documents of each row that has any to train on (list[Document]).

    A position is that of the rows. Not Grain's own ``map``, because rows are rendered many at a time (which is several
    times as fast), and the position of each must be known all the same.
    """

    def __init__(
        self,
        rows: grain.IterDataset,
        parser: RowParser,
        tokenizer: Tokenizer | None,
        config: DataConfig,
        row_filter: RowFilter,
    ):
        super().__init__()
        self._rows, self._parser, self._tokenizer, self._config = rows, parser, tokenizer, config
        self._filter = row_filter

    def first_position(self) -> Any:
        return iter(self._rows).get_state()

    def read(self, position: Any) -> Iterator[tuple[Any, list[Document]]]:
        rows, size = iter(self._rows), _FIRST_BATCH
        rows.set_state(position)
        while batch := [(row, rows.get_state()) for row in itertools.islice(rows, size)]:
            of_batch, keys = [row for row, _ in batch], self._filter.keys
            rendered = self._parser.render(of_batch, self._tokenizer, self._config, keys)
            for (_, after), of_row in zip(batch, rendered, strict=True):
                if kept := self._filter.keep(of_row):
                    yield after, kept
            size = min(2 * size, BATCH)


class Epochs(ResumableDataset):
    """The elements of one epoch after the other.

    Not Grain's own ``repeat``, because every epoch has an order of its own, and a source ends after some epochs
    without an element: a shard may have a part of a source in which nothing can be trained on.
    """

    def __init__(self, open_epoch: Callable[[int], grain.IterDataset], max_epochs: int):
        """``max_epochs``: 0 for no limit."""
        super().__init__()
        self._open_epoch, self._max_epochs = open_epoch, max_epochs

    def first_position(self) -> dict[str, Any]:
        return {"epoch": 0, "rows": None}

    def read(self, position: dict[str, Any]) -> Generator[tuple[dict[str, Any], Any], None, dict[str, Any]]:
        epoch, rows, empty = position["epoch"], position["rows"], position.get("empty", 0)
        while empty < _EMPTY_EPOCHS and (not self._max_epochs or epoch < self._max_epochs):
            elements, is_empty = iter(self._open_epoch(epoch)), rows is None
            if rows is not None:
                elements.set_state(rows)
            for element in elements:
                is_empty = False
                yield {"epoch": epoch, "rows": elements.get_state()}, element
            empty = empty + 1 if is_empty else 0
            epoch, rows = epoch + 1, None
        return {"epoch": epoch, "rows": None, "empty": empty}
