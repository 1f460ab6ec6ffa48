"""``data.too_long = "split"``: long text in parts, each token of it trained exactly as often as in the whole."""

import dataclasses
import itertools

import numpy as np
import pytest
from kind_fixtures import make_config
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.data.batches.in_memory import load_examples
from postrain.data.batches.open import open_train_rows
from postrain.data.batches.token_shift import shift
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def text(words):
    return {"text": " ".join(f"word{i}" for i in range(words))}


def load(tmp_path, rows, tokenizer, **changes):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(path, **{"kind": "sft", "sequence_length": LENGTH, "too_long": "split"} | changes)
    return load_examples(config.train, tokenizer, config)


def trained_pairs(example):
    """(read, predicted) of each trained slot."""
    tokens, targets, mask = shift(example)
    return [(int(a), int(b)) for a, b, trained in zip(tokens, targets, mask, strict=True) if trained]


def test_no_token_is_lost_or_trained_twice(tmp_path, tokenizer):
    rows = [text(n) for n in (1, 9, 40, 120)]
    whole = load(tmp_path, rows, tokenizer, sequence_length=4096).examples
    found = load(tmp_path, rows, tokenizer)
    parts = {line: list(group) for line, group in itertools.groupby(found.examples, lambda e: e.ref.line)}
    for example in whole:
        own, slots = parts[example.ref.line], len(example.tokens) - 1
        assert len(own) == -(-slots // LENGTH) and all(part.slots <= LENGTH for part in own)
        assert sum(map(trained_pairs, own), []) == trained_pairs(example)
        assert all(after.tokens[0] == before.tokens[-1] for before, after in itertools.pairwise(own))
        assert all(part.slots == LENGTH for part in own[:-1]) and not any(part.truncated for part in own)
    total = found.report.total
    assert (total.rows, total.documents, total.too_long, total.truncated) == (4, len(found.examples), 0, 0)
    assert total.split == sum(len(own) > 1 for own in parts.values()) == 3
    assert total.trained == sum(len(example.tokens) - 1 for example in whole)
    assert total.longest == max(len(example.tokens) for example in whole)


def test_a_text_that_fits_to_the_last_token_stays_whole(tmp_path, tokenizer):
    example = load(tmp_path, [text(40)], tokenizer, sequence_length=4096).examples[0]
    slots = len(example.tokens) - 1
    (same,) = load(tmp_path, [text(40)], tokenizer, sequence_length=slots).examples
    np.testing.assert_array_equal(same.tokens, example.tokens)
    first, last = load(tmp_path, [text(40)], tokenizer, sequence_length=slots - 1).examples
    assert len(last.tokens) == 2 and last.loss_mask.tolist() == [False, True] and len(first.tokens) == slots


def test_parts_keep_the_weight_of_their_row_and_a_begin_token_stays_untrained(tmp_path, tokenizer):
    found = load(tmp_path, [text(40) | {"weight": 0.5}], tokenizer)
    assert len(found.examples) > 2 and {example.weight for example in found.examples} == {0.5}
    from real_tokenizers import get_tokenizer_folder

    llama3 = load_tokenizer(get_tokenizer_folder("llama3"))
    parts = load(tmp_path, [text(60)], llama3).examples
    assert len(parts) > 2 and parts[0].tokens[0] == llama3.bos_id and not parts[0].loss_mask[0]
    assert all(part.loss_mask[1:].all() and not part.loss_mask[0] for part in parts)


def test_a_stream_has_the_same_parts_and_goes_on_in_the_middle_of_a_row(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [text(n) for n in (40, 3, 75, 60)])
    config = make_config(path, kind="sft", sequence_length=LENGTH, too_long="split", streaming=True, batch_size=1)
    config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, shards=1), packing_window=3)
    opened = open_train_rows(tokenizer, config)
    batches = []
    for step in range(16):
        batches.append(next(opened.batches)["tokens"])
        if step == 4:
            position = opened.batches.get_state()
    opened.batches.close()
    again = open_train_rows(tokenizer, config)
    again.batches.set_state(position)
    for batch in batches[5:]:
        np.testing.assert_array_equal(next(again.batches)["tokens"], batch)
    again.batches.close()


REFUSED = {
    "conversations": ([chat("q", "a")], "messages"),
    "a prompt and its completion": ([{"prompt": "q", "completion": " a"}], "prompt_completion"),
    "pairs": ([{"prompt": "q", "chosen": " a", "rejected": " b"}], "preference"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_answers_something_is_refused_by_name(tmp_path, tokenizer, case):
    rows, kind = REFUSED[case]
    message = f"'data.too_long' = 'split' is for plain text, and source 'rows' has rows of kind {kind}: a later part"
    with pytest.raises(UserError, match=message):
        load(tmp_path, rows, tokenizer, kind="preference" if kind == "preference" else "sft")
