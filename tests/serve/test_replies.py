"""Calls and reasoning are found in an answer's text, whatever the pieces in which it comes."""

import json

import pytest
from real_tokenizers import get_template_path, get_tokenizer_folder

from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.serve.replies import ReplyParser, ToolForm, find_tool_form

QWEN = ToolForm("<tool_call>", "</tool_call>", "name", "arguments")
LLAMA = ToolForm("", "", "name", "parameters")
CALL = '{"name": "add", "arguments": {"a": 1, "b": "</x> 東"}}'
MARKED = r"""<tool_call>{"name": "g", "arguments": {"x": "see </tool_call> \"mark\""}}</tool_call>"""
BAD, OPEN = "<tool_call>{bad}</tool_call>", '<tool_call>{"name": "g</tool_call>'
INFINITE = '<tool_call>{"name": "g", "arguments": {"x": 1e999}}</tool_call>'
BOTH = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.mark.parametrize(
    ("tokenizer", "template", "form"),
    [
        ("qwen3", "qwen3", QWEN),
        ("qwen3", "qwen2_5", QWEN),
        ("smollm3", "smollm3", None),
        ("llama3", "llama3_1", LLAMA),
        ("mistral_nemo", "mistral_nemo", ToolForm("[TOOL_CALLS]", "", "name", "arguments")),
        ("gptoss", "gptoss", None),
        ("gemma3", "gemma3", None),
    ],
)
def test_the_form_of_calls_is_what_the_template_writes(tokenizer, template, form):
    path = get_template_path(template)
    assert find_tool_form(load_tokenizer(get_tokenizer_folder(tokenizer), str(path))) == form


def parse(text, form, reasoning="none", functions=("add", "g"), size=None):
    """({kind: text}, [(name, arguments)]) of a text that comes in pieces."""
    parser = ReplyParser(form, set(functions), reasoning)
    size = size or max(len(text), 1)
    pieces = [text[k : k + size] for k in range(0, len(text), size)]
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.feed("", last=True)
    texts, calls = {}, []
    for kind, value in deltas:
        if kind == "tool_calls":
            assert value["index"] == len(calls) and value["id"].startswith("call_")
            calls.append((value["function"]["name"], json.loads(value["function"]["arguments"])))
        else:
            texts[kind] = texts.get(kind, "") + value
    return texts, calls


ADD = ("add", {"a": 1, "b": "</x> 東"})
CASES = [
    ("plain < text", QWEN, "none", {"content": "plain < text"}, []),
    (BOTH, QWEN, "none", {}, [ADD]),
    (f"Let me see.\n\n{BOTH}\n{BOTH}\n", QWEN, "none", {"content": "Let me see."}, [ADD, ADD]),
    (f"a {BOTH} and b", QWEN, "none", {"content": "aand b"}, [ADD]),
    ("<tool_call>\nnot json\n</tool_call>", QWEN, "none", {"content": "<tool_call>\nnot json\n</tool_call>"}, []),
    ("<tool_call>\n{", QWEN, "none", {"content": "<tool_call>\n{"}, []),
    ("<tool_call>" + CALL, QWEN, "none", {}, [ADD]),  # cut at the closing mark, or the model leaves it out
    (f"<tool_call>[{CALL}, {CALL}]</tool_call>", QWEN, "none", {}, [ADD, ADD]),
    (MARKED, QWEN, "none", {}, [("g", {"x": 'see </tool_call> "mark"'})]),
    (f"{BAD} b", QWEN, "none", {"content": f"{BAD} b"}, []),
    (f"{OPEN} b", QWEN, "none", {"content": f"{OPEN} b"}, []),
    (f"{INFINITE}", QWEN, "none", {"content": INFINITE}, []),
    (
        '{"name": "g", "parameters": {"x": NaN}}',
        LLAMA,
        "none",
        {"content": '{"name": "g", "parameters": {"x": NaN}}'},
        [],
    ),
    (BOTH, None, "none", {"content": BOTH}, []),
    ("<think>\nhm\n\n</think>\n\nyes ", None, "may come", {"reasoning_content": "hm", "content": "yes "}, []),
    ("hm\n</think>\nyes", None, "open", {"reasoning_content": "hm", "content": "yes"}, []),
    ("only thoughts", None, "open", {"reasoning_content": "only thoughts"}, []),
    ("<thin ice", None, "may come", {"content": "<thin ice"}, []),
    (f"<think>a</think>{BOTH}", QWEN, "may come", {"reasoning_content": "a"}, [ADD]),
    ('{"name": "g", "parameters": {"x": [1]}}', LLAMA, "none", {}, [("g", {"x": [1]})]),
    ('<|python_tag|>{"name": "g", "parameters": {}}; {"name": "g"}', LLAMA, "none", {}, [("g", {}), ("g", {})]),
    ('{"name": "other", "parameters": {}}', LLAMA, "none", {"content": '{"name": "other", "parameters": {}}'}, []),
    (' {"answer": 1}', LLAMA, "none", {"content": ' {"answer": 1}'}, []),
    ("", QWEN, "may come", {}, []),
]


@pytest.mark.parametrize(("text", "form", "reasoning", "texts", "calls"), CASES)
def test_a_reply_is_taken_apart(text, form, reasoning, texts, calls):
    assert parse(text, form, reasoning) == (texts, calls)
    for size in (1, 2, 3, 7):
        assert parse(text, form, reasoning, size=size) == (texts, calls), size


def test_text_is_not_held_back_longer_than_needed():
    parser = ReplyParser(QWEN, set(), "none")
    assert [delta.value for delta in parser.feed("word <tool")] == ["word"]
    assert [delta.value for delta in parser.feed("box> more")] == [" <toolbox> more"]
