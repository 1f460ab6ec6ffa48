"""How answers are scored, and the questions that held-out rows become."""

import numpy as np
import pytest
from tiny_models import make_tiny_tokenizer

from postrain.data.bad_row import RowRef
from postrain.data.messages import parse_row
from postrain.data.rendering.render import Rendered, render, render_prompt
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.files import read_jsonl
from postrain.rollout.answers import (
    Question,
    Sample,
    append_samples,
    exact_match,
    make_questions,
    mean_scores,
    valid_json,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("found", "expected", "score"), [("a", "a", 1), (" a\n", "a", 1), ("A", "a", 0), ("a b", "ab", 0), ("", "a", 0)]
)
def test_exact_match(found, expected, score):
    assert exact_match(found, expected) == score


@pytest.mark.parametrize(
    ("found", "score"),
    [('{"a":1}', 1), ("[]", 1), ("3", 1), ("{'a':1}", 0), ('{"a":1} x', 0), ("NaN", 0), ("", 0), ("[" * 20_000, 0)],
)
def test_valid_json(found, score):
    assert valid_json(found, "whatever") == score


def test_a_question_is_what_serving_feeds_and_its_answer_what_it_should_give(tokenizer):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    ref = RowRef("s", "f.jsonl", 7)
    examples = render(parse_row({"messages": messages}, "messages", ref), tokenizer)
    [question] = make_questions(examples[-1:], tokenizer, 5)
    assert question.prompt == render_prompt(messages[:3], tokenizer).tolist()
    assert (question.answer, question.row) == ("four", "f.jsonl:7")


def test_plain_text_asks_nothing_and_the_limit_holds(tokenizer):
    text = render(parse_row({"text": "hello"}, "text", RowRef("s", "f", 1)), tokenizer)
    pair = render(parse_row({"prompt": "1+1=", "completion": "2"}, "sft", RowRef("s", "f", 2)), tokenizer)
    questions = make_questions([*text, *pair, *pair], tokenizer, 1)
    assert questions == [Question(tokenizer.encode_text("1+1="), "2", "f:2")]


def test_an_answer_cut_by_truncation_keeps_its_last_token(tokenizer):
    tokens = np.array(tokenizer.encode_text("ab12"), np.int32)
    rendered = Rendered(tokens, np.array([False, False, True, True]), RowRef("s", "f", 3))
    assert make_questions([rendered], tokenizer, 1)[0].answer == "12"


def test_truncated_documents_are_not_asked(tokenizer):
    """Of "12" the model may rightly say more: its answer was cut."""
    tokens = np.array(tokenizer.encode_text("ab12"), np.int32)
    mask = np.array([False, False, True, True])
    cut, whole = (Rendered(tokens, mask, RowRef("s", "f", i), truncated=i == 3) for i in (3, 4))
    assert [question.row for question in make_questions([cut, whole], tokenizer, 2)] == ["f:4"]


def test_documents_of_a_split_row_are_told_apart_by_turn(tokenizer):
    tokens = np.array(tokenizer.encode_text("ab12"), np.int32)
    mask = np.array([False, False, True, True])
    rows = [Rendered(tokens, mask, RowRef("s", "f", line)) for line in (1, 1, 2)]
    questions = make_questions(rows, tokenizer, 3)
    assert [(question.row, question.turn) for question in questions] == [("f:1", 1), ("f:1", 2), ("f:2", 1)]


def test_samples_with_a_line_separator_in_them_are_read_back(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = Sample("f:1", "a\u2028b\u2029c\x85d", "\u2028", "x", True, {"exact_match": 0.0})
    append_samples(path, 0, [sample])
    append_samples(path, 2, [sample])
    steps = [(line["step"], line["prompt"]) for _, line in read_jsonl(path)]
    assert steps == [(0, sample.prompt), (2, sample.prompt)]


def test_samples_of_a_repeated_step_replace_the_old_ones(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = Sample("f:1", "p", "x", "x", True, {"exact_match": 1.0})
    for step in (0, 2, 4):
        append_samples(path, step, [sample])
    whole = path.read_text()
    append_samples(path, 2, [sample])
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    append_samples(path, 4, [sample])
    assert path.read_text() == whole


def test_scores_are_averaged():
    samples = [Sample("", "", "", "", True, {"exact_match": score}) for score in (1.0, 0.0, 0.0, 0.0)]
    assert mean_scores(samples) == {"eval/exact_match": 0.25}
