"""Local files: written whole, locked, hashed; JSON lines read back, in the four places that do; short lists, trees."""

import contextlib
import errno
import hashlib
import json
import os
import threading

import pytest

from postrain.config import SourceConfig, TrackersConfig, resolve
from postrain.data.batches.in_memory import load_examples
from postrain.errors import UserError, shorten
from postrain.files import check_writable, digest, lock, read_jsonl, spread, write_whole
from postrain.report.metrics import MetricsWriter, read_metrics
from postrain.rollout.chat import _read_rows
from postrain.trees import flatten, unflatten

ODD = "a\u2028b\u2029c\x85d"  # str.splitlines would make four lines of it


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"a.txt cannot be written \(No space left on device\)"):
        write_whole(path, "new")
    assert path.read_bytes() == b"old\r\n" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_only_newlines_end_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"x": ODD}, ensure_ascii=False).encode() + b"\r\n\n" + b'{"x": 1}')
    assert read_jsonl(path) == [(1, {"x": ODD}), (3, {"x": 1})]
    assert read_jsonl(path, drop_torn=True) == [(1, {"x": ODD})]
    assert [row for row, *_ in _read_rows_of(path, ODD)] == [{"prompt": ODD}]


def test_a_byte_order_mark_is_left_out_at_the_start_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\n')
    assert [row for row, *_ in _read_rows(path)] == [{"prompt": "a"}]
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}\n')
    with pytest.raises(UserError, match="a.jsonl:2: not valid JSON"):
        list(_read_rows(path))


def _read_rows_of(path, text):
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(_read_rows(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [(b'{"a": ', "a.jsonl:2: not valid JSON"), (b"[1]", "a.jsonl:2: expected a JSON object, found list"),
     (b'{"a": "\xff"}', "a.jsonl:2: not valid JSON")],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(UserError, match=words):
        read_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="none.jsonl cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_metrics_with_such_a_name_are_read_by_a_resumed_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/" + ODD: 2.0}, ensure_ascii=False) + "\n")
    with contextlib.closing(MetricsWriter(tmp_path, TrackersConfig(), step=1)) as writer:
        writer.write(2, {"train/loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_rejected_rows_with_such_a_reason_are_read_back(tmp_path, tokenizer):
    good = {"prompt": "1", "completion": "2"}
    path, rejected = tmp_path / f"rows{ODD}.jsonl", tmp_path / "rejected.jsonl"
    path.write_text(json.dumps(good) + "\n" + "{}\n")
    values = {"train": str(path), "on_bad_row": "skip", "max_bad_fraction": 1.0}
    config = resolve({"data": values, "model": {"path": "x"}}).data
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(good) + "\n" + "{}\n")
    load_examples([SourceConfig(str(path))], tokenizer, config, rejected)
    load_examples([SourceConfig(str(other))], tokenizer, config, rejected)
    assert [(entry["file"], entry["line"]) for _, entry in read_jsonl(rejected)] == [(str(path), 2), (str(other), 2)]


def test_truncated_documents_say_so(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "1", "completion": "2" * count}) for count in (1, 50)]
    path.write_text("\n".join(lines))
    values = {"train": str(path), "too_long": "truncate", "sequence_length": 12}
    config = resolve({"data": values, "model": {"path": "x"}}).data
    example_set = load_examples(config.train, tokenizer, config)
    assert [example.truncated for example in example_set.examples] == [False, True]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tiny_models import make_tiny_tokenizer

    from postrain.data.rendering.tokenizer import load_tokenizer

    return load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "new" / "deep" / "a.txt", "--output")
    check_writable(tmp_path / "file", "--output")
    with pytest.raises(UserError, match=r"--html .*file/a.txt cannot be written \(.*file: Not a directory\)"):
        check_writable(tmp_path / "file" / "a.txt", "--html")
    with pytest.raises(UserError, match=r"--output /dev/null is not an ordinary file"):
        check_writable("/dev/null", "--output")
    with pytest.raises(UserError, match="a folder, expected the name of a file"):
        check_writable(tmp_path, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shortened_list_counts_the_items_left_out():
    assert shorten([], 3) == ""
    assert shorten(["a", "b", "c"], 3) == "a, b, c"
    assert shorten(range(7), 3) == "0, 1, 2 and 4 more"
    assert shorten(["a: 1, 2", "b", "c"], 2, "; ") == "a: 1, 2; b and 1 more"


def test_a_tree_comes_back_from_its_paths():
    tree = {"a": {"b": {"c": 1, "d": [2]}}, "e": None}
    assert flatten(tree) == {"a.b.c": 1, "a.b.d": [2], "e": None}
    assert unflatten(flatten(tree)) == tree


@pytest.mark.parametrize("folder", [False, True])
def test_a_lock_keeps_others_out_until_its_block_ends(tmp_path, folder):
    path = tmp_path / "new" / "lock"
    with lock(path, folder=folder) as held:
        assert held and path.is_dir() == folder
        with pytest.raises(BlockingIOError), lock(path, wait=False, folder=folder):
            raise AssertionError
    with lock(path, wait=False, folder=folder) as held:
        assert held


def test_a_caller_that_waits_for_a_removed_lock_takes_a_new_one(tmp_path):
    """The waiting thread has opened the removed file: its lock would not keep out the third caller."""
    path, order, opened = tmp_path / "lock", [], threading.Event()
    real_open = os.open

    def wait_for_it():
        with lock(path):
            order.append("second")
            with pytest.raises(BlockingIOError), lock(path, wait=False):
                raise AssertionError

    def open_and_tell(*arguments):
        descriptor = real_open(*arguments)
        if threading.current_thread() is thread:
            opened.set()
        return descriptor

    thread = threading.Thread(target=wait_for_it)
    with pytest.MonkeyPatch.context() as patch, lock(path):
        patch.setattr(os, "open", open_and_tell)
        thread.start()
        assert opened.wait(60)
        order.append("first")
        path.unlink()
    thread.join(60)
    assert order == ["first", "second"] and path.exists()


def test_a_lock_that_the_file_system_lacks_is_not_held(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock(tmp_path / "lock") as held:
        assert not held


def test_digests_of_files_and_of_stretches(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    assert digest(path) == hashlib.sha256(bytes(range(100))).hexdigest()
    assert digest(path, [(0, 100)]) == digest(path)
    assert digest(path, [(90, 5), (0, 2)]) == hashlib.sha256(bytes([90, 91, 92, 93, 94, 0, 1])).hexdigest()
    with pytest.raises(UserError, match=r"none cannot be read \(No such file"):
        digest(tmp_path / "none")


def test_stretches_go_from_the_first_byte_to_the_last():
    assert spread(10, 110, 3, 10) == [(10, 10), (55, 10), (100, 10)]
    assert spread(10, 50, 3, 10) == [(10, 40)]
    assert spread(0, 0, 3, 10) == [(0, 0)]
