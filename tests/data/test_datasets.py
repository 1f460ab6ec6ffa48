"""Grain datasets as sources, and a user's transformations between our stages: the rows of files, and exact resume."""

import collections
import json
import multiprocessing
import os
import re
import signal

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kind_fixtures import assert_same_batches
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import DataConfig, SourceConfig, StreamSection, resolve, to_dict
from postrain.data.batches.fingerprint import compare_fingerprints, fingerprint_config
from postrain.data.batches.in_memory import load_examples
from postrain.data.batches.open import open_train_rows, read_documents
from postrain.data.batches.resumable import Epochs
from postrain.data.batches.source import open_source, read_rows
from postrain.data.documents import SameLayout
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

ROWS = [chat(f"{i}?", " ".join(["word"] * (1 + i * 7 % 23))) for i in range(160)]
FILES = []  # the path that `long_answers` reads; set by a test, as a config file would name it


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def make_config(source, streaming, **changes):
    values = {"sequence_length": 96, "batch_size": 4, "packing_window": 40, "seed": 3, "stream": StreamSection(2)}
    return DataConfig(train=(SourceConfig(**source),), streaming=streaming, **(values | changes))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def is_long(row):
    return len(row["messages"][1]["content"]) > 40


def shout(row):
    return {"messages": [row["messages"][0], row["messages"][1] | {"content": row["messages"][1]["content"].upper()}]}


def make_rows():
    return grain.MapDataset.source(ROWS)


def iterate_rows():
    return grain.MapDataset.source(ROWS).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def share_rows(shard, shards):
    return grain.MapDataset.source(ROWS[shard::shards]).to_iter_dataset()


def long_answers(shard, shards):
    """Rows of a file, with a filter and a map between their reading and their rendering."""
    return read_rows(FILES[0], shard, shards).filter(is_long).map(shout)


def test_in_memory_a_dataset_gives_the_batches_of_a_file_of_its_rows(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = take(open_train_rows(tokenizer, make_config({"path": str(path)}, False)).batches, 20)
    for dataset in (make_rows(), make_rows, iterate_rows(), iterate_rows, share_rows):
        rows = open_train_rows(tokenizer, make_config({"dataset": dataset, "name": "mine"}, False))
        assert_same_batches(take(rows.batches, 20), expected)
        assert str(rows.sample.ref) == "mine:0"
        rows.batches.close()


@pytest.mark.parametrize("dataset", [make_rows, iterate_rows, share_rows])
def test_streamed_every_row_of_a_dataset_comes_once_an_epoch(tokenizer, dataset):
    config = make_config({"dataset": dataset, "max_epochs": 2}, True)
    source, refs = open_source(config.train[0], config), collections.Counter()
    for shard in range(2):
        reader = iter(read_documents(source, tokenizer, config, SameLayout(), shard=shard))
        for documents in reader:
            refs[reader.get_state()["epoch"], tokenizer.decode(documents[0].tokens).split("?")[0]] += 1
    assert len(refs) == 2 * len(ROWS) and set(refs.values()) == {1}


@pytest.mark.parametrize("dataset", [make_rows, iterate_rows, share_rows, long_answers])
def test_streamed_a_dataset_goes_on_from_any_position(tmp_path, tokenizer, dataset):
    FILES[:] = [str(write_jsonl(tmp_path / "rows.jsonl", ROWS))]
    config = make_config({"dataset": dataset}, True)
    whole, states, batches = open_train_rows(tokenizer, config).batches, [], []
    for _ in range(24):
        batches += take(whole, 1)
        states.append(json.loads(json.dumps(whole.get_state())))
    whole.close()
    for step in (1, 5, 11, 17):
        resumed = open_train_rows(tokenizer, config).batches
        resumed.set_state(states[step - 1])
        assert_same_batches(take(resumed, 24 - step), batches[step:])
        assert json.loads(json.dumps(resumed.get_state())) == states[-1]
        resumed.close()


def run_until_killed(config, folder, tokenizer_folder, position, steps, kill_at):
    """Reads batches, and writes the arrays and the position after each to the disk; SIGKILL before ``kill_at``."""
    batches = open_train_rows(load_tokenizer(tokenizer_folder), config).batches
    if position:
        batches.set_state(json.loads((folder / f"{position}.json").read_text()))
    for step in range(position, steps):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = next(batches)
        np.savez(folder / f"{step}.npz", **{name: batch[name] for name in ("tokens", "targets", "segment_ids")})
        (folder / f"{step + 1}.json").write_text(json.dumps(batches.get_state()))
    batches.close()


def test_a_users_filter_and_map_between_our_stages_resume_exactly_after_kills(tmp_path, tokenizer):
    """Killed twice in the middle of windows, the three processes give the batches of one that was never killed."""
    FILES[:] = [str(write_jsonl(tmp_path / "rows.jsonl", ROWS))]
    config, folder = make_config({"dataset": long_answers}, True), tmp_path / "run"
    folder.mkdir()
    for position, kill_at in ((0, 7), (7, 13), (13, None)):
        arguments = config, folder, tokenizer.folder, position, 20, kill_at
        process = multiprocessing.get_context("fork").Process(target=run_until_killed, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    batches = open_train_rows(tokenizer, config).batches
    for step, batch in enumerate(take(batches, 20)):
        found = np.load(folder / f"{step}.npz")
        for name in found.files:
            np.testing.assert_array_equal(found[name], batch[name], name)
        texts = [tokenizer.decode(row[row > 0]) for row in batch["tokens"]]
        assert all("WORD" in text and "word" not in text for text in texts)
    batches.close()


def test_a_transformation_between_rendering_and_packing(tokenizer):
    """Grain's own filter over the documents of a row: its iterator has the position of ours."""
    config = make_config({"dataset": make_rows}, True, shuffle=False)
    source = open_source(config.train[0], config)
    documents = read_documents(source, tokenizer, config, SameLayout())
    short = documents.filter(lambda row: row[0].num_tokens < 40)
    everything = Epochs(lambda epoch: short, 1)
    reader, found, states = iter(everything), [], []
    for _ in range(30):
        found.append(str(next(reader)[0].ref))
        states.append(json.loads(json.dumps(reader.get_state())))
    for step in (4, 21):
        again = iter(everything)
        again.set_state(states[step])
        assert [str(next(again)[0].ref) for _ in found[step + 1 :]] == found[step + 1 :]
    assert all(document.startswith("make_rows:") for document in found)


def test_real_datasets_of_grain(tmp_path, tokenizer):
    pq.write_table(pa.Table.from_pylist([{"text": f"row {i}"} for i in range(40)]), tmp_path / "rows.parquet")
    stored = grain.experimental.ParquetIterDataset(str(tmp_path / "rows.parquet"))
    shuffled = grain.experimental.WindowShuffleIterDataset(stored, window_size=7, seed=1)
    arrays = grain.MapDataset.range(40).map(lambda i: {"items": np.arange(1, 4 + i % 5), "times": np.arange(3 + i % 5)})
    for source in ({"dataset": shuffled, "kind": "text"}, {"dataset": arrays, "kind": "events"}):
        config = make_config(source, True)
        whole, resumed = (open_train_rows(tokenizer, config).batches for _ in range(2))
        take(whole, 5)
        resumed.set_state(json.loads(json.dumps(whole.get_state())))
        assert_same_batches(take(resumed, 6), take(whole, 6))
        whole.close(), resumed.close()


class NoState(grain.DatasetIterator):
    def __init__(self):
        super().__init__()
        self._rows = iter(ROWS)

    def __next__(self):
        return next(self._rows)

    def get_state(self):
        raise NotImplementedError("get_state")

    def set_state(self, state):
        raise NotImplementedError("set_state")


class NoStateDataset(grain.IterDataset):
    def __iter__(self):
        return NoState()


class StillState(NoState):
    """Its state never moves, so a resumed run would go on from the first row."""

    def get_state(self):
        return {"next": 0}

    def set_state(self, state):
        self._rows = iter(ROWS[state["next"] :])


class StillStateDataset(grain.IterDataset):
    def __iter__(self):
        return StillState()


def make_list():
    return [1, 2]


def fail_to_make():
    raise KeyError("bucket")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (grain.MapDataset.source([3]), "mine:0: expected an object.*; found a number"),
        (grain.MapDataset.source([ROWS[0], "x"]), "mine:1: expected an object.*; found a string"),
        (grain.MapDataset.source([ROWS[0]] * 2).map(lambda row: row["no"]), "mine:0: KeyError: 'no'"),
        (grain.MapDataset.source([]), "source 'mine' has no rows"),
        (grain.MapDataset.source(ROWS).filter(lambda row: False), "source 'mine' has no rows"),
        (grain.MapDataset.source(ROWS).repeat(), "source 'mine' has no end: leave repeat"),
        (make_list, r"source 'mine': expected a grain.MapDataset or grain.IterDataset of rows, found \[1, 2\]"),
        (fail_to_make, "source 'mine': fail_to_make: KeyError: 'bucket'"),
    ],
)
def test_what_cannot_be_a_source(tokenizer, dataset, message, streaming):
    config = make_config({"dataset": dataset, "name": "mine"}, streaming)
    with pytest.raises(UserError) as error:
        take(open_train_rows(tokenizer, config).batches, 40)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


def test_a_dataset_without_state_is_for_rows_in_memory(tokenizer):
    source = {"dataset": NoStateDataset(), "name": "mine"}
    with pytest.raises(
        UserError, match="source 'mine': its iterator has no state that can be saved .NotImplemented"
    ) as e:
        open_train_rows(tokenizer, make_config(source, True))
    assert "(data.streaming=False)" in str(e.value) and "\n" not in str(e.value)
    config = make_config(source, False)
    assert len(load_examples(config.train, tokenizer, config).examples) == len(ROWS)


def test_a_dataset_whose_state_does_not_move_is_for_rows_in_memory(tokenizer):
    source = {"dataset": StillStateDataset(), "name": "mine"}
    with pytest.raises(UserError, match="source 'mine': its iterator does not go on where its state was taken") as e:
        open_train_rows(tokenizer, make_config(source, True))
    assert "(data.streaming=False)" in str(e.value) and "\n" not in str(e.value)
    config = make_config(source, False)
    assert len(load_examples(config.train, tokenizer, config).examples) == len(ROWS)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_tells_a_changed_dataset(tokenizer, streaming):
    configs = [make_config({"dataset": d, "name": "mine"}, streaming) for d in (make_rows, share_rows)]
    prints = [json.loads(json.dumps(open_train_rows(tokenizer, config).fingerprint)) for config in configs]
    changes = compare_fingerprints(*prints)
    assert re.match(
        r"source 'mine': rows came from function make_rows \w+ of 160 rows, now from function sh", changes[0]
    )
    assert fingerprint_config(tokenizer, configs[0]).items() <= prints[0].items()


def test_config_json_names_a_dataset():
    values = {"model": {"path": "m"}, "data": {"train": [{"dataset": make_rows}, {"dataset": make_rows()}]}}
    saved = to_dict(resolve(values))
    first, second = (source["dataset"] for source in saved["data"]["train"])
    assert re.fullmatch(r"function make_rows [0-9a-f]{12}", first) and second.startswith("dataset ")
    again = resolve(json.loads(json.dumps(saved)))
    with pytest.raises(UserError, match="config.json only names it: run with the config file"):
        open_source(again.data.train[0], again.data)
    for source, message in (
        ({"dataset": 3}, "expected a grain.MapDataset, a grain.IterDataset or a function that returns one, found 3"),
        ({"dataset": make_rows, "path": "a.jsonl"}, "a source has both 'path' = 'a.jsonl' and 'dataset'"),
    ):
        with pytest.raises(UserError, match=message):
            resolve({"model": {"path": "m"}, "data": {"train": [source]}})
