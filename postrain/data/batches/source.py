"""Files of rows -> random access to checked examples.

A path is a .jsonl or .parquet file, a glob of either, or a folder that ``datasets`` saved (``save_to_disk``), whose
Arrow files are read with pyarrow. Of these nothing is held but an index of the lines and the rows of Parquet last asked
for. Compressed files, .array_record, and files elsewhere (``s3://``, ...) are read whole.

Arrow gives every row of a column the same fields: a call with the argument ``a`` next to one with ``b`` is stored
as ``{a: ..., b: null}`` and ``{a: null, b: ...}``. Nulls inside the objects of Parquet and Arrow rows are therefore
left out; in JSONL they stay.
"""

import glob
import json
import mmap
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from postrain.config import SourceConfig
from postrain.data.files.formats import decode_line, list_blocks, one_line, read_block, without_nulls
from postrain.data.files.storage import FORMATS, StoredFile, list_files, source_name
from postrain.data.kinds.registry import RowParser
from postrain.data.messages import BadRow, RowRef
from postrain.errors import UserError

BLOCK = 512  # rows of Parquet and Arrow that are turned into Python objects together


class Source:
    """Rows of one ``SourceConfig``, in the order of its files.

    ``len(source)``; ``source[i]`` gives the example of a row (``data.kinds``), None where the source's
    function leaves it out, and raises BadRow.

    Attributes:
      name: in reports.
      parser: of its rows.
    """

    def __init__(self, name: str, parser: RowParser, files: list):
        self.name, self.parser, self._files = name, parser, files
        self._ends = np.cumsum([len(f) for f in files])
        parser.decide(self._raw_rows())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        return self.parser.parse(*self.raw(index))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def raw(self, index: int) -> tuple[RowRef, Any]:
        """A row as decoded from its file, unchecked; raises BadRow where it cannot be decoded."""
        file, row = self._locate(index)
        ref = RowRef(self.name, str(file.path), file.line(row))
        return ref, file.read(row, ref)

    def _locate(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a source with {len(self)} rows")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[which], index - (int(self._ends[which - 1]) if which else 0)

    def _raw_rows(self) -> Iterator[tuple[RowRef, Any]]:
        for i in range(len(self)):
            try:
                yield self.raw(i)
            except BadRow as e:
                yield e.ref, e


def open_source(config: SourceConfig) -> Source:
    """Opens a source and counts its rows; rows are checked when read.

    Raises:
      UserError: nothing at the path, no rows, a file that cannot be read, an unknown kind or file type.
    """
    parser = RowParser(config)
    if not config.path:
        raise UserError("a source has no path; give data.train a .jsonl or .parquet file, a glob, or a datasets folder")
    if "://" in config.path:
        files = [_Stored(file) for file in list_files(config.path)]
    else:
        files = [file for path in _paths(config.path) for file in _open(path)]
    if not sum(len(f) for f in files):
        raise UserError(f"{config.path} has no rows")
    return Source(config.name or source_name(config.path), parser, [f for f in files if len(f)])


def _paths(path: str) -> list[pathlib.Path]:
    if pathlib.Path(path).exists():
        return [pathlib.Path(path)]
    if glob.has_magic(path):
        paths = [pathlib.Path(p) for p in sorted(glob.glob(path, recursive=True))]
        if paths:
            return paths
        raise UserError(f"{path} matches no file")
    raise UserError(f"{path} does not exist; expected a .jsonl or .parquet file, a glob of them, or a datasets folder")


def _open(path: pathlib.Path) -> list:
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return [_JsonLines(path)]
    if path.suffix == ".parquet":
        return [_Parquet(path)]
    if path.suffix == ".arrow":
        return [_Arrow(path)]
    if path.name.endswith(tuple(FORMATS)):
        return [_Stored(file) for file in list_files(str(path))]
    known = ".jsonl (.gz, .zst), .parquet, .arrow or .array_record"
    raise UserError(f"{path}: expected {known}; found {path.suffix or 'no suffix'!r}")


def _open_folder(path: pathlib.Path) -> list:
    """A folder saved by ``datasets``: state.json lists its Arrow files."""
    state = path / "state.json"
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(p.parent) for p in path.glob("*/state.json"))) or "none"
        raise UserError(f"{path} holds several splits; give one of them as the path: {splits}")
    if not state.is_file():
        raise UserError(
            f"{path} is not a folder saved by datasets (no state.json); for files give a glob: {path}/*.jsonl"
        )
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{state} cannot be read: {type(e).__name__}: {e}") from None
    return [_Arrow(path / name) for name in names]


class _JsonLines:
    """Byte offsets of the lines that are not blank; the file stays mapped, not read."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with open(path, "rb") as f:
                size = f.seek(0, 2)
                self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from None
        self._begins, self._ends, self._lines = _line_index(self._bytes)

    def __len__(self) -> int:
        return len(self._begins)

    def line(self, row: int) -> int:
        return int(self._lines[row])

    def read(self, row: int, ref: RowRef) -> Any:
        begin = int(self._begins[row])
        return decode_line(self._bytes[begin : self._ends[row]], ref, first=begin == 0)


def _line_index(data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begin, end (int64 byte offsets) and number (from 1) of every line with something on it."""
    chunk = 1 << 24
    pieces = ((i, np.frombuffer(data[i : i + chunk], np.uint8)) for i in range(0, len(data), chunk))
    breaks = [np.flatnonzero(piece == ord("\n")) + i for i, piece in pieces]
    ends = np.concatenate([*breaks, [len(data)]]).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    filled = [e - b > 64 or bool(data[b:e].strip()) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
    keep = np.flatnonzero(filled)
    return begins[keep], ends[keep], keep + 1


class _Stored:
    """A file that is not on this machine, or can only be read from its start: its rows are read once and held.

    Each as its pickle: a row that is given out may be changed, as a source's function does.
    """

    def __init__(self, file: StoredFile):
        self.path = file.url
        self._rows: list[tuple[int, bytes]] = []  # line, pickle of the row
        for block in list_blocks([file], max(file.bytes, 1)):
            rows = read_block(block)
            while True:
                try:
                    ref, row = next(rows)
                except StopIteration:
                    break
                except BadRow as e:
                    ref, row = e.ref, e
                self._rows.append((ref.line, pickle.dumps(row)))

    def __len__(self) -> int:
        return len(self._rows)

    def line(self, row: int) -> int:
        return self._rows[row][0]

    def read(self, row: int, ref: RowRef) -> Any:
        value = pickle.loads(self._rows[row][1])
        if isinstance(value, BadRow):
            raise BadRow(ref, value.reason, value.advice)
        return value


class _Table:
    """Rows of a Parquet or Arrow file, converted a block at a time."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._block, self._rows = -1, []

    def line(self, row: int) -> int:
        return row + 1

    def read(self, row: int, ref: RowRef) -> Any:
        block, inside = divmod(row, BLOCK)
        if block != self._block:
            try:
                self._rows = self._slice(block * BLOCK, BLOCK).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
                raise BadRow(ref, f"the file cannot be read here: {one_line(e)}") from None
            self._block = block
        return without_nulls(self._rows[inside])


class _Parquet(_Table):
    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path} cannot be read as Parquet: {one_line(e)}") from None
        meta = self._file.metadata
        self._group_ends = np.cumsum([meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
        self._group, self._table = -1, None

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def _slice(self, start: int, length: int) -> pa.Table:
        """Rows from ``start`` on, over as many row groups as needed."""
        pieces, stop = [], min(start + length, len(self))
        while start < stop:
            group = int(np.searchsorted(self._group_ends, start, side="right"))
            if group != self._group:
                self._table, self._group = self._file.read_row_group(group), group
            first = int(self._group_ends[group - 1]) if group else 0
            pieces.append(self._table.slice(start - first, stop - start))
            start += pieces[-1].num_rows
        return pa.concat_tables(pieces)


class _Arrow(_Table):
    """An Arrow file as ``datasets`` writes it (a stream; the random-access format is read too), memory-mapped."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        try:
            data = pa.memory_map(str(path), "r")
            try:
                self._table = pa.ipc.open_stream(data).read_all()
            except pa.ArrowInvalid:
                data.seek(0)
                self._table = pa.ipc.open_file(data).read_all()
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path} cannot be read as Arrow: {one_line(e)}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def _slice(self, start: int, length: int) -> pa.Table:
        return self._table.slice(start, length)
