"""Stored files -> blocks -> rows.

A block is the unit of reading and shuffling. The blocks of a file are known without reading its rows:

* plain JSON lines: ranges of bytes; a line belongs to the block in which it begins, whatever the size of blocks
* Parquet: row groups, several small ones together (its footer is read)
* ArrayRecord, a record being the JSON of a row: ranges of records where the file is local (its index is read), else
  the whole file, which has to be copied to the disk to be read
* a ``.json`` that is one array of rows instead of lines: the whole file, which is held in memory
* ``.jsonl.gz``, ``.jsonl.zst``, Arrow (what ``datasets`` saves), CSV and TSV (whose first line names the columns, and
  where a line may end inside a quoted field): the whole file, as it can only be read from its start

Rows of a block come in the order of the file. Memory holds one row; of Parquet 64 rows and the compressed columns of
the row group; of Arrow a record batch. A file that ends too early, or that its own checksums contradict, is named and
stops the reading; so is one that changed while it was read. Two things cannot be detected: JSON lines that end at the
end of a line (or a .gz or .zst that ends between two of its members) but too early, and a flipped bit where the format
has no checksum (JSON lines, Arrow; Parquet and Zstandard unless their writer added one) and the row can still be
decoded.

Parquet and Arrow give every row of a column the same fields: a call with the argument ``a`` next to one with ``b`` is
stored as ``{a: ..., b: null}`` and ``{a: null, b: ...}``. Nulls inside the objects of their rows are therefore left
out; in JSON lines they stay. So they do in columns of JSON text of the type ``arrow.json`` (``datasets``' ``Json()``),
which are decoded. In CSV and TSV every value is text.
"""

import codecs
import csv
import dataclasses
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from postrain.data.bad_row import BadRow, RowRef, decode_json, explain_quotes
from postrain.data.files import storage
from postrain.data.files.storage import DEFAULTS, FORMATS, StorageOptions, StoredFile, local_copy, open_file
from postrain.errors import UserError, one_line

RECORDS = 64  # rows of Parquet, Arrow and ArrayRecord that are decoded together
# What the readers of the formats raise for a damaged file.
_READER_ERRORS = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException, RuntimeError)
_START = 64  # bytes that tell what a file is
_SIGNATURES = {  # first bytes -> the suffix that says so, what the file is, and what to do
    b"version https://git-lfs": ("", "a pointer of Git LFS in place of the file: fetch it with `git lfs pull`"),
    b"<!DOCTYPE": ("", "a web page: download the file itself"),
    b"<html": ("", "a web page: download the file itself"),
    b"\xff\xfe": ("", "text in UTF-16: save it as UTF-8"),
    b"\xfe\xff": ("", "text in UTF-16: save it as UTF-8"),
    b"PK\x03\x04": ("", "a zip archive, or a spreadsheet: unpack it, or save the sheet as CSV"),
    b"\x1f\x8b": (".gz", "compressed by gzip: let its name end in .gz"),
    b"\x28\xb5\x2f\xfd": (".zst", "compressed by Zstandard: let its name end in .zst"),
    b"PAR1": (".parquet", "a Parquet file: let its name end in .parquet"),
}
_LARGEST_ARRAY = 1 << 30  # bytes of a JSON array, which is read whole
_ARROW_FILE = b"ARROW1"  # first bytes of Arrow's random-access format; datasets writes the streaming format
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # last bytes of a stream; pyarrow reads one without them as whole


class Row(NamedTuple):
    """A row as stored: where it is, and its value, unchecked; a ``BadRow`` where it cannot be decoded."""

    ref: RowRef
    value: Any


@dataclasses.dataclass(frozen=True)
class Block:
    """``start``, ``stop``: bytes (jsonl), row groups (parquet), records (array_record); None: up to the end."""

    file: StoredFile
    kind: str  # one of FORMATS' values, or "array"
    start: int = 0
    stop: int | None = None

    @classmethod
    def from_json(cls, fields: dict) -> "Block":
        """The block whose ``dataclasses.asdict`` this is."""
        return cls(**(fields | {"file": StoredFile(**fields["file"])}))


def list_blocks(files: Sequence[StoredFile], block_bytes: int, options: StorageOptions = DEFAULTS) -> list[Block]:
    """The blocks of files, in order, of about ``block_bytes`` stored bytes each where the format can be divided.

    Raises:
      UserError: an unknown suffix; a footer or index that cannot be read; no bytes, but for plain JSON lines.
    """
    found = storage.parallel(lambda file: _divide(file, block_bytes, options), files)
    return [block for blocks in found for block in blocks]


def read_block(block: Block, source: str = "", options: StorageOptions = DEFAULTS) -> Iterator[Row]:
    """Each row, in the order of the file; ``source`` is the name in each ``RowRef``.

    Raises:
      UserError: a file that is damaged, missing, changed or cannot be read; rows before the damage may have come.
    """
    try:
        yield from _READERS[block.kind](block, source, options)
    except _READER_ERRORS as e:
        raise _explain_damage(block.file, e, options) from e
    storage.check_unchanged(block.file, options)


def _check_start(url: str, start: bytes) -> None:
    """Raises UserError for a file that begins as one of another kind than its name says."""
    for magic, (suffix, what) in _SIGNATURES.items():
        if start.startswith(magic) and not (suffix and url.endswith(suffix)):
            raise UserError(f"{url} is {what}")


def _explain_damage(file: StoredFile, cause: Exception, options: StorageOptions) -> UserError:
    try:
        with open_file(file, options) as f:
            _check_start(file.url, f.read(_START))
    except UserError as e:  # what it is, or that it cannot be read
        return e
    return UserError(_format_damage(file, cause))


def _format_damage(file: StoredFile, cause: Exception | str) -> str:
    what = f"{type(cause).__name__} {one_line(cause)}".strip() if isinstance(cause, Exception) else cause
    return f"{file.url} is corrupt or truncated ({what}): download it again, or remove it from the config"


def _divide(file: StoredFile, block_bytes: int, options: StorageOptions) -> list[Block]:
    name = file.url.partition("::")[0]
    suffix = max((s for s in FORMATS if name.endswith(s)), key=len, default=None)
    if suffix is None:
        raise UserError(f"{file.url}: expected a file of {', '.join(FORMATS)}")
    kind = FORMATS[suffix]
    if name.endswith(".json") and _begins_array(file, options):
        return [Block(file, "array")]
    if kind == "jsonl":
        begins = range(0, file.bytes, block_bytes)
        return [Block(file, kind, begin, min(begin + block_bytes, file.bytes)) for begin in begins]
    if not file.bytes:
        raise UserError(_format_damage(file, "0 bytes"))
    try:
        if kind == "parquet":
            return _divide_parquet(file, block_bytes, options)
        if kind == "array_record" and storage.is_local(file.url):
            return _divide_records(file, block_bytes)
    except _READER_ERRORS as e:
        raise _explain_damage(file, e, options) from e
    return [Block(file, kind)]


def _decode(line: bytes, ref: RowRef, *, first: bool = False) -> Row:
    """The row of a line of JSON; ``first`` of its file, where a byte order mark may stand.

    Raises UserError where the file is one JSON array instead of lines, or no JSON at all.
    """
    data = line.removesuffix(b"\n")
    if first:
        _check_start(ref.file, data)
    if first and data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        raise UserError(
            f"{ref.file} is one JSON array; expected one JSON object on each line: rename it to .json, which may be an "
            "array, or make lines of it, as with jq -c '.[]'"
        )
    try:
        return Row(ref, decode_json(data.decode("utf-8-sig" if first else "utf-8")))
    except UnicodeDecodeError as e:
        reason = f"not UTF-8: byte 0x{data[e.start]:02x} at byte {e.start + 1} of the line"
    except json.JSONDecodeError as e:
        hint = "; expected one JSON object on each line" if first else ""
        reason = f"invalid JSON: {e.msg} at column {e.colno}{hint}{explain_quotes(e.doc)}"
    except (ValueError, RecursionError) as e:
        reason = f"invalid JSON: {e}"
    return Row(ref, BadRow(ref, reason))


def _read_lines(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    """Starts a byte early: a line begins at ``start`` exactly where the byte before it ends one."""
    assert block.stop is not None  # JSON lines are divided
    url, position = block.file.url, max(block.start - 1, 0)
    with open_file(block.file, options, position, block.stop) as f:
        if block.start:
            skipped = f.readline(block.stop - position)
            position += len(skipped)
            if not skipped.endswith(b"\n"):  # one line fills the block, from before its start to beyond its end
                return
        for number, line in enumerate(f, 1):
            if position >= block.stop:
                return
            if line.strip():
                ref = RowRef(source, url, 0, position) if block.start else RowRef(source, url, number)
                yield _decode(line, ref, first=position == 0)
            position += len(line)


def _begins_array(file: StoredFile, options: StorageOptions) -> bool:
    with open_file(file, options) as f:
        return f.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _read_array(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    """The elements of a file that is one JSON array, counted from 1. It is read whole."""
    url = block.file.url
    if block.file.bytes > _LARGEST_ARRAY:
        raise UserError(f"{url} is one JSON array of {block.file.bytes:,} bytes: make lines of it, as with jq -c '.[]'")
    with open_file(block.file, options, 0, block.file.bytes) as f:
        data = f.read()
    try:
        values = decode_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{url}: not UTF-8: byte 0x{data[e.start]:02x} at byte {e.start + 1}") from e
    except json.JSONDecodeError as e:
        raise UserError(
            f"{url}:{e.lineno}: invalid JSON: {e.msg} at column {e.colno}, in a file that is one array"
        ) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{url}: invalid JSON: {e}") from e
    yield from (Row(RowRef(source, url, number), value) for number, value in enumerate(values, 1))


def _read_compressed(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    with open_file(block.file, options, 0, block.file.bytes) as f:
        if block.kind == "jsonl.gz":
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=f)
        else:
            stream = pa.CompressedInputStream(pa.PythonFile(f, "r"), "zstd")
            lines = io.BufferedReader(stream, buffer_size=1 << 18)
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _decode(line, RowRef(source, block.file.url, number), first=number == 1)


def _divide_parquet(file: StoredFile, block_bytes: int, options: StorageOptions) -> list[Block]:
    with open_file(file, options) as f:
        meta = pq.ParquetFile(f).metadata
    blocks, start, size = [], 0, 0
    for group in range(meta.num_row_groups):
        columns = [meta.row_group(group).column(c) for c in range(meta.num_columns)]
        more = sum(c.total_compressed_size for c in columns)
        if size and size + more > block_bytes:
            blocks.append(Block(file, "parquet", start, group))
            start, size = group, 0
        size += more
    return [*blocks, Block(file, "parquet", start, meta.num_row_groups)] if meta.num_row_groups else []


def _read_parquet(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    assert block.stop is not None  # Parquet is divided
    with open_file(block.file, options) as f:
        parquet = pq.ParquetFile(f, page_checksum_verification=True)
        counts = [parquet.metadata.row_group(g).num_rows for g in range(block.stop)]
        row = sum(counts[: block.start])
        for group in range(block.start, block.stop):
            end = row + counts[group]
            for batch in parquet.iter_batches(RECORDS, row_groups=[group], use_threads=False):
                yield from _table_rows(batch, source, block.file.url, row)
                row += batch.num_rows
            if row != end:
                raise UserError(
                    _format_damage(block.file, f"row group {group} has {counts[group] + row - end} rows of {end}")
                )


def _table_rows(batch: pa.RecordBatch, source: str, url: str, row: int) -> Iterator[Row]:
    """Rows of a batch that begins after ``row`` rows of its file; those whose text is not UTF-8 as BadRow.

    Raises pa.ArrowInvalid where an array contradicts itself, as in a damaged file: to decode it could end the process.
    """
    try:
        batch.validate(full=True)
        rows: list[dict | BadRow] = [*_to_rows(batch)]
    except pa.ArrowInvalid:
        rows = [_decode_row(batch.slice(i, 1), RowRef(source, url, row + i + 1)) for i in range(batch.num_rows)]
    decode = _json_decoder(pa.struct(batch.schema))
    for i, value in enumerate(rows, row + 1):
        ref = RowRef(source, url, i)
        value = value if isinstance(value, BadRow) else without_nulls(value)
        if decode is not None and not isinstance(value, BadRow):
            try:
                value = decode(value)
            except (ValueError, RecursionError) as e:
                value = BadRow(ref, f"invalid JSON in a column of JSON text: {e}")
        yield Row(ref, value)


def _to_rows(batch: pa.RecordBatch) -> list[dict]:
    """As ``to_pylist``, but lists of lists of numbers of one length as arrays [L, K].

    A teacher's distributions are millions of numbers, and to make an object of each takes fifty times as long.
    """
    tables = {name: _to_tables(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    others = [name for name, found in tables.items() if found is None]
    if len(others) == len(tables):
        return batch.to_pylist()
    columns = [found or batch.column(name).to_pylist() for name, found in tables.items()]
    return [dict(zip(tables, values, strict=True)) for values in zip(*columns, strict=True)]


def _to_tables(column: pa.Array) -> list[np.ndarray] | None:
    """The array of each row; None where the column has another type, or nulls."""
    if not pa.types.is_list(column.type) or not pa.types.is_fixed_size_list(column.type.value_type):
        return None
    inner = column.values
    numbers = inner.values
    if not (pa.types.is_integer(numbers.type) or pa.types.is_floating(numbers.type)):
        return None
    if column.null_count or inner.null_count or numbers.null_count:
        return None
    size = inner.type.list_size
    table = numbers.to_numpy(zero_copy_only=False)[inner.offset * size : (inner.offset + len(inner)) * size]
    table, ends = table.reshape(-1, size), column.offsets.to_numpy()
    return [table[start:stop] for start, stop in itertools.pairwise(ends)]


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Decodes the JSON text inside a value of this type; None where it has none."""
    if isinstance(kind, pa.JsonType):
        return lambda text: text if text is None else decode_json(text)
    if pa.types.is_struct(kind):
        found = {field.name: _json_decoder(field.type) for field in kind.fields}
        inner = {name: decode for name, decode in found.items() if decode is not None}
        if inner:
            return lambda row: row and row | {name: decode(row[name]) for name, decode in inner.items() if name in row}
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        decode_item = _json_decoder(kind.value_type)
        if decode_item is not None:
            return lambda items: items and [decode_item(item) for item in items]
    return None


def _decode_row(row: pa.RecordBatch, ref: RowRef) -> dict | BadRow:
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as e:
            if "UTF8" not in str(e):
                raise
            return BadRow(ref, f"the text of {name} is not UTF-8")
    return row.to_pylist()[0]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _open_records(path: str):
    from array_record.python.array_record_module import ArrayRecordReader  # no wheels for Windows

    reader = ArrayRecordReader(path, "readahead_buffer_size:0")
    if not reader.ok():
        reader.close()  # raises what was wrong
    return reader


def _divide_records(file: StoredFile, block_bytes: int) -> list[Block]:
    reader = _open_records(file.url)
    number = reader.num_records()
    reader.close()
    step = max(block_bytes * number // file.bytes, 1)
    return [Block(file, "array_record", i, min(i + step, number)) for i in range(0, number, step)]


def _read_records(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    with local_copy(block.file, options) as path:
        reader = _open_records(path)
        stop = reader.num_records() if block.stop is None else block.stop
        for begin in range(block.start, stop, RECORDS):
            end = min(begin + RECORDS, stop)
            records = reader.read(begin, end)
            if len(records) != end - begin:
                raise UserError(_format_damage(block.file, f"{len(records)} of records {begin + 1} to {end}"))
            for number, record in enumerate(records, begin + 1):
                yield _decode(record, RowRef(source, block.file.url, number))
        reader.close()


def _read_arrow(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    row = 0
    with open_file(block.file, options, 0, block.file.bytes) as f:
        for batch in _record_batches(f):
            for start in range(0, batch.num_rows, RECORDS):
                yield from _table_rows(batch.slice(start, RECORDS), source, block.file.url, row + start)
            row += batch.num_rows


def _record_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Of Arrow's random-access format or of its streaming format, one at a time."""
    random_access = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    if random_access:
        reader = pa.ipc.open_file(pa.PythonFile(file, "r"))
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    try:
        yield from pa.ipc.open_stream(pa.PythonFile(file, "r"))
    except MemoryError as e:  # a damaged length asks for more bytes than there can be
        raise EOFError("a record batch that does not fit in memory") from e
    file.seek(max(file.tell() - len(_ARROW_END), 0))
    if file.read(len(_ARROW_END)) != _ARROW_END:
        raise EOFError("no end of the Arrow stream")


def _read_csv(block: Block, source: str, options: StorageOptions) -> Iterator[Row]:
    """Lines after the first, which names the columns; a row is named by the line in which it begins."""
    csv.field_size_limit(2**31 - 1)  # of the whole process; 128 KiB are less than a long conversation
    with open_file(block.file, options, 0, block.file.bytes) as f:
        _check_start(block.file.url, f.read(_START))
        f.seek(0)
        text = io.TextIOWrapper(f, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader, end = csv.reader(text, delimiter="\t" if block.kind == "tsv" else ",", strict=True), 0
        try:
            names = next(reader, [])
            if len(names) == 1 and any(separator in names[0] for separator in ",;\t|"):
                expected = "tabs" if block.kind == "tsv" else "commas"
                raise UserError(
                    f"{block.file.url}:1: expected names of columns with {expected} between them; found one name, "
                    f"{names[0]!r:.80}: save the file with {expected}"
                )
            named = [name for name in names if name]  # pandas writes its index as a column without a name
            if not named or len(set(named)) < len(named):
                raise UserError(f"{block.file.url}:1: expected different names of columns; found {names!r:.200}")
            end = reader.line_num
            for fields in reader:
                ref, end = RowRef(source, block.file.url, end + 1), reader.line_num
                if fields:
                    yield Row(ref, _name_fields(names, fields, ref))
        except csv.Error as e:
            raise UserError(
                f"{block.file.url}:{end + 1}: the row that begins here is not {block.kind.upper()}: {e}: put fields "
                "with quotes or line breaks between quotes, and double the quotes in them"
            ) from e


def _name_fields(names: list[str], fields: list[str], ref: RowRef) -> dict[str, str] | BadRow:
    if len(fields) != len(names):
        return BadRow(ref, f"expected {len(names)} fields, as in the first line; found {len(fields)}")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as e:
        return BadRow(ref, f"not UTF-8: byte 0x{ord(e.object[e.start]) - 0xDC00:02x}")
    return {name: field for name, field in zip(names, fields, strict=True) if name}


_READERS = {
    "jsonl": _read_lines,
    "array": _read_array,
    "jsonl.gz": _read_compressed,
    "jsonl.zst": _read_compressed,
    "parquet": _read_parquet,
    "array_record": _read_records,
    "arrow": _read_arrow,
    "csv": _read_csv,
    "tsv": _read_csv,
}
