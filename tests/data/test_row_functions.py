"""A function of the user's in place of a kind: what it gives, what it raises, and that a changed one is noticed."""

import gzip
import json
import pathlib
import re

import pytest
from kind_fixtures import assert_same_batches, make_config
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import format_config, resolve, to_dict
from postrain.config.load import load_config
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import load_examples
from postrain.data.batches.open import open_train_rows
from postrain.data.kinds import registry
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.report.workdir import read_config, save_config
from postrain.training.agreement import config_facts

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"
FUNCTION = '''
def to_chat(row):
    """{"q", "a"} -> messages."""
    if row.get("q") == "exit":
        raise SystemExit(3)
    if not row["a"]:
        return None
    return {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}


def get_config():
    return {"model": {"path": "m"}, "data": {"train": [{"path": "rows.jsonl", "kind": to_chat}]}}
'''


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def read_function(folder, text=FUNCTION):
    """The function as a config file gives it."""
    file = folder / "config.py"
    file.write_text(text)
    return load_config(str(file)).data.train[0].kind


def answers(numbers):
    return [{"q": f"q {i}", "a": f"a {i}" if i % 3 else ""} for i in numbers]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_it_makes_are_those_that_could_have_been_given(tmp_path, tokenizer, streaming):
    made = write_jsonl(tmp_path / "rows.jsonl", answers(range(12)))
    given = write_jsonl(tmp_path / "given.jsonl", [chat(row["q"], row["a"]) for row in answers(range(12)) if row["a"]])
    batches = []
    for path, kind in ((made, read_function(tmp_path)), (given, "sft")):
        config = make_config(path, kind=kind, streaming=streaming, shuffle=False, packing="none")
        rows = open_train_rows(tokenizer, config, kind="sft")
        batches.append([next(rows.batches)["tokens"].tolist() for _ in range(4)])
        rows.batches.close()
    assert batches[0] == batches[1]


def test_what_it_leaves_out_is_counted_under_its_name(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", answers(range(12)))
    config = make_config(path, kind=read_function(tmp_path))
    example_set = load_examples(config.train, tokenizer, config)
    assert len(example_set.examples) == 8 and example_set.report.sources[0].left_out == 4
    assert "rows: 4 rows of 12 left out by to_chat" in str(example_set.report)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": "x"}, "to_chat: KeyError: 'q'"),
        ({"a": "x", "q": "exit"}, "to_chat: SystemExit: 3"),
        ({"q": 3, "a": "x"}, "what to_chat made of it: messages[0].content must be a string; found a number"),
        (["q", "a"], "expected an object with the keys of a row, such as 'messages'; found a list"),
    ],
)
def test_what_it_raises_is_a_bad_row(tmp_path, tokenizer, row, reason, streaming):
    path = write_jsonl(tmp_path / "rows.jsonl", [*answers(range(1, 3)), row])
    config = make_config(path, kind=read_function(tmp_path), streaming=streaming)
    with pytest.raises(UserError) as error:
        next(open_train_rows(tokenizer, config).batches)
    assert str(error.value).startswith(f"{path}:3: {reason}")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_it_changes_is_the_files_own_again(tmp_path, tokenizer, streaming):
    """It is called more than once for the first rows, and again in every epoch."""
    text = FUNCTION.replace('if not row["a"]:', 'row["a"] += row.pop("more")\n    if not row["a"]:')
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps(row | {"more": "!"}) + "\n" for row in answers(range(3))).encode())
    )
    config = make_config(path, kind=read_function(tmp_path, text), streaming=streaming, shuffle=False, packing="none")
    batches = open_train_rows(tokenizer, config).batches
    rows = next(batches)["tokens"]
    batches.close()
    assert [tokenizer.decode(row[row > 0]).count("!") for row in rows] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("return None", "return {}"), "see docs/data.md"),
        (('row["q"]', 'row["Q"]'), ":1: to_chat: KeyError: 'Q'"),
    ],
)
def test_a_stream_is_not_read_further_for_a_row_of_a_known_kind(tmp_path, tokenizer, monkeypatch, change, reason):
    monkeypatch.setattr(registry, "_ENOUGH", 20)
    text = FUNCTION.replace(*change).replace("    if not", "    CALLS.append(1)\n    if not") + "\n\nCALLS = []\n"
    answer = "" if "None" in change[0] else "a"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "q", "a": answer}] * 50)
    function = read_function(tmp_path, text)
    with pytest.raises(UserError, match=re.escape(str(path)) + ": no row of a known kind in its first 20: ") as error:
        open_train_rows(tokenizer, make_config(path, kind=function, streaming=True))
    assert reason in str(error.value) and len(function.__globals__["CALLS"]) == 20


def test_a_stream_of_lines_that_cannot_be_read_says_why(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": \n' * 3)
    with pytest.raises(UserError, match="no row of kind sft in it: .*rows.jsonl:1: invalid JSON"):
        open_train_rows(tokenizer, make_config(path, kind="sft", streaming=True))


def test_rows_of_two_kinds_are_told(tmp_path, tokenizer):
    text = FUNCTION.replace("return None", "return {'prompt': row['q'], 'chosen': 'a', 'rejected': 'b'}")
    path = write_jsonl(tmp_path / "rows.jsonl", answers(range(1, 4)))
    config = make_config(path, kind=read_function(tmp_path, text))
    told = f"{path}:3: what to_chat made of it: expected a row of kind sft, as the first at {path}:1; found .*: have"
    with pytest.raises(UserError, match=told):
        load_examples(config.train, tokenizer, config)


def test_what_is_no_row_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", answers(range(3)))
    config = make_config(path, kind=read_function(tmp_path, FUNCTION.replace("return None", "return 3")))
    with pytest.raises(UserError, match=f"{path}:1: what to_chat made of it: expected an object.*; found a number"):
        load_examples(config.train, tokenizer, config)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_one_is_noticed(tmp_path, tokenizer, streaming):
    path = write_jsonl(tmp_path / "rows.jsonl", answers(range(9)))
    prints = []
    for text in (FUNCTION, "# moved\n" + FUNCTION, FUNCTION.replace('{"q", "a"}', "Other words, the same rows")):
        config = make_config(path, kind=read_function(tmp_path, text), streaming=streaming)
        prints.append(json.loads(json.dumps(open_train_rows(tokenizer, config).fingerprint)))
    assert prints[0] == prints[1]
    [change] = compare_fingerprints(prints[0], prints[2])
    assert re.fullmatch(r"source 'rows': rows went through function to_chat \w+, now function to_chat \w+", change)
    none = open_train_rows(
        tokenizer, make_config(write_jsonl(path, [chat("q", "a")]), kind="sft", streaming=streaming)
    ).fingerprint
    assert any(change.endswith("now no function") for change in compare_fingerprints(prints[0], none))


def test_config_json_has_its_name(tmp_path):
    """And can be read again, for export; data cannot be read with it."""
    file = tmp_path / "config.py"
    file.write_text(FUNCTION)
    config = load_config(str(file), {"data.seed": "7", "optimizer.name": "lion"})
    assert config.data.train[0].kind.__name__ == "to_chat" and config.data.seed == 7
    kind = to_dict(config)["data"]["train"][0]["kind"]
    assert re.fullmatch(r"function to_chat [0-9a-f]{12}", kind) and kind in format_config(config)
    assert kind in config_facts(config)["config key data.train"]  # the same in every process
    save_config(tmp_path, config)
    again = read_config(tmp_path)
    assert again.data.train[0].kind == kind
    with pytest.raises(UserError, match="config.json only names it; run with the config file"):
        load_examples(again.data.train, None, again.data)


def make_closure(word):
    def to_row(row):
        return {"text": word}

    return to_row


def without_source():
    values = {}
    exec("def to_row(row):\n    return row", values)
    return values["to_row"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda row: row, "config key 'data.train.kind' is a lambda"),
        (make_closure("x"), "make_closure.<locals>.to_row reads variables of the function around it (word)"),
        (without_source(), "the source text of to_row cannot be found"),
        (dict, "expected a function, found <class 'dict'>"),
    ],
)
def test_a_function_that_cannot_be_known_again_is_refused(function, reason):
    with pytest.raises(UserError) as error:
        resolve({"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl", "kind": function}]}})
    assert reason in str(error.value) and "write it with `def` in the config file" in str(error.value)


def test_the_function_of_the_guide(tmp_path, tokenizer):
    text = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    rows = [
        {"question": "q ", "a": "yes", "b": "no", "votes_a": 1, "votes_b": 2},
        {"question": "q ", "a": "yes", "b": "no", "votes_a": 2, "votes_b": 2},
    ]
    path = write_jsonl(tmp_path / "votes.jsonl", rows)
    config = make_config(path, kind=read_function(tmp_path, text))
    example_set = load_examples(config.train, tokenizer, config)
    [group] = example_set.examples
    assert [tokenizer.decode(one.tokens) for one in group.sequences] == ["q no<|im_end|>", "q yes<|im_end|>"]
    assert example_set.kind.name == "preference" and example_set.report.sources[0].left_out_by == "to_pair"


def test_a_stream_goes_on_from_any_position(tmp_path, tokenizer):
    """Rows left out stand between those that are kept: places in files count both."""
    path = write_jsonl(tmp_path / "rows.jsonl", answers(range(200)))
    config = make_config(path, kind=read_function(tmp_path), streaming=True, shards=2, sequence_length=64)
    whole = open_train_rows(tokenizer, config).batches
    states, batches = [], []
    for _ in range(16):
        batches.append(next(whole))
        states.append(json.loads(json.dumps(whole.get_state())))
    whole.close()
    for step in (0, 3, 8, 13):
        resumed = open_train_rows(tokenizer, config).batches
        resumed.set_state(states[step])
        assert_same_batches([next(resumed) for _ in batches[step + 1 :]], batches[step + 1 :])
        resumed.close()
