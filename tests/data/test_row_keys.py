"""What becomes of every key of a row: it is read, ignored on purpose, refused by name, or counted as unread."""

import collections
import json
import pathlib
import random

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from kind_fixtures import make_config, make_rows
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl
from rendering_fixtures import load_real, render_row, trained_texts

from postrain.config import Config, DataConfig, ModelSection, SourceConfig
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches.in_memory import load_examples
from postrain.data.batches.open import open_train_rows
from postrain.data.batches.row_filter import RowCounts, add_up
from postrain.data.kinds.preference import parse_preference
from postrain.data.messages import parse_row
from postrain.data.preview import preview
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.data.row_keys import (
    CALL_KEYS,
    FALSE_FLAGS,
    FUNCTION_KEYS,
    MESSAGE_KEYS,
    NUMBER_FLAGS,
    PART_KEYS,
    ROW_KEYS,
    TRUE_FLAGS,
    WEIGHT_KEYS,
)
from postrain.errors import UserError

CASES = pathlib.Path(__file__).with_name("cases")
REF = RowRef("train", "rows.jsonl", 7)
USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}
SECOND = [{"role": "user", "content": "Another one?"}, {"role": "assistant", "content": "Green."}]
CHAT = {"messages": [USER, ANSWER, *SECOND]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen3():
    return load_real("qwen3", "qwen3")


def load(path, tokenizer, **changes):
    config = DataConfig(train=(SourceConfig(path=str(path)),), sequence_length=512, **changes)
    return load_examples(config.train, tokenizer, config)


def tokens_and_mask(row, tokenizer):
    return [(one.tokens.tolist(), one.loss_mask.tolist()) for one in render_row(row, tokenizer)]


# The small inputs that went wrong


ONLY_THE_LAST = ["Green is another.<|im_end|>"]
REFUSED = {
    "06f-chain_of_thought": r"messages\[1\] has different reasoning in 'chain_of_thought' and 'cot'",
    "07a-images-column": "'images' is not read: only text is trained on",
    "07b-images-in-message": r"messages\[0\]: 'images' is not read: only text is trained on",
    "08-documents": "'documents' is not read: it would be missing in the prompt",
    "09a-enable_thinking": "'enable_thinking' is not read: reasoning is switched on by",
    "09b-reasoning_effort": "'reasoning_effort' is not read",
    "10a-available_tools": "'available_tools' is not read: name it 'tools'",
    "10c-instruction": "'instruction' is not read: it would be missing in the prompt",
    "10e-context": "'context' is not read: it would be missing in the prompt",
    "10f-input": "'input' is not read: it would be missing in the prompt",
    "21h-dup-keys": "invalid JSON: the key 'messages' stands twice in an object",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_that_is_refused_by_name(name, qwen3):
    with pytest.raises(BadRow, match=rf"{name}\.jsonl:1: .*{REFUSED[name]}"):
        load(CASES / f"{name}.jsonl", qwen3)


MASKED = ["01-flag-training", "03-flag-loss_weight", "04-flag-loss_mask", "05b-flag-trainable", "05c-flag-ignore",
          "05e-flag-mask_history", "05f-row-loss_mask"]  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_a_case_that_trains_the_last_answer_only(name, qwen3):
    (example,) = load(CASES / f"{name}.jsonl", qwen3).examples
    assert trained_texts(qwen3, example) == ONLY_THE_LAST


@pytest.mark.parametrize("name", ["06a-thinking_blocks", "06d-think"])
def test_a_case_with_reasoning_under_another_name(name, qwen3):
    (example,) = load(CASES / f"{name}.jsonl", qwen3).examples
    assert "Seven eights are fifty-six." in trained_texts(qwen3, example)[0]
    assert example.template_switches == ()


def test_the_case_of_weights(qwen3):
    loaded = load(CASES / "05j-row-weight.jsonl", qwen3)
    # Qwen3's template makes two sequences of each row. Those of weight 0 are left out, and counted.
    assert [(example.ref.line, example.weight) for example in loaded.examples] == [(2, 0.25)] * 2
    assert loaded.report.total.untrained == 2


def test_the_case_of_tools_that_are_json_strings(qwen3):
    rows = [json.loads(line) for line in (CASES / "14-tools-json-strings.jsonl").read_text().splitlines()]
    loaded = load(CASES / "14-tools-json-strings.jsonl", qwen3)
    for row, example in zip(rows, loaded.examples, strict=True):
        expected = row | {"tools": [json.loads(tool) for tool in row["tools"]]}
        assert [(example.tokens.tolist(), example.loss_mask.tolist())] == tokens_and_mask(expected, qwen3)


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [("23a-conversations", "a", "b"), ("23b-sharegpt", "a", "b"), ("23c-alpaca", "Name a colour.", "Blue.")],
)
def test_a_case_of_another_form(name, prompt, answer, qwen3):
    (example,) = load(CASES / f"{name}.jsonl", qwen3).examples
    assert [(example.tokens.tolist(), example.loss_mask.tolist())] == tokens_and_mask(chat(prompt, answer), qwen3)


# Forms of other tools

CALL = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}]
FORMS = {
    "sharegpt": (
        {
            "system": "Be brief.",
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "Human", "value": "1+1?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "two", "loss": False},
                {"from": "user", "value": "and again?"},
                {"from": "assistant", "value": "still two"},
            ],
        },
        {
            "tools": TOOLS,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "two", "train": False},
                {"role": "user", "content": "and again?"},
                {"role": "assistant", "content": "still two"},
            ],
        },
    ),
    "alpaca": (
        {
            "instruction": "Translate.",
            "input": "good day",
            "output": "bonjour",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
            "mask_history": True,
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello", "train": False},
                {"role": "user", "content": "Translate.\ngood day"},
                {"role": "assistant", "content": "bonjour"},
            ]
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("declared", [True, False])
def test_a_form_of_another_tool_has_the_ids_and_masks_of_its_messages(tmp_path, form, declared, qwen3):
    row, messages = FORMS[form]
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    config = DataConfig(train=(SourceConfig(path=str(path), kind=form if declared else "sft"),), sequence_length=512)
    found = load_examples(config.train, qwen3, config)
    got = [(one.tokens.tolist(), one.loss_mask.tolist()) for one in found.examples]
    assert got == tokens_and_mask(messages, qwen3)
    assert found.report.sources[0].unread == {}


BAD_FORMS = {
    "from": ({"conversations": [{"from": "narrator", "value": "x"}]}, r"conversations\[0\].from must be one of human"),
    "both": ({"conversations": [{"from": "human", "value": "x", "role": "user"}]}, "has both 'from' and 'value' and"),
    "no list": ({"conversations": "hi"}, "conversations is not valid JSON"),
    "an object": ({"conversations": {"a": 1}}, "'conversations' must be a list of turns; found an object"),
    "no value": ({"conversations": [{"from": "human"}]}, r"conversations\[0\].content is missing"),
    "a call": ({"conversations": [{"from": "function_call", "value": "{"}]}, r"conversations\[0\].value is not valid"),
    "two systems": (
        {"system": "x", "conversations": [{"from": "system", "value": "y"}, {"from": "gpt", "value": "z"}]},
        "'system' stands beside a first turn that is a system message",
    ),
    "no output": ({"instruction": "x", "output": " "}, "'output' is empty"),
    "nothing to do": ({"instruction": "", "output": "x"}, "'instruction' and 'input' are empty"),
    "history": ({"instruction": "x", "output": "y", "history": [["a"]]}, r"history\[0\] must be a pair"),
    "context": ({"instruction": "x", "output": "y", "context": "z"}, "'context' is not read"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_a_bad_row_of_another_form(row, reason):
    with pytest.raises(BadRow, match=reason):
        parse_row(row, "sft", REF)


def test_the_keys_of_an_unknown_shape_and_what_to_write_are_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "x", "reply": "y"}])
    for streaming in (False, True):
        with pytest.raises(UserError) as error:
            open_train_rows(tokenizer, make_config(path, kind="sft", streaming=streaming))
        assert "'query', 'reply'" in str(error.value) and "a function as the source's kind" in str(error.value)


# What is trained, in other words

FLAGS = [
    *({word: off} for word, off in [("train", False), ("training", False), ("trainable", False), ("ignore", True)]),
    {"train_on_turn": False},
    *({word: off} for word, off in [("masked", True), ("loss", False), ("loss", 0), ("loss_weight", 0.0)]),
    *({word: off} for word, off in [("weight", 0), ("loss_mask", 0), ("loss_mask", False)]),
]


@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_an_answer_that_is_context_only(flag):
    row = {"messages": [USER, ANSWER | flag, *SECOND]}
    assert [m.get("train") for m in parse_row(row, "sft", REF).messages] == [None, False, None, None]
    word, off = next(iter(flag.items()))
    on = {"messages": [USER, ANSWER | {word: type(off)(not off)}, *SECOND]}
    assert [m.get("train") for m in parse_row(on, "sft", REF).messages] == [None, True, None, None]


def test_that_a_question_is_not_trained_may_be_said():
    said = USER | {"train": False, "masked": True, "loss_weight": 0, "ignore": False}
    assert parse_row({"messages": [said, ANSWER]}, "sft", REF).messages == (USER, ANSWER)


BAD_WORDS = {
    "half a message": ({"loss_mask": 0.5}, {}, r"messages\[1\].loss_mask must be 0 or 1, for a message as a whole"),
    "a message's weight": ({"weight": -1}, {}, r"messages\[1\].weight must be 0, or a number from 1e-6 to 1e6, for"),
    "two of a message": ({"weight": 2, "loss_weight": 3}, {}, "'weight': 2, 'loss_weight': 3 contradict each other"),
    "a mask of tokens": ({"loss_mask": [0, 1]}, {}, r"messages\[1\].loss_mask must be 0 or 1"),
    "not a boolean": ({"training": "no"}, {}, r"messages\[1\].training must be true or false"),
    "a contradiction": ({"train": True, "weight": 0}, {}, "'train': True, 'weight': 0 contradict each other"),
    "details": ({"train_detail": [{"begin_offset": 0}]}, {}, "'train_detail' is not read: a message is trained as a"),
    "as many": ({}, {"loss_mask": [0, 1]}, "'loss_mask' must be a list of 0 and 1, one for each of messages"),
    "of a question": ({}, {"loss_mask": [1, 1, 0, 1]}, r"'loss_mask' is 1 for messages\[0\]"),
    "of both": ({"train": True}, {"loss_mask": [0, 0, 0, 1]}, r"messages\[1\] and the row's 'loss_mask' contradict"),
    "history": ({}, {"mask_history": 3}, "'mask_history' must be true or false; found 3"),
    "a weight": ({}, {"weight": -1}, "'weight' must be 0, or a number from 1e-6 to 1e6; found -1"),
    "infinity": (
        {},
        {"sample_weight": float("inf")},
        "'sample_weight' must be 0, or a number from 1e-6 to 1e6; found inf",
    ),
    "two weights": ({}, {"weight": 1, "loss_weight": 2}, "'weight' and 'loss_weight' contradict each other"),
    "encrypted": (
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {},
        r"reasoning_details\[0\]: only reasoning as plain text can be trained on; found 'reasoning.encrypted'",
    ),
    "a late thought": (
        {"content": [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "y"}]},
        {},
        r"content\[1\]: only text parts can be trained on; found 'thinking'",
    ),
    "harmony": ({"channel": "analysis"}, {}, "'channel' is not read: write an analysis as reasoning_content"),
    "a refusal": ({"refusal": "No."}, {}, "'refusal' is not read"),
    "arguments": ({"tool_calls": [{"name": "f", "args": {"a": 1}}]}, {}, "'args' is not read: name it 'arguments'"),
    "beside": (
        {"tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]},
        {},
        "'arguments' is not read: beside 'function'",
    ),
    "a picture": ({"content": [{"type": "text", "text": "x", "image": "y"}]}, {}, "'image' is not read: only text"),
    "schema": ({}, {"tools": [{"name": "f", "input_schema": {"a": 1}}]}, "'input_schema' is not read: name it"),
}


@pytest.mark.parametrize(("of_answer", "of_row", "reason"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_a_word_that_is_refused(of_answer, of_row, reason):
    with pytest.raises(BadRow, match=reason):
        parse_row({"messages": [USER, ANSWER | of_answer, *SECOND]} | of_row, "sft", REF)


@pytest.mark.parametrize(
    "words",
    [
        {"reasoning": "why"},
        {"chain_of_thought": "why"},
        {"thinking_blocks": [{"type": "thinking", "thinking": "why", "signature": "s"}]},
        {"reasoning": "why", "reasoning_details": [{"type": "reasoning.text", "text": "why"}]},
        {"content": [{"type": "thinking", "thinking": "why", "signature": "s"}, {"type": "text", "text": "Blue."}]},
    ],
)
def test_reasoning_of_other_tools(words):
    unread = set()
    _, answer = parse_row({"messages": [USER, ANSWER | words]}, "sft", REF, unread).messages
    assert not unread
    assert answer == {"role": "assistant", "content": "Blue.", "reasoning_content": "why"}


def test_weights_of_rows_weigh_their_tokens(tmp_path, tokenizer):
    """As the loss divides by the sum of ``loss_mask``, a weighted mean over tokens is what an update minimises."""
    rows = [chat("q", "a") | {"weight": 0.25}, chat("q", "word " * 9) | {"weight": "2"}, chat("q", "a")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(path, kind="sft", shuffle=False, packing="none", batch_size=3, too_long="truncate")
    plain = make_config(write_jsonl(tmp_path / "plain.jsonl", [{"messages": r["messages"]} for r in rows]), kind="sft",
                        shuffle=False, packing="none", batch_size=3)  # fmt: skip
    batches = []
    for one in (config, plain):
        opened = open_train_rows(tokenizer, one)
        batches.append(next(opened.batches)["loss_mask"])
        opened.batches.close()
    np.testing.assert_array_equal(batches[0], batches[1] * np.float32([[0.25], [2], [1]]))
    hashes = [load(p, tokenizer).fingerprint["documents"] for p in (path, tmp_path / "plain.jsonl")]
    assert hashes[0] != hashes[1]


def test_a_weight_stays_with_what_is_left_of_a_row(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("q", "word " * 400) | {"weight": 0.5}])
    (example,) = load(path, tokenizer, too_long="truncate").examples
    assert example.truncated and example.weight == 0.5


# What is not read is counted


def noted(rows):
    """Rows of which every second has a key of its own, and every third an unknown key further in."""
    return [
        row | ({"difficulty": 3} if i % 2 else {"difficulty": None}) | ({"split": "a"} if i % 3 == 0 else {})
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("kind", ["sft", "preference", "kd", "events", "prompts"])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_what_is_not_read_is_counted_exactly(tmp_path, kind, shards, tokenizer):
    rows = noted(make_rows(kind, 60))
    if kind in ("sft", "prompts"):
        for i, row in enumerate(rows):
            (row.get("messages") or row["prompt"])[0] |= {"foo": 1} if i % 4 == 0 else {}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = None if kind == "events" else tokenizer
    expected = {"difficulty": 30, "split": 20, "messages[].foo": 15}
    if kind == "prompts":  # all else is metadata
        expected = {"prompt[].foo": 15}
    elif kind != "sft":
        expected.pop("messages[].foo")
    if kind == "events":
        expected["member"] = 60
    config = make_config(path, kind=kind, streaming=bool(shards), shards=shards or 1, batch_size=3)
    if not shards:
        found = load_examples(config.train, tokenizer, config).report.sources[0].unread
    else:
        batches, again = (open_train_rows(tokenizer, config).batches for _ in range(2))
        next(batches)
        again.set_state(json.loads(json.dumps(batches.get_state())))
        for stream in (batches, again):
            for _ in range(50):  # beyond the first epoch, which is the one that is counted
                next(stream)
            stream_state = stream.get_state()
            found = add_up("rows", [shard["counts"][0] for shard in stream_state["shards"].values()]).unread
            assert found == expected
            line = stream.format_consumption(stream_state)[1]
            assert line.startswith("source 'rows': keys that were not read: ")
            stream.close()
    assert found == expected


def test_of_answers_their_key_is_named():
    row = {"prompt": [USER], "chosen": [ANSWER | {"foo": 1}], "rejected": [SECOND[1] | {"bar": 1}], "gap": 2.0}
    unread = set()
    parse_preference(row, "pair", REF, unread)
    assert unread == {"chosen[].foo", "rejected[].bar", "gap"}
    with pytest.raises(BadRow, match="'weight' is not read: rows of this kind all count the same"):
        parse_preference(row | {"weight": 2.0}, "pair", REF, set())


def test_what_is_not_read_is_printed_for_each_source(tmp_path, folder, tokenizer):
    one = write_jsonl(tmp_path / "one.jsonl", [chat("q", "a") | {"difficulty": i} for i in range(12)])
    two = write_jsonl(tmp_path / "two.jsonl", [chat("q", "a", foo=1, timestamp=3), chat("q", "b") | {"id": 1}])
    line = "source 'one': keys that were not read: 'difficulty' (12 rows)"
    other = "source 'two': keys that were not read: messages[].foo (1 row)"
    config = make_config(one, two, kind="sft")
    opened = open_train_rows(tokenizer, config)
    assert opened.summary.splitlines()[-2:] == [line, other] and list(opened.notes) == [line, other]
    opened.batches.close()
    page = tmp_path / "page.html"
    text = preview(Config(data=config, model=ModelSection(path=str(folder))), page, color=False)
    assert line in text and other in text
    assert line.replace("'", "&#39;") in page.read_text() and other.replace("'", "&#39;") in page.read_text()


def test_keys_that_are_ids_do_not_fill_a_position():
    counts = RowCounts("x")
    for i in range(1000):
        counts.add_unread([f"key {i} " + "long" * 50, "common"])
    assert len(counts.unread) <= 201 and counts.unread["common"] == 1000
    assert sum(counts.unread.values()) == 2000
    text = counts.format_unread()
    assert text.startswith("source 'x': keys that were not read: 'common' (1,000 rows), ") and len(text) < 3000
    assert text.endswith("and 180 or more others")
    again = RowCounts("x")
    again.set(json.loads(json.dumps(counts.to_json())))
    assert again == counts and add_up("x", [counts.to_json()] * 2).unread["common"] == 2000


def to_chat(row):
    return chat(row["q"], row["a"]) | {"made": 1}


def test_of_a_function_only_what_it_returned_counts(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "x", "a": "y", "mood": 1}] * 3)
    config = make_config(path, kind=to_chat)
    assert load_examples(config.train, tokenizer, config).report.sources[0].unread == {"made": 3}


# Files


def test_columns_of_json_are_decoded(tmp_path, qwen3):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"b": {"default": None}}}}}
    row = chat("1+1?", "2") | {"tools": [tool]}
    text = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": [text], "tools": [datasets.Json()]})
    table = datasets.Dataset.from_dict({key: [value] * 2 for key, value in row.items()}, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    expected = tokens_and_mask(row, qwen3)
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        found = load(path, qwen3).examples
        assert [[(one.tokens.tolist(), one.loss_mask.tolist())] for one in found] == [expected] * 2
    assert "arrow.json" in str(pq.read_schema(tmp_path / "rows.parquet"))


def quote(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_csv_has_the_same_keys(tmp_path, suffix, streaming, tokenizer):
    rows = [chat('line one\nline two, "quoted"', f"caf\u00e9 {i}") for i in range(4)]
    separator = "," if suffix == "csv" else "\t"
    lines = [["", "messages", "tools", "difficulty"]]
    lines += [[str(i), quote(json.dumps(row["messages"], indent=1)), "", "3"] for i, row in enumerate(rows)]
    path = tmp_path / f"rows.{suffix}"
    path.write_text("\ufeff" + "".join(separator.join(line) + "\r\n" for line in lines), encoding="utf-8", newline="")
    given = write_jsonl(tmp_path / "rows.jsonl", rows)
    batches = []
    for one in (path, given):
        config = make_config(one, kind="sft", streaming=streaming, shuffle=False, packing="none")
        opened = open_train_rows(tokenizer, config)
        batches.append(next(opened.batches)["tokens"].tolist())
        opened.batches.close()
    assert batches[0] == batches[1]
    found = load(path, tokenizer)
    assert found.report.sources[0].unread == {"difficulty": 4}
    assert [e.ref.line for e in found.examples] == [2 + 10 * i for i in range(4)]  # each spans ten lines


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,completion\na,b\nc\n", "rows.csv:3: expected 2 fields, as in the first line; found 1"),
        ("prompt,completion\na,\n", "rows.csv:2: 'completion' is empty"),
        ("prompt,prompt\na,b\n", "rows.csv:1: expected different names of columns; found ['prompt', 'prompt']"),
        ('prompt,completion\na,b\nc,"d\n', "rows.csv:3: the row that begins here is not CSV: unexpected end of data"),
        ("prompt,completion\na,caf\udce9\n", "rows.csv:2: not UTF-8: byte 0xe9"),
        ("messages\n[1\n", "rows.csv:2: messages is not valid JSON"),
    ],
)
def test_a_bad_row_of_csv_is_named_by_its_line(tmp_path, tokenizer, text, reason):
    (tmp_path / "rows.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        load(tmp_path / "rows.csv", tokenizer)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_csv_of_other_forms(tmp_path, tokenizer):
    (tmp_path / "rows.csv").write_text("instruction,input,output,weight\nName a colour.,,Blue.,0.5\n")
    (example,) = load(tmp_path / "rows.csv", tokenizer).examples
    assert example.weight == 0.5
    assert [(example.tokens.tolist(), example.loss_mask.tolist())] == tokens_and_mask(
        chat("Name a colour.", "Blue."), tokenizer
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"name": "f", '
        '"arguments": "{\\"a\\": 1, \\"a\\": 2}"}]}]}',
    ],
)
def test_a_key_that_stands_twice_is_refused_at_any_level(tmp_path, line, tokenizer):
    with pytest.raises(BadRow, match=r"rows.jsonl:1: .*the key '(content|a)' stands twice in an object"):
        load(write_jsonl(tmp_path / "rows.jsonl", [line]), tokenizer)


# All keys at all levels, at random

BLOCK = {"type": "thinking", "thinking": "a"}, {"type": "reasoning.text", "text": "a"}
# (level, key) or key -> two values that mean something else, where "one" and "two" would not do.
VALUES = {
    "tools": (TOOLS, [TOOLS[0] | {"strict": True}]),
    "mask_history": (True, False),
    ("row", "loss_mask"): ([0, 0, 0, 1], [0, 1, 0, 0]),
    "history": ([["a", "b"]], [["c", "d"]]),
    "tool_calls": ([CALL], [CALL | {"name": "sub"}]),
    "thinking_blocks": ([BLOCK[0]], [BLOCK[0] | {"thinking": "b"}]),
    "reasoning_details": ([BLOCK[1]], [BLOCK[1] | {"text": "b"}]),
    ("call", "function"): (CALL, CALL | {"name": "sub"}),
    ("function", "arguments"): ({"a": 1}, {"a": 2}),
}
VALUES |= {("row", key): (2.0, 3.0) for key in WEIGHT_KEYS}
VALUES |= {("message", key): (True, False) for key in (*TRUE_FLAGS, *FALSE_FLAGS)}
VALUES |= {("message", key): (1, 0) for key in NUMBER_FLAGS}
LONG_ANSWER = {"content": [{"type": "text", "text": "Blue."}], "tool_calls": [{"id": "c", "function": CALL}]}
ROWS = {
    "messages": {"messages": [USER, ANSWER | LONG_ANSWER, *SECOND]},
    "sharegpt": {"conversations": CHAT["messages"]},
    "alpaca": {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    "prompt_completion": {"prompt": [USER], "completion": [ANSWER]},
    "text": {"text": "abc"},
}
INNER = {
    "message": ("messages[].", MESSAGE_KEYS),
    "part": ("messages[].content[].", PART_KEYS),
    "call": ("messages[].tool_calls[].", CALL_KEYS),
    "function": ("messages[].tool_calls[].function.", FUNCTION_KEYS),
}
# What a row of these forms cannot be without; and the types, which tell only whether a part is read.
FIXED = {"messages", "conversations", "prompt", "completion", "content", "role", "type"}


def place(form, level, key, value):
    """A row of the form that has the key at a level."""
    row = json.loads(json.dumps(ROWS[form]))
    target = row
    if level != "row":
        target = row["messages"][1]
    if level == "part":
        target = target["content"][0]
    elif level in ("call", "function"):
        target = target["tool_calls"][0]
        target = target["function"] if level == "function" else target
    target[key] = value
    return row


def find_fate(form, level, key):
    """What becomes of a key, by what ``parse_row`` does with two values of it."""
    name = INNER[level][0] + key if level in INNER else key
    outcomes, counted = [], []
    for value in VALUES.get((level, key)) or VALUES.get(key) or ("one", "two"):
        unread = set()
        try:
            outcomes.append(parse_row(place(form, level, key, value), form, REF, unread))
        except BadRow as bad:
            assert f"{key!r} is not read: " in bad.reason
            return "refused"
        assert unread <= {name}
        counted.append(name in unread)
    changed = outcomes[0] != outcomes[1]
    assert counted[0] == counted[1] and not (changed and counted[0])
    return "counted" if counted[0] else "read" if changed else "ignored"


def test_every_key_has_one_fate():
    rng = random.Random(0)
    places = [*((form, "row", ROW_KEYS[form]) for form in ROWS), *(("messages", x, INNER[x][1]) for x in INNER)]
    fates = collections.Counter()
    for form, level, keys in places:
        listed = [*keys.read, *keys.refused, *sorted(keys.ignored)]
        made = ["x" + "".join(rng.choices("bcdfgh_", k=rng.randint(3, 9))) for _ in range(40)]
        for key in {*listed, *made} - FIXED:
            expected = "counted"
            for name, group in (("ignored", keys.ignored), ("refused", keys.refused), ("read", keys.read)):
                expected = name if key in group else expected
            assert find_fate(form, level, key) == expected, (form, level, key)
            fates[expected] += 1
    assert min(fates.values()) > 50 and len(fates) == 4


def test_what_is_ignored_or_counted_changes_neither_tokens_nor_mask(qwen3):
    rng, expected = random.Random(1), tokens_and_mask(CHAT, qwen3)
    for _ in range(20):
        row = json.loads(json.dumps(CHAT))
        for target, keys in [(row, ROW_KEYS["messages"]), *((m, MESSAGE_KEYS) for m in row["messages"])]:
            for key in rng.sample([*sorted(keys.ignored), "xq", "xz_w"], 3):
                target[key] = rng.choice(["text", 3, True, ["a"], {"b": None}])
        assert tokens_and_mask(row, qwen3) == expected


def test_alpaca_with_its_rendered_text_is_alpaca():
    row = {"instruction": "Name a film.", "input": "", "output": "Heat.", "text": "Below is an instruction. Heat."}
    unread = set()
    example = parse_row(row, "sft", RowRef("s", "f", 1), unread)
    assert [m["content"] for m in example.messages] == ["Name a film.", "Heat."] and unread == {"text"}


@pytest.mark.parametrize("weight", [1e39, "1e39", 1e-50, 10**400, -1, True, "much"])
def test_a_weight_that_float32_cannot_hold_is_refused(weight):
    with pytest.raises(BadRow, match="'weight' must be 0, or a number from 1e-6 to 1e6; found "):
        parse_row({"text": "a", "weight": weight}, "sft", RowRef("s", "f", 1))


def make_turns(*, train=None):
    first = {"role": "assistant", "content": "b"} | ({} if train is None else {"train": train})
    user = {"role": "user", "content": "a"}
    return [user, first, user, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": make_turns(train=True), "mask_history": True},
            "messages.1. is to be trained, and 'mask",
        ),
        (
            {"messages": make_turns(), "mask_history": True, "loss_mask": [0, 1, 0, 1]},
            "messages.1. is to be trained, and 'mask",
        ),
        ({"prompt": make_turns(train=True), "completion": "d"}, "prompt.1. is to be trained, and a prompt is not"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "", "tool_calls": [{"id": 3, "function": {"name": "f"}}]},
                ]
            },
            "messages.1..tool_calls.0..id must be a string; found a number",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]},
                ]
            },
            "'type' is not read: only calls of functions can be trained on",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": "b",
                        "thinking_blocks": [{"type": "thinking", "thinking": "a", "texts": "b"}],
                    },
                ]
            },
            "unknown key 'texts'; did you mean 'text'",
        ),
    ],
)
def test_what_contradicts_itself_or_would_be_dropped_is_refused(row, words):
    with pytest.raises(BadRow, match=words):
        parse_row(row, "sft", RowRef("s", "f", 1))


def test_a_loss_mask_is_of_the_turns_beside_a_system_key():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"}
    example = parse_row(row | {"loss_mask": [0, 1]}, "sft", RowRef("s", "f", 1))
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant"]
    row["conversations"][0]["value"] = None
    with pytest.raises(BadRow, match="conversations.0..content is missing or null"):
        parse_row(row, "sft", RowRef("s", "f", 1))


def test_names_of_unread_keys_are_printed_escaped():
    counts = RowCounts("x")
    counts.add_unread(["messages[].\ud800x", "\x1b[2J"])
    line = counts.format_unread()
    assert line.isprintable() and line.encode("utf-8") and "messages[].\\ud800x (1 row)" in line
