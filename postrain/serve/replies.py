"""A chat answer's text taken apart as it comes: reasoning, content, tool calls.

How a model writes a call is found by having its chat template write one. Two forms are read: JSON between two marks
(``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, or a list after ``[TOOL_CALLS]``), and JSON alone (Llama).
"""

import json
import os
import re
import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from postrain.data.rendering.render import TEMPLATE_DATE
from postrain.data.rendering.template import TemplateRefusal
from postrain.data.rendering.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
_NAME, _KEY, _VALUE = "probe_function", "probe_key", "probe value"


class ToolForm(NamedTuple):
    """``opening`` and ``closing`` stand around the JSON of a call, "" where nothing does."""

    opening: str
    closing: str
    name_key: str
    arguments_key: str


def find_tool_form(tokenizer: Tokenizer) -> ToolForm | None:
    """How the chat template writes an assistant's call; None where it is in no form that is read here."""
    if tokenizer.template is None:
        return None
    schema = {"type": "object", "properties": {_KEY: {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": _NAME, "description": "", "parameters": schema}}]
    call = {"type": "function", "id": "call00000", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        render = lambda count, prompt: tokenizer.template.render(
            messages[:count], tools, template_date=TEMPLATE_DATE, add_generation_prompt=prompt
        )
        whole, begin = render(2, False), len(os.path.commonprefix([render(2, False), render(1, True)]))
    except TemplateRefusal:
        return None
    place = whole.find(_VALUE, begin)
    for start in (match.start() for match in re.finditer(r"[\[{]", whole[:place]) if match.start() >= begin):
        try:
            value, end = json.JSONDecoder().raw_decode(whole, start)
        except ValueError:
            continue
        item = value[0] if isinstance(value, list) and value else value
        if end < place or not isinstance(item, dict):
            continue
        name_keys = [key for key, one in item.items() if one == _NAME]
        argument_keys = [key for key, one in item.items() if _read_arguments(one) == {_KEY: _VALUE}]
        if name_keys and argument_keys:
            before, after = whole[begin:start].split(), whole[end:]
            closing = after[: match.start()] if (match := tokenizer.control_pattern.search(after)) else after
            return ToolForm(before[-1] if before else "", closing.strip(), name_keys[0], argument_keys[0])
    return None


def write_call_grammar(form: ToolForm, functions: Sequence[dict]) -> str:
    """llguidance's Lark for one call of any of ``functions``, its arguments as the function's schema has them."""
    rules, calls = [], []
    for i, function in enumerate(functions):
        schema = function.get("parameters") or {"type": "object"}
        # A rule of its own: references in a schema are from its root.
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
        before = f"{{{json.dumps(form.name_key)}: {json.dumps(function['name'])}, {json.dumps(form.arguments_key)}: "
        calls.append(f'{json.dumps(before)} arguments_{i} "}}"')
    opening = f'{json.dumps(form.opening)} "\\n" ' if form.opening else ""
    closing = f' "\\n" {json.dumps(form.closing)}' if form.closing else ""
    return "\n".join([f"start: {opening}call{closing}", f"call: {' | '.join(calls)}", *rules])


def _refuse_constant(word: str):
    raise ValueError(f"{word} is not a number of JSON")


def _read_arguments(value: Any) -> dict | None:
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


class Delta(NamedTuple):
    """A part of a message: text of its kind, or a whole call in OpenAI's form."""

    kind: Literal["reasoning_content", "content", "tool_calls"]
    value: Any


class ReplyParser:
    """Text of one answer, piece by piece -> Deltas. Text that is not what it seemed becomes content: nothing is lost.

    ``form``: None where no call is looked for. ``functions``: names that may be called by JSON alone; a mark makes any
    other a call too. ``reasoning``: "none", "open" (the prompt has begun it) or "may come".
    """

    def __init__(self, form: ToolForm | None, functions: set[str], reasoning: Literal["none", "open", "may come"]):
        self.form, self.functions = form, functions
        self.num_calls = 0
        self._text, self._trim = "", reasoning == "open"  # trim: white space that comes next
        self._mode = {"none": "start", "open": "reasoning", "may come": "undecided"}[reasoning]

    def feed(self, text: str, last: bool = False) -> list[Delta]:
        """``last``: no more will come."""
        self._text += text
        deltas: list[Delta] = []
        while getattr(self, f"_take_{self._mode}")(deltas, last):
            pass
        return deltas

    def _take_undecided(self, deltas, last) -> bool:
        text = self._text.lstrip()
        if THINK.startswith(text) and not last:
            return False
        self._mode = "start"
        if text.startswith(THINK):
            self._mode, self._text, self._trim = "reasoning", text.removeprefix(THINK), True
        return True

    def _take_reasoning(self, deltas, last) -> bool:
        ended = self._take_until(END_THINK, "reasoning_content", deltas, last, trimmed=True)
        if ended:
            self._mode = "start"
        return ended

    def _take_start(self, deltas, last) -> bool:
        """Before the first character of the content, where JSON alone may begin."""
        self._mode = "content"
        if self.form is None or self.form.opening:
            return True
        if re.match(r"\s*(<\|\w+\|>)?\s*[\[{]", self._text):
            self._mode = "call"
        elif re.match(r"\s*(<(\|\w*(\|>?)?)?)?\s*$", self._text) and not last:
            self._mode = "start"
            return False
        return True

    def _take_content(self, deltas, last) -> bool:
        if self.form is None or not self.form.opening:
            return self._take_until(None, "content", deltas, last, trimmed=False)
        found = self._take_until(self.form.opening, "content", deltas, last, trimmed=True)
        if found:
            self._mode = "call"
        return found

    def _take_call(self, deltas, last) -> bool:
        """A call is given whole, at its end."""
        closing = self.form.closing
        place = self._find_closing(last) if closing else -1
        if place < 0 and not last:
            return False
        body = self._text if place < 0 else self._text[:place]
        self._text = "" if place < 0 else self._text[place + len(closing) :]
        calls = self._read_calls(body)
        self._trim = bool(calls)
        for call in calls:
            deltas.append(Delta("tool_calls", {"index": self.num_calls, **call}))
            self.num_calls += 1
        if not calls:
            deltas.append(Delta("content", self.form.opening + body + (closing if place >= 0 else "")))
        self._mode = "content"
        return bool(self._text)

    def _find_closing(self, last: bool) -> int:
        """Where the closing mark is, -1 where it has not come: one within a string of the JSON is none."""
        closing = self.form.closing
        if closing not in self._text:
            return -1
        for match in re.finditer(rf'"(?:[^"\\]|\\.)*"?|{re.escape(closing)}', self._text, re.DOTALL):
            if match.group() == closing:
                return match.start()
        return self._text.find(closing) if last else -1  # a string that has no end: no JSON

    def _take_until(self, mark: str | None, kind, deltas, last, *, trimmed: bool) -> bool:
        """Gives out text up to ``mark``; whether that has come. ``trimmed``: without the white space before it."""
        if self._trim:
            self._text = self._text.lstrip()
        place = self._text.find(mark) if mark else -1
        held = 0
        if place < 0 and mark and not last:
            sizes = range(min(len(mark) - 1, len(self._text)), 0, -1)
            held = next((size for size in sizes if self._text.endswith(mark[:size])), 0)
        text = self._text[: place if place >= 0 else len(self._text) - held]
        given = text.rstrip() if trimmed and (place >= 0 or not last) else text
        self._text = self._text[place + len(mark) :] if place >= 0 else self._text[len(given) :]
        if given:
            deltas.append(Delta(kind, given))
            self._trim = False
        if place >= 0:
            self._trim = True
        return place >= 0

    def _read_calls(self, body: str) -> list[dict]:
        """The calls in JSON values one after the other; [] where any of it is something else."""
        decoder, calls = json.JSONDecoder(parse_constant=_refuse_constant), []
        body = body if self.form.opening else re.sub(r"^\s*<\|\w+\|>", "", body)
        place = 0
        while (match := re.compile(r"[\s;,]*").match(body, place)) and match.end() < len(body):
            try:
                value, place = decoder.raw_decode(body, match.end())
            except (ValueError, RecursionError):
                return []
            for item in value if isinstance(value, list) else [value]:
                name = item.get(self.form.name_key) if isinstance(item, dict) else None
                arguments = _read_arguments(item.get(self.form.arguments_key, {})) if name else None
                known = isinstance(name, str) and (self.form.opening or name in self.functions)
                if not known or arguments is None:
                    return []
                try:
                    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                except ValueError:  # 1e999 is read as infinity
                    return []
                function = {"name": name, "arguments": written}
                calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return calls
