"""A group whose sequences begin alike has that beginning in its row once, and nothing of it is lost or doubled."""

import json

import numpy as np
import pytest
from tiny_models import make_tiny_tokenizer

from postrain.config import DataConfig, SourceConfig
from postrain.data.bad_row import RowRef
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import load_examples, make_eval_batches
from postrain.data.batches.token_shift import assemble_row, shift
from postrain.data.documents import (
    AS_RENDERED,
    Field,
    Group,
    Preparation,
    Rendered,
    count_shared_slots,
    layout_of,
    share_prompts,
)
from postrain.data.rendering.tokenizer import load_tokenizer

REF = RowRef("test", "test", 1)


def make_sequence(tokens, first, score=0.0, reads_last=False, seen=None, mask=None):
    mask = np.arange(len(tokens)) >= first if mask is None else mask
    fields = (Field("scores", np.full(len(tokens), score, np.float32), "sequence"),)
    if seen is not None:
        fields += (Field("seen", np.asarray(seen, np.int32), "token"),)
    return Rendered(np.asarray(tokens, np.int32), mask, REF, fields=fields, reads_last=reads_last)


def make_group(prompt, *answers, **options):
    return Group(
        tuple(make_sequence([*prompt, *answer], len(prompt), i, **options) for i, answer in enumerate(answers))
    )


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [
        (make_group([1, 2, 3, 4], [5], [6, 7]).sequences, 3),
        (make_group([1], [5], [6, 7]).sequences, 0),
        (make_group([1, 2, 3], [5, 6], [5, 7], [5, 6, 7]).sequences, 2),  # answers that begin alike
        ((make_sequence([1, 2, 3, 4], 3), make_sequence([1, 2, 9, 4, 5], 4)), 1),  # prompts that part
        ((make_sequence([1, 2, 3, 4], 1), make_sequence([1, 2, 3, 4, 5], 4)), 0),  # one trains more of it
        ((make_sequence([1, 2, 3], 3, reads_last=True), make_sequence([1, 2, 3, 4], 4, reads_last=True)), 2),
        ((make_sequence([1, 2, 3], 3), make_sequence([1, 2, 3], 3)), 1),  # a slot is left to each
        (make_group([1, 2, 3, 4], [5], [6], seen=[0, 1, 2, 3, 4]).sequences, 3),
        (
            (make_sequence([1, 2, 3, 4], 3, seen=[0, 1, 2, 3]), make_sequence([1, 2, 3, 5], 3, seen=[0, 9, 2, 3])),
            0,
        ),  # read together with other values
    ],
)
def test_what_a_group_shares(sequences, shared):
    assert count_shared_slots(sequences) == shared


def unfold(row, layout):
    """Of each segment of a group ``{name: values}`` as it would be with its prefix before it, in order."""
    found = []
    for segment in range(1, row["segment_ids"].max() + 1):
        own = np.flatnonzero(row["segment_ids"] == segment)
        if not row["group_ids"][own[0]]:
            assert not row["loss_mask"][own].any() and not row["scores"][own].any()
            continue
        prefix = np.arange(row["prefix_starts"][own[0]], row["prefix_ends"][own[0]])
        assert len(set(row["segment_ids"][prefix])) <= 1 and (prefix < own[0]).all()
        slots = np.concatenate([prefix, own])
        found.append({name: row[name][slots] for name in ("tokens", "targets", "loss_mask", "positions", *layout)})
    return found


@pytest.mark.parametrize("reads_last", [False, True])
def test_every_sequence_is_read_from_its_prefix_on(reads_last):
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(3, 300, length).tolist()
    groups = [
        make_group(draw(prompt), *map(draw, answers), reads_last=reads_last, seen=None)
        for prompt, answers in ((7, (3, 4)), (1, (2, 5, 1)), (12, (1, 1, 9, 2, 6)), (2, (8, 3)))
    ]
    holes = np.array([False] * 7 + [True, False, True, False])
    groups[0] = Group(
        (groups[0].sequences[0], make_sequence(groups[0].sequences[1].tokens, 0, 2.0, reads_last, mask=holes))
    )
    shared = [share_prompts().each(group) for group in groups]
    assert [group.shared_slots for group in shared] == [6, 0, 11, 1]
    slots = sum(group.slots for group in shared)
    assert slots == sum(group.slots for group in groups) - 6 - 4 * 11 - 1
    row = assemble_row(shared, slots, layout_of(shared[0]))
    assert (row["segment_ids"] > 0).all(), "every slot is used"
    found = unfold(row, ("scores",))
    sequences = [sequence for group in groups for sequence in group.sequences]
    for segment, sequence in zip(found, sequences, strict=True):
        tokens, targets, loss_mask = shift(sequence)
        np.testing.assert_array_equal(segment["tokens"], tokens)
        np.testing.assert_array_equal(segment["targets"], targets)
        np.testing.assert_array_equal(segment["loss_mask"], loss_mask)
        np.testing.assert_array_equal(segment["positions"], np.arange(len(tokens)))
        trained = segment["loss_mask"] > 0
        scores = sequence.fields[0].values[1:]
        np.testing.assert_array_equal(segment["scores"][trained], scores[trained[: len(scores)]])
    assert [set(row["group_ids"][row["segment_ids"] == i]) for i in (1, 2, 3, 4)] == [{0}, {1}, {1}, {2}]


def test_a_row_of_arrays_read_with_the_tokens():
    group = share_prompts().each(make_group([1, 2, 3], [4, 5], [6, 7], seen=[10, 11, 12, 13, 14]))
    row = assemble_row([group], 8, layout_of(group))
    np.testing.assert_array_equal(row["tokens"], [1, 2, 3, 4, 3, 6, 0, 0])
    np.testing.assert_array_equal(row["targets"], [2, 3, 4, 5, 6, 7, 0, 0])
    np.testing.assert_array_equal(row["seen"], [10, 11, 12, 13, 12, 13, 0, 0])
    np.testing.assert_array_equal(row["scores"], [0, 0, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(row["prefix_ends"], [0, 0, 2, 2, 2, 2, 0, 0])


def test_a_preparation_goes_first_and_single_documents_stay():
    half = Preparation("without ends", each=lambda document: cut(document))

    def cut(document):
        if isinstance(document, Group):
            return Group(tuple(map(cut, document.sequences)))
        return make_sequence(document.tokens[:-1], 2)

    both = share_prompts(half)
    assert both.name == "without ends, with shared prompts"
    assert both.each(make_group([1, 2], [3, 4], [5, 6])).slots == 1 + 2 * 1
    one = make_sequence([1, 2, 3], 1)
    assert share_prompts().each(one) is one and layout_of(one) == layout_of(make_group([1], [2], [3]).sequences[0])


@pytest.fixture
def load(tmp_path):
    """``load(preparation, **data)``: pairs with prompts of odd lengths, read from a file."""
    rows = [
        {"prompt": f"{'why ' * (i % 5 * 4)}{i} ", "chosen": "so " * (1 + i % 3), "rejected": "no"} for i in range(23)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(make_tiny_tokenizer(tmp_path / "tokenizer"))
    sources = (SourceConfig(path=str(tmp_path / "pairs.jsonl"), kind="preference"),)

    def load(preparation, **data):
        config = DataConfig(**{"train": sources, "sequence_length": 256, "batch_size": 2} | data)
        return load_examples(sources, tokenizer, config, preparation=preparation), config

    return load


def test_a_file_of_pairs_takes_fewer_slots_and_says_so(load):
    shared, config = load(share_prompts())
    plain, _ = load(AS_RENDERED)
    saved = plain.lengths.sum() - shared.lengths.sum()
    prompts = [int(group.sequences[0].loss_mask.argmax()) for group in plain.examples]
    assert saved == sum(prompts) - len(prompts) == shared.report.saved_slots > 500
    assert shared.report.packed_rows < plain.report.packed_rows and plain.report.saved_slots == 0
    share = saved / plain.lengths.sum()
    assert f"shared prompts: {saved:,} slots saved, {share:.1%} of those that the answers" in str(shared.report)
    assert "shared prompts" not in str(plain.report)
    assert shared.report.total.tokens == plain.report.total.tokens, "tokens are those of the rows"
    trained = lambda rows: sum((batch["loss_mask"] > 0).sum() for batch in make_eval_batches(rows, config))
    assert trained(shared) == trained(plain) == shared.report.total.trained


def test_groups_that_fit_only_with_a_shared_prompt_are_kept(load):
    shared, _ = load(share_prompts(), sequence_length=128)
    assert len(shared.examples) == 23
    assert "; 4 documents would be too long so, and left out where prompts are not shared" in str(shared.report)
    plain, _ = load(AS_RENDERED, sequence_length=128)
    assert plain.report.total.too_long == 4 and len(plain.examples) == 19


def test_the_fingerprint_says_that_prompts_are_shared(load):
    shared, plain = (load(preparation)[0].fingerprint for preparation in (share_prompts(), AS_RENDERED))
    assert compare_fingerprints(plain, shared) == [
        "documents were trained as rendered, are with shared prompts (config key 'data.share_prompts', which was off "
        "then)"
    ]
    assert "preparation" not in plain
