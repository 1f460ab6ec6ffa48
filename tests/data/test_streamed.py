"""Streams: the same rows on any number of processes, from any saved position; every row once an epoch; the shares."""

import collections
import dataclasses
import gzip
import json

import numpy as np
import pytest
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import DataConfig, MixtureSection, PhaseConfig, SourceConfig, StreamSection
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches import source as source_module
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.open import open_train_rows, read_documents
from postrain.data.batches.row_filter import RejectedLog
from postrain.data.batches.source import open_source
from postrain.data.batches.token_shift import shift
from postrain.data.documents import SameLayout
from postrain.data.rendering.render import render_many
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.files import read_jsonl

FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
BATCH = 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources of ragged rows: a in 11 files (one empty), b in 3 files, c in one."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name, files, rows in (("a", 11, 30), ("b", 3, 20), ("c", 1, 40)):
        for number in range(files):
            count = 0 if (name, number) == ("a", 4) else rows - number
            words = [" ".join(["word"] * int(rng.integers(1, 30))) for _ in range(count)]
            lines = [chat(f"{name} {number} {i}?", f"{name}{number}.{i} {text}") for i, text in enumerate(words)]
            write_jsonl(folder / f"{name}-{number:02}.jsonl", lines)
    return folder


def open_stream(tokenizer, config, **process):
    return open_train_rows(tokenizer, config, **process).batches


def make_config(folder, names="ab", weights=(), shards=4, **changes):
    weights = weights or (0.0,) * len(names)
    sources = tuple(
        SourceConfig(path=str(folder / f"{name}-*.jsonl"), name=name, weight=weight)
        for name, weight in zip(names, weights, strict=True)
    )
    values = {"sequence_length": 96, "batch_size": BATCH, "packing_window": 80, "seed": 3}
    return DataConfig(train=sources, streaming=True, stream=StreamSection(shards=shards), **(values | changes))


def take(stream, count):
    """``count`` batches of one or more processes' iterators, joined to global batches."""
    streams = stream if isinstance(stream, list) else [stream]
    parts = [[next(one) for one in streams] for _ in range(count)]
    return [{name: np.concatenate([part[name] for part in batch]) for name in FIELDS} for batch in parts]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(batch[name], other[name], name)


def documents_of(batches, tokenizer):
    """(source, file, row) of each document, from its text."""
    found = []
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                text = tokenizer.decode(tokens[segments == segment])
                found.append(tuple(text.split("user\n")[1].split("?")[0].split()))
    return found


def parse_all(path):
    source = open_source(SourceConfig(path=str(path)), DataConfig())
    return [source.parser.parse(*row) for row in source.rows()]


def close(*streams):
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("shards", [1, 4, 8])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(folder, tokenizer, shards, processes):
    config = make_config(folder, shards=shards)
    whole = open_stream(tokenizer, config)
    parts = [open_stream(tokenizer, config, process_index=i, process_count=processes) for i in range(processes)]
    assert_same(take(whole, 12), take(parts, 12))
    close(whole, *parts)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("name", "shards"), [("a", 1), ("a", 4), ("b", 1), ("b", 8), ("c", 5)])
def test_the_shards_have_every_row_once_an_epoch(folder, tokenizer, name, shards, shuffle):
    config = make_config(folder, name, shards=shards, shuffle=shuffle, sequence_length=512)  # none is too long
    source = open_source(dataclasses.replace(config.train[0], max_epochs=2), config)
    epochs, orders = (collections.Counter(), collections.Counter()), ([], [])
    for shard in range(shards):
        reader = iter(read_documents(source, tokenizer, config, SameLayout(), shard=shard))
        for documents in reader:
            place, epoch = (documents[0].ref.file, documents[0].ref.line), reader.get_state()["epoch"]
            epochs[epoch][place] += 1
            orders[epoch].append(place)
    rows = [(file.url, i + 1) for file in source.files for i in range(len(open(file.url).readlines()))]
    assert epochs[0] == epochs[1] == collections.Counter(rows)
    if name == "a":  # the others have few blocks, whose orders may well be the same
        assert (orders[0] == orders[1]) == (not shuffle)


def test_documents_are_what_rendering_gives(folder, tokenizer):
    config = make_config(folder, "c")
    expected = collections.Counter()
    for (document,) in render_many(parse_all(folder / "c-00.jsonl"), tokenizer):
        tokens, targets, mask = shift(document)
        expected[tuple(tokens), tuple(targets), tuple(mask)] += 1
    stream = open_stream(tokenizer, config)
    for batch in take(stream, 6):
        for row in range(BATCH):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                assert expected[tuple(tuple(batch[name][row][at]) for name in ("tokens", "targets", "loss_mask"))] == 1
                np.testing.assert_array_equal(batch["positions"][row][at], np.arange(at.sum()))
    close(stream)


@pytest.mark.parametrize("stop", [1, 2, 5, 11])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_restored_anywhere_on_any_number_of_processes_it_goes_on_with_the_same_batches(
    folder, tokenizer, stop, before, after
):
    config = make_config(folder, weights=(3.0, 1.0), mixture=MixtureSection(phases=(PhaseConfig(7, (1.0, 2.0)),)))
    whole = open_stream(tokenizer, config)
    expected = take(whole, stop + 8)
    parts = [open_stream(tokenizer, config, process_index=i, process_count=before) for i in range(before)]
    assert_same(take(parts, stop), expected[:stop])
    shards = {}
    for part in parts:
        shards |= part.get_state()["shards"]
    state = json.loads(json.dumps({"shards": shards}))
    resumed = [open_stream(tokenizer, config, process_index=i, process_count=after) for i in range(after)]
    for one in resumed:
        one.set_state(state)
    assert_same(take(resumed, 8), expected[stop:])
    close(whole, *parts, *resumed)


@pytest.mark.parametrize("by", ["tokens", "rows"])
def test_shares_are_those_of_the_weights(folder, tokenizer, by):
    config = make_config(folder, "abc", (5.0, 2.0, 1.0), shards=2, mixture=MixtureSection(by=by))
    stream = open_stream(tokenizer, config)
    batches = take(stream, 60)
    close(stream)
    amounts = collections.Counter()
    for batch in batches:
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                text = tokenizer.decode(tokens[segments == segment])
                amounts[text.split("user\n")[1][0]] += (segments == segment).sum() + 1 if by == "tokens" else 1
    total = sum(amounts.values())
    for name, share in zip("abc", (5 / 8, 2 / 8, 1 / 8), strict=True):
        assert abs(amounts[name] / total - share) < 0.02, amounts


def test_weights_change_at_the_given_update(folder, tokenizer):
    phases = (PhaseConfig(6, (0.0, 1.0)), PhaseConfig(9, (1.0, 0.0)))
    config = make_config(folder, weights=(1.0, 0.0), mixture=MixtureSection(phases=phases), packing="none")
    stream = open_stream(tokenizer, config)
    found = [{document[0] for document in documents_of([batch], tokenizer)} for batch in take(stream, 14)]
    close(stream)
    assert found == [{"a"}] * 5 + [{"b"}] * 3 + [{"a"}] * 6


def test_temperature_flattens_the_sizes(folder, tokenizer):
    def shares(temperature):
        mixture = MixtureSection(temperature=temperature)
        stream = open_stream(tokenizer, make_config(folder, "ac", shards=1, mixture=mixture))
        counts = collections.Counter(document[0] for document in documents_of(take(stream, 40), tokenizer))
        close(stream)
        return counts["c"] / sum(counts.values())

    assert shares(1.0) < 0.2 < shares(3.0) < shares(1e9) < 0.52


@pytest.mark.parametrize("bad", ['{"messages": [', chat("a 0 long?", "word " * 99), chat("a 0 b?", "a", train=False)])
def test_shares_by_rows_are_of_those_that_are_kept(tmp_path, tokenizer, bad):
    write_jsonl(tmp_path / "a-0.jsonl", [chat(f"a 0 {i}?", "word") for i in range(8)] + [bad] * 24)
    write_jsonl(tmp_path / "b-0.jsonl", [chat(f"b 0 {i}?", "word") for i in range(8)])
    changes = {"streaming": False, "on_bad_row": "skip", "max_bad_fraction": 1.0, "packing": "none", "shuffle": False}
    config = dataclasses.replace(make_config(tmp_path, mixture=MixtureSection(by="rows")), **changes)
    config = dataclasses.replace(config, train=tuple(dataclasses.replace(s, max_epochs=9) for s in config.train))
    stream = open_stream(tokenizer, config)
    counts = collections.Counter(document[0] for document in documents_of(take(stream, 4), tokenizer))
    close(stream)
    assert abs(counts["a"] - counts["b"]) <= 1


def test_bad_rows_are_refused_or_left_out_and_named(tmp_path, tokenizer):
    rows = [chat(f"a 0 {i}?", f"a0.{i}") for i in range(50)]
    rows[20] = '{"messages": ['
    write_jsonl(tmp_path / "a-00.jsonl", rows)
    stream = open_stream(tokenizer, make_config(tmp_path, "a"))
    with pytest.raises(UserError, match="a-00.jsonl:21: invalid JSON"):
        take(stream, 5)
    close(stream)
    stream = open_stream(tokenizer, make_config(tmp_path, "a", on_bad_row="skip"))
    seen = {document[2] for document in documents_of(take(stream, 12), tokenizer)}
    assert seen == {str(i) for i in range(50)} - {"20"}
    close(stream)


def test_rows_of_the_last_batches_are_named(folder, tokenizer):
    stream = open_stream(tokenizer, make_config(folder, "b", packing="none"))
    batch = [next(stream) for _ in range(3)][-1]
    named = stream.describe_rows(batch["row_ids"])
    assert len(named.split(", ")) == BATCH and "b-0" in named and ".jsonl:" in named
    close(stream)


def test_what_cannot_be_is_refused(folder, tokenizer):
    with pytest.raises(UserError, match="'data.batch_size' = 8 must be a multiple of 'data.stream.shards' = 3"):
        open_stream(tokenizer, make_config(folder, shards=3))
    with pytest.raises(UserError, match="no row of kind sft in it: see docs/data.md"):
        write_jsonl(folder / "z-0.jsonl", [{"x": 1}])
        open_stream(tokenizer, make_config(folder, "z"))
    stream, other = (open_stream(tokenizer, make_config(folder, shards=shards)) for shards in (2, 8))
    with pytest.raises(UserError, match="no shard 2"):
        other.set_state(stream.get_state())
    close(stream, other)


def write_lengths(path, count, slots, name):
    """Rows that take about ``slots`` slots each."""
    return write_jsonl(path, [chat(f"{name} 0 {i}?", " ".join(["word"] * (slots // 2))) for i in range(count)])


def test_weights_change_at_the_given_update_though_rows_are_packed(tmp_path, tokenizer):
    """Documents of 0.6 rows: their slots say little of the rows that they take."""
    rows = {name: parse_all(write_lengths(tmp_path / f"{name}-0.jsonl", 300, 70, name)) for name in "ab"}
    (document,) = next(iter(render_many([rows["a"][0]], tokenizer)))
    phases = (PhaseConfig(21, (0.0, 1.0)), PhaseConfig(26, (1.0, 0.0)))
    config = make_config(
        tmp_path,
        weights=(1.0, 0.0),
        shards=1,
        mixture=MixtureSection(phases=phases),
        sequence_length=int(len(document.tokens) / 0.6),
        packing_window=400,
    )
    stream = open_stream(tokenizer, config)
    found = [[document[0] for document in documents_of([batch], tokenizer)] for batch in take(stream, 30)]
    close(stream)
    assert [set(names) for names in found] == [{"a"}] * 20 + [{"b"}] * 5 + [{"a"}] * 5


def test_sources_and_shards_without_anything_to_train_on_end(tmp_path, tokenizer):
    write_lengths(tmp_path / "a-0.jsonl", 20, 400, "a")
    with pytest.raises(UserError, match="no row of it can be trained on"):
        open_stream(tokenizer, make_config(tmp_path, "a"))
    lines = [chat(f"a 0 {i}?", "x" if i % 8 != 5 else "word " * 400) for i in range(16)]
    write_jsonl(tmp_path / "a-0.jsonl", lines)
    stream = open_stream(tokenizer, make_config(tmp_path, "a", shards=8))
    found = r"shard 5 of .* no more rows for update 1; .*a-\*.jsonl: of 2 rows 2 documents too long \(data.sequence_len"
    with pytest.raises(UserError, match=found):
        take(stream, 1)
    close(stream)
    (tmp_path / "a-0.jsonl").write_text("")
    config = make_config(tmp_path, "a")
    with pytest.raises(UserError, match="has no rows"):
        open_stream(tokenizer, dataclasses.replace(config, train=(dataclasses.replace(config.train[0], kind="text"),)))


def test_a_source_that_ends_for_a_shard_ends_alike_after_a_resume(tmp_path, tokenizer, monkeypatch):
    """Five of eight blocks, one a shard, have nothing to train on: after three such epochs the shard is done with a."""
    monkeypatch.setattr(source_module, "_SHARED_BYTES", 0)  # as if it were large
    for number in range(8):
        words = "word " * (400 if number >= 3 else 5)
        path = write_jsonl(tmp_path / f"a-{number}.jsonl", [chat(f"a {number} {i}?", words) for i in range(6)])
        (tmp_path / f"a-{number}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    write_jsonl(tmp_path / "b-0.jsonl", [chat(f"b 0 {i}?", "word " * 9) for i in range(40)])
    config = make_config(tmp_path, weights=(1.0, 1.0), shards=8, sequence_length=160, packing_window=64)
    sources = (dataclasses.replace(config.train[0], path=f"{tmp_path}/a-*.jsonl.gz"), config.train[1])
    config = dataclasses.replace(config, train=sources)
    whole, states, batches = open_stream(tokenizer, config), [], []
    for _ in range(16):
        batches += take(whole, 1)
        states.append(json.loads(json.dumps(whole.get_state())))
    drawn = whole.format_consumption(states[-1])
    assert "a: " in drawn[0] and "; of " in drawn[0] and " documents too long (data.sequence_length; the" in drawn[0]
    assert "too long" not in drawn[1]
    for step in (1, 5, 10):
        resumed = open_stream(tokenizer, config)
        resumed.set_state(states[step - 1])
        assert_same(take(resumed, 16 - step), batches[step:])
        assert json.loads(json.dumps(resumed.get_state())) == states[-1]
        close(resumed)
    close(whole)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_first_updates_have_the_shares_however_large_the_window(tmp_path, tokenizer, streaming):
    """A source of 12 rows, a sixth as long as the others, comes first and whole where its weight says so."""
    write_jsonl(tmp_path / "a-0.jsonl", [chat(f"a 0 {i}?", "word " * 15) for i in range(400)])
    write_jsonl(tmp_path / "b-0.jsonl", [chat(f"b 0 {i}?", "word " * 5) for i in range(12)])
    config = make_config(
        tmp_path, weights=(1.0, 1.0), shards=1, packing_window=10_000, mixture=MixtureSection(by="rows")
    )
    sources = config.train[0], dataclasses.replace(config.train[1], max_epochs=1)
    config = dataclasses.replace(config, train=sources, streaming=streaming)
    stream = open_stream(tokenizer, config)
    rows_a_window = 64 // BATCH  # at least, of the first one
    names = [document[0] for document in documents_of(take(stream, rows_a_window), tokenizer)]
    close(stream)
    assert names.count("b") == 12


def test_a_mixed_source_without_anything_to_train_on_is_refused(tmp_path, tokenizer):
    write_lengths(tmp_path / "a-0.jsonl", 20, 400, "a")
    write_lengths(tmp_path / "b-0.jsonl", 20, 10, "b")
    config = make_config(tmp_path, weights=(1.0, 1.0))
    with pytest.raises(UserError, match=r"a-\*.jsonl: no row of it can be trained on, so it cannot be mixed"):
        open_stream(tokenizer, dataclasses.replace(config, streaming=False))


def test_bad_rows_are_added_to_a_log_whose_last_line_was_cut_off(tmp_path):
    log, path = [], tmp_path / "rejected.jsonl"
    for line in (3, 4, 5):
        log.append(BadRow(RowRef("a", "a.jsonl", line), "no ünicode"))
    RejectedLog(path).write(log[0])
    whole = path.read_bytes()
    path.write_bytes(whole * 2 + whole[:20])
    again = RejectedLog(path)
    for bad in log:
        again.write(bad)
    assert [entry["line"] for _, entry in read_jsonl(path)] == [3, 3, 4, 5]


def test_the_share_of_bad_rows_is_judged_alike_after_a_resume(tmp_path, tokenizer):
    lines = [chat(f"a 0 {i}?", "x") if not 2000 <= i < 2060 else "{" for i in range(3000)]
    write_jsonl(tmp_path / "a-0.jsonl", lines)
    config = make_config(tmp_path, "a", shards=1, on_bad_row="skip", max_bad_fraction=0.04, shuffle=False)
    whole, resumed = open_stream(tokenizer, config), open_stream(tokenizer, config)
    take(whole, 25)
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    assert_same(take(resumed, 40), take(whole, 40))
    close(whole, resumed)


def test_the_fingerprint_tells_what_changes_the_order(folder, tokenizer):
    config = make_config(folder)
    first = dataclasses.replace(config.train[0], kind="messages", weight=2.0)
    others = {
        "by": dataclasses.replace(config, mixture=MixtureSection(by="rows")),
        "shards": dataclasses.replace(config, stream=StreamSection(shards=2)),
        "weights": dataclasses.replace(config, train=(first, dataclasses.replace(config.train[1], weight=1.0))),
    }
    print_of = lambda config: open_train_rows(tokenizer, config).fingerprint
    expected = print_of(config)
    for name, other in others.items():
        assert any(name in change for change in compare_fingerprints(expected, print_of(other))), name


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path, tokenizer):
    print_of = lambda place: open_train_rows(tokenizer, make_config(place, ("*/a",), shards=1)).fingerprint
    for place in ("first", "moved"):
        for day, rows in (("1", 8), ("2", 9)):
            (tmp_path / place / day).mkdir(parents=True)
            write_jsonl(tmp_path / place / day / "a-0.jsonl", [chat(f"a {day} {i}?", "word") for i in range(rows)])
    expected = print_of(tmp_path / "first")
    assert expected == print_of(tmp_path / "moved")
    write_jsonl(tmp_path / "moved" / "1" / "a-0.jsonl", [chat("a 1 0?", "word")] * 8)
    (change,) = compare_fingerprints(expected, print_of(tmp_path / "moved"))
    assert "file 1/a-0.jsonl has other content" in change


def test_bad_rows_in_the_middle_of_a_file_are_all_written_down(tmp_path, tokenizer):
    lines = [chat(f"a 0 {i}?", "word " * 30) if i % 97 else "{" for i in range(1, 3000)]
    write_jsonl(tmp_path / "a-0.jsonl", lines)
    config = make_config(tmp_path, "a", on_bad_row="skip", sequence_length=512)
    rows = open_train_rows(tokenizer, config, tmp_path / "rejected.jsonl")
    for _ in range(100):  # more than an epoch of every shard
        next(rows.batches)
    rows.batches.close()
    entries = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert len({(entry["line"], entry.get("byte")) for entry in entries}) == len(entries) == 30
