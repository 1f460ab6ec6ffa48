"""Rows of kind sft, checked and normalised: conversations, prompt/completion pairs or plain text.

They have five forms. What becomes of their other keys is in row_keys.py:

* ``{"messages": [...], "tools": [...]}``: OpenAI-style messages with the roles system, developer, user,
  assistant and tool; ``tool_calls`` with arguments as an object or as a JSON string; ``reasoning_content``
  (also spelt ``reasoning`` or ``thinking``); ``train: false`` (or OpenAI's ``weight: 0``) on an assistant
  message keeps it out of the loss. Words of other tools for these: other_tools.py.
* ``{"prompt": ..., "completion": ...}``: two strings, or lists of messages; only the completion is trained.
* ``{"text": "..."}``: plain text, trained as a whole.
* ``{"conversations": [...]}``, ShareGPT's turns of from/value, and ``{"instruction", "input", "output"}``, Alpaca's:
  read as the messages that they stand for.

In the result ``content`` is always a string, arguments are objects, and there are no null keys.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from postrain.data.bad_row import (
    FUNCTION_ADVICE,
    BadRow,
    RowRef,
    check_string,
    checked_json,
    describe_type,
    name_keys,
)
from postrain.data.other_tools import (
    add_system,
    apply_row_masks,
    parse_json,
    read_alpaca,
    read_reasoning,
    read_sharegpt,
    read_train_flag,
    read_weight,
    without_reasoning,
)
from postrain.data.row_keys import (
    CALL_KEYS,
    FLAT_CALL_KEYS,
    FUNCTION_KEYS,
    MESSAGE_KEYS,
    PART_KEYS,
    ROW_KEYS,
    Keys,
    is_empty,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
SFT_FORMS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),  # before text: some tables have both, and their text is the rendered rest
    "text": ("text",),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
REPEATED = (
    "begins with the whole prompt, which would then stand there twice: leave the prompt out of it, or, where that is "
    "meant, let the prompt end with a separator of its own, such as a line break"
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """``messages`` are normalised dicts; an assistant message is trained unless it says ``train: False``.

    ``weight`` of an assistant message of kind sft: how much its tokens count beside those of others; 1 without it.
    """

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None
    ref: RowRef
    weight: float = 1.0  # of each of its trained tokens, in these three


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """Two plain strings, used without a template; only the completion is trained."""

    prompt: str
    completion: str
    ref: RowRef
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class TextRow:
    """Plain text, trained as a whole."""

    text: str
    ref: RowRef
    weight: float = 1.0


Example = Conversation | PromptCompletion | TextRow


def parse_row(raw: Any, form: str, ref: RowRef, unread: set[str] | None = None) -> Example:
    """Checks one row of kind sft.

    Args:
      raw: the row, as decoded from JSON.
      form: one of ``SFT_FORMS``, or "sft": by the row's keys.
      ref: its place, for errors.
      unread: takes the keys that are not read, at each level: ``'difficulty'``, ``messages[].foo``.

    Raises:
      BadRow: naming file, line, the message's index and what was expected.
    """
    raw, unread = check_object(raw, ref), set() if unread is None else unread
    form = find_form(raw, SFT_FORMS) if form == "sft" else form
    check_keys(raw, ROW_KEYS[form], ref, unread)
    if not form:
        expected = (
            "'messages', or 'conversations', or 'instruction' and 'output', or 'prompt' and 'completion', or 'text'"
        )
        raise BadRow(ref, f"expected the keys {expected}; found {name_keys(raw)}", FUNCTION_ADVICE)
    weight = read_weight(raw, ref)
    if form == "text":
        text = check_string(raw.get("text"), "text", ref)
        if not text.strip():
            raise BadRow(ref, "'text' is empty")
        return TextRow(text, ref, weight)
    if form == "prompt_completion":
        if isinstance(raw.get("prompt"), str) and isinstance(raw.get("completion"), str):
            if repeats_prompt(raw["prompt"], raw["completion"]):
                raise BadRow(ref, f"'completion' {REPEATED}")
        example = parse_prompt_completion(raw, ref, unread, weighted=True)
        return dataclasses.replace(example, weight=weight) if weight != 1 else example
    where, messages = "messages", raw.get("messages")
    if form == "sharegpt":
        where, messages = "conversations", read_sharegpt(raw, ref)
    elif form == "alpaca":
        messages = read_alpaca(raw, ref)
    parsed = apply_row_masks(raw, parse_messages(messages, ref, unread, where, weighted=True), where, ref)
    check_answers(parsed, where, ref)
    if form != "messages":
        parsed = add_system(raw.get("system"), parsed, ref)
    return _make_conversation(parsed, raw.get("tools"), ref, weight)


def check_object(raw: Any, ref: RowRef) -> dict:
    """The row. Raises BadRow where it is not an object."""
    if not isinstance(raw, dict):
        raise BadRow(ref, f"expected an object with the keys of a row, such as 'messages'; found {describe_type(raw)}")
    return raw


def check_keys(raw: dict, keys: Keys, ref: RowRef, unread: set[str], where: str = "") -> None:
    """Raises BadRow for a key that is refused; adds those that are not read to ``unread``.

    ``where``: the place of ``raw`` in the row. In ``unread`` places in lists are left out: ``messages[].foo``.
    """
    if keys.known.issuperset(raw):
        return
    if reason := keys.check(raw, re.sub(r"\[\d+\]", "[]", where) + "." if where else "", unread):
        raise BadRow(ref, f"{where}: {reason}" if where else reason)


def find_form(raw: dict, forms: Mapping[str, tuple[str, ...]]) -> str:
    """The first form whose keys the row has; empty where there is none."""
    return next(iter(find_forms(raw, forms)), "")


def find_forms(raw: dict, forms: Mapping[str, tuple[str, ...]]) -> list[str]:
    """All forms whose keys the row has: those without a null among them, as in a table every row has every column.

    Where each has a null, all of them: the row lacks something of the form that it is to have. A form that is a part of
    another one (a prompt, of prompt and completion) does not count beside it.
    """
    there = {form: keys for form, keys in forms.items() if all(key in raw for key in keys)}
    whole = [form for form, keys in there.items() if not any(set(keys) < set(other) for other in there.values())]
    full = [form for form in whole if all(raw[key] is not None for key in there[form])]
    return full or whole


def parse_prompt_completion(
    raw: dict, ref: RowRef, unread: set[str], weighted: bool = False
) -> Conversation | PromptCompletion:
    """A prompt and what is trained after it, with the tools; both text or both messages. Raises BadRow.

    ``weighted``: as in ``parse_messages``.
    """
    prompt, completion = raw.get("prompt"), raw.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise BadRow(ref, "'completion' is empty")
        if not is_empty(raw.get("tools")):
            raise BadRow(
                ref, "two strings are plain text, which has no 'tools': write the prompt as a list of messages"
            )
        return PromptCompletion(check_string(prompt, "prompt", ref), check_string(completion, "completion", ref), ref)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before = parse_messages(prompt, ref, unread, "prompt", weighted)
    if (trained := next((i for i, m in enumerate(before) if m.get("train")), None)) is not None:
        raise BadRow(ref, f"prompt[{trained}] is to be trained, and a prompt is not: write the row as messages")
    # Only the completion is trained, also where the prompt holds earlier assistant turns.
    before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
    after = parse_messages(completion, ref, unread, "completion", weighted)
    check_answers(after, "completion", ref)
    if [m | {"train": False} if m["role"] == "assistant" else m for m in after[: len(before)]] == before:
        raise BadRow(ref, "'completion' begins with the messages of 'prompt': leave them out of one of the two")
    return _make_conversation(before + after, raw.get("tools"), ref)


def check_last_answer(example: Example) -> None:
    """Raises BadRow for a conversation that does not end with an answer that is trained: the text's end is another."""
    if not isinstance(example, Conversation):
        return
    last = example.messages[-1]
    if last["role"] != "assistant" or last.get("train") is False:
        found = f"a message of role {last['role']!r}" if last["role"] != "assistant" else "an answer with train: false"
        raise BadRow(
            example.ref, f"the row must end with the answer that is judged, an assistant message; it ends with {found}"
        )


def repeats_prompt(prompt: str, answer: str) -> bool:
    """Whether plain text that is to follow a prompt begins with the whole prompt, of more than one word, once more."""
    words = prompt.strip()
    return len(words.split()) > 1 and len(answer) > len(prompt) and answer.startswith(prompt)


def _make_conversation(messages: list[dict], tools: Any, ref: RowRef, weight: float = 1.0) -> Conversation:
    assistants = [m for m in messages if m["role"] == "assistant"]
    if not assistants:
        raise BadRow(ref, "no assistant message: nothing to train on")
    if not any(m.get("train", True) for m in assistants):
        raise BadRow(ref, "every assistant message has train: false: nothing to train on")
    return Conversation(tuple(messages), parse_tools(tools, ref), ref, weight)


def parse_messages(
    messages: Any, ref: RowRef, unread: set[str] | None = None, where: str = "messages", weighted: bool = False
) -> list[dict]:
    """A list of messages, or a JSON string of one, checked and normalised; none of them need be the assistant's.

    Answers may be empty here: ``check_answers`` refuses those that are trained.

    ``where``: the key that holds them, for errors and ``unread`` (see ``parse_row``). ``weighted``: an answer may have
    a weight besides 0 and 1, which is read, or ignored where nothing is trained. Raises BadRow.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parse_json(messages, where, ref)
    if not isinstance(messages, (list, tuple)):
        raise BadRow(ref, f"'{where}' must be a list of messages; found {describe_type(messages)}")
    if not messages:
        raise BadRow(ref, f"'{where}' is empty")
    unread = set() if unread is None else unread
    return [_parse_message(m, f"{where}[{i}]", ref, unread, weighted) for i, m in enumerate(messages)]


def _parse_message(message: Any, where: str, ref: RowRef, unread: set[str], weighted: bool) -> dict:
    if not isinstance(message, dict):
        raise BadRow(ref, f"{where} must be an object with 'role' and 'content'; found {describe_type(message)}")
    message = {k: v for k, v in message.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        raise BadRow(ref, f"{where}.role must be one of {', '.join(ROLES)}; found {role!r:.40}{_hint_at_role(message)}")
    if "function_call" in message:
        raise BadRow(ref, f"{where}.function_call is the old form of a tool call: rewrite it as tool_calls")
    check_keys(message, MESSAGE_KEYS, ref, unread, where)
    out = {"role": role}
    reasoning = read_reasoning(message, where, ref, unread)
    if reasoning is not None:
        if role != "assistant":
            raise BadRow(ref, f"{where}: only assistant messages have reasoning_content; this one is {role!r}")
        out["reasoning_content"] = reasoning
    calls = message.get("tool_calls")
    if isinstance(calls, str) and calls:
        calls = parse_json(calls, f"{where}.tool_calls", ref)
    if not is_empty(calls):
        if role != "assistant":
            raise BadRow(ref, f"{where}: only assistant messages have tool_calls; this one is {role!r}")
        out["tool_calls"] = _parse_tool_calls(calls, f"{where}.tool_calls", ref, unread)
    if "content" in message:
        out["content"] = _read_content(without_reasoning(message["content"]), f"{where}.content", ref, unread)
    elif "tool_calls" in out:
        out["content"] = ""
    else:
        raise BadRow(ref, f"{where}.content is missing or null")
    for key in ("name", "tool_call_id"):
        if key in message:
            out[key] = check_string(message[key], f"{where}.{key}", ref)
    train, weight = read_train_flag(message, where, ref, weighted)
    if train is not None:
        out["train"] = train
    if weight != 1:
        out["weight"] = weight
    return out


def check_answers(messages: list[dict], where: str, ref: RowRef, first: int = 0) -> None:
    """Raises BadRow for an answer that is to be trained and is empty; one that is context only may be.

    ``first``: the place of the first message in ``where``.
    """
    for i, message in enumerate(messages, first):
        if message["role"] == "assistant" and message.get("train") is not False:
            if not message["content"].strip() and not message.get("tool_calls"):
                raise BadRow(ref, f"{where}[{i}]: the assistant message is empty (no content, no tool_calls)")


def _hint_at_role(message: dict) -> str:
    if "from" in message:
        return "; rename ShareGPT's 'from' and 'value' to 'role' and 'content', or 'messages' to 'conversations'"
    if "type" in message:  # items of OpenAI's Responses API
        kind = f"{message['type']!r:.40}"
        return f"; an item of type {kind} is part of a message: reasoning_content, tool_calls, or the role tool"
    return ""


def _read_content(content: Any, where: str, ref: RowRef, unread: set[str]) -> str:
    """A string, or OpenAI's list of text parts, joined: templates treat parts differently."""
    if not isinstance(content, (list, tuple)):
        return check_string(content, where, ref)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
            found = part.get("type") if isinstance(part, dict) else describe_type(part)
            raise BadRow(ref, f"{where}[{i}]: only text parts can be trained on; found {found!r:.40}")
        check_keys(part, PART_KEYS, ref, unread, f"{where}[{i}]")
        texts.append(check_string(part.get("text"), f"{where}[{i}].text", ref))
    return "".join(texts)


def _parse_tool_calls(calls: Any, where: str, ref: RowRef, unread: set[str]) -> list[dict]:
    if not isinstance(calls, (list, tuple)):
        raise BadRow(ref, f"{where} must be a list; found {describe_type(calls)}")
    out = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        if isinstance(call, str):
            call = parse_json(call, at, ref)
        if not isinstance(call, dict):
            raise BadRow(ref, f"{at} must be an object; found {describe_type(call)}")
        function = call if is_empty(call.get("function")) else call["function"]
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRow(ref, f"{at}.function.name is missing")
        if function is call:
            check_keys(call, FLAT_CALL_KEYS, ref, unread, at)
        else:
            check_keys(call, CALL_KEYS, ref, unread, at)
            check_keys(function, FUNCTION_KEYS, ref, unread, f"{at}.function")
        arguments = _parse_arguments(function.get("arguments"), f"{at}.function.arguments", ref)
        entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if not is_empty(call.get("id")):
            entry["id"] = check_string(call["id"], f"{at}.id", ref)
        out.append(checked_json(entry, at, ref))
    return out


def _parse_arguments(arguments: Any, where: str, ref: RowRef) -> dict:
    if isinstance(arguments, str):
        arguments = parse_json(arguments, where, ref) if arguments.strip() else {}
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise BadRow(ref, f"{where} must be an object or a JSON string of one; found {describe_type(arguments)}")
    return arguments


def parse_tools(tools: Any, ref: RowRef) -> tuple[dict, ...] | None:
    """Function schemas, given as a list or as a JSON string of one, or each as a JSON string; bare functions are
    wrapped as OpenAI does. A template sees all of their keys. A function or its parameters may be a JSON string, too,
    as in tables: a template would write that string into the prompt with its quotes escaped."""
    if isinstance(tools, str):
        tools = parse_json(tools, "tools", ref) if tools.strip() else None
    if is_empty(tools):
        return None
    if not isinstance(tools, (list, tuple)):
        raise BadRow(ref, f"'tools' must be a list of function schemas; found {describe_type(tools)}")
    out = []
    for i, tool in enumerate(tools):
        if isinstance(tool, str):
            tool = parse_json(tool, f"tools[{i}]", ref)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, str):
            function = parse_json(function, f"tools[{i}].function", ref)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(ref, f"tools[{i}] must be an object with a function name")
        if "input_schema" in function and "parameters" not in function:
            raise BadRow(ref, f"tools[{i}]: 'input_schema' is not read: name it 'parameters'")
        if isinstance(function.get("parameters"), str):
            function = function | {"parameters": _parse_schema(function["parameters"], f"tools[{i}].parameters", ref)}
        if "function" in tool:
            tool = tool | {"function": function}
        else:
            # OpenAI's Responses API has the type beside the name.
            is_flat = tool.get("type") == "function"
            tool = {"type": "function", "function": {k: v for k, v in function.items() if k != "type" or not is_flat}}
        out.append(checked_json(tool, f"tools[{i}]", ref))
    return tuple(out)


def _parse_schema(text: str, where: str, ref: RowRef) -> dict:
    schema = parse_json(text, where, ref)
    if not isinstance(schema, dict):
        raise BadRow(ref, f"{where} must be a JSON schema, an object; found {describe_type(schema)} as JSON text")
    return schema
