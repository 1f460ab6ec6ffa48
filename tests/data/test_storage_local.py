"""Which files a path stands for, and local files that change or go."""

import pytest

from postrain.data.files.formats import list_blocks, read_block
from postrain.data.files.remote import StorageOptions, retry
from postrain.data.files.storage import list_files, open_file
from postrain.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl.gz", "x/c.parquet", "x/.hidden.jsonl", "_tmp/d.jsonl", "info.json", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def names(paths, folder):
    return [file.url.removeprefix(f"{folder}/") for file in list_files(paths)]


def test_files_of_a_path(folder):
    assert names(str(folder), folder) == names(".", folder) == ["a.jsonl.gz", "b.jsonl", "x/c.parquet"]
    assert names("*.jsonl*", folder) == names(f"{folder}/{{b.jsonl,a.jsonl.gz}}", folder) == ["a.jsonl.gz", "b.jsonl"]
    assert names(["x", "b.jsonl"], folder) == ["x/c.parquet", "b.jsonl"]
    assert names("info.json", folder) == ["info.json"]
    assert names("**/*.jsonl", folder) == ["_tmp/d.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="b.jsonl is listed twice by b.jsonl, \\*.jsonl: its rows would be read twice"):
        list_files(["b.jsonl", "*.jsonl"])
    with pytest.raises(UserError, match="1 of 2 names match no file, the first is z.jsonl"):
        list_files("{b,z}.jsonl")
    with pytest.raises(UserError, match="a path is empty"):
        list_files([""])


def test_a_name_with_the_signs_of_a_pattern_is_a_name(folder):
    for name in ("odd[1].jsonl", "{a,b}.jsonl"):
        (folder / name).write_text("{}\n")
        assert names(name, folder) == [name]


ODD = [
    "a#b",
    "a:b",
    "file:a",
    "s3:a",
    "C:\\x",
    "a%20b",
    "a?b",
    "a*b",
    "[x]",
    "a\\b",
    "a\nb",
    "-x",
    " a ",
    "{0..3}",
    "~",
    "~root",
]
ODD += ["$HOME", "a;b&c=d,e|f@g", "\u00e9", "e\u0301", "\x7f", "n" * 245]


@pytest.mark.parametrize("name", ODD)
def test_any_name_is_read_as_a_file_and_as_a_folder(folder, name):
    (folder / "odd" / name).mkdir(parents=True)
    (folder / "odd" / name / "x.jsonl").write_text("{}\n")
    file = folder / f"{name}.jsonl"
    file.write_text("{}\n")
    for path in (file, file.name, folder / "odd" / name):
        if str(path).startswith("~"):  # of the user's home, in whose place stands ./
            path = f"./{path}"
        [block] = list_blocks(list_files(str(path)), 1 << 20)
        assert [row for _, row in read_block(block, "odd")] == [{}]


def test_a_chain_of_file_systems_is_not_a_name(folder):
    (folder / "a::b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"a::b.jsonl: '::' stands between file systems, .*: rename it"):
        list_files("a::b.jsonl")


def test_all_shards_or_those_that_were_named(folder):
    for number in (0, 1, 3):
        (folder / "x" / f"s-{number:05}-of-00004.jsonl").write_text("{}\n")
    for path in ("x", "x/s-*"):
        with pytest.raises(UserError, match="1 of 4 shards are missing, the first is .*/s-00002-of-00004.jsonl: add"):
            list_files(path)
    assert len(list_files("x/s-{00000..00001}-of-00004.jsonl")) == 2
    assert len(list_files("x/s-00003-of-00004.jsonl")) == 1


def test_a_range_that_goes_down_is_named(folder):
    """It would stand for no name at all, and no name is missing then."""
    with pytest.raises(UserError, match=r"s-\{03\.\.01\}.jsonl: \{03\.\.01\} counts down .* expected \{01\.\.03\}"):
        list_files("x/s-{03..01}.jsonl")


def test_a_link_is_the_file_behind_it(folder):
    (folder / "link.jsonl").symlink_to(folder / "b.jsonl")
    [file] = list_files("link.jsonl")
    assert (file.bytes, file.version) == (3, str((folder / "b.jsonl").stat().st_mtime_ns))
    with open_file(file) as f:
        assert f.read() == b"{}\n"


def test_files_that_change_or_go(folder):
    (folder / "b.jsonl").write_text('{"a": 1}\n' * 9)
    blocks = list_blocks(list_files("b.jsonl"), 30)
    rows = read_block(blocks[0])
    next(rows)
    with open(folder / "b.jsonl", "a") as f:
        f.write("{}\n")
    with pytest.raises(UserError, match=r"b.jsonl has changed since it was listed \(81 bytes, .*; now 84 bytes"):
        list(rows)
    (folder / "b.jsonl").unlink()
    with pytest.raises(UserError, match="b.jsonl cannot be read: No such file"):
        next(read_block(blocks[1]))


def test_waits_double_and_end(caplog):
    tried = []

    def fail():
        tried.append(1)
        raise OSError("busy")

    with pytest.raises(
        UserError, match=r"^x@7 cannot be read: 4 tries within 0 s have failed, the last one with OSErr"
    ):
        retry(StorageOptions(tries=4, first_wait=0.01), "x@7", fail)
    waits = [record.args[-1] for record in caplog.records]
    assert len(tried) == 4 and len(waits) == 3
    assert all(0.5 <= wait / (0.01 * 2**i) <= 1 for i, wait in enumerate(waits))
