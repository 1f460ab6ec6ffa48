"""One shard's documents of one source: its rows rendered and filtered, epoch after epoch."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import grain

from postrain.config import DataConfig
from postrain.data.batches.resumable import ResumableDataset
from postrain.data.batches.row_filter import RowFilter
from postrain.data.documents import Document
from postrain.data.kinds.registry import RowParser, render_rows
from postrain.data.messages import BadRow
from postrain.data.rendering.render import BATCH
from postrain.data.rendering.tokenizer import Tokenizer

_FIRST_BATCH = 4  # rows that are rendered together after a position was set; each time twice as many, up to BATCH
_EMPTY_EPOCHS = 3  # consecutive epochs without a document after which a source counts as exhausted


class RenderedRows(ResumableDataset):
    """``SourceRow`` -> the documents of each row that has any to train on (list[Document]).

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
        while batch := [(parse_row(self._parser, row), rows.get_state()) for row in itertools.islice(rows, size)]:
            documents = render_examples(self._parser, [row for row, _ in batch], self._tokenizer, self._config)
            for (_, after), found in zip(batch, documents, strict=True):
                if kept := self._filter.keep(found):
                    yield after, kept
            size = min(2 * size, BATCH)


def parse_row(parser: RowParser, row) -> Any:
    """The example of a ``SourceRow``, a BadRow, or None where the source's function leaves it out."""
    try:
        return parser.parse(*row)
    except BadRow as e:
        return e


def render_examples(
    parser: RowParser, examples: list[Any], tokenizer: Tokenizer | None, config: DataConfig
) -> Iterator[list[Document] | BadRow | None]:
    """The documents of each of the results of ``parse_row``; BadRow and None stay as they are."""
    good = [example for example in examples if not isinstance(example, BadRow | None)]
    rendered = render_rows(parser.kind, good, tokenizer, config)
    return (example if isinstance(example, BadRow | None) else next(rendered) for example in examples)


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

    def read(self, position: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
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
