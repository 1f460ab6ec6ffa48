"""Rows of kind sft, checked and normalised: conversations, prompt/completion pairs or plain text.

They have three forms. Other top-level keys are ignored, unless they would change the prompt (``check_keys``):

* ``{"messages": [...], "tools": [...]}``: OpenAI-style messages with the roles system, developer, user,
  assistant and tool; ``tool_calls`` with arguments as an object or as a JSON string; ``reasoning_content``
  (also spelt ``reasoning`` or ``thinking``); ``train: false`` (or OpenAI's ``weight: 0``) on an assistant
  message keeps it out of the loss.
* ``{"prompt": ..., "completion": ...}``: two strings, or lists of messages; only the completion is trained.
* ``{"text": "..."}``: plain text, trained as a whole.

In the result ``content`` is always a string, arguments are objects, and there are no null keys.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from typing import Any

from postrain.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SFT_FORMS = {"messages": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",)}
# The keys of each form, and keys by which other formats change the prompt, which here would be dropped silently.
READ_KEYS = {form: (*keys, "tools") if form != "text" else keys for form, keys in SFT_FORMS.items()}
_ANY_KEYS = tuple(dict.fromkeys(key for keys in READ_KEYS.values() for key in keys))
_SYSTEM = "a system message is the first of the messages, with the role 'system'"
FOREIGN_KEYS = {
    "functions": "it is the old form of 'tools': rename it",
    "system": _SYSTEM,
    "system_prompt": _SYSTEM,
    "system_message": _SYSTEM,
    "chat_template_kwargs": "reasoning is switched on by an answer's reasoning_content, and off where it has none",
}
# Keys of a message that are read here or belong to the OpenAI format; others are ignored, unless they look like a
# misspelling of one of these.
MESSAGE_KEYS = frozenset(
    "role content name tool_calls tool_call_id reasoning_content reasoning thinking train weight".split()
)
# They mark places in rendered text (trained_spans.py): Unicode reserves them for internal use, and no text holds them.
NONCHARACTERS = frozenset("\ufdd0\ufdd1\ufdd2")
IGNORED_KEYS = frozenset("id refusal audio annotations timestamp metadata".split())


@dataclasses.dataclass(frozen=True)
class RowRef:
    """The place of a row; ``line`` counts from 1 (rows in a file without lines, such as Parquet).

    ``line`` is 0 for a row found in the middle of a file, whose earlier lines are not counted; ``byte`` is then its
    first byte, from 0.
    """

    source: str
    file: str
    line: int
    byte: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file}@{self.byte}"


class BadRow(UserError):
    """A row that cannot be used, in one line: ``file:line: what is wrong``, and advice where there is any.

    Attributes: ``ref`` and ``reason``; ``advice``, where more than this row is wrong, else empty.
    """

    def __init__(self, ref: RowRef, reason: str, advice: str = ""):
        reason, advice = " ".join(reason.split()), " ".join(advice.split())
        super().__init__(f"{ref}: {reason}" + (f": {advice}" if advice else ""))
        self.ref, self.reason, self.advice = ref, reason, advice

    def __reduce__(self):
        return BadRow, (self.ref, self.reason, self.advice)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """``messages`` are normalised dicts; an assistant message is trained unless it says ``train: False``."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None
    ref: RowRef


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """Two plain strings, used without a template; only the completion is trained."""

    prompt: str
    completion: str
    ref: RowRef


@dataclasses.dataclass(frozen=True)
class TextRow:
    """Plain text, trained as a whole."""

    text: str
    ref: RowRef


Example = Conversation | PromptCompletion | TextRow


def parse_row(raw: Any, form: str, ref: RowRef) -> Example:
    """Checks one row of kind sft.

    Args:
      raw: the row, as decoded from JSON.
      form: one of ``SFT_FORMS``, or "sft": by the row's keys.
      ref: its place, for errors.

    Raises:
      BadRow: naming file, line, the message's index and what was expected.
    """
    raw = check_object(raw, ref)
    form = find_form(raw, SFT_FORMS) if form == "sft" else form
    check_keys(raw, READ_KEYS.get(form, _ANY_KEYS), ref, is_text=form == "text")
    if form == "text":
        text = _string(raw.get("text"), "text", ref)
        if not text.strip():
            raise BadRow(ref, "'text' is empty")
        return TextRow(text, ref)
    if form == "prompt_completion":
        return _parse_prompt_completion(raw, ref)
    if form == "messages":
        messages = _parse_messages(raw.get("messages"), "messages", ref)
        return _conversation(messages, raw.get("tools"), ref)
    raise BadRow(ref, "expected the keys 'messages', or 'prompt' and 'completion', or 'text'; found " + name_keys(raw))


def check_object(raw: Any, ref: RowRef) -> dict:
    """The row. Raises BadRow where it is not an object."""
    if not isinstance(raw, dict):
        raise BadRow(ref, f"expected an object with the keys of a row, such as 'messages'; found {_kind_of(raw)}")
    return raw


def check_keys(raw: dict, read: tuple[str, ...], ref: RowRef, *, is_text: bool = False) -> None:
    """Raises BadRow for a key that should change the prompt or the target, and that nothing here reads.

    That is one of FOREIGN_KEYS, except in plain text, which has no prompt; or a likely misspelling of one of the keys
    ``read`` that the row lacks. Other keys are the user's own.
    """
    for key, value in raw.items():
        if key in read or is_empty(value):  # in a table every row has every column
            continue
        if key in FOREIGN_KEYS and not is_text:
            raise BadRow(ref, f"{key!r} is not read: {FOREIGN_KEYS[key]}")
        near = _find_near_key(str(key), read)
        if near and is_empty(raw.get(near)):
            raise BadRow(ref, f"unknown key {key!r}; did you mean {near!r}?")


def is_empty(value: Any) -> bool:
    """Whether a value is null, or an empty string, list or object; an array never counts as empty."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


@functools.lru_cache(maxsize=1024)
def _find_near_key(key: str, known: tuple[str, ...]) -> str:
    """The known key that ``key`` misspells, or empty; ``prompt_id`` contains a known key and is not a misspelling."""
    if set(key.split("_")) & set(known):
        return ""
    return next(iter(difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.85)), "")


def find_form(raw: dict, forms: Mapping[str, tuple[str, ...]]) -> str:
    """The first form whose keys the row has; empty where there is none."""
    return next((form for form, keys in forms.items() if all(key in raw for key in keys)), "")


def _parse_prompt_completion(raw: dict, ref: RowRef) -> Conversation | PromptCompletion:
    prompt, completion = raw.get("prompt"), raw.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise BadRow(ref, "'completion' is empty")
        if not is_empty(raw.get("tools")):
            raise BadRow(
                ref, "two strings are plain text, which has no 'tools': write the prompt as a list of messages"
            )
        return PromptCompletion(_string(prompt, "prompt", ref), _string(completion, "completion", ref), ref)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before = _parse_messages(prompt, "prompt", ref)
    # Only the completion is trained, also where the prompt holds earlier assistant turns.
    before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
    after = _parse_messages(completion, "completion", ref)
    return _conversation(before + after, raw.get("tools"), ref)


def _conversation(messages: list[dict], tools: Any, ref: RowRef) -> Conversation:
    assistants = [m for m in messages if m["role"] == "assistant"]
    if not assistants:
        raise BadRow(ref, "no assistant message: nothing to train on")
    if not any(m.get("train", True) for m in assistants):
        raise BadRow(ref, "every assistant message has train: false: nothing to train on")
    return Conversation(tuple(messages), parse_tools(tools, ref), ref)


def parse_messages(messages: Any, ref: RowRef) -> list[dict]:
    """A list of messages, checked and normalised; for prompts, which need no assistant turn. Raises BadRow."""
    return _parse_messages(messages, "messages", ref)


def _parse_messages(messages: Any, where: str, ref: RowRef) -> list[dict]:
    if not isinstance(messages, (list, tuple)):
        raise BadRow(ref, f"'{where}' must be a list of messages; found {_kind_of(messages)}")
    if not messages:
        raise BadRow(ref, f"'{where}' is empty")
    return [_parse_message(m, f"{where}[{i}]", ref) for i, m in enumerate(messages)]


def _parse_message(message: Any, where: str, ref: RowRef) -> dict:
    if not isinstance(message, dict):
        raise BadRow(ref, f"{where} must be an object with 'role' and 'content'; found {_kind_of(message)}")
    message = {k: v for k, v in message.items() if v is not None}
    role = message.get("role")
    if role not in ROLES:
        hint = "; rename ShareGPT's 'from' and 'value' to 'role' and 'content'" if "from" in message else ""
        raise BadRow(ref, f"{where}.role must be one of {', '.join(ROLES)}; found {role!r}{hint}")
    _check_keys(message, where, ref)
    out = {"role": role}
    reasoning = next((message[k] for k in ("reasoning_content", "reasoning", "thinking") if message.get(k)), None)
    if reasoning is not None:
        if role != "assistant":
            raise BadRow(ref, f"{where}: only assistant messages have reasoning_content; this one is {role!r}")
        out["reasoning_content"] = _string(reasoning, f"{where}.reasoning_content", ref)
    if message.get("tool_calls"):
        if role != "assistant":
            raise BadRow(ref, f"{where}: only assistant messages have tool_calls; this one is {role!r}")
        out["tool_calls"] = _parse_tool_calls(message["tool_calls"], f"{where}.tool_calls", ref)
    if "content" in message:
        out["content"] = _content(message["content"], f"{where}.content", ref)
    elif "tool_calls" in out:
        out["content"] = ""
    else:
        raise BadRow(ref, f"{where}.content is missing or null")
    for key in ("name", "tool_call_id"):
        if key in message:
            out[key] = _string(message[key], f"{where}.{key}", ref)
    train = _train_flag(message, where, ref)
    if train is not None:
        out["train"] = train
    if role == "assistant" and train is not False and not (out["content"].strip() or out.get("tool_calls")):
        raise BadRow(ref, f"{where}: the assistant message is empty (no content, no tool_calls)")
    return out


def _check_keys(message: dict, where: str, ref: RowRef) -> None:
    if "function_call" in message:
        raise BadRow(ref, f"{where}.function_call is the old form of a tool call: rewrite it as tool_calls")
    for key in message:
        if key in MESSAGE_KEYS or key in IGNORED_KEYS:
            continue
        near = difflib.get_close_matches(str(key), MESSAGE_KEYS, n=1, cutoff=0.8)
        if near:  # a misspelt `train` would silently train the wrong turns
            raise BadRow(ref, f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")


def _train_flag(message: dict, where: str, ref: RowRef) -> bool | None:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise BadRow(ref, f"{where}.train must be true or false; found {train!r}")
    if weight is not None and weight not in (0, 1):
        raise BadRow(ref, f"{where}.weight must be 0 or 1; found {weight!r}")
    flag = train if train is not None else (bool(weight) if weight is not None else None)
    if flag and message["role"] != "assistant":
        raise BadRow(ref, f"{where}: only assistant messages can be trained; this one is {message['role']!r}")
    return flag if message["role"] == "assistant" else None


def _content(content: Any, where: str, ref: RowRef) -> str:
    """A string, or OpenAI's list of text parts, joined: templates treat parts differently."""
    if isinstance(content, (list, tuple)):
        texts = []
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                found = part.get("type") if isinstance(part, dict) else _kind_of(part)
                raise BadRow(ref, f"{where}[{i}]: only text parts can be trained on; found {found!r}")
            texts.append(_string(part.get("text"), f"{where}[{i}].text", ref))
        return "".join(texts)
    return _string(content, where, ref)


def _parse_tool_calls(calls: Any, where: str, ref: RowRef) -> list[dict]:
    if not isinstance(calls, (list, tuple)):
        raise BadRow(ref, f"{where} must be a list; found {_kind_of(calls)}")
    out = []
    for i, call in enumerate(calls):
        if not isinstance(call, dict):
            raise BadRow(ref, f"{where}[{i}] must be an object; found {_kind_of(call)}")
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRow(ref, f"{where}[{i}].function.name is missing")
        arguments = _arguments(function.get("arguments"), f"{where}[{i}].function.arguments", ref)
        entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            entry["id"] = call["id"]
        out.append(checked_strings(entry, f"{where}[{i}]", ref))
    return out


def _arguments(arguments: Any, where: str, ref: RowRef) -> dict:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as e:
            raise BadRow(ref, f"{where} is not valid JSON: {e}") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise BadRow(ref, f"{where} must be an object or a JSON string of one; found {_kind_of(arguments)}")
    return arguments


def parse_tools(tools: Any, ref: RowRef) -> tuple[dict, ...] | None:
    """Function schemas, given as a list or as a JSON string of one; bare functions are wrapped as OpenAI does."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as e:
            raise BadRow(ref, f"tools is not valid JSON: {e}") from None
    if is_empty(tools):
        return None
    if not isinstance(tools, (list, tuple)):
        raise BadRow(ref, f"'tools' must be a list of function schemas; found {_kind_of(tools)}")
    out = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(ref, f"tools[{i}] must be an object with a function name")
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        out.append(checked_strings(tool, f"tools[{i}]", ref))
    return tuple(out)


def checked_strings(value: Any, where: str, ref: RowRef) -> Any:
    """The value, after checking that every string inside it can be encoded."""
    if isinstance(value, str):
        return _string(value, where, ref)
    if isinstance(value, dict):
        return {_string(k, where, ref): checked_strings(v, where, ref) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [checked_strings(v, where, ref) for v in value]
    return value


def _string(value: Any, where: str, ref: RowRef) -> str:
    if not isinstance(value, str):
        raise BadRow(ref, f"{where} must be a string; found {_kind_of(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            raise BadRow(ref, f"{where} has a lone surrogate (half of a \\uXXXX pair) at character {e.start}") from None
        if not NONCHARACTERS.isdisjoint(value):
            raise BadRow(ref, f"{where} holds one of the noncharacters U+FDD0 to U+FDD2, which are not text")
    return value


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return "nothing (null or missing)" if value is None else names.get(type(value), type(value).__name__)


def name_keys(raw: dict) -> str:
    return ", ".join(repr(k) for k in list(raw)[:8]) or "no keys"
