"""A position taken over by a changed pipeline: nothing starts over but what has to."""

import dataclasses
import json

import numpy as np
import pytest
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import DataConfig, MixtureSection, PhaseConfig, SourceConfig, StreamSection
from postrain.data.batches.fingerprint import digest_change
from postrain.data.batches.open import open_train_rows
from postrain.data.rendering.tokenizer import load_tokenizer

BATCH = 4
ROWS = {"a": 160, "b": 120, "c": 50}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name, rows in ROWS.items():
        words = [" ".join(["word"] * int(rng.integers(1, 20))) for _ in range(rows)]
        write_jsonl(folder / f"{name}.jsonl", [chat(f"{name} {i}?", text) for i, text in enumerate(words)])
    return folder


def make_config(folder, names="ab", **changes):
    sources = tuple(SourceConfig(path=str(folder / f"{name}.jsonl"), name=name) for name in names)
    values = {"sequence_length": 96, "batch_size": BATCH, "packing_window": 20, "seed": 3, "stream": StreamSection(2)}
    return DataConfig(train=sources, **(values | changes))


class Pipeline:
    """Batches as lists of what their documents are: (source, row)."""

    def __init__(self, tokenizer, config):
        self._tokenizer, self._rows = tokenizer, open_train_rows(tokenizer, config)
        self.batches, self.fingerprint = self._rows.batches, json.loads(json.dumps(self._rows.fingerprint))

    def take(self, count):
        found = []
        for _ in range(count):
            batch = next(self.batches)
            for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
                texts = [self._tokenizer.decode(tokens[segments == i]) for i in range(1, segments.max() + 1)]
                found += [tuple(text.split("user\n")[1].split("?")[0].split()) for text in texts]
        return found

    def carry_over(self, other):
        """Goes on from where ``other`` is, as a run would: by way of JSON."""
        state = json.loads(json.dumps(other.batches.get_state()))
        self.batches.carry_over(state, other.fingerprint, self.fingerprint)
        other.batches.close()


def test_in_memory_it_goes_on_from_the_same_part_of_the_epoch(folder, tokenizer):
    old = Pipeline(tokenizer, make_config(folder))
    per_epoch = sum(ROWS[name] for name in "ab")
    seen = len(old.take(13))
    new = Pipeline(tokenizer, make_config(folder, sequence_length=72, batch_size=6))
    assert digest_change(old.fingerprint, new.fingerprint) != digest_change(new.fingerprint, old.fingerprint)
    new.carry_over(old)
    assert new.batches.get_state()["grain"]["next_index"] == 13
    left = []
    while new.batches.get_state()["epoch"] == 0:
        state = new.batches.get_state()
        left += new.take(1)
    assert abs(len(left) - (per_epoch - seen)) < 40 < seen, "two batches, where the epochs meet"
    again = Pipeline(tokenizer, make_config(folder, sequence_length=72, batch_size=6))
    again.batches.set_state(state)
    again.take(1)
    assert again.take(9) == new.take(9), "it can be saved and restored as ever"
    for other in (again, new):
        other.batches.close()


@pytest.mark.parametrize("streaming", [True, False])
def test_with_other_weights_the_sources_go_on(folder, tokenizer, streaming):
    def make(first, second):
        config = make_config(folder, streaming=streaming, mixture=MixtureSection(by="rows"))
        weights = dict(a=first, b=second)
        return dataclasses.replace(
            config, train=tuple(dataclasses.replace(s, weight=weights[s.name]) for s in config.train)
        )

    old, new = Pipeline(tokenizer, make(1.0, 1.0)), Pipeline(tokenizer, make(9.0, 1.0))
    before = old.take(5)
    new.carry_over(old)
    after = new.take(3)
    again = set(before) & set(after)
    assert len(set(after)) == len(after) and len(again) <= 20, "at most the documents of a window come again"
    assert {name: [row for row in after if row[0] == name] for name in "ab"}["b"], "both are drawn"
    share = len([name for name, _ in after if name == "a"]) / len(after)
    assert share > 0.8, "by the new weights from here on"
    new.batches.close()


def test_a_new_source_begins_and_the_others_go_on(folder, tokenizer):
    old = Pipeline(tokenizer, make_config(folder, streaming=True))
    new = Pipeline(tokenizer, make_config(folder, "abc", streaming=True))
    before = old.take(5)
    new.carry_over(old)
    after = new.take(4)
    assert len(set(before) & set(after)) <= 20 < len(after) and {name for name, _ in after} == set("abc")
    drawn = new.batches.describe_drawn(new.batches.get_state())
    counted = [int(line.split(": ")[1].split()[0]) for line in drawn]
    assert sum(counted) == len(before) + len(after), "what was trained on before is still counted"
    new.batches.close()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("rows", [200, 40, 0])
def test_a_source_that_changes_or_goes_leaves_the_others_as_they_were(folder, tokenizer, tmp_path, streaming, rows):
    """The first one, so that the others' rows stand elsewhere in memory; of 0 rows it is left out."""
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}

    def make(place, names):
        config = make_config(place, names, streaming=streaming, mixture=MixtureSection(by="rows"))
        sources = [dataclasses.replace(source, weight=weights[source.name]) for source in config.train]
        return dataclasses.replace(config, train=tuple(sources))

    for name in "bc":
        (tmp_path / f"{name}.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    write_jsonl(tmp_path / "a.jsonl", [chat(f"a new{i}?", "word") for i in range(rows)])
    old = Pipeline(tokenizer, make(folder, "abc"))
    new = Pipeline(tokenizer, make(tmp_path, "abc" if rows else "bc"))
    before = old.take(4)
    new.carry_over(old)
    after = new.take(4)
    assert {name for name, _ in after} == set("abc" if rows else "bc")
    assert all(row.startswith("new") for name, row in after if name == "a")
    kept = [row for row in after if row[0] in "bc"] if rows else []  # without it the places in the list are others
    assert len(set(kept) & set(before)) <= 20 and len(set(kept)) == len(kept)
    new.batches.close()


def test_the_code_of_a_change_of_the_rendering_is_of_that_change(folder, tokenizer):
    pipeline = Pipeline(tokenizer, make_config(folder))
    pipeline.batches.close()
    others = [pipeline.fingerprint | {"documents": digest} for digest in ("1", "2")]
    assert len({digest_change(pipeline.fingerprint, other) for other in others}) == 2
    changed = pipeline.fingerprint | {"chat_template": "other"}  # here the documents are not known at the start
    assert digest_change(pipeline.fingerprint, changed) == digest_change(others[0], changed)


def test_from_memory_to_a_stream_the_updates_are_counted_on(folder, tokenizer):
    """The place is of another kind, so the data begins anew; phases come at the updates that they name."""
    old = Pipeline(tokenizer, make_config(folder))
    phases = MixtureSection(by="rows", phases=(PhaseConfig(step=7, weights=(0.0, 1.0)),))
    new = Pipeline(tokenizer, make_config(folder, streaming=True, mixture=phases))
    old.take(4)
    new.carry_over(old)
    assert {name for name, _ in new.take(2)} == set("ab")
    later = [name for name, _ in new.take(4)]  # those that had been drawn too early come first
    assert later[len(later) // 2 :] == ["b"] * (len(later) - len(later) // 2)
    back = Pipeline(tokenizer, make_config(folder))
    back.carry_over(new)
    assert back.batches.get_state()["grain"]["next_index"] == 10
    assert len(set(back.take(3))) > 20
    back.batches.close()
