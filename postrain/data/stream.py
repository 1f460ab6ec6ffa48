"""Training batches out of data that never is in memory, nor read twice in an epoch, nor by two processes.

A global batch of B rows has B / L rows of each of L lanes, in order (``postrain.data.lane``). Which rows a lane gives
depends on the data and the config alone, so the order of examples is the same for every number of processes; each
process runs the lanes that its rows of the batch come from. With as many lanes as processes, or a multiple, no block
is read by two of them.

Rows are read, rendered, packed and assembled in a background thread, some batches ahead. What is held is a window of
documents for each lane.
"""

import collections
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.data.block_reader import BlockReader, BlockSource, open_block_source
from postrain.data.fingerprint import describe_pipeline
from postrain.data.lane import LANE_VERSION, Lane
from postrain.data.mixture import make_phases
from postrain.data.packing import assemble_row
from postrain.data.rendering import Rendered
from postrain.data.report import SourceReport
from postrain.data.storage import StoredFile, is_local, open_file
from postrain.data.tokenizer import Tokenizer
from postrain.errors import UserError

_PREFETCHED_BATCHES = 8
_NAMED_BATCHES = _PREFETCHED_BATCHES + 4  # whose rows can still be told: a bad step is found out a step late
_SAMPLE = 1 << 16  # bytes of a local file's start, middle and end that tell whether it is the same


class StreamIterator:
    """Endless batches, see ``open_stream``.

    Attributes:
      sources: what is read.
      fingerprint: JSON-able; see ``postrain.data.fingerprint``.
    """

    def __init__(
        self, sources: Sequence[BlockSource], tokenizer: Tokenizer, config: DataConfig, process: int, processes: int
    ):
        self.sources, self._config = list(sources), config
        self.fingerprint = _make_fingerprint(sources, tokenizer, config)
        self._lanes = _Lanes(self.sources, tokenizer, config, process, processes)
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            _Batches(self._lanes), prefetch_buffer_size=_PREFETCHED_BATCHES
        )
        self._batches = iter(dataset)

    def __iter__(self) -> "StreamIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position of this process' lanes after the last batch that was handed out: {"lanes": {lane: position}}."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which ``state`` was taken; it must hold the lanes of all processes."""
        missing = [lane for lane in self._lanes.lanes if str(lane) not in state["lanes"]]
        if missing:
            raise UserError(f"the data position has no lane {missing[0]}: it is not of this data.stream.lanes")
        self._batches.set_state(dict(state))

    def describe_rows(self, row_ids: np.ndarray, limit: int = 16) -> str:
        """``file:line, file:line, ...`` of the documents in ``row_ids`` of one of the last batches."""
        return self._lanes.describe(row_ids, limit)

    def describe_drawn(self) -> str:
        """A line for each source: documents and tokens that this process has drawn, and their share."""
        return self._lanes.describe_drawn()

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


def open_stream(
    tokenizer: Tokenizer, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> StreamIterator:
    """Batches of ``config.train``, as ``make_train_iterator`` describes them; ``row_ids`` number the documents drawn.

    Raises:
      UserError: a source that cannot be read, a batch that does not divide among lanes and processes.
    """
    lanes, rows = config.stream.lanes, config.batch_size
    if rows % lanes or rows % process_count:
        raise UserError(
            f"config key 'data.batch_size' = {rows} must be a multiple of 'data.stream.lanes' = {lanes} and of the "
            f"{process_count} processes"
        )
    sources = [open_block_source(source, config) for source in config.train]
    return StreamIterator(sources, tokenizer, config, process_index, process_count)


class _Lanes:
    """The lanes that a process' rows of each batch come from."""

    def __init__(
        self, sources: Sequence[BlockSource], tokenizer: Tokenizer, config: DataConfig, process: int, processes: int
    ):
        self._config, self._sources = config, sources
        count, self._rows = config.stream.lanes, config.batch_size // config.stream.lanes
        self._first, self._stop = (config.batch_size // processes * i for i in (process, process + 1))
        self.reports = [SourceReport(source.name) for source in sources]
        phases = make_phases(config, [source.bytes for source in sources])

        def make_lane(number: int) -> Lane:
            readers = [
                BlockReader(source, i, tokenizer, config, report, number)
                for i, (source, report) in enumerate(zip(sources, self.reports, strict=True))
            ]
            window = max(config.packing_window // count, self._rows)
            options = {"index": number, "lanes": count, "rows_a_batch": self._rows, "window": window}
            return Lane(readers, phases, config, **options)

        numbers = range(self._first // self._rows, -(-self._stop // self._rows))
        self.lanes = {number: make_lane(number) for number in numbers}
        self._documents = 0  # handed out
        self._named: collections.deque[dict[int, str]] = collections.deque(maxlen=_NAMED_BATCHES)

    def next_batch(self) -> dict[str, np.ndarray]:
        rows: list[list[Rendered]] = []
        for number, lane in self.lanes.items():
            first = number * self._rows
            given = lane.next_rows(self._rows)
            rows += given[max(self._first - first, 0) : self._stop - first]
        assembled = [assemble_row(row, self._config.sequence_length) for row in rows]
        batch = {name: np.stack([row[name] for row in assembled]) for name in assembled[0]}
        row_ids = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        names = {}
        for ids, row in zip(row_ids, rows, strict=True):
            for i, document in enumerate(row):
                ids[i] = self._documents % 2**31
                names[int(ids[i])] = str(document.ref)
                self._documents += 1
        self._named.append(names)
        return batch | {"row_ids": row_ids}

    def get_state(self) -> dict[str, Any]:
        return {"lanes": {str(number): lane.get_state() for number, lane in self.lanes.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for number, lane in self.lanes.items():
            lane.set_state(state["lanes"][str(number)])

    def describe(self, row_ids: np.ndarray, limit: int) -> str:
        names: dict[int, str] = {}
        for batch in list(self._named):
            names |= batch
        refs = dict.fromkeys(names[i] for i in np.ravel(row_ids).tolist() if i in names)
        named = ", ".join(list(refs)[:limit])
        return named if len(refs) <= limit else f"{named} and {len(refs) - limit} more"

    def describe_drawn(self) -> str:
        totals = np.sum([lane.totals for lane in self.lanes.values()], axis=0)
        whole = max(totals[:, 1].sum(), 1)
        lines = [
            f"{source.name}: {documents:,} documents, {tokens:,} tokens, {tokens / whole:.1%}"
            for source, (documents, tokens) in zip(self._sources, totals.tolist(), strict=True)
        ]
        return "\n".join(lines)


class _Batches(grain.IterDataset):
    """What Grain's background thread iterates over."""

    def __init__(self, lanes: _Lanes):
        super().__init__()
        self._lanes = lanes

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self._lanes)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, lanes: _Lanes):
        super().__init__()
        self._lanes = lanes

    def __next__(self) -> dict[str, np.ndarray]:
        return self._lanes.next_batch()

    def get_state(self) -> dict[str, Any]:
        return self._lanes.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._lanes.set_state(state)


def _make_fingerprint(sources: Sequence[BlockSource], tokenizer: Tokenizer, config: DataConfig) -> dict:
    files = [{"name": source.name, "files": [_describe(file, source) for file in source.files]} for source in sources]
    return describe_pipeline(files, tokenizer, config) | {"stream": {"version": LANE_VERSION}}


def _describe(file: StoredFile, source: BlockSource) -> dict:
    """A local file by its size and three pieces, so that it may be copied; another by size and version."""
    name = file.url.rpartition("/")[2]
    if not is_local(file.url):
        return {"name": name, "bytes": file.bytes, "version": file.version}
    digest = hashlib.blake2b(digest_size=20)
    for start in (0, file.bytes // 2, max(file.bytes - _SAMPLE, 0)):
        with open_file(file, source.options, start) as f:
            digest.update(f.read(_SAMPLE))
    return {"name": name, "bytes": file.bytes, "sample": digest.hexdigest()}
