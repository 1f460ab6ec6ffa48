"""Files of every format -> blocks -> the rows that were written, each once; what is torn is named."""

import dataclasses
import gzip
import json
import re
import subprocess
import sys
import zipfile

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from datasets.arrow_writer import ArrowWriter
from object_store import serve_store, upload

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.files import storage
from postrain.data.files.formats import Block, list_blocks, read_block
from postrain.data.files.storage import FORMATS, StorageOptions, list_files
from postrain.errors import UserError

ROWS = [{"text": f"ä{i} " * (i % 9), "id": i, "messages": [{"role": "user", "content": "\u2028"}]} for i in range(700)]
WHOLE = {"jsonl.gz", "jsonl.zst", "arrow"}


def lines_of(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_jsonl(path, rows):
    path.write_bytes(lines_of(rows))


compress_zstd = zstandard.ZstdCompressor(write_checksum=True).compress


def write_gzip(path, rows):  # two members, as `cat a.gz b.gz` makes them
    path.write_bytes(gzip.compress(lines_of(rows[:99]), 1) + gzip.compress(lines_of(rows[99:]), 1))


def write_zstd(path, rows):
    path.write_bytes(compress_zstd(lines_of(rows[:99])) + compress_zstd(lines_of(rows[99:])))


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=90, write_page_checksum=True)


def write_records(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:7")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


def write_arrow(path, rows):
    """As datasets does, with more than one record batch."""
    with ArrowWriter(path=str(path), writer_batch_size=150) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


WRITERS = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_gzip,
    "jsonl.zst": write_zstd,
    "parquet": write_parquet,
    "array_record": write_records,
    "arrow": write_arrow,
}
assert {*WRITERS, "csv", "tsv"} == set(FORMATS.values())  # of those two every value is text: test_row_keys.py


def blocks_of(path, block_bytes=5_000, options=storage.DEFAULTS):
    return list_blocks(list_files(str(path), options), block_bytes, options)


def read(blocks, options=storage.DEFAULTS):
    return [row for block in blocks for row in read_block(block, "s", options)]


@pytest.fixture(scope="module")
def proxy():
    with pytest.MonkeyPatch.context() as patch, serve_store(patch) as proxy:
        patch.setattr(storage, "PIECE", 30_000)
        yield proxy


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_read_are_the_rows_written(tmp_path, kind, proxy):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    blocks = blocks_of(path)
    assert (len(blocks) == 1) == (kind in WHOLE)
    assert [Block.from_json(json.loads(json.dumps(dataclasses.asdict(b)))) for b in blocks] == blocks
    got = read(blocks)
    assert [raw for _, raw in got] == ROWS
    assert all(str(ref).startswith(f"{path}:") or ref.line == 0 for ref, _ in got)
    if kind != "jsonl":
        assert [ref for ref, _ in got] == [RowRef("s", str(path), i) for i in range(1, 701)]
    options = StorageOptions(tries=3, timeout=5.0, first_wait=0.01)
    url = upload(path, f"rows.{kind}")
    remote = blocks_of(url, options=options)
    proxy.faults[:] = ["reset", None, "short"] if kind not in ("jsonl.gz", "jsonl.zst") else ["reset", "short"]
    assert [raw for _, raw in read(remote, options)] == ROWS
    assert not proxy.faults


def test_records_of_a_store_are_copied_to_the_disk_without_a_name(tmp_path, proxy):
    write_records(tmp_path / "rows.array_record", ROWS)
    options = StorageOptions(cache_folder=str(tmp_path / "cache"), cache_bytes=10**7)
    url = upload(tmp_path / "rows.array_record", "copied.array_record")
    rows = read_block(blocks_of(url, options=options)[0], "s", options)
    next(rows)
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".piece", ""}  # and the lock
    assert [raw for _, raw in rows] == ROWS[1:]
    (tmp_path / "file").write_text("in the way")
    options = StorageOptions(cache_folder=str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"{url} is read from a copy on the disk, and its .* could not be written"):
        read(blocks_of(url), options)


def random_file(rng):
    """Lines of odd lengths, blank ones, CRLF, a BOM, perhaps no newline at the end; and the rows in them."""
    lines, rows = [], []
    for i in range(rng.integers(0, 20)):
        kind = rng.integers(0, 8)
        if kind == 0:
            lines.append([b"", b"\r", b"  "][rng.integers(0, 3)])
            continue
        rows.append({"i": i, "t": "é\u2028x"[: rng.integers(0, 4)] * int(rng.integers(0, 60 if kind == 1 else 5))})
        lines.append(json.dumps(rows[-1], ensure_ascii=bool(rng.integers(0, 2))).encode() + b"\r" * int(kind == 2))
    data = b"\n".join(lines) + b"\n" * int(rng.integers(0, 3))
    if rows and lines[0].startswith(b"{") and rng.integers(0, 2):
        data = b"\xef\xbb\xbf" + data
    return data, rows


@pytest.mark.parametrize("seed", range(15))
def test_every_line_is_in_exactly_one_block(tmp_path, seed):
    data, rows = random_file(np.random.default_rng(seed))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    lines = data.split(b"\n")
    begins = dict(enumerate(np.cumsum([0] + [len(line) + 1 for line in lines]).tolist()))
    number = {begins[i]: i + 1 for i in range(len(lines))}
    for block_bytes in [1, 3, 7, 13, 14, 31, 50, 200, 10**6]:
        got = []
        for block in blocks_of(path, block_bytes):
            for ref, raw in read_block(block):
                begin = ref.byte if ref.line == 0 else begins[ref.line - 1]
                assert begin in number and block.start <= begin < block.stop
                assert str(ref) == (f"{path}@{begin}" if block.start else f"{path}:{number[begin]}")
                got.append(raw)
        assert got == rows


def test_a_block_reads_no_more_of_the_file_than_it_needs(proxy, monkeypatch):
    monkeypatch.setattr(storage, "TAIL", 100)
    url = upload(lines_of({"text": "x" * 29} for _ in range(1000)), "few.jsonl")  # 42 bytes a line
    blocks = blocks_of(url, 10_000)
    proxy.reads.clear()
    assert len(read(blocks[1:2])) == sum(10_000 <= begin < 20_000 for begin in range(0, 42_000, 42))
    assert [wanted for _, wanted in proxy.reads] == ["bytes=9999-19999", "bytes=20000-20099"]
    long = blocks_of(upload(lines_of([{"text": "x" * 50_000}]), "long.jsonl"), 10_000)
    proxy.reads.clear()
    assert read(long[2:3]) == [] and [wanted for _, wanted in proxy.reads] == ["bytes=19999-29999"]


def test_lines_that_cannot_be_decoded_are_the_same_in_blocks_of_any_size(tmp_path):
    lines = [b'{"text": "1"}', b"{", b'{"text": "\xff"}', b"[" * 5000, b"[1", b'{"text": "2"}', b'{"text": "3']
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))

    outcomes = []
    for block_bytes in (1_000_000, 7):
        values = [value for block in blocks_of(path, block_bytes) for _, value in read_block(block)]
        outcomes.append([value.reason if isinstance(value, BadRow) else value for value in values])
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == len(lines)
    assert [one for one in outcomes[0] if isinstance(one, dict)] == [{"text": "1"}, {"text": "2"}]
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    rows = read_block(blocks_of(path.with_suffix(".jsonl.gz"))[0])
    next(rows)
    assert "rows.jsonl.gz:2: invalid JSON: Expecting" in str(bad_row(next(rows)))
    rows = read_block(blocks_of(path, 10)[1])
    assert "rows.jsonl@14: invalid JSON: Expecting" in str(bad_row(next(rows)))


def bad_row(row):
    """The error that stands in place of a row's value."""
    assert isinstance(row.value, BadRow) and row.ref == row.value.ref
    return row.value


def write_stream(path, table):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("suffix, write", [("parquet", lambda p, t: pq.write_table(t, p)), ("arrow", write_stream)])
def test_a_row_of_a_table_whose_text_is_not_utf8(tmp_path, suffix, write):
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")]
    )
    path = tmp_path / f"rows.{suffix}"
    write(path, pa.table({"id": [1, 2, 3], "text": text}))
    rows = read_block(blocks_of(path)[0])
    assert next(rows)[1] == {"id": 1, "text": "a"}
    assert f"rows.{suffix}:2: the text of text is not UTF-8" in str(bad_row(next(rows)))
    assert next(rows)[1] == {"id": 3, "text": "c"}


@pytest.mark.parametrize(
    "suffix, write", [("parquet", lambda p, t: pq.write_table(t, p, row_group_size=70)), ("arrow", write_stream)]
)
def test_tables_of_numbers_are_arrays(tmp_path, suffix, write):
    """Lists of lists of one length, as of a teacher's distributions; with a null among them they stay lists."""
    rng = np.random.default_rng(0)
    tables = [rng.random((int(length), 3)).astype(np.float32) for length in rng.integers(0, 6, 200)]
    lists = [table.tolist() for table in tables]
    kind = pa.list_(pa.list_(pa.float32(), 3))
    holed = [[*rows, [None, 1.0, 2.0]] for rows in lists]
    table = {"id": range(200), "x": pa.array(lists, kind), "y": pa.array(holed, kind), "z": pa.array(lists)}
    write(tmp_path / f"rows.{suffix}", pa.table(table))
    rows = [raw for _, raw in read(blocks_of(tmp_path / f"rows.{suffix}"))]
    assert [row["id"] for row in rows] == list(range(200)) and [list(row) for row in rows] == [list(table)] * 200
    for row, expected, whole in zip(rows, tables, lists, strict=True):
        assert isinstance(row["x"], np.ndarray) and row["x"].dtype == np.float32
        np.testing.assert_array_equal(row["x"], expected)
        assert isinstance(row["y"], list) and row["z"] == whole


def test_arrow_in_its_random_access_format(tmp_path):
    with pa.ipc.new_file(tmp_path / "rows.arrow", pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=150)
    assert [raw for _, raw in read(blocks_of(tmp_path / "rows.arrow"))] == ROWS


def test_a_damaged_arrow_file_never_ends_the_process(tmp_path):
    """Arrow has no checksum, and pyarrow follows a damaged offset out of its memory unless the array is checked."""
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1 << 30, 2, 3], np.int32)), pa.py_buffer(b"abc")]
    )
    path = tmp_path / "rows.arrow"
    write_stream(path, pa.table({"text": text}))
    with pytest.raises(UserError, match="rows.arrow is corrupt or truncated .*offset"):
        read(blocks_of(path))
    write_arrow(path, ROWS[:200])
    whole = path.read_bytes()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read(blocks_of(path))
        except UserError as error:
            assert str(error).startswith(str(path))


def test_a_folder_that_datasets_saved(tmp_path, proxy):
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved, num_shards=2)
    datasets.load_from_disk(saved).map(lambda row: {"id": row["id"] + 1})  # leaves a file of its own there
    assert list(saved.glob("cache-*.arrow"))
    files = list_files(str(saved))
    assert [file.url for file in files] == [str(saved / f"data-0000{i}-of-00002.arrow") for i in (0, 1)]
    rows = read(list_blocks(files, 1))
    assert [raw for _, raw in rows] == ROWS and rows[-1][0] == RowRef("s", files[1].url, 350)
    for file in saved.iterdir():
        url = upload(file, f"saved/{file.name}").rpartition("/")[0]
    assert [raw for _, raw in read(blocks_of(url))] == ROWS

    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="saved: data-00001-of-00002.arrow, which its state.json lists, is missing"):
        list_files(str(saved))
    (saved / "state.json").write_text("{}")
    with pytest.raises(UserError, match="saved/state.json cannot be read: KeyError"):
        list_files(str(saved))
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=f"holds several splits; give one of them as the path: {tmp_path}/splits/train"):
        list_files(str(tmp_path / "splits"))


@pytest.mark.parametrize("kind", [k for k in WRITERS if k != "jsonl"])
def test_a_file_cut_off_anywhere_is_named(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS[:200])
    whole = path.read_bytes()
    end = len(whole)
    cuts = {0, 1, 511, 512, 1024, 1536, end - 1, end // 2 + 1, (end - 1) // 512 * 512}
    cuts |= set(np.linspace(0, end - 1, 15, dtype=int).tolist())
    if kind in ("jsonl.gz", "jsonl.zst"):  # what ends between two members is a whole file
        compress = (lambda data: gzip.compress(data, 1)) if kind == "jsonl.gz" else compress_zstd
        cuts.discard(len(compress(lines_of(ROWS[:99]))))
    for cut in sorted(c for c in cuts if c < end):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"^{re.escape(str(path))} is corrupt or truncated") as error:
            read(blocks_of(path))
        assert not isinstance(error.value, BadRow)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "array_record"])
def test_a_flipped_bit_is_found_by_the_checksum_of_the_format(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    whole = path.read_bytes()
    assert [raw for _, raw in read(blocks_of(path))] == ROWS
    for seed in range(20):
        rng = np.random.default_rng(seed)
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            got = [raw for _, raw in read(blocks_of(path))]
        except UserError as error:
            assert str(error).startswith(f"{path} is corrupt or truncated") or "@" in str(error) or ":" in str(error)
        else:  # in a byte that says nothing about the rows, as the time in the header of gzip
            assert got == ROWS


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(UserError, match=r"a.txt: expected a file of \.jsonl, "):
        blocks_of(tmp_path / "a.txt")
    with pytest.raises(UserError, match=f"{tmp_path} matches no file"):
        blocks_of(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    assert blocks_of(tmp_path) == []


def test_any_fsspec_path(tmp_path):
    fsspec.filesystem("memory").pipe_file("/corpus/a.jsonl", lines_of(ROWS))
    assert [raw for _, raw in read(blocks_of("memory://corpus/*.jsonl"))] == ROWS
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("in/a.jsonl", lines_of(ROWS))
        archive.writestr("in/b.jsonl", lines_of(ROWS[:9]))
    assert [raw for _, raw in read(blocks_of(f"zip://in/*.jsonl::{tmp_path}/rows.zip"))] == ROWS + ROWS[:9]
    with pytest.raises(UserError, match="nope://a: .*|nope://a cannot be read"):
        list_files("nope://a")


READER = """
import resource, sys
from postrain.data.files.formats import list_blocks, read_block
from postrain.data.files.storage import list_files

def read(path):
    return sum(len(raw["text"]) for block in list_blocks(list_files(path), 4 << 20) for _, raw in read_block(block))

small = read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(small, read(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", WRITERS)
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(4_000).hex() for _ in range(500)]
    for name, times in (("small", 1), ("large", 6)):
        WRITERS[kind](tmp_path / f"{name}.{kind}", [{"text": text} for text in texts * times])
    command = [sys.executable, "-c", READER, *(str(tmp_path / f"{name}.{kind}") for name in ("small", "large"))]
    small, large, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert (small, large) == (4_000_000, 24_000_000)
    assert grown < 8_000  # KiB
