"""Every kind of data goes the same way: one layout, in memory and in streams, from any position, on any processes."""

import dataclasses
import json

import numpy as np
import pytest
from kind_fixtures import (
    COMMON,
    MAKERS,
    K,
    assert_same_batches,
    expected_arrays,
    join_processes,
    make_config,
    make_rows,
    without_shuffle,
)
from pipeline_fixtures import make_tokenizer_folder, write_jsonl

from postrain.config import Config, MixtureSection, ModelSection, PreferenceSection, RewardSection
from postrain.data.batches.in_memory import MemoryBatches, load_examples, make_eval_batches
from postrain.data.batches.open import join_positions, open_train_rows
from postrain.data.preview import preview
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

EXTRA = {
    "sft": {},
    "preference": {"scores": (np.float32, ()), "group_ids": (np.int32, ())},
    "labelled": {"labels": (np.int32, ())},
    "stepwise": {"steps": (np.int32, ())},
    "prompts": {},
    "kd": {"teacher_ids": (np.int32, (K,)), "teacher_logprobs": (np.float32, (K,))},
    "events": {"seconds": (np.int32, ()), "actions": (np.int32, ())},
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture
def paths(tmp_path, kind):
    return [write_jsonl(tmp_path / f"{name}.jsonl", make_rows(kind, 40, seed)) for seed, name in enumerate("ab")]


def tokenizer_of(kind, tokenizer):
    return None if kind == "events" else tokenizer


def take(batches, count):
    return [next(batches) for _ in range(count)]


def open_batches(config, tokenizer, **process):
    return open_train_rows(tokenizer, config, **process).batches


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_packed_row_holds_what_its_documents_hold_alone(kind, paths, tokenizer, packing):
    config = make_config(*paths, kind=kind, packing=packing)
    example_set = load_examples(config.train, tokenizer_of(kind, tokenizer), config)
    assert len(example_set.examples) == 80 and example_set.kind.name == kind.partition("/")[0]
    batches = MemoryBatches(example_set, config)
    shared = 0
    for batch in take(batches, batches.num_steps(1)):
        extra = {name: (a.dtype.type, a.shape[2:]) for name, a in batch.items() if name not in (*COMMON, "row_ids")
                 and name != "metadata"}  # fmt: skip
        assert extra == EXTRA[example_set.kind.name]
        for b, ids in enumerate(batch["row_ids"]):
            documents = [example_set.examples[i] for i in ids[ids >= 0]]
            shared += len(documents) > 1
            for name, expected in expected_arrays(documents, 128).items():
                np.testing.assert_array_equal(batch[name][b], expected, name)
    batches.close()
    assert bool(shared) == (packing == "best_fit")


def test_an_empty_row_of_an_evaluation_has_every_array(kind, paths, tokenizer):
    config = make_config(*paths, kind=kind, batch_size=96)
    example_set = load_examples(config.train, tokenizer_of(kind, tokenizer), config)
    batches = make_eval_batches(example_set, config)
    last = batches[-1]
    assert not last["segment_ids"][-1].any() and all(not last[name][-1].any() for name in EXTRA[example_set.kind.name])
    trained = sum(sequence.num_trained for document in example_set.examples for sequence in document.sequences)
    assert sum(batch["loss_mask"].sum() for batch in batches) == trained
    assert (trained == 0) == (kind == "prompts")


def test_a_stream_of_one_shard_gives_what_memory_gives(kind, paths, tokenizer):
    tokenizer = tokenizer_of(kind, tokenizer)
    memory = open_batches(without_shuffle(make_config(*paths[:1], kind=kind)), tokenizer)
    stream = open_batches(without_shuffle(make_config(*paths[:1], kind=kind, streaming=True)), tokenizer)
    assert_same_batches(take(memory, 10), take(stream, 10))
    memory.close()
    stream.close()


WAYS = {
    "memory": {},
    "mixture": {"mixture": MixtureSection(temperature=2.0)},
    "stream": {"streaming": True, "shards": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_and_a_resume_give_the_same_batches(kind, paths, tokenizer, way):
    tokenizer, config = tokenizer_of(kind, tokenizer), make_config(*paths, kind=kind, **WAYS[way])
    whole = open_batches(config, tokenizer)
    expected = take(whole, 14)
    whole.close()
    parts = [open_batches(config, tokenizer, process_index=p, process_count=2) for p in range(2)]
    first = [join_processes([next(part) for part in parts]) for _ in range(6)]
    state = json.loads(json.dumps(join_positions([part.get_state() for part in parts])))
    resumed = open_batches(config, tokenizer)
    resumed.set_state(state)
    given = [*first, *(join_processes([batch]) for batch in take(resumed, 8))]
    assert_same_batches(given, [join_processes([batch]) for batch in expected])
    for one in (*parts, resumed):
        one.close()


@pytest.mark.parametrize("way", WAYS)
def test_metadata_stands_beside_its_prompt(tmp_path, tokenizer, way):
    path = write_jsonl(tmp_path / "prompts.jsonl", make_rows("prompts", 40))
    batches = open_batches(make_config(path, kind="prompts", **WAYS[way]), tokenizer)
    seen = 0
    for batch in take(batches, 6):
        for tokens, segments, metadata in zip(batch["tokens"], batch["segment_ids"], batch["metadata"], strict=True):
            assert segments.max() == len(metadata)
            for segment, told in enumerate(metadata, 1):
                text = tokenizer.decode(tokens[segments == segment])
                assert text.startswith(f"<|im_start|>user\nq {told['answer']} ") and text.endswith("assistant\n")
                assert told == {"answer": told["answer"], "tests": [{"in": int(told["answer"])}]}
                seen += 1
    assert seen > 24
    batches.close()


@pytest.mark.parametrize("streaming", [False, True])
def test_preview_shows_every_kind(kind, paths, tokenizer_folder, tmp_path, streaming):
    model = "" if kind == "events" else str(tokenizer_folder)
    recipe = "preference" if kind.startswith("preference") or kind == "labelled" else "sft"
    recipe = {"stepwise": "reward", "kd": "distill"}.get(kind, recipe)
    data = make_config(*paths, kind=kind, streaming=streaming)
    section = PreferenceSection(loss="kto" if kind == "labelled" else "sigmoid")
    config = Config(recipe=recipe, data=data, model=ModelSection(tokenizer=model), preference=section)
    config = dataclasses.replace(config, reward=RewardSection(loss="stepwise"))
    if kind in ("sft", "preference", "labelled", "kd"):
        other = dataclasses.replace(config, recipe="preference" if recipe == "sft" else "sft")
        with pytest.raises(UserError, match=f"rows of kind {kind}, but recipe {other.recipe!r} reads rows of kind"):
            preview(other, color=False)
    text = preview(config, tmp_path / "page.html", rows=2, color=False)
    page = (tmp_path / "page.html").read_text()
    row = make_rows(kind, 1)[0]
    told = {
        "sft": "⟦word", "preference": "[scores 0]", "preference/list": "[scores 1]", "kd": "teacher_ids",
        "labelled": "[labels 0]", "stepwise": "[steps 0 0",
        "prompts": '[metadata {"answer": "0", "tests": [{"in": 0}]}]',
        "events": "⟦" + " ".join(map(str, row.get("items", [])[1:])),
    }[kind]  # fmt: skip
    assert told in text and "documents by length" in text
    assert page.count("<pre ") == {"preference": 4, "preference/list": text.count("[scores")}.get(kind, 2)


def test_sources_of_two_kinds_are_refused(tmp_path, tokenizer):
    first = write_jsonl(tmp_path / "chats.jsonl", make_rows("sft", 3))
    other = write_jsonl(tmp_path / "pairs.jsonl", make_rows("preference", 3))
    for streaming in (False, True):
        config = make_config(first, other, kind="sft", streaming=streaming)
        pairs = make_config(other, kind="preference").train
        config = type(config)(**{**vars(config), "train": (config.train[0], *pairs)})
        with pytest.raises(UserError, match="source 'chats' is of kind sft and source 'pairs' of kind preference"):
            open_batches(config, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_refuses_rows_of_another_kind(tmp_path, tokenizer, streaming):
    path = write_jsonl(tmp_path / "pairs.jsonl", make_rows("preference", 3))
    config = make_config(path, kind="preference", streaming=streaming)
    with pytest.raises(UserError, match="source 'pairs' has rows of kind preference, and the recipe reads .* kind sft"):
        open_train_rows(tokenizer, config, kind="sft")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("found", ["preference", "preference/list", "stepwise", "kd", "events", "prompts"])
def test_rows_of_another_kind_name_the_kind_to_set(tmp_path, tokenizer, found, streaming):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(found, 3))
    kind = found.partition("/")[0]
    advice = f": set kind='{kind}' for the source"
    if kind == "preference":
        advice = ", for recipe 'preference': use a config like configs/preference.py"
    if kind == "stepwise":
        advice = ", for recipe 'reward' with 'reward.loss' = 'stepwise': use a config like configs/reward.py"
    if kind == "labelled":
        advice = ", for recipe 'preference' with 'preference.loss' = 'kto' or 'bco' or 'apo_zero_unpaired': use a"
    if kind == "kd":
        advice = ", for recipe 'distill' with 'distill.teacher' = '': use a config like configs/distill.py"
    with pytest.raises(UserError, match=f"{path}:1.* is a row of kind {kind}{advice}"):
        open_batches(make_config(path, kind="sft", streaming=streaming), tokenizer)


def test_a_function_that_leaves_the_label_in_a_row_is_told_to_take_it_out(tmp_path, tokenizer):
    def rated(row):
        return row

    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "a", "label": True}])
    config = make_config(path, kind=rated)
    with pytest.raises(UserError, match="have .*rated take 'label' out of them, or use another recipe"):
        load_examples(config.train, tokenizer, config, kind="sft")


def test_a_row_that_misses_a_key_is_not_taken_for_a_prompt(tmp_path, tokenizer):
    for kind, key in (("sft", "completion"), ("preference", "rejected")):
        whole = {"prompt": "p", **({"chosen": "a", "rejected": "b"} if kind == "preference" else {"completion": "a"})}
        rows = [whole, {name: value for name, value in whole.items() if name != key}]
        config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), kind=kind)
        with pytest.raises(UserError, match=f"rows.jsonl:2: '{key}' "):
            open_batches(config, tokenizer)
        config = make_config(write_jsonl(tmp_path / "alone.jsonl", rows[1:]), kind=kind)
        with pytest.raises(UserError, match="alone.jsonl:1: ") as error:
            open_batches(config, tokenizer)
        assert kind == "sft" or "prompts" not in str(error.value)


def test_pairs_and_lists_are_two_forms(tmp_path, tokenizer):
    rows = [*make_rows("preference", 1), *make_rows("preference/list", 1)]
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), kind="preference")
    with pytest.raises(UserError, match="rows.jsonl:2: expected a row of kind pair, .*; found one of kind scored_list"):
        open_batches(config, tokenizer)


@pytest.mark.parametrize("kind", ["preference", "prompts"])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_cut_is_not(tmp_path, tokenizer, kind, streaming):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(kind, 3))
    with pytest.raises(UserError, match=f"'data.too_long' = 'truncate': part of a row of kind {kind} cannot be used"):
        open_batches(make_config(path, kind=kind, streaming=streaming, too_long="truncate"), tokenizer)


@pytest.mark.parametrize(("kind", "fits"), [("preference", 2), ("prompts", 0), ("kd", 1), ("events", 1)])
def test_a_document_fits_to_the_token(tmp_path, tokenizer, kind, fits):
    """Of each sequence the last token takes no slot, but in prompts, where it is read."""
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(kind, 1))
    tokenizer = tokenizer_of(kind, tokenizer)
    loose = make_config(path, kind=kind)
    [document] = load_examples(loose.train, tokenizer, loose).examples
    length = document.num_tokens - fits
    tight = make_config(path, kind=kind, sequence_length=length, too_long="error")
    [same] = load_examples(tight.train, tokenizer, tight).examples
    assert same.slots == length
    tighter = make_config(path, kind=kind, sequence_length=length - 1, too_long="error")
    with pytest.raises(UserError, match=f"has {length + fits} tokens, data.sequence_length = {length - 1} takes up to"):
        load_examples(tighter.train, tokenizer, tighter)
