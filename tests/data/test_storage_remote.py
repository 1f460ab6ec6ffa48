"""Reading from a real object store over a network that fails."""

import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import sys

import numpy as np
import pytest
import s3fs
from object_store import BUCKET, FAULTS, come_back, serve_store, upload

from postrain.data.files import storage
from postrain.data.files.formats import list_blocks, read_block
from postrain.data.files.storage import StorageOptions, list_files, open_file
from postrain.errors import UserError

QUICK = StorageOptions(tries=4, timeout=20.0, first_wait=0.01)
HASTY = dataclasses.replace(
    QUICK, timeout=2.0, tries=2
)  # where an answer never comes; a busy machine needs its time else


@pytest.fixture(scope="module")
def proxy():
    with pytest.MonkeyPatch.context() as patch, serve_store(patch) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, proxy):
    monkeypatch.setattr(storage, "PIECE", 10_000)
    monkeypatch.setattr(storage, "TAIL", 1_000)
    yield
    assert not proxy.faults
    proxy.reads.clear()


def some_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def read_all(file, options=QUICK, start=0):
    with open_file(file, options, start, file.bytes) as f:
        return f.read()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_request_is_made_again_for_the_same_bytes(proxy, fault):
    data = some_bytes(35_000)
    [file] = list_files(upload(data, f"faults/{fault}.jsonl"), QUICK)
    proxy.faults[:] = [None, fault, None] if fault == "stall" else [None, fault, fault, None, fault]
    assert read_all(file, HASTY if fault == "stall" else QUICK) == data
    assert [wanted for _, wanted in proxy.reads] == [
        "bytes=0-9999",
        "bytes=10000-19999",
        "bytes=20000-29999",
        "bytes=30000-34999",
    ]


@pytest.mark.parametrize(
    ("fault", "options", "cause"),
    [("error", QUICK, "OSError|ClientError"), ("stall", HASTY, "TimeoutError: no answer within 2 s")],
)
def test_what_does_not_end_is_named(proxy, fault, options, cause):
    [file] = list_files(upload(some_bytes(25_000), "lost.jsonl"), QUICK)
    proxy.faults[:] = [None] + [fault] * options.tries
    message = rf"{file.url}@10000 cannot be read: {options.tries} tries .* last one with .*({cause})"
    with pytest.raises(UserError, match=message):
        read_all(file, options)


def test_a_refusal_is_named_at_once(proxy):
    [file] = list_files(upload(b"{}\n", "mine.jsonl"), QUICK)
    proxy.faults[:] = ["denied"]
    with pytest.raises(UserError, match=rf"{file.url}@0 cannot be read \(.*: check the path and who may read it"):
        read_all(file)


def test_the_store_goes_away_and_comes_back(proxy):
    data = some_bytes(25_000)
    [file] = list_files(upload(data, "away.jsonl"), QUICK)
    patient = dataclasses.replace(QUICK, tries=10, first_wait=0.1)
    with open_file(file, patient, 0, file.bytes) as f:
        got = f.read(10_000)
        proxy.away = True
        back = come_back(proxy, 1.0)
        assert got + f.read() == data
    back.join()
    proxy.away = True
    with pytest.raises(UserError, match="away.jsonl cannot be read: 4 tries"):
        open_file(file, QUICK)
    proxy.away = False


def test_http(proxy):
    data = some_bytes(25_000)
    url = upload(data, "plain.jsonl").replace("s3:/", proxy.url)
    with pytest.raises(UserError, match="plain.jsonl cannot be read .*403, .*who may read it"):
        list_files(url, QUICK)
    s3fs.S3FileSystem().chmod(f"{BUCKET}/plain.jsonl", acl="public-read")
    [file] = list_files(url, QUICK)
    proxy.faults[:] = [None, "reset", "error"]
    assert read_all(file) == data
    with pytest.raises(UserError, match="nothing.jsonl matches no file"):
        list_files(url.replace("plain", "nothing"), QUICK)
    proxy.away = True
    with pytest.raises(UserError, match="plain.jsonl cannot be read: 4 tries"):
        list_files(url, QUICK)
    proxy.away = False


def test_a_file_that_changed_is_refused(proxy):
    url = upload(b'{"text": "a"}\n' * 2000, "changing.jsonl")
    [file] = list_files(url, QUICK)
    blocks = list_blocks([file], 20_000, QUICK)
    rows = read_block(blocks[1], "s", QUICK)
    next(rows)
    upload(b'{"text": "b"}\n' * 2000, "changing.jsonl")
    with pytest.raises(UserError, match=rf"{url} has changed since it was listed \(28000 bytes, version \w+; now"):
        list(rows)
    with pytest.raises(UserError, match="has changed"):
        open_file(file, QUICK)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://b/a.jsonl", r"not installed: .*gcsfs.*: pip install -e '.\[gcs\]'"),
        ("zip://a.jsonl::gs://b/a.zip", r"not installed: .*gcsfs.*: pip install -e '.\[gcs\]'"),
        ("nope://a", "Protocol not known: nope"),
    ],
)
def test_a_missing_package_is_named(proxy, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=message):
        list_files(url, QUICK)


def test_lists(proxy):
    for name in ("many/b-00001-of-00002.jsonl", "many/b-00000-of-00002.jsonl", "many/_SUCCESS", "many/x/c.parquet"):
        upload(b"1", name)
    root = f"s3://{BUCKET}/many"

    def names(path):
        return [f.url.removeprefix(root + "/") for f in list_files(path, QUICK)]

    both = ["b-00000-of-00002.jsonl", "b-00001-of-00002.jsonl"]
    assert names(root) == names(root + "/") == [*both, "x/c.parquet"]
    assert names(f"{root}/b-*") == names(root + "/b-{00000..00001}-of-00002.jsonl") == both
    assert names([f"{root}/x/*", f"{root}/{both[1]}"]) == ["x/c.parquet", both[1]]
    with pytest.raises(UserError, match="1 of 3 names match no file, the first is .*b-00002-of-00002"):
        names(root + "/b-{00000..00002}-of-00002.jsonl")
    upload(b"1", "torn/b-00001-of-00002.jsonl")
    with pytest.raises(UserError, match="1 of 2 shards are missing, the first is .*torn/b-00000-of-00002.jsonl"):
        list_files(f"s3://{BUCKET}/torn", QUICK)
    for nothing in (f"{root}/d-*.jsonl", f"{root}/nothing", "s3://no-such-bucket/a.jsonl"):
        with pytest.raises(UserError, match="matches no file"):
            list_files(nothing, QUICK)


def test_the_second_reading_comes_from_the_cache(proxy, tmp_path):
    cached = dataclasses.replace(QUICK, cache_folder=str(tmp_path / "cache"), cache_bytes=1_000_000)
    data = b"".join(b'{"text": "%d"}\n' % i for i in range(4000))
    [file] = list_files(upload(data, "cached.jsonl"), QUICK)

    def rows():
        blocks = list_blocks([file], 9_999, cached)
        return [raw["text"] for block in blocks for _, raw in read_block(block, "s", cached)]

    assert rows() == [str(i) for i in range(4000)] and proxy.reads
    proxy.reads.clear()
    assert rows() == [str(i) for i in range(4000)] and not proxy.reads
    damaged = sorted((tmp_path / "cache").glob("*.piece"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert rows() == [str(i) for i in range(4000)] and len(proxy.reads) == 1
    upload(data.replace(b"1", b"2"), "cached.jsonl")
    [file] = list_files(file.url, QUICK)
    assert rows() == [str(i).replace("1", "2") for i in range(4000)]


def test_the_cache_stays_under_its_limit_and_keeps_what_was_used_last(proxy, tmp_path):
    cached = dataclasses.replace(QUICK, cache_folder=str(tmp_path), cache_bytes=45_000)
    data = {name: some_bytes(20_000, seed) for seed, name in enumerate("abc")}
    files = {name: list_files(upload(data[name], f"limit/{name}.jsonl"), QUICK)[0] for name in "abc"}
    for name, requests in [("a", 2), ("b", 2), ("a", 0), ("c", 2), ("a", 0), ("c", 0), ("b", 2)]:
        proxy.reads.clear()
        assert read_all(files[name], cached) == data[name]
        assert (name, len(proxy.reads)) == (name, requests)
        assert folder_bytes(tmp_path) <= 45_000


def folder_bytes(folder):
    return sum(p.stat().st_size for p in pathlib.Path(folder).iterdir() if p.name != "lock")


def _read_often(files, options, sums, seed):
    storage.PIECE = 10_000
    order = np.random.default_rng(seed).permutation(np.tile(np.arange(len(files)), 4))
    for i in order:
        assert hashlib.sha256(read_all(files[i], options)).hexdigest() == sums[i]


def test_processes_share_a_cache_and_one_is_killed(proxy, tmp_path):
    cached = dataclasses.replace(QUICK, cache_folder=str(tmp_path), cache_bytes=65_000)
    data = [some_bytes(30_000, seed) for seed in range(4)]
    files = [list_files(upload(d, f"shared/{i}.jsonl"), QUICK)[0] for i, d in enumerate(data)]
    sums = [hashlib.sha256(d).hexdigest() for d in data]
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_read_often, args=(files, cached, sums, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    largest = 0
    while any(worker.is_alive() for worker in workers[:2]):
        try:
            largest = max(largest, folder_bytes(tmp_path))
        except FileNotFoundError:  # removed between the listing and the look
            continue
        if largest and workers[2].is_alive():
            workers[2].kill()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers[:2]] == [0, 0]
    assert 0 < largest <= 65_000
    (tmp_path / "left.partial").write_bytes(b"half")
    for file, d in zip(files, data, strict=True):
        assert read_all(file, cached) == d
    assert not list(tmp_path.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_gone_without(proxy, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cached = dataclasses.replace(QUICK, cache_folder=str(tmp_path / "file"), cache_bytes=10**6)
    [file] = list_files(upload(some_bytes(5_000), "no_cache.jsonl"), QUICK)
    for _ in range(2):
        assert read_all(file, cached) == some_bytes(5_000)
    assert caplog.text.count("takes no more") == 1 and os.listdir(tmp_path) == ["file"]
