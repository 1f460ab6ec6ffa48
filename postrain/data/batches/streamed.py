"""Training batches from shards: mixed and packed while training goes on, in one order on any number of processes.

A global batch of B rows has B / L rows of each of L shards, in order (``shard.py``). Which rows a shard gives
depends on the data and the config alone, so the order of examples is the same for every number of processes; each
process runs the shards that its rows of the batch come from. With as many shards as processes, or a multiple, no block
of a large source is read by two of them.

Rows are read, rendered, packed and assembled in a background thread, some batches ahead. What is held is a window of
documents for each shard.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.data.batches.mixture import make_phases
from postrain.data.batches.packing import assemble_batch
from postrain.data.batches.report import add_up
from postrain.data.batches.shard import Reader, Shard
from postrain.data.documents import Document, Layout, check_token_ids, largest_id
from postrain.errors import UserError, shorten

_NAMED_BATCHES = 4  # besides those prepared ahead, whose rows can be told: a bad step is found out a step late


class ShardedBatches:
    """Endless batches of this process, as ``make_train_iterator`` has them; ``row_ids`` count the documents given.

    Args:
      names: of the sources, for reports.
      sizes: of the sources, of whatever is counted: their shares where the config gives no weights.
      make_readers: shard -> a reader for each source.
      layout: of the documents.
      shards: L, divides ``config.batch_size``.
      process_index, process_count: which rows of each global batch are this process'.

    Raises:
      UserError: a batch that does not divide among shards and processes.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[float],
        make_readers: Callable[[int], Sequence[Reader]],
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
        self._names, self._shards, each = list(names), shards, rows // shards
        mine = range(process_index * rows // process_count, (process_index + 1) * rows // process_count)
        phases, window = make_phases(config, sizes), max(config.packing_window // shards, each)
        made = {
            shard: Shard(
                make_readers(shard), phases, config, index=shard, shards=shards, rows_a_batch=each, window=window
            )
            for shard in range(mine.start // each, -(-mine.stop // each))
        }
        self._source = _Batches(made, mine, each, config, layout)
        # One thread: it is far quicker than a step, and more would contend for the GIL.
        dataset = grain.experimental.ThreadPrefetchIterDataset(self._source, prefetch_buffer_size=config.prefetch)
        self._batches = iter(dataset)

    def __iter__(self) -> "ShardedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """This process's shards after the last batch that was returned: {"shards": {shard: position}}."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which ``state`` was taken; it must hold the shards of all processes."""
        missing = [shard for shard in self._source.shards if str(shard) not in state["shards"]]
        if missing:
            raise UserError(f"the data position has no shard {missing[0]}: it is not of this data.stream.shards")
        self._batches.set_state(dict(state))

    def start_anew(self, update: int) -> None:
        """Begins with the first rows of every source after ``update`` updates of the run, and the weights of then."""
        self.set_state({"shards": {str(shard): {"update": update} for shard in self._source.shards}})

    def check_token_ids(self, vocab_size: int) -> None:
        """From now on a document with an id from ``vocab_size`` on raises UserError when its batch is made."""
        self._source.vocab_size = vocab_size

    def describe_rows(self, row_ids: np.ndarray, limit: int = 16) -> str:
        """``file:line, file:line, ...`` of the documents in ``row_ids`` of one of the last batches."""
        names = {number: name for batch in list(self._source.named) for number, name in batch.items()}
        refs = dict.fromkeys(names[i] for i in np.ravel(row_ids).tolist() if i in names)
        return shorten(refs, limit)

    def format_consumption(self, position: Mapping[str, Any]) -> list[str]:
        """For each source: documents and tokens that were trained on up to ``position``, and their share.

        Of a stream what was left out, too, of the rows that were read for it in their first epoch.
        """
        shards = [shard for shard in position["shards"].values() if "totals" in shard]
        totals = np.sum([shard["totals"] for shard in shards], axis=0, initial=0) + np.zeros((len(self._names), 2), int)
        whole = max(totals[:, 1].sum(), 1)
        lines = []
        for i, (name, (documents, tokens)) in enumerate(zip(self._names, totals.tolist(), strict=True)):
            losses = add_up(name, filter(None, (shard["counts"][i] for shard in shards))).describe_losses()
            said = f"; {losses}" if losses else ""
            lines.append(f"{name}: {documents:,} documents, {tokens:,} tokens, {tokens / whole:.1%}{said}")
        return lines

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


def join_positions(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of a run out of those of its processes, which differ only by the shards that each has."""
    shards = {shard: state for position in positions for shard, state in position.get("shards", {}).items()}
    return positions[0] | ({"shards": shards} if shards else {})


class _Batches(grain.IterDataset):
    """What Grain's background thread iterates over: rows ``mine`` of each global batch, ``each`` of them a shard's."""

    def __init__(self, shards: dict[int, Shard], mine: range, each: int, config: DataConfig, layout: Layout):
        super().__init__()
        self.shards, self.vocab_size = shards, 2**31
        self.named: collections.deque[dict[int, str]] = collections.deque(maxlen=config.prefetch + _NAMED_BATCHES)
        self._mine, self._each, self._sequence_length, self._layout = mine, each, config.sequence_length, layout
        self._given = 0  # documents

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)

    def next_batch(self) -> dict[str, np.ndarray]:
        rows: list[list[Document]] = []
        for number, shard in self.shards.items():
            first = number * self._each
            given = shard.next_rows(self._each)
            rows += given[max(self._mine.start - first, 0) : self._mine.stop - first]
        batch = assemble_batch(rows, self._sequence_length, self._layout)
        if largest_id(batch) >= self.vocab_size:
            check_token_ids([document for row in rows for document in row], self.vocab_size)
        return batch | {"row_ids": self._number(rows)}

    def _number(self, rows: list[list[Document]]) -> np.ndarray:
        row_ids = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        names = {}
        for ids, row in zip(row_ids, rows, strict=True):
            for i, document in enumerate(row):
                ids[i] = self._given % 2**31
                names[int(ids[i])] = str(document.ref)
                self._given += 1
        self.named.append(names)
        return row_ids


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: _Batches):
        super().__init__()
        self._batches = batches

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batches.next_batch()

    def get_state(self) -> dict[str, Any]:
        return {"shards": {str(number): shard.get_state() for number, shard in self._batches.shards.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for number, shard in self._batches.shards.items():
            shard.set_state(state["shards"][str(number)])
