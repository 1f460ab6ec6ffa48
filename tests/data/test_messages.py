"""Rows -> checked examples; every mistake names file, line and what was wrong, in one line."""

import json
import math
import pickle

import pytest

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.messages import Conversation, PromptCompletion, TextRow, parse_row
from postrain.errors import UserError

REF = RowRef("train", "rows.jsonl", 12)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
EMPTY = {"role": "assistant", "content": ""}

CHAT = {"messages": [USER, ANSWER]}


def parse(raw, kind="sft"):
    return parse_row(raw, kind, REF)


def test_messages_are_normalised():
    row = parse(
        {
            "id": 7,
            "messages": [
                {"role": "developer", "content": "rules", "name": None},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning": "why",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                        {"name": "g", "arguments": {"y": None}},
                        {"function": {"name": "h"}},
                    ],
                },
                {"role": "tool", "content": "1", "tool_call_id": "c1"},
                {"role": "assistant", "content": "done", "weight": 0},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
        }
    )
    assert row == Conversation(
        messages=(
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": "ab"},
            {
                "role": "assistant",
                "reasoning_content": "why",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}, "id": "c1"},
                    {"type": "function", "function": {"name": "g", "arguments": {"y": None}}},
                    {"type": "function", "function": {"name": "h", "arguments": {}}},
                ],
                "content": "",
            },
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "assistant", "content": "done", "train": False},
        ),
        tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
        ref=REF,
    )


def test_prompt_completion_and_text():
    assert parse({"prompt": "a", "completion": "b"}) == PromptCompletion("a", "b", REF)
    assert parse({"text": "abc"}) == TextRow("abc", REF)
    assert parse({"messages": [USER, ANSWER], "text": "also"}).messages == (USER, ANSWER)
    assert parse({"messages": [USER, ANSWER], "text": "also"}, "text") == TextRow("also", REF)


def test_of_a_prompt_in_messages_only_the_completion_is_trained():
    row = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [m.get("train") for m in row.messages] == [None, False, None, None]
    assert parse({"prompt": "hi", "completion": [ANSWER]}).messages == (USER, ANSWER)
    assert parse({"prompt": [USER], "completion": "hello"}).messages == (USER, ANSWER)


BAD = {
    "a list": ([1], "expected an object with the keys of a row, such as 'messages'; found a list"),
    "no known key": ({"question": 1, "answer": 2}, "or 'text'; found 'question', 'answer'"),
    "no key": ({}, "found no keys"),
    "messages not a list": ({"messages": "hi"}, "'messages' must be a list of messages; found a string"),
    "empty messages": ({"messages": []}, "'messages' is empty"),
    "a message not an object": ({"messages": ["hi"]}, "messages[0] must be an object with 'role' and 'content'"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role must be one of system,"),
    "a role that is no string": ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role must be one of"),
    "ShareGPT": ({"messages": [{"from": "human", "value": "x"}]}, "rename ShareGPT's 'from' and 'value'"),
    "content missing": ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content is missing or null"),
    "content a number": (
        {"messages": [{"role": "user", "content": 3}, ANSWER]},
        "content must be a string; found a num",
    ),
    "content an object": ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, "found an object"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}, ANSWER]},
        "messages[0].content[0]: only text parts can be trained on; found 'image_url'",
    ),
    "no assistant": ({"messages": [USER]}, "no assistant message: nothing to train on"),
    "nothing trained": ({"messages": [USER, ANSWER | {"train": False}]}, "every assistant message has train: false"),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": "\n"}]}, "the assistant message is empty"),
    "train no boolean": ({"messages": [USER, ANSWER | {"train": "no"}]}, "messages[1].train must be true or false"),
    "train on a user": ({"messages": [USER | {"train": True}, ANSWER]}, "only assistant messages can be trained"),
    "weight 1e-9": ({"messages": [USER, ANSWER | {"weight": 1e-9}]}, "messages[1].weight must be 0, or a number from"),
    "misspelt key": ({"messages": [USER, ANSWER | {"trian": False}]}, "unknown key 'trian'; did you mean 'train'?"),
    "tool_call": ({"messages": [USER, ANSWER | {"tool_call": []}]}, "did you mean 'tool_calls'?"),
    "function_call": ({"messages": [USER, ANSWER | {"function_call": {}}]}, "write it as tool_calls"),
    "calls by a user": ({"messages": [USER | {"tool_calls": [{}]}, ANSWER]}, "only assistant messages have tool_calls"),
    "reasoning of a user": ({"messages": [USER | {"thinking": "x"}, ANSWER]}, "only assistant messages have reasoning"),
    "call without name": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "messages[1].tool_calls[0].function.name is missing",
    ),
    "arguments not JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        "messages[1].tool_calls[0].function.arguments is not valid JSON",
    ),
    "arguments a list": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "must be an object or a JSON string of one; found a list",
    ),
    "messages as Python writes them": (
        {"messages": str([USER, ANSWER])},
        "it is Python's spelling of an object, as str() writes it: write it with json.dumps()",
    ),
    "tools no list": ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "'tools' must be a list of function schemas"),
    "tools not JSON": ({"messages": [USER, ANSWER], "tools": "[{"}, "tools is not valid JSON"),
    "tool without name": (
        {"messages": [USER, ANSWER], "tools": [{"type": "function"}]},
        "tools[0] must be an object with",
    ),
    "functions": (CHAT | {"functions": [{"name": "f"}]}, "'functions' is not read: it is the old form of 'tools'"),
    "system": (CHAT | {"system": "Be brief."}, "'system' is not read: a system message is the first of the messages"),
    "system of a pair": (
        {"prompt": "a", "completion": "b", "system_prompt": "x"},
        "'system_prompt' is not read: a sys",
    ),
    "switches": (CHAT | {"chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kwargs' is not read"),
    "tool": (CHAT | {"tool": [{"name": "f"}]}, "unknown key 'tool'; did you mean 'tools'?"),
    "Tools": (CHAT | {"Tools": [{"name": "f"}], "tools": None}, "unknown key 'Tools'; did you mean 'tools'?"),
    "mesages": ({"mesages": [USER, ANSWER]}, "unknown key 'mesages'; did you mean 'messages'?"),
    "message": ({"message": [USER, ANSWER]}, "unknown key 'message'; did you mean 'messages'?"),
    "promt": ({"promt": "a", "completion": "b"}, "unknown key 'promt'; did you mean 'prompt'?"),
    "completions": ({"prompt": "a", "completions": "b"}, "unknown key 'completions'; did you mean 'completion'?"),
    "texts": ({"texts": "a"}, "unknown key 'texts'; did you mean 'text'?"),
    "tools of plain text": (
        {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
        "which has no 'tools': write",
    ),
    "empty text": ({"text": " \n"}, "'text' is empty"),
    "text a number": ({"text": 5}, "text must be a string; found a number"),
    "empty completion": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "completion a number": ({"prompt": "a", "completion": 5}, "'completion' must be a list of messages; found a num"),
    "lone surrogate": ({"text": "a\ud800b"}, "text has a lone surrogate (half of a \\uXXXX pair) at character 1"),
    "surrogate in arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": "\\udc00"}'}]}]},
        "lone surrogate",
    ),
    "NaN in arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": [NaN]}'}]}]},
        "messages[1].tool_calls[0] holds NaN, which is not JSON",
    ),
    "infinite arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": -math.inf}}]}]},
        "messages[1].tool_calls[0] holds -Infinity, which is not JSON",
    ),
    "NaN in tools": (CHAT | {"tools": [{"name": "f", "parameters": {"default": math.nan}}]}, "tools[0] holds NaN"),
    "parameters not JSON": (CHAT | {"tools": [{"name": "f", "parameters": "{"}]}, "tools[0].parameters is not valid"),
    "parameters no object": (
        CHAT | {"tools": [{"name": "f", "parameters": "[]"}]},
        "tools[0].parameters must be a JSON schema, an object; found a list as JSON text",
    ),
    "prompt twice": (
        {"prompt": "Q: 2+2? A:", "completion": "Q: 2+2? A: 4"},
        "'completion' begins with the whole prompt, which would then stand there twice",
    ),
    "messages of the prompt twice": (
        {"prompt": [USER, ANSWER, USER], "completion": [USER, ANSWER, USER, ANSWER]},
        "'completion' begins with the messages of 'prompt'",
    ),
    "empty and trained by the mask": (
        {"messages": [USER, EMPTY, USER, ANSWER], "loss_mask": [0, 1, 0, 1]},
        "messages[1]: the assistant message is empty",
    ),
    "noncharacter": ({"text": "a\ufdd0b"}, "holds one of the noncharacters"),
}


@pytest.mark.parametrize("raw, reason", BAD.values(), ids=BAD.keys())
def test_bad_rows(raw, reason):
    with pytest.raises(BadRow) as error:
        parse(raw)
    assert str(error.value).startswith("rows.jsonl:12: ") and "\n" not in str(error.value)
    assert reason in str(error.value)
    assert isinstance(error.value, UserError) and error.value.ref == REF


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, EMPTY, USER, ANSWER], "loss_mask": [0, 0, 0, 1]},
        {"messages": [USER, EMPTY, USER, ANSWER], "mask_history": True},
        {"messages": [USER, EMPTY | {"weight": 0}, USER, ANSWER]},
        {"prompt": [USER, EMPTY, USER], "completion": [ANSWER]},
    ],
)
def test_an_empty_answer_that_is_not_trained_is_context(row):
    assert parse(row).messages == (USER, EMPTY | {"train": False}, USER, ANSWER)


def test_an_answer_may_repeat_a_word_or_all_of_its_prompt():
    for prompt, completion in (("run", "running"), ("He goes to school", "He goes to school"), ("a b\n", "a b c")):
        assert parse({"prompt": prompt, "completion": completion}).completion == completion


@pytest.mark.parametrize("value", ["null", "[]", "", None, []])
def test_no_tools_and_no_calls_however_they_are_written(value):
    assert parse(CHAT | {"tools": value}) == parse({"messages": [USER, ANSWER | {"tool_calls": value}]}) == parse(CHAT)


def test_a_function_as_text_is_the_function():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "w", "parameters": schema}
    text = function | {"parameters": json.dumps(schema)}
    expected = ({"type": "function", "function": function},)
    for tool in (function, text, {"type": "function", "function": text}, {"type": "function", **text}):
        assert parse(CHAT | {"tools": [tool]}).tools == parse(CHAT | {"tools": [json.dumps(tool)]}).tools == expected
    assert parse(CHAT | {"tools": [{"type": "function", "function": json.dumps(text)}]}).tools == expected


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": None, "prompt": None, "completion": None, "text": "Sky."}, TextRow("Sky.", REF)),
        ({"messages": None, "prompt": "2+2=", "completion": " 4"}, PromptCompletion("2+2=", " 4", REF)),
        ({"text": None, "conversations": None, "messages": [USER, ANSWER]}, Conversation((USER, ANSWER), None, REF)),
    ],
)
def test_a_null_is_a_column_that_the_row_does_not_have(row, expected):
    assert parse(row) == expected
    with pytest.raises(BadRow, match="'messages' must be a list of messages; found nothing"):
        parse({"messages": None, "id": 1})


def test_keys_of_its_own_are_left_to_the_user():
    own = {
        "id": 1,
        "source": "web",
        "prompt_id": "7f",
        "message_id": 3,
        "num_tools": 2,
        "tool_choice": "auto",
        "system": "",
    }
    own |= {
        "text": "also",
        "prompt": "hi",
        "functions": None,
        "tool": [],
        "title": "x",
        "test": 1,
        3: 4,
    }
    assert parse(CHAT | own).messages == (USER, ANSWER)
    assert parse({"messages": [USER, ANSWER], "tools": [{"name": "f"}], "tool": "hammer"}).tools
    assert parse({"prompt": "a", "completion": "b", "message": "c", "tools": []}) == PromptCompletion("a", "b", REF)
    assert parse({"text": "abc", "system": "linux", "tool": "x", "functions": [1], "message": "m"}) == TextRow(
        "abc", REF
    )


def test_a_bad_row_survives_another_process():
    error = BadRow(REF, "why\nnot")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.ref, again.reason) == ("rows.jsonl:12: why not", REF, "why not")
    again = pickle.loads(pickle.dumps(BadRow(REF, "why", "do\nthis")))
    assert (str(again), again.reason, again.advice) == ("rows.jsonl:12: why: do this", "why", "do this")


def test_wrong_kind_is_named():
    with pytest.raises(BadRow, match="'messages' must be a list of messages; found nothing"):
        parse({"text": "x"}, "messages")
