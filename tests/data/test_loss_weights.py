"""Weights of a source's loss and of single answers: they weigh tokens, and change neither shares nor the mask."""

import dataclasses

import numpy as np
import pytest
from kind_fixtures import make_config
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import DataConfig, SourceConfig
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import load_examples, make_eval_batches
from postrain.data.batches.open import open_train_rows
from postrain.data.batches.token_shift import shift
from postrain.data.kinds.preference import parse_preference
from postrain.data.messages import parse_row
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

REF = RowRef("s", "f", 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    from real_tokenizers import get_template, get_tokenizer_folder

    template = tmp_path_factory.mktemp("qwen3") / "qwen3.jinja"
    template.write_text(get_template("qwen3"))
    return load_tokenizer(get_tokenizer_folder("qwen3"), chat_template=template)


def two_sources(tmp_path, weight, **changes):
    rows = {"a": [chat("q", "yes") | {"weight": 2.0}, chat("q", "no")], "b": [chat("q", "it may be")] * 2}
    sources = tuple(
        SourceConfig(path=str(write_jsonl(tmp_path / f"{name}.jsonl", rows[name])), loss_weight=w)
        for name, w in (("a", weight), ("b", 1.0))
    )
    options = {"sequence_length": 64, "batch_size": 4, "packing": "none", "shuffle": False} | changes
    return DataConfig(train=sources, **options)


def test_a_source_weighs_its_tokens_beside_the_weights_of_its_rows(tmp_path, tokenizer):
    masks, prints = [], []
    for weight in (1.0, 0.25):
        data = two_sources(tmp_path, weight)
        loaded = load_examples(data.train, tokenizer, data)
        [batch] = make_eval_batches(loaded, data)
        masks.append(batch["loss_mask"])
        header, *lines = loaded.report.table()
        shown = [line[-1] for line in lines] if header[-1] == "loss weight" else []
        assert shown == ([] if weight == 1 else ["0.25", "1", ""])
        prints.append(loaded.fingerprint)
    np.testing.assert_array_equal(masks[1], masks[0] * np.float32([[0.25], [0.25], [1], [1]]))
    assert masks[0].max(1).tolist() == [2, 1, 1, 1]
    assert compare_fingerprints(*prints) == ["source 'a': loss_weight was 1, is 0.25"]


def test_a_stream_weighs_them_too_and_shares_stay_as_they_are(tmp_path, tokenizer):
    found = {}
    for weight in (1.0, 0.5):
        data = two_sources(tmp_path, weight, streaming=True)
        data = dataclasses.replace(data, stream=dataclasses.replace(data.stream, shards=1))
        opened = open_train_rows(tokenizer, data)
        found[weight] = [next(opened.batches) for _ in range(3)], opened.fingerprint
        opened.batches.close()
        assert ("a: loss weight 0.5" in opened.summary) == (weight == 0.5)
    for plain, weighted in zip(found[1.0][0], found[0.5][0], strict=True):
        np.testing.assert_array_equal(plain["tokens"], weighted["tokens"])
    values = lambda weight: sorted({float(x) for batch in found[weight][0] for x in batch["loss_mask"].max(1)})
    assert values(1.0) == [1.0, 2.0] and values(0.5) == [0.5, 1.0]
    assert compare_fingerprints(found[1.0][1], found[0.5][1]) == ["source 'a': loss_weight was 1, is 0.5"]


def test_kinds_whose_rows_all_count_the_same_refuse_it(tmp_path, tokenizer):
    rows = [{"prompt": "q", "chosen": " yes", "rejected": " no"}]
    source = SourceConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", rows)), kind="preference", loss_weight=2.0)
    data = DataConfig(train=(source,))
    message = "'loss_weight' of source 'pairs': rows of kind preference all count the same: leave it out, or give"
    with pytest.raises(UserError, match=message):
        load_examples(data.train, tokenizer, data)


# Of single answers


def converse(*weights):
    """A conversation with an answer for each weight; None: without one."""
    messages = []
    for i, weight in enumerate(weights):
        messages += chat(f"question {i}", f"answer number {i}")["messages"]
        messages[-1] |= {} if weight is None else {"weight": weight}
    return {"messages": messages}


def weights_of_answers(example):
    """Of each trained stretch of a document the weights of its tokens."""
    _, _, mask = shift(example)
    starts = np.flatnonzero((mask != 0) & (np.append(0, mask[:-1]) == 0))
    ends = np.flatnonzero((mask != 0) & (np.append(mask[1:], 0) == 0))
    return [sorted(set(mask[start : end + 1].tolist())) for start, end in zip(starts, ends, strict=True)]


def load(tmp_path, rows, tokenizer, **changes):
    config = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), kind="sft", **changes)
    return load_examples(config.train, tokenizer, config)


@pytest.mark.parametrize("spelt", ["", " <|im_end|> in words"])
def test_an_answer_weighs_its_own_tokens(tmp_path, tokenizer, spelt):
    """Also where control tokens that the row spells have the text encoded by the second tokenizer."""
    row, plain = converse(0.5, None, 3.0, 0), converse(None, None, None, 0)
    for one in (row, plain):
        one["messages"][0]["content"] += spelt
    (found,), (without,) = (load(tmp_path, [one], tokenizer, sequence_length=512).examples for one in (row, plain))
    assert weights_of_answers(found) == [[0.5], [1.0], [3.0]] and weights_of_answers(without) == [[1.0]] * 3
    np.testing.assert_array_equal(found.tokens, without.tokens)
    np.testing.assert_array_equal(found.loss_mask, without.loss_mask)
    assert without.weights is None, "nothing is stored where nothing is weighed"


def test_rows_and_answers_multiply_and_a_cut_document_keeps_its_weights(tmp_path, tokenizer):
    rows = [converse(0.5, 3.0) | {"weight": 2.0}, converse(2.0, 4.0)]
    rows[1]["messages"][-1]["content"] = "word " * 300
    first, cut = load(tmp_path, rows, tokenizer, sequence_length=64, too_long="truncate").examples
    assert weights_of_answers(first) == [[1.0], [6.0]]
    assert cut.truncated and len(cut.tokens) == 65 and weights_of_answers(cut) == [[2.0], [4.0]]


def test_a_template_that_makes_a_document_of_each_turn_keeps_them_apart(tmp_path, qwen3):
    row = converse(0.5, 2.0)
    row["messages"][1]["reasoning_content"] = "why"  # Qwen3's template drops it in later prompts
    examples = load(tmp_path, [row], qwen3, sequence_length=256).examples
    assert [weights_of_answers(example) for example in examples] == [[[0.5]], [[2.0]]]


def test_the_hash_of_documents_tells_weights_apart(tmp_path, tokenizer):
    hashes = [
        load(tmp_path, [converse(*weights)], tokenizer, sequence_length=512).fingerprint["documents"]
        for weights in ((None, None), (1, 1.0), (1, 0.5), (0.5, 1))
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_other_words_for_it_and_what_contradicts(tmp_path, tokenizer):
    words = {"loss_weight": 0.5, "train": True, "masked": False}
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": "a", **words}]}
    row["prompt"] = [{"role": "user", "content": "q"}]
    assert parse_row(row, "sft", REF).messages[-1]["weight"] == 0.5
    for answer, message in (
        ({"weight": 0.5, "train": False}, "'train': False, 'weight': 0.5 contradict each other"),
        ({"weight": True}, None),
        ({"weight": "0.5"}, r"messages\[1\].weight must be 0, or a number from 1e-6 to 1e6"),
        ({"weight": float("nan")}, r"messages\[1\].weight must be 0, or a number from 1e-6 to 1e6"),
    ):
        if message is None:
            assert "weight" not in parse_row(chat("q", "a", **answer), "sft", REF).messages[-1]
            continue
        with pytest.raises(BadRow, match=message):
            parse_row(chat("q", "a", **answer), "sft", REF)
    with pytest.raises(BadRow, match="only assistant messages can be trained"):
        parse_row(
            {"messages": [{"role": "user", "content": "q", "weight": 0.5}, *chat("q", "a")["messages"]]}, "sft", REF
        )
    pair = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a", "weight": 2}],
    }
    with pytest.raises(BadRow, match=r"weight must be 0 or 1, for a message as a whole; found 2"):
        parse_preference(pair | {"rejected": [{"role": "assistant", "content": "b"}]}, "pair", REF, set())
