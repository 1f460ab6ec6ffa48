"""A source of ``data.train`` or ``data.eval`` -> its rows, as they are stored.

A source is files (``postrain.data.files``) or a Grain dataset that the config gives. In memory all rows are read in
order (``Source.rows``). Streamed, each shard of the data reads its share of every epoch (``Source.shard_rows``, a
``grain.IterDataset``). Elements are ``Row``.

* Files are divided into blocks. The blocks of an epoch come in a seeded order and are dealt to the shards in turn, so
  that each is read once by one shard. A source that is small, or has fewer blocks than there are shards, is shared row
  by row: every shard reads all of it and keeps every n-th row.
* The rows of a ``grain.MapDataset`` come in a seeded order of each epoch, and every shard takes every n-th of them.
* A ``grain.IterDataset`` comes in its own order, the same in each epoch. Every shard reads all of it and keeps every
  n-th row, unless a function makes the dataset of each shard.
"""

import abc
import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig, SourceConfig
from postrain.config.functions import identify_dataset
from postrain.config.schema import StreamSection
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches.epoch_order import permutation
from postrain.data.batches.resumable import ResumableDataset
from postrain.data.batches.row_filter import count
from postrain.data.files.formats import Block, Row, list_blocks, read_block
from postrain.data.files.storage import StorageOptions, StoredFile, list_files, source_name
from postrain.data.kinds.registry import RowParser
from postrain.errors import UserError

_LEAST_BLOCKS = 16  # of a shard, where files can be divided: with fewer, some shards would have much more than others
_SHARED_BYTES = 64 << 20  # of a source so small that every shard reads all of it, and keeps its share of the rows
_ENDLESS = 2**40  # rows of a MapDataset after repeat()


class DatasetRef(RowRef):
    """Row ``line``, from 0, of a Grain dataset; ``file`` is the name of the source."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Source(abc.ABC):
    """One source of a data set.

    Attributes:
      config: of the source.
      name: in reports.
      where: how messages name it.
      parser: of its rows.
      size: stored bytes, which a mixture without weights goes by; 1 where they are not known.
    """

    size = 1

    def __init__(self, config: SourceConfig, data: DataConfig, index: int, name: str, where: str):
        """``index``: which source of ``data`` it is; a part of its seeds."""
        self.config, self.name, self.where = config, name, where
        self.parser = RowParser(dataclasses.replace(config, path=where))
        self._data, self._index = data, index

    @abc.abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows once, in order."""

    @abc.abstractmethod
    def shard_rows(self, epoch: int, shard: int) -> grain.IterDataset:
        """The ``Row``s of one shard in one epoch, in the order in which they are trained on."""

    @abc.abstractmethod
    def format_summary(self) -> str:
        """What is known of a stream before it is read, in one line."""

    @abc.abstractmethod
    def list_row_files(self) -> list[str]:
        """Paths or URLs of the files that have rows, in order."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a fingerprint says of the source besides its files."""
        return self.parser.identity

    def _order(self, size: int, epoch: int) -> np.ndarray:
        """int [size]: what is shuffled in an epoch, blocks or rows."""
        if not self._data.shuffle:
            return np.arange(size)
        return permutation(size, (self._data.seed, epoch, self._index, 2))


def list_loss_weights(sources: Sequence[Source]) -> dict[str, float]:
    """Source -> ``loss_weight``, of those that have another one than 1."""
    return {source.name: source.config.loss_weight for source in sources if source.config.loss_weight != 1}


def open_source(config: SourceConfig, data: DataConfig, index: int = 0) -> Source:
    """Opens a source, and reads it up to the first row that tells the form of its rows. Rows are checked when parsed.

    Raises:
      UserError: nothing at the path, or no rows; a storage that does not answer; a file that cannot be read; an unknown
        kind or file type; a stream without a row of its kind; a Grain dataset that cannot be a source.
    """
    source = (FileSource if config.dataset is None else DatasetSource)(config, data, index)
    if next(source.rows(), None) is None:
        raise UserError(f"{source.where} has no rows")
    source.parser.decide(source.rows())
    if data.streaming and not source.parser.form:
        parser = source.parser
        raise UserError(f"{source.where}: no row of {parser.expected} in {parser.looked_at}: {parser.advice}")
    return source


# Files


class FileSource(Source):
    """Files. In memory each is one block, so that its lines are numbered.

    Attributes: ``files``; ``blocks``, in the order of the files; ``options`` of the storage.
    """

    def __init__(self, config: SourceConfig, data: DataConfig, index: int):
        super().__init__(config, data, index, config.name or source_name(config.path), config.path)
        if not config.path:
            raise UserError("a source has no path; give data.train a .jsonl or .parquet file, a glob, or a folder")
        stream = data.stream
        self.options = StorageOptions()
        if data.streaming:
            cache_bytes = int(stream.cache_gibibytes * 2**30)
            self.options = StorageOptions(cache_folder=stream.cache_folder, cache_bytes=cache_bytes)
        try:
            self.files: list[StoredFile] = list_files(config.path, self.options)
        except UserError as e:
            key = next((key for key in ("train", "eval") if any(one is config for one in getattr(data, key))), "")
            raise UserError(f"config key 'data.{key}': {e}" if key else str(e)) from e
        self.size = sum(file.bytes for file in self.files)
        size = max((file.bytes for file in self.files), default=0)
        if data.streaming:
            enough = self.size // (_LEAST_BLOCKS * stream.shards)
            size = max(min(stream.block_mebibytes << 20, enough), 1 << 16)
        self.blocks: list[Block] = list_blocks(self.files, max(size, 1), self.options)

    def rows(self) -> Iterator[Row]:
        return (row for block in self.blocks for row in read_block(block, self.name, self.options))

    def shard_rows(self, epoch: int, shard: int) -> grain.IterDataset:
        size, shards = len(self.blocks), self._data.stream.shards
        order = self._order(size, epoch).tolist()
        if size < shards or self.size < _SHARED_BYTES:
            return FileRows(self, order, shard, shards)
        return FileRows(self, order[shard::shards])

    def list_row_files(self) -> list[str]:
        found = {}  # of each file the first row is read
        for block in self.blocks:
            if block.file.url not in found and next(read_block(block, self.name, self.options), None) is not None:
                found[block.file.url] = None
        return list(found)

    def format_summary(self) -> str:
        return (
            f"{self.name}: {count(len(self.files), 'file')}, {self.size / 2**20:,.1f} MiB, "
            f"{count(len(self.blocks), 'block')}, kind {self.parser.form}"
        )


class FileRows(ResumableDataset):
    """The rows of some blocks; of ``shards`` that share the blocks those of ``shard``.

    Not Grain's own reading, because files have no random access, and the position in them is a block and a row.
    """

    def __init__(self, source: FileSource, blocks: list[int], shard: int = 0, shards: int = 1):
        super().__init__()
        self._source, self._blocks, self._shard, self._shards = source, blocks, shard, shards

    def first_position(self) -> dict[str, int]:
        return {"block": 0, "row": 0}

    def read(self, position: dict[str, int]) -> Iterator[tuple[dict[str, int], Row]]:
        source, first_row = self._source, position["row"]
        for place in range(position["block"], len(self._blocks)):
            block = self._blocks[place]
            for i, row in enumerate(read_block(source.blocks[block], source.name, source.options)):
                if i >= first_row and (i + block) % self._shards == self._shard:
                    yield {"block": place, "row": i + 1}, row
            first_row = 0


def read_rows(path: str, shard: int = 0, shards: int = 1) -> grain.IterDataset:
    """The rows (dicts) of files as a Grain dataset with a position, for the function of a ``data.train[].dataset``.

    Grain's transformations may follow: then a user's ``filter`` or ``map`` stands between reading and rendering.

    Args:
      path: as ``data.train[].path``.
      shard, shards: which part of the rows, of how many; together the parts have every row once.

    Raises:
      UserError: as ``open_source``; when it is read, a row that cannot be decoded.
    """
    data = DataConfig(streaming=True, shuffle=False, stream=StreamSection(shards=shards))
    return FileSource(SourceConfig(path=path), data, 0).shard_rows(0, shard).map(_row_value)


def _row_value(row: Row) -> Any:
    if isinstance(row.value, BadRow):
        raise row.value
    return row.value


# Grain datasets


class DatasetSource(Source):
    """A ``grain.MapDataset`` or ``grain.IterDataset`` of rows (dicts), or a function that makes one.

    Attributes: ``length`` in rows, None where it is not known.
    """

    def __init__(self, config: SourceConfig, data: DataConfig, index: int):
        described = identify_dataset(config.dataset, "data.train.dataset")
        name = config.name or described.split()[1]
        super().__init__(config, data, index, name, f"source {name!r}")
        self._is_sharded = inspect.isfunction(config.dataset) and bool(inspect.signature(config.dataset).parameters)
        dataset = self._make(0)
        self.length = len(dataset) if isinstance(dataset, grain.MapDataset) else None
        if self.length is not None and self.length >= _ENDLESS:
            raise UserError(f"{self.where} has no end: leave repeat() out: a source is repeated as often as needed")
        if data.streaming and self.length is None:
            try:  # its position must be saved as JSON and set again
                rows = iter(dataset)
                rows.set_state(json.loads(json.dumps(rows.get_state())))
                goes_on = _goes_on(rows, iter(dataset))
            except Exception as e:
                raise UserError(
                    f"{self.where}: its iterator has no state that can be saved ({type(e).__name__}: {e}), so a run "
                    "could not go on from a checkpoint: give it get_state and set_state, or read it before training "
                    "(data.streaming=False)"
                ) from e
            if not goes_on:
                raise UserError(
                    f"{self.where}: its iterator does not go on where its state was taken, so a run that is started "
                    "again would read other rows: mend get_state and set_state, or read it before training "
                    "(data.streaming=False)"
                )
        self._facts = {"dataset": described} | ({} if self.length is None else {"length": self.length})

    @property
    def identity(self) -> dict[str, Any]:
        return self.parser.identity | self._facts

    def list_row_files(self) -> list[str]:
        return []

    def rows(self) -> Iterator[Row]:
        dataset = self._make(0)
        if isinstance(dataset, grain.MapDataset):
            return filter(None, (self._read_at(dataset, i) for i in range(len(dataset))))
        return (self._row(i, value) for i, value in self._number(iter(dataset), 0))

    def shard_rows(self, epoch: int, shard: int) -> grain.IterDataset:
        dataset = self._make(shard)
        first, step = (0, 1) if self._is_sharded else (shard, self._data.stream.shards)
        if isinstance(dataset, grain.IterDataset):
            return DatasetRows(self, dataset, first, step)
        order = self._order(len(dataset), epoch)[first::step].tolist()
        # Read in the thread that prepares batches: a pool would only contend with it.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return grain.MapDataset.source(order).map(lambda i: self._read_at(dataset, i)).to_iter_dataset(options)

    def format_summary(self) -> str:
        return (
            f"{self.name}: {self._facts['dataset']}"
            + ("" if self.length is None else f", {count(self.length, 'row')}")
            + f", kind {self.parser.form}"
        )

    def _make(self, shard: int) -> grain.MapDataset | grain.IterDataset:
        """The dataset, of a function that divides it that of ``shard``."""
        dataset = self.config.dataset
        if inspect.isfunction(dataset):
            shards = self._data.stream.shards if self._data.streaming else 1
            try:
                dataset = dataset(shard, shards) if self._is_sharded else dataset()
            except UserError:
                raise
            except Exception as e:
                raise UserError(f"{self.where}: {self.config.dataset.__name__}: {type(e).__name__}: {e}") from e
        if not isinstance(dataset, grain.MapDataset | grain.IterDataset):
            raise UserError(
                f"{self.where}: expected a grain.MapDataset or grain.IterDataset of rows, found {dataset!r:.80}"
            )
        return dataset

    def _read_at(self, dataset: grain.MapDataset, index: int) -> Row | None:
        """A row; None where a filter of the dataset has left it out."""
        try:
            value = dataset[index]
        except (Exception, SystemExit) as e:
            ref = DatasetRef(self.name, self.name, index)
            return Row(ref, BadRow(ref, f"{type(e).__name__}: {e}"))
        return None if value is None else self._row(index, value)

    def _row(self, index: int, value: Any) -> Row:
        return Row(DatasetRef(self.name, self.name, index), _to_plain(value))

    def _number(self, rows: Iterator, index: int) -> Iterator[tuple[int, Any]]:
        """(index, value) of what is left of an iterator. After an error it has no position to go on from."""
        while True:
            try:
                value = next(rows)
            except StopIteration:
                return
            except UserError:
                raise
            except Exception as e:
                raise UserError(f"{self.name}:{index}: the dataset cannot be read: {type(e).__name__}: {e}") from e
            yield index, value
            index += 1


class DatasetRows(ResumableDataset):
    """Every ``step``-th row of a user's ``grain.IterDataset``, from row ``first`` on.

    Not Grain's own slicing, because a position must count the rows of the dataset, to name them, and be JSON.
    """

    def __init__(self, source: DatasetSource, dataset: grain.IterDataset, first: int, step: int):
        super().__init__()
        self._source, self._dataset, self._first, self._step = source, dataset, first, step

    def first_position(self) -> dict[str, Any]:
        return {"index": 0, "rows": None}

    def read(self, position: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Row]]:
        rows = iter(self._dataset)
        if position["rows"] is not None:
            rows.set_state(position["rows"])
        for index, value in self._source._number(rows, position["index"]):
            if index % self._step == self._first:
                state = json.loads(json.dumps(rows.get_state()))  # a copy: an iterator may change its own
                yield {"index": index + 1, "rows": state}, self._source._row(index, value)


def _goes_on(rows: grain.DatasetIterator, other: grain.DatasetIterator) -> bool:
    """Whether another iterator goes on from a state that was taken after the first row of one, as a resume has it.

    True where that cannot be told: rows of things that do not compare, or that cannot be read.
    """
    read = lambda rows, count: [_to_plain(value) for value in itertools.islice(rows, count)]
    try:
        read(rows, 1)
        state = json.loads(json.dumps(rows.get_state()))
        expected = read(rows, 2)
        other.set_state(state)
        found = read(other, 2)
        plain = json.dumps(expected), json.dumps(found)  # raises for what is not plain; nan is equal to itself
    except Exception:  # of a row, named when the rows are read
        return True
    return plain[0] == plain[1]


def _to_plain(value: Any) -> Any:
    """Arrays and numbers of numpy as those of Python; containers as copies, for functions that change their rows."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value
