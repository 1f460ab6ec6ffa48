"""Files -> rows in order, with the file and line of each; and what is refused."""

import gzip
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from postrain.config import DataConfig, SourceConfig
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches.source import open_source
from postrain.data.files.formats import RECORDS
from postrain.data.messages import PromptCompletion, TextRow
from postrain.errors import UserError


def chat(i):
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"ä{i}"}]}


def write_lines(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


class Rows:
    """The examples of a source by index, each parsed when it is asked for."""

    def __init__(self, source):
        self.source, self.name, self.parser, self.rows = source, source.name, source.parser, list(source.rows())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.parser.parse(*self.rows[index])


def open_path(path, **options):
    return Rows(open_source(SourceConfig(path=str(path), **options), DataConfig()))


def test_jsonl_by_index_with_blank_lines_and_crlf(tmp_path):
    lines = [b"\xef\xbb\xbf" + json.dumps(chat(0)).encode() + b"\r", b"", b"  \r", chat(1), b"", chat(2), b""]
    source = open_path(write_lines(tmp_path / "rows.jsonl", lines))
    assert (len(source), source.name, source.parser.form) == (3, "rows", "messages")
    assert [source[i].messages[0]["content"] for i in (2, 0, 1)] == ["q2", "q0", "q1"]
    assert [str(e.ref) for e in source] == [f"{tmp_path}/rows.jsonl:{line}" for line in (1, 4, 6)]


def test_glob_reads_files_in_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", [{"text": "3"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "1"}, {"text": "2"}])
    (tmp_path / "empty.jsonl").write_text("")
    source = open_path(tmp_path / "*.jsonl", name="mine")
    assert [(e.text, e.ref.source, e.ref.line) for e in source] == [
        ("1", "mine", 1),
        ("2", "mine", 2),
        ("3", "mine", 1),
    ]


def test_kinds(tmp_path):
    source = open_path(write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}]))
    assert source.parser.form == "prompt_completion" and isinstance(source[0], PromptCompletion)
    assert isinstance(open_path(tmp_path / "p.jsonl", kind="text")[0], TextRow)


def test_columns_of_nulls_do_not_decide_the_form(tmp_path):
    empty = {"messages": None, "prompt": None, "completion": None}
    source = open_path(
        write_lines(tmp_path / "t.jsonl", [empty | {"text": "x"}, empty | {"text": "y"}, empty | chat(0)])
    )
    assert source.parser.form == "text" and source[1].text == "y"
    with pytest.raises(
        BadRow, match="t.jsonl:3: expected a row of kind text, as the first .*found one of kind messages"
    ):
        source[2]
    source = open_path(write_lines(tmp_path / "m.jsonl", [chat(0), empty, {"prompt": "a", "completion": None}]))
    with pytest.raises(BadRow, match="m.jsonl:2: 'messages' must be a list of messages; found nothing"):
        source[1]
    with pytest.raises(
        BadRow, match="m.jsonl:3: expected a row of kind messages.* found one of kind prompt_completion"
    ):
        source[2]


def test_a_row_of_two_forms_is_refused_until_the_config_says_which(tmp_path):
    path = write_lines(tmp_path / "two.jsonl", [chat(0) | {"prompt": "x", "completion": "PC", "text": "T"}])
    said = "two.jsonl:1: the row is one of 'messages' and of 'prompt' and 'completion', and only one of them is trained"
    with pytest.raises(BadRow, match=f"{said}: say which with kind='messages' or kind='prompt_completion' for the"):
        open_path(path)
    assert open_path(path, kind="messages")[0].messages[0]["content"] == "q0"
    assert open_path(path, kind="prompt_completion")[0] == PromptCompletion("x", "PC", RowRef("two", str(path), 1))
    lists = {"prompt": "a", "chosen": "b", "rejected": "c", "completions": ["b", "c"], "scores": [1, 0]}
    with pytest.raises(
        BadRow, match="one of 'chosen' and 'rejected' and of 'completions' and 'scores'.*take the other"
    ):
        open_path(write_lines(tmp_path / "p.jsonl", [lists]), kind="preference")


@pytest.mark.parametrize(
    ("rows", "line", "found", "expected"),
    [
        ([chat(0), chat(1), {"text": "x"}], 3, "text", "messages, as the first at {}:1"),
        ([b"{", {"id": 3}, {"text": "x"}, chat(1)], 4, "messages", "text, as the first at {}:3"),
        ([{"prompt": "a", "completion": "b"}, {"text": "x"}], 2, "text", "prompt_completion, as the first at {}:1"),
    ],
)
def test_rows_of_two_kinds_are_named_by_their_first_lines(tmp_path, rows, line, found, expected):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadRow) as error:
        open_path(path)[line - 1]
    assert str(error.value) == (
        f"{path}:{line}: expected a row of kind {expected.format(path)}; found one of kind {found}: a source has one "
        f"kind: put the {found} rows into a file of their own, and list both in the config"
    )


def test_the_kind_that_the_config_gives_holds(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [chat(0) | {"text": "x"}, {"text": "y"}, chat(1), {"id": 1}])
    source = open_path(path, kind="text")
    assert [source[i].text for i in (0, 1)] == ["x", "y"]
    with pytest.raises(BadRow, match="rows.jsonl:3: expected a row of the source's kind, text; found one of kind mess"):
        source[2]
    with pytest.raises(BadRow, match="rows.jsonl:4: text must be a string; found nothing"):
        source[3]


BAD_LINES = {
    "not JSON": (b'{"text": "a" "b"}', "invalid JSON: Expecting ',' delimiter at column 14"),
    "cut off": (b'{"text": "a', "invalid JSON: Unterminated string"),
    "single quotes": (b"{'text': 'a'}", "column 2; it is Python's spelling of an object, as str() writes it"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "invalid JSON: Extra data"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 14 of the line"),
    "too deep": (b"[" * 100_000, "invalid JSON: "),
    "a number": (b"12", "expected an object"),
}


@pytest.mark.parametrize("line, reason", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_lines_name_their_line_and_leave_the_others(tmp_path, line, reason):
    source = open_path(write_lines(tmp_path / "rows.jsonl", [{"text": "good"}, b"", line, {"text": "fine"}]))
    with pytest.raises(BadRow) as error:
        source[1]
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:3: ") and reason in str(error.value)
    assert source[0].text == "good" and source[2].text == "fine"


def test_a_bad_first_line_is_that_rows_error(tmp_path):
    source = open_path(write_lines(tmp_path / "rows.jsonl", [b"{", {"text": "fine"}]))
    with pytest.raises(BadRow, match="rows.jsonl:1: invalid JSON"):
        source[0]
    assert source[1].text == "fine"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \n"])
def test_a_json_file_may_be_one_array(tmp_path, indent, before):
    rows = [chat(0), chat(1), {"text": "x"}]
    (tmp_path / "rows.json").write_bytes(before + json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    source = open_path(tmp_path / "rows.json")
    assert [source[i].messages[0]["content"] for i in (0, 1)] == ["q0", "q1"] and len(source) == 3
    with pytest.raises(BadRow, match=r"rows.json:3: expected a row of kind messages, as the first at .*rows.json:1"):
        source[2]
    streamed = open_source(SourceConfig(path=str(tmp_path / "rows.json")), DataConfig(streaming=True))
    assert [str(row.ref) for row in streamed.rows()] == [f"{tmp_path}/rows.json:{i}" for i in (1, 2, 3)]
    write_lines(tmp_path / "lines.json", rows[:2])
    assert open_path(tmp_path / "lines.json")[1].messages[0]["content"] == "q1"


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_in_place_of_lines_is_explained(tmp_path, indent):
    written = json.dumps([chat(0)], indent=indent).encode()
    (tmp_path / "rows.jsonl").write_bytes(written)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(written))
    for name in ("rows.jsonl", "rows.json.gz"):
        with pytest.raises(UserError, match=f"{name} is one JSON array; expected one JSON object on each line: rename"):
            open_path(tmp_path / name)
    for end, reason in (
        (b",]", r"invalid JSON: .* at column \d+, in a file that is one array"),
        (b'{"a":1,"a":2}]', ""),
    ):
        (tmp_path / "rows.json").write_bytes(written[:-1].rstrip() + end)
        with pytest.raises(UserError, match=r"rows.json:\d+: " + reason):
            open_path(tmp_path / "rows.json")


STARTS = {
    "rows.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS"),
    "rows.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS"),
    "rows.jsonl.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS"),
    "rows.csv": ("prompt,completion\na b,c\n".encode("utf-16"), "text in UTF-16: save it as UTF-8"),
    "text.jsonl": ('{"text": "a b"}\n'.encode("utf-16"), "text in UTF-16: save it as UTF-8"),
    "packed.jsonl": (gzip.compress(b'{"text": "a b"}\n'), "compressed by gzip: let its name end in .gz"),
    "table.json": (b"PAR1\x15\x04", "a Parquet file: let its name end in .parquet"),
    "sheet.csv": (b"PK\x03\x04\x14\x00", "a zip archive, or a spreadsheet"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>", "a web page: download the file itself"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_file_that_is_not_what_its_name_says_is_told_what_it_is(tmp_path, name):
    data, what = STARTS[name]
    (tmp_path / name).write_bytes(data)
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))} is {what}"):
            open_source(SourceConfig(path=str(tmp_path / name)), DataConfig(streaming=streaming))


@pytest.mark.parametrize(
    ("name", "line", "expected"), [("a.csv", "prompt;completion", "commas"), ("a.tsv", "a,b", "tabs")]
)
def test_columns_between_other_separators_are_explained(tmp_path, name, line, expected):
    (tmp_path / name).write_text(f"{line}\nx;y\n")
    reason = (
        f"{name}:1: expected names of columns with {expected} between them; found one name, '{line}': save the file"
    )
    with pytest.raises(UserError, match=reason):
        open_path(tmp_path / name)


def test_a_path_without_files_is_named_with_its_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    paths = {
        "none.jsonl": f"none.jsonl matches no file; expected .jsonl, .*; looked for {tmp_path}/none.jsonl$",
        "no/x*.jsonl": rf"a folder; looked for {tmp_path}/no/x\*.jsonl, and there is no folder {tmp_path}/no$",
        f"{tmp_path}/none.jsonl": "a glob of them, or a folder$",
        "here": "a folder, in which .json, .csv, .tsv are left out: name such files themselves$",
        "[a.jsonl": "looks like part of a list that lacks a bracket: write lists as",
    }
    for path, reason in paths.items():
        one = SourceConfig(path=path)
        for key in ("train", "eval"):
            with pytest.raises(UserError, match=f"^config key 'data.{key}': .*{reason}"):
                open_source(one, DataConfig(**{key: (one,)}))


def test_parquet_over_row_groups(tmp_path):
    num = 2 * 512 + 30
    table = pa.Table.from_pylist([chat(i) for i in range(num)])
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=200)
    source = open_path(tmp_path / "rows.parquet")
    assert len(source) == num
    for i in (num - 1, 0, 199, 200, RECORDS - 1, RECORDS, 777, 1):
        assert source[i].messages == tuple(chat(i)["messages"]) and source[i].ref.line == i + 1


def test_nulls_that_arrow_adds_are_taken_out(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": {"c": "x"}}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert b"null" in json.dumps(pq.read_table(tmp_path / "rows.parquet").to_pylist()).encode()  # the trap is there
    source = open_path(tmp_path / "rows.parquet")
    found = [e.messages[1]["tool_calls"][0]["function"] for e in source]
    assert found == [{"name": c["name"], "arguments": c["arguments"]} for c in calls]
    lines = open_path(
        write_lines(
            tmp_path / "rows.jsonl",
            [
                {
                    "messages": [
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": None}}]},
                    ]
                }
            ],
        )
    )
    assert lines[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_folder_saved_by_datasets(tmp_path):
    rows = [chat(i) for i in range(7)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    source = open_path(tmp_path / "saved")
    assert (source.name, len(source)) == ("saved", 7)
    assert [e.messages for e in source] == [tuple(r["messages"]) for r in rows]
    assert source[6].ref.file.endswith("data-00001-of-00002.arrow") and source[6].ref.line == 3

    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="holds several splits; give one of them as the path: .*splits/train"):
        open_path(tmp_path / "splits")
    assert len(open_path(tmp_path / "splits" / "train")) == 7


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "broken.arrow").write_bytes(b"not arrow at all")
    (tmp_path / "rows.txt").write_text("a,b")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    expected = {
        "": "a source has no path",
        "missing.jsonl": "missing.jsonl matches no file; expected .jsonl, ",
        "no*.jsonl": "matches no file",
        "empty.jsonl": "empty.jsonl has no rows",
        "none.parquet": "none.parquet has no rows",
        "broken.parquet": "broken.parquet is corrupt or truncated",
        "broken.arrow": "broken.arrow is corrupt or truncated",
        "rows.txt": "rows.txt: expected a file of .jsonl, ",
        "folder": "folder matches no file; expected .jsonl, ",
    }
    for name, reason in expected.items():
        with pytest.raises(UserError) as error:
            open_path(tmp_path / name if name else "")
        assert reason in str(error.value) and "\n" not in str(error.value), name
    with pytest.raises(UserError, match="must be one of sft, preference, .*, sharegpt, alpaca, text; found 'chat'"):
        open_path(tmp_path / "empty.jsonl", kind="chat")


def test_a_truncated_parquet_file(tmp_path):
    pq.write_table(pa.table({"text": ["x" * 50] * 3000}), tmp_path / "rows.parquet", compression="none")
    data = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="rows.parquet is corrupt or truncated"):
        open_path(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("rows.jsonl", "rows"),
        ("rows.jsonl.gz", "rows"),
        ("v1.5.jsonl.gz", "v1.5"),
        ("part-*.jsonl.gz", "part-*"),
    ],
)
def test_a_source_has_one_name_in_memory_and_in_a_stream(tmp_path, path, name):
    write = gzip.open if path.endswith("gz") else open
    with write(tmp_path / path.replace("*", "0"), "wt") as file:
        file.write('{"text": "a"}\n')
    config = SourceConfig(path=str(tmp_path / path))
    names = {open_source(config, DataConfig(streaming=streaming)).name for streaming in (False, True)}
    assert names == {name}
