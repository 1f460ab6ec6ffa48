"""Rows in memory from files that are elsewhere, or can only be read from their start: the documents of plain ones."""

import gzip
import json

import numpy as np
import pytest
from object_store import BUCKET, serve_store, upload
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import DataConfig, SourceConfig
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import load_examples
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

ROWS = [chat(f"{i}?", " ".join(["word"] * (1 + i % 7))) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def store():
    with pytest.MonkeyPatch.context() as patch, serve_store(patch) as proxy:
        yield proxy


def load(path, tokenizer, **options):
    config = DataConfig(sequence_length=96, **options)
    return load_examples([SourceConfig(path=str(path), name="rows")], tokenizer, config)


def assert_same(found, expected):
    assert len(found.examples) == len(expected.examples)
    for one, other in zip(found.examples, expected.examples, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


MAKE = {
    "rows.jsonl": lines_of,
    "rows.jsonl.gz": lambda rows: gzip.compress(lines_of(rows), mtime=0),
}


@pytest.mark.parametrize("name", MAKE)
def test_the_documents_are_those_of_a_plain_file(store, tokenizer, tmp_path, name):
    expected = load(write_jsonl(tmp_path / "plain.jsonl", ROWS), tokenizer)
    (tmp_path / name).write_bytes(MAKE[name](ROWS))
    upload(MAKE[name](ROWS), f"there/{name}")
    store.faults[:] = ["reset"]
    for path in (tmp_path / name, f"s3://{BUCKET}/there/{name}"):
        found = load(path, tokenizer)
        assert_same(found, expected)
        assert str(found.examples[3].ref).startswith(str(path))
        assert load(path, tokenizer).fingerprint == found.fingerprint
    assert not store.faults
    upload(MAKE[name](ROWS[1:]), f"there/{name}")
    (change, *_) = compare_fingerprints(found.fingerprint, load(path, tokenizer).fingerprint)
    assert f"file {name} has other content" in change


def test_bad_rows_elsewhere_are_named(store, tokenizer, tmp_path):
    upload(lines_of(ROWS), "bad/a-00000-of-00002.jsonl")
    with pytest.raises(UserError, match="shards are missing, the first is .*a-00001-of-00002"):
        load(f"s3://{BUCKET}/bad/*.jsonl", tokenizer)
    upload(b'{"messages": []}\n' + lines_of(ROWS[:5]), "bad/a-00001-of-00002.jsonl")
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/bad/a-00001-of-00002.jsonl:1: 'messages' is empty"):
        load(f"s3://{BUCKET}/bad/*.jsonl", tokenizer)
    found = load(f"s3://{BUCKET}/bad/*.jsonl", tokenizer, on_bad_row="skip")
    assert len(found.examples) == 45 and found.report.total.skipped == 1
    with pytest.raises(UserError, match="matches no file"):
        load(f"s3://{BUCKET}/nowhere/*.jsonl", tokenizer)
