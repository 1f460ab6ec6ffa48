"""The stream of batches: every document once an epoch, the same rows on any number of processes, exact resume."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from pipeline_fixtures import (
    QUICKSTART,
    chat,
    fewest_rows,
    make_config,
    make_example_set,
    make_tokenizer_folder,
    write_jsonl,
)
from rendering_fixtures import CHATML, load_real

from postrain.config import SourceConfig
from postrain.data.batches import epoch_order
from postrain.data.batches.epoch_order import EpochOrder
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import MemoryBatches, load_examples, make_eval_batches
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

FIELDS = {"tokens", "targets", "loss_mask", "segment_ids", "positions", "row_ids"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def _take(iterator, num):
    return [next(iterator) for _ in range(num)]


def _assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == FIELDS
        for name in FIELDS:
            np.testing.assert_array_equal(batch[name], other[name], name)


def _documents(batch):
    return batch["row_ids"][batch["row_ids"] >= 0].tolist()


# The stream


@pytest.mark.parametrize("changes", [{}, {"packing": "none"}, {"shuffle": False}, {"batch_size": 1}, {"seed": -5}])
def test_every_document_exactly_once_in_every_epoch(changes):
    example_set, config = make_example_set(150, 64), make_config(**changes)
    plan = EpochOrder(example_set.lengths, config)
    iterator = MemoryBatches(example_set, config)
    rows = [row[row >= 0] for batch in _take(iterator, iterator.num_steps(3)) for row in batch["row_ids"]]
    for epoch in range(3):
        of_epoch = rows[plan.first_row(epoch) : plan.first_row(epoch + 1)]
        assert sorted(np.concatenate(of_epoch).tolist()) == list(range(150))
    iterator.close()


def test_a_set_smaller_than_a_batch_goes_round():
    example_set = make_example_set(3, 64)
    config = make_config(batch_size=8, packing="none")
    iterator = MemoryBatches(example_set, config)
    seen = collections.Counter(i for batch in _take(iterator, 3) for i in _documents(batch))
    assert seen == {0: 8, 1: 8, 2: 8} and iterator.num_steps(1) == 1
    iterator.close()


def test_batches_hold_what_the_documents_say():
    example_set, config = make_example_set(60, 64), make_config()
    iterator = MemoryBatches(example_set, config)
    for batch in _take(iterator, 12):
        assert batch["tokens"].shape == (4, 64) and batch["row_ids"].shape[0] == 4
        assert {n: a.dtype for n, a in batch.items()} == {n: np.int32 for n in FIELDS} | {"loss_mask": np.float32}
        for b, ids in enumerate(batch["row_ids"]):
            for segment, i in enumerate(ids[ids >= 0], 1):
                document, slots = example_set.examples[i], batch["segment_ids"][b] == segment
                assert batch["tokens"][b, slots].tolist() == document.tokens[:-1].tolist()
                assert batch["targets"][b, slots].tolist() == document.tokens[1:].tolist()
                assert batch["loss_mask"][b, slots].tolist() == document.loss_mask[1:].tolist()
                assert batch["positions"][b, slots].tolist() == list(range(slots.sum()))
            empty = batch["segment_ids"][b] == 0
            assert batch["segment_ids"][b].max() == (ids >= 0).sum() and not batch["loss_mask"][b, empty].any()
    iterator.close()


def test_epochs_are_shuffled_differently_and_by_the_seed():
    example_set = make_example_set(100, 64)

    def order(epoch, **changes):
        return np.concatenate(EpochOrder(example_set.lengths, make_config(**changes)).rows_of_epoch(epoch)).tolist()

    assert order(0) == order(0) and len({tuple(order(e, seed=s)) for e in range(3) for s in range(3)}) == 9
    assert order(0, shuffle=False, packing="none") == list(range(100)) == order(1, shuffle=False, packing="none")


def test_shuffled_order_is_pinned():
    """A resume under another numpy or postrain must give the same rows: change PLAN_VERSION with these numbers."""
    rows = EpochOrder(np.array([5, 3, 8, 2, 7, 1, 4]), make_config(sequence_length=10, seed=1)).rows_of_epoch(2)
    assert [row.tolist() for row in rows] == [[1, 4], [3, 2], [0, 6, 5]]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_rows_do_not_depend_on_the_number_of_processes(process_count):
    example_set, config = make_example_set(90, 64), make_config(batch_size=8)
    plan = EpochOrder(example_set.lengths, config)
    iterators = [
        MemoryBatches(example_set, config, process_index=p, process_count=process_count) for p in range(process_count)
    ]
    for step in range(10):
        local = [next(i) for i in iterators]
        assert all(batch["tokens"].shape == (8 // process_count, 64) for batch in local)
        got = [row[row >= 0].tolist() for batch in local for row in batch["row_ids"]]
        assert got == [documents.tolist() for documents in map(plan.__getitem__, range(8 * step, 8 * step + 8))]
    assert all(i.get_state() == iterators[0].get_state() for i in iterators)
    for i in iterators:
        i.close()


def test_batch_must_divide_among_processes():
    with pytest.raises(UserError, match=r"data\.batch_size must be a multiple of the 3 processes; found 4"):
        MemoryBatches(make_example_set(9, 64), make_config(), process_count=3)
    with pytest.raises(UserError, match="5 rows does not divide among 2"):
        make_eval_batches(make_example_set(9, 64), make_config(batch_size=5), process_count=2)


# The saved position


@pytest.mark.parametrize("changes", [{}, {"packing": "none"}, {"batch_size": 16}, {"shuffle": False}])
def test_restored_at_any_step_the_following_batches_are_the_same(changes):
    example_set, config = make_example_set(40, 64), make_config(**changes)
    iterator = MemoryBatches(example_set, config)
    num = iterator.num_steps(2) + 4  # past the ends of two epochs
    states, batches = [iterator.get_state()], []
    for _ in range(num):
        batches.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    iterator.close()
    assert max(len(json.dumps(state)) for state in states) < 200
    for step in range(num):
        resumed = MemoryBatches(example_set, config)
        resumed.set_state(states[step])
        assert resumed.get_state() == states[step]
        _assert_same(_take(resumed, min(3, num - step)), batches[step : step + 3])
        assert resumed.get_state() == states[min(step + 3, num)]
        resumed.close()


def test_an_iterator_can_be_set_back_in_spite_of_prefetch():
    example_set, config = make_example_set(40, 64), make_config()
    iterator = MemoryBatches(example_set, config)
    _take(iterator, 2)
    state = iterator.get_state()
    first = _take(iterator, 25)
    iterator.set_state(state)
    _assert_same(_take(iterator, 25), first)
    iterator.close()


def test_restored_on_another_number_of_processes():
    example_set, config = make_example_set(40, 64), make_config()
    one = MemoryBatches(example_set, config)
    _take(one, 9)
    two = [MemoryBatches(example_set, config, process_index=p, process_count=2) for p in range(2)]
    for iterator in two:
        iterator.set_state(one.get_state())
    for _ in range(9):
        whole = next(one)
        halves = [next(iterator) for iterator in two]
        for name in FIELDS - {"row_ids"}:
            np.testing.assert_array_equal(whole[name], np.concatenate([half[name] for half in halves]))
    for iterator in (one, *two):
        iterator.close()


def test_a_restored_position_does_not_pack_the_epochs_before_it(monkeypatch):
    example_set, config = make_example_set(40, 64), make_config()
    iterator = MemoryBatches(example_set, config)
    _take(iterator, iterator.num_steps(6))
    state = iterator.get_state()
    iterator.close()
    packed = []
    # Each epoch is shuffled by a seed of its own, (seed, epoch, ...), before it is packed.
    permute = epoch_order.permutation
    monkeypatch.setattr(epoch_order, "permutation", lambda size, seed: packed.append(seed[1]) or permute(size, seed))
    resumed = MemoryBatches(example_set, config)
    resumed.set_state(state)
    next(resumed)
    resumed.close()
    assert state["epoch"] >= 5 and packed and min(packed) == state["epoch"]


# Evaluation


@pytest.mark.parametrize("batch_size", [4, 1, 7, 64])
def test_evaluation_has_every_document_once_and_fills_up_with_nothing(batch_size):
    example_set, config = make_example_set(50, 64), make_config(batch_size=batch_size)
    batches = make_eval_batches(example_set, config)
    assert sorted(i for batch in batches for i in _documents(batch)) == list(range(50))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 64)}
    trained = sum(int(e.loss_mask.sum()) for e in example_set.examples)
    assert sum(batch["loss_mask"].sum() for batch in batches) == trained
    for batch in batches:
        empty = (batch["row_ids"] < 0).all(axis=1)
        assert not batch["segment_ids"][empty].any() and batch["segment_ids"][~empty].any(axis=1).all()
    _assert_same(batches, make_eval_batches(example_set, dataclasses.replace(config, seed=9)))


def test_evaluation_cut_by_process_is_the_same_rows():
    example_set, config = make_example_set(50, 64), make_config()
    whole = make_eval_batches(example_set, config)
    parts = [make_eval_batches(example_set, config, process_index=p, process_count=2) for p in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(batch["tokens"], np.concatenate([half["tokens"] for half in halves]))


def test_rows_are_named_by_file_and_line():
    batches = MemoryBatches(make_example_set(40, 64), make_config())
    assert batches.describe_rows(np.array([[4, 0, -1], [4, -1, -1]])) == "made.jsonl:5, made.jsonl:1"
    assert batches.describe_rows(np.arange(20)).endswith("made.jsonl:16 and 4 more")
    batches.close()


# Loading


def _load(folder, rows, tokenizer, rejected_path=None, **changes):
    path = write_jsonl(folder / "rows.jsonl", rows)
    return load_examples((SourceConfig(path=str(path)),), tokenizer, make_config(**changes), rejected_path)


def test_the_quickstart_rows_are_rendered_counted_and_packed(tokenizer):
    files = sorted(QUICKSTART.glob("*.jsonl"))
    config = make_config(sequence_length=256, packing_window=10_000)
    example_set = load_examples([SourceConfig(path=str(file)) for file in files], tokenizer, config)
    total = example_set.report.total
    assert [s.rows for s in example_set.report.sources] == [len(file.read_text().splitlines()) for file in files]
    assert total.documents == total.rows == len(example_set.examples) and total.skipped == total.too_long == 0
    assert total.tokens == sum(len(e.tokens) for e in example_set.examples)
    assert total.trained == sum(int(e.loss_mask.sum()) for e in example_set.examples)
    assert 0.1 < total.trained / total.tokens < 0.6
    # A row holds three to five of these documents: coarse pieces, so not every slot can be filled.
    assert 1 <= example_set.report.packed_rows / fewest_rows(example_set.lengths, 256) <= 1.01
    assert all(file.stem in str(example_set.report) for file in files)
    assert f"{total.trained:,}" in str(example_set.report)
    stop = tokenizer.eos_id
    for example in example_set.examples:
        assert example.tokens[example.loss_mask][-1] == stop


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_batch_decodes_to_the_rows(tokenizer, tmp_path, packing):
    rows = [chat("first?", "one"), chat("second?", "two"), chat("third?", "three")]
    example_set = _load(tmp_path, rows, tokenizer, packing=packing, sequence_length=128)
    (batch,) = make_eval_batches(example_set, make_config(packing=packing, sequence_length=128))
    answers = []
    for targets, mask, segments in zip(batch["targets"], batch["loss_mask"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            answers.append(tokenizer.decode(targets[(mask > 0) & (segments == segment)]))
    assert answers == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]


LONG = chat("q", "word " * 200)
LONG_QUESTION = chat("word " * 200, "a")


def test_too_long_rows_are_dropped_and_counted(tokenizer, tmp_path):
    example_set = _load(tmp_path, [chat("q", "a"), LONG], tokenizer, too_long="drop")
    report = example_set.report.sources[0]
    assert (report.rows, report.documents, report.too_long, report.truncated) == (2, 1, 1, 0)
    assert report.longest > 64 and example_set.lengths.max() <= 64


def test_truncated_rows_keep_the_limit_and_those_without_answer_go(tokenizer, tmp_path):
    example_set = _load(tmp_path, [chat("q", "a"), LONG, LONG_QUESTION], tokenizer, too_long="truncate")
    report = example_set.report.sources[0]
    assert (report.documents, report.truncated, report.untrained, report.too_long) == (2, 1, 1, 0)
    assert len(example_set.examples[1].tokens) == 65 and example_set.lengths.max() == 64
    assert all(e.loss_mask[1:].any() for e in example_set.examples)


def test_the_limit_leaves_the_last_token_out(tokenizer, tmp_path):
    length = len(_load(tmp_path, [chat("q", "a b c")], tokenizer).examples[0].tokens)
    kept = _load(tmp_path, [chat("q", "a b c")], tokenizer, sequence_length=length - 1)
    assert kept.report.used_slots == (length - 1) * kept.report.packed_rows and kept.report.sources[0].longest == length
    message = f"rows.jsonl:1: the document has {length} tokens, data.sequence_length = {length - 2} takes up to "
    with pytest.raises(UserError, match=f"{message}{length - 1}: raise it"):
        _load(tmp_path, [chat("q", "a b c")], tokenizer, sequence_length=length - 2, too_long="error")


BAD = [
    "{not json",
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_stops_the_run_naming_file_and_line(tokenizer, tmp_path, bad):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: ") as error:
        _load(tmp_path, [chat("q", "a"), bad], tokenizer)
    assert "on_bad_row" in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_with_all_rows_is_not_answered_with_skipping(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*tokenizer_config.json does not render tools") as error:
        _load(tmp_path, [chat("q", "a"), chat("q", "a") | {"tools": [call]}], tokenizer)
    assert "on_bad_row" not in str(error.value)
    with pytest.raises(UserError, match=r"rows\.jsonl:2: expected a row of kind messages") as error:
        _load(tmp_path, [chat("q", "a"), {"text": "x"}], tokenizer)
    assert "on_bad_row" not in str(error.value)


def test_bad_rows_can_be_skipped_and_are_written_down(tokenizer, tmp_path):
    rejected_path = tmp_path / "run" / "rejected.jsonl"
    rows = [chat("q", "a"), BAD[0], chat("q", "b"), BAD[1], BAD[2]]
    for _ in range(2):  # a resume loads again and must not write the lines twice
        example_set = _load(tmp_path, rows, tokenizer, rejected_path, on_bad_row="skip", max_bad_fraction=0.6)
        rejected = [json.loads(line) for line in rejected_path.read_text().splitlines()]
        assert [(r["file"], r["line"]) for r in rejected] == [(str(tmp_path / "rows.jsonl"), n) for n in (2, 4, 5)]
        assert all(r.keys() == {"file", "line", "reason"} for r in rejected) and "robot" in rejected[1]["reason"]
    assert example_set.report.sources[0].skipped == 3 and len(example_set.examples) == 2


def test_train_and_eval_share_one_rejected_file(tokenizer, tmp_path):
    rejected_path = tmp_path / "rejected.jsonl"
    config = make_config(on_bad_row="skip", max_bad_fraction=0.6)
    for name in ("train", "eval", "train"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [chat("q", "a"), BAD[0]])
        load_examples((SourceConfig(path=str(path)),), tokenizer, config, rejected_path)
    files = [json.loads(line)["file"] for line in rejected_path.read_text().splitlines()]
    assert sorted(files) == [str(tmp_path / "eval.jsonl"), str(tmp_path / "train.jsonl")]


def test_too_many_bad_rows_stop_the_run_and_leave_the_reasons(tokenizer, tmp_path):
    rejected_path = tmp_path / "rejected.jsonl"
    rows = [chat("q", "a")] * 8 + [BAD[0], BAD[1]]
    assert _load(tmp_path, rows, tokenizer, on_bad_row="skip", max_bad_fraction=0.2).report.total.skipped == 2
    with pytest.raises(UserError, match=r"2 bad rows of 10, more than data\.max_bad_fraction = 0\.1 .*rows\.jsonl:10"):
        _load(tmp_path, rows, tokenizer, rejected_path, on_bad_row="skip", max_bad_fraction=0.1)
    assert len(rejected_path.read_text().splitlines()) == 2


def test_an_empty_set_is_refused_saying_why(tokenizer, tmp_path):
    with pytest.raises(
        UserError, match="nothing to train on in rows: 2 rows, 2 too long for data.sequence_length = 64"
    ):
        _load(tmp_path, [LONG, LONG], tokenizer)
    with pytest.raises(UserError, match="in rows: 1 row, 1 left with nothing to train on after truncation"):
        _load(tmp_path, [LONG_QUESTION], tokenizer, too_long="truncate")
    with pytest.raises(UserError, match="rows"):
        _load(tmp_path, [], tokenizer)


# Answers after a switch of the template


def test_a_switch_that_serving_must_set_is_said(tmp_path):
    tokenizer = load_real("qwen3", "qwen3")
    rows = [chat("q", "a"), chat("q", "a", reasoning_content="why"), chat("q", "b")]
    report = _load(tmp_path, rows, tokenizer).report
    line = "2 answers trained after enable_thinking=False: serve with it (postrain generate --thinking off)"
    assert str(report).splitlines()[-1] == line and report.template_switches == {"enable_thinking=False": 2}
    assert report.format_notes()[1:] == [line]
    assert _load(tmp_path, rows[1:2], tokenizer).report.format_notes()[1:] == []
    assert _load(tmp_path, rows[:1], load_real("qwen3", CHATML)).report.format_notes()[1:] == []


def test_an_answer_that_was_cut_away_is_not_counted(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.role == 'assistant' %}"
        "{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
    )
    row = chat("q", "a")
    long = {"messages": row["messages"] + chat("word " * 40, "b")["messages"]}
    whole = _load(tmp_path, [long], load_real("qwen3", template), sequence_length=128)
    cut = _load(tmp_path, [long], load_real("qwen3", template), sequence_length=32, too_long="truncate")
    assert whole.report.template_switches == {"enable_thinking=False": 2}
    assert cut.report.template_switches == {"enable_thinking=False": 1}


# The fingerprint


def test_the_same_pipeline_has_the_same_fingerprint(tokenizer, tmp_path):
    a = _load(tmp_path, [chat("q", "a")], tokenizer).fingerprint
    moved = tmp_path / "moved"
    moved.mkdir()
    b = _load(moved, [chat("q", "a")], tokenizer).fingerprint
    assert json.loads(json.dumps(a)) == b and compare_fingerprints(a, b) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4}, {"batch_size": 8}, {"sequence_length": 128}, {"packing": "none"}, {"packing_window": 7},
        {"shuffle": False}, {"template_date": "2025-01-01"}, {"default_system": "Be brief."},
    ],
)  # fmt: skip
def test_a_changed_setting_is_named(tokenizer, tmp_path, changes):
    a = _load(tmp_path, [chat("q", "a")], tokenizer).fingerprint
    b = _load(tmp_path, [chat("q", "a")], tokenizer, **changes).fingerprint
    ((key, value),) = changes.items()
    (line,) = compare_fingerprints(a, b)
    assert line.startswith(f"data.{key}: was ") and line.endswith(f", is {value!r}")


def test_changed_data_tokenizer_and_code_are_named(tokenizer, tmp_path):
    a = _load(tmp_path, [chat("q", "a")], tokenizer).fingerprint
    b = _load(tmp_path, [chat("q", "b")], tokenizer).fingerprint
    (line,) = compare_fingerprints(a, b)
    assert line.startswith("source 'rows': file rows.jsonl has other content")
    template = tmp_path / "other.jinja"
    template.write_text("{{ '\\n' }}" + tokenizer.chat_template)
    other = load_tokenizer(tokenizer.folder, str(template))
    assert "the chat template is another one" in compare_fingerprints(
        b, _load(tmp_path, [chat("q", "b")], other).fingerprint
    )
    version = a["versions"]["packing"]
    assert compare_fingerprints(a, a | {"versions": a["versions"] | {"packing": 0}}) == [
        f"the packing code is another version: was {version}, is 0"
    ]
    assert "the rendering code changed" in compare_fingerprints(a, a | {"documents": "0"})[0]
    with_function = a | {"sources": [{**source, "function": "function f 12"} for source in a["sources"]]}
    (change,) = compare_fingerprints(with_function, with_function | {"documents": "0"})
    assert change.endswith("function f 12 does not give the same twice, or the rendering code changed")
