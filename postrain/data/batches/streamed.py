"""Training batches from shards: mixed and packed while training goes on, in one order on any number of processes.

A global batch of B rows has B / S rows of each of S shards, in order (``shard.py``). The rows of a shard depend on the
data and the config alone, so the order of examples is the same for every number of processes; each process runs the
shards that its rows of the batch come from. With as many shards as processes, or a multiple, no block of a large source
is read by two of them.

Rows are read, rendered, packed and assembled in a background thread (Grain's), some batches ahead. Memory holds a
window of documents for each shard.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.data.batches.resumable import ResumableDataset
from postrain.data.batches.row_filter import RowCounts, add_up
from postrain.data.batches.shard import Shard, make_phases
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Document, Layout, check_token_ids, largest_id
from postrain.errors import UserError, shorten

_NAMED_BATCHES = 4  # besides those prepared ahead, whose rows can be named: a bad step is noticed a step late

# (shard, where each source counts its rows, or None: they were counted before) -> a dataset for each source.
OpenSources = Callable[[int, Sequence[RowCounts] | None], Sequence[grain.IterDataset]]


class ShardedBatches:
    """Endless batches of this process, as ``MemoryBatches`` has them; ``row_ids`` number the documents.

    Args:
      names: of the sources, for reports.
      sizes: of the sources, in whatever unit: their shares where the config gives no weights.
      open_sources: see ``Shard``.
      layout: of the documents.
      shards: S, divides ``config.batch_size``.
      process_index, process_count: which rows of each global batch are this process'.

    Raises:
      UserError: a batch that does not divide among shards and processes.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[float],
        open_sources: OpenSources,
        config: DataConfig,
        *,
        layout: Layout,
        shards: int,
        process_index: int,
        process_count: int,
    ):
        rows = config.batch_size
        if rows % shards or rows % process_count:
            raise UserError(
                f"config key 'data.batch_size' = {rows} must be a multiple of "
                + (f"'data.stream.shards' = {shards} and of " if config.streaming else "")
                + f"the number of processes that read rows, {process_count}: {math.lcm(shards, process_count)} fits"
            )
        self._names, each = list(names), rows // shards
        own_rows = range(process_index * rows // process_count, (process_index + 1) * rows // process_count)
        phases, window = make_phases(config, sizes), max(config.packing_window // shards, each)
        self._shards = {
            number: Shard(
                functools.partial(open_sources, number),
                [RowCounts(name) for name in names],
                phases,
                config,
                index=number,
                shards=shards,
                rows_a_batch=each,
                window=window,
            )
            for number in range(own_rows.start // each, -(-own_rows.stop // each))
        }
        self._source = ShardBatches(self._shards, own_rows, each, config, layout)
        # One thread: it is far quicker than a step, and more would contend for the GIL.
        dataset = grain.experimental.ThreadPrefetchIterDataset(self._source, prefetch_buffer_size=config.prefetch)
        self._batches = iter(dataset)

    def __iter__(self) -> "ShardedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position of this process' shards after the last batch that was handed out: {"shards": {shard: ...}}."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which ``state`` was taken; it must hold the shards of all processes."""
        missing = [number for number in self._shards if str(number) not in state["shards"]]
        if missing:
            raise UserError(
                f"the data position has no shard {missing[0]}: expected one for each of data.stream.shards, found "
                f"{', '.join(state['shards'])}: set data.stream.shards as it was"
            )
        self._batches.set_state(dict(state))

    def start_anew(self, update: int) -> None:
        """Begins with the first row of every source after ``update`` updates of the run; phases count those, too."""
        self.set_state({"shards": {str(number): shard.position_at(update) for number, shard in self._shards.items()}})

    def check_token_ids(self, vocab_size: int) -> None:
        """From now on a document with an id from ``vocab_size`` on raises UserError when its batch is made."""
        self._source.vocab_size = vocab_size

    def describe_rows(self, row_ids: np.ndarray) -> str:
        """``file:line, file:line, ...`` of the documents in ``row_ids`` of one of the last batches."""
        names = {number: name for batch in list(self._source.named) for number, name in batch.items()}
        return shorten(list(dict.fromkeys(names[i] for i in np.ravel(row_ids).tolist() if i in names)), 16)

    def format_consumption(self, position: Mapping[str, Any]) -> list[str]:
        """For each source: documents and tokens that were trained on up to ``position``, and their share.

        Of a stream also, of the rows that were read for it in their first epoch, the losses and the keys not read.
        """
        shards = list(position["shards"].values())
        totals = np.sum([shard["totals"] for shard in shards], axis=0).tolist()
        all_tokens = max(sum(tokens for _, tokens in totals), 1)
        lines = []
        for i, (name, (documents, tokens)) in enumerate(zip(self._names, totals, strict=True)):
            counts = add_up(name, [shard["counts"][i] for shard in shards])
            line = f"{name}: {documents:,} documents, {tokens:,} tokens, {tokens / all_tokens:.1%}"
            losses, unread = counts.format_losses(), counts.format_unread()
            lines.append(f"{line}; {losses}" if losses else line)
            lines += [unread] if unread else []
        return lines

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


class ShardBatches(ResumableDataset):
    """The rows ``own_rows`` of each global batch, collated; ``each`` rows of the batch are of one shard.

    Not Grain's own ``batch``, because a batch has rows of several datasets.
    """

    def __init__(self, shards: dict[int, Shard], own_rows: range, each: int, config: DataConfig, layout: Layout):
        super().__init__()
        self.vocab_size = 2**31
        self.named: collections.deque[dict[int, str]] = collections.deque(maxlen=config.prefetch + _NAMED_BATCHES)
        self._shards, self._own_rows, self._each, self._layout = shards, own_rows, each, layout
        self._sequence_length, self._documents = config.sequence_length, 0

    def first_position(self) -> dict[str, Any]:
        return {"shards": {str(number): shard.first_position() for number, shard in self._shards.items()}}

    def read(self, position: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        readers = {number: iter(shard) for number, shard in self._shards.items()}
        for number, reader in readers.items():
            reader.set_state(position["shards"][str(number)])
        while True:
            batch = self.next_batch(readers)
            yield {"shards": {str(number): reader.get_state() for number, reader in readers.items()}}, batch

    def next_batch(self, readers: Mapping[int, Iterator[list[Document]]]) -> dict[str, np.ndarray]:
        """The arrays of the next rows of each shard, and ``row_ids``."""
        rows: list[list[Document]] = []
        for number, reader in readers.items():
            first, of_shard = number * self._each, [next(reader) for _ in range(self._each)]
            rows += of_shard[max(self._own_rows.start - first, 0) : self._own_rows.stop - first]
        batch = assemble_batch(rows, self._sequence_length, self._layout)
        if largest_id(batch) >= self.vocab_size:
            check_token_ids((document for row in rows for document in row), self.vocab_size)
        return batch | {"row_ids": self._name_rows(rows)}

    def _name_rows(self, rows: list[list[Document]]) -> np.ndarray:
        row_ids, names = np.full((len(rows), max(1, *map(len, rows))), -1, np.int32), {}
        for ids, documents in zip(row_ids, rows, strict=True):
            for i, document in enumerate(documents):
                ids[i] = self._documents % 2**31
                names[int(ids[i])] = str(document.ref)
                self._documents += 1
        self.named.append(names)
        return row_ids
