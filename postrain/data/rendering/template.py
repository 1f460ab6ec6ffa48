"""Chat templates: the Jinja program of a tokenizer, which writes a conversation as text.

The environment is the one that `transformers` and the serving engines built on it use (sandboxed,
``trim_blocks``, ``lstrip_blocks``, ``raise_exception``, ``tojson``, ``strftime_now``), with one difference:
today's date is ``template_date``, so that the same row gives the same tokens tomorrow. A test compares
the two over all templates in the test data.
"""

import datetime
import functools
import json
import re

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from postrain.errors import UserError

# Variables by which templates turn reasoning on and off. Serving passes them as chat_template_kwargs.
REASONING_SWITCHES = ("enable_thinking", "thinking")

_REASONING_FIELDS = {"reasoning_content", "thinking"}
_TRANSLATED = {"train", "reasoning_content", "tool_calls"}  # keys of messages that templates read in another form
_PROBE_TOOLS: list[dict] = [
    {
        "type": "function",
        "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
]


class TemplateRefusal(Exception):
    """The template raised for this conversation, with this message."""


class _Generation(Extension):
    """The tag ``{% generation %}``, which marks trained text for other libraries. Here it only prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(ImmutableSandboxedEnvironment):
    """Skips the sandbox's check of ``loop.first`` and its like, which takes longer than the loop itself."""

    def getattr(self, obj, attribute):
        if type(obj) is jinja2.runtime.LoopContext and attribute in ("first", "last", "index", "index0", "length"):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    return env


class ChatTemplate:
    """A compiled template: ``render`` writes messages as text; the rest is found by probing the template.

    Attributes:
      source: the Jinja text.
      literals: all text that the template itself can write, pieces joined by NUL.
      names: attributes and string constants that occur in it: the keys of messages that it can read.
      switches: the variables of ``REASONING_SWITCHES`` that it reads.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], origin: str):
        """``special_tokens``: ``bos_token`` etc., as templates read them. ``origin``: for errors.

        Raises:
          UserError: the template is not valid Jinja.
        """
        self.source = source
        self.origin = origin
        self._changing: dict[tuple, bool] = {}  # of changes_prompt
        try:
            self._template = _environment().from_string(source)
            self._globals = {**self._template.globals, **special_tokens}
            tree = _environment().parse(source)
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"{origin}: the chat template is not valid Jinja: line {e.lineno}: {e.message}") from None
        pieces = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        pieces |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        self.literals = "\0".join(sorted(pieces))
        variables = {node.name for node in tree.find_all(jinja2.nodes.Name)}
        self.names = pieces | {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        self.switches = tuple(name for name in REASONING_SWITCHES if name in variables)

    def render(self, messages, tools=None, *, template_date: str, add_generation_prompt: bool, **variables) -> str:
        """The conversation as text.

        Raises:
          TemplateRefusal: the template raised, with its message.
        """
        date = parse_date(template_date)
        messages = [self._for_template(m) for m in messages]
        variables |= {
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": lambda format: date.strftime(format),
        }
        try:  # what Template.render does, which would copy its globals, a ChainMap, each time
            context = self._template.new_context({**self._globals, **variables}, shared=True)
            return "".join(self._template.root_render_func(context))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:
            raise TemplateRefusal(re.sub(r"\s+", " ", str(e)) or type(e).__name__) from None

    def lift_reasoning(self, message: dict) -> dict:
        """For templates that take reasoning only in a field of its own: a ``<think>`` block at the start of the content
        becomes ``reasoning_content``, else its tags would be written out as a part of the answer.
        """
        if message["role"] != "assistant" or not message["content"].lstrip().startswith("<think>"):
            return message
        if "</think>" not in message["content"] or "reasoning_content" in message or not self._takes_field_alone:
            return message
        reasoning, answer = split_inline(message["content"])
        message = {**message, "content": answer.lstrip("\n")}
        return {**message, "reasoning_content": reasoning} if reasoning else message

    @functools.cached_property
    def reads_reasoning(self) -> bool:
        """Whether the template has anything to do with reasoning: a switch, a field, or the tag that ends it."""
        return bool(self.switches or _REASONING_FIELDS & self.names) or "</think>" in self.literals

    @functools.cached_property
    def splits_content(self) -> bool:
        """Whether the template finds reasoning in the content, up to ``</think>``."""
        return "</think>" in self.literals and not self._takes_field_alone

    @functools.cached_property
    def _takes_field_alone(self) -> bool:
        """Whether the template reads a field for reasoning, and nothing of it in the content."""
        if not _REASONING_FIELDS & self.names or "</think>" not in self.literals:
            return bool(_REASONING_FIELDS & self.names)
        # It may write the tag without looking for it in the content: then the two come out differently.
        user, block = {"role": "user", "content": "x"}, "<think>\nPROBEREASON\n</think>\n\nPROBE"
        field = {"role": "assistant", "content": "PROBE", "reasoning_content": "PROBEREASON"}
        texts = [self._probe([user, m], None) for m in (field, {"role": "assistant", "content": block})]
        with_field, with_block = ("".join(t.split()) if t else "" for t in texts)
        return "PROBEREASON" in with_field and with_field != with_block

    def _for_template(self, message: dict) -> dict:
        """The message with the keys that templates read: without ``train``, reasoning also as ``thinking``."""
        if not _TRANSLATED & message.keys():
            return message
        out = {k: v for k, v in message.items() if k != "train"}
        if "reasoning_content" in out:
            out["thinking"] = out["reasoning_content"]
        if "tool_calls" in out and self.arguments_as_text:
            functions = [call["function"] for call in out["tool_calls"]]
            texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
            out["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": text}}
                for call, text in zip(out["tool_calls"], texts, strict=True)
            ]
        return out

    @functools.cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template joins a call's arguments as text (DeepSeek) instead of writing an object out."""
        self.__dict__["arguments_as_text"] = False  # while probing
        accepted = []
        for arguments in ({}, "{}"):
            call = {"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": arguments}}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            accepted.append(self._probe([{"role": "user", "content": "x"}, answer], _PROBE_TOOLS) is not None)
        return accepted == [False, True]

    @functools.cached_property
    def renders_tools(self) -> bool:
        """Whether the template writes function schemas anywhere."""
        shown = self._probe([{"role": "user", "content": "x"}], _PROBE_TOOLS)
        return shown is not None and _PROBE_TOOLS[0]["function"]["name"] in shown

    def changes_prompt(self, **variables) -> bool:
        """Whether a generation prompt with these switches differs from the default one."""
        key = tuple(variables.items())
        if key not in self._changing:
            texts = [self._probe([{"role": "user", "content": "x"}], None, True, **v) for v in ({}, variables)]
            self._changing[key] = None in texts or texts[0] != texts[1]
        return self._changing[key]

    def _probe(self, messages: list[dict], tools: list[dict] | None, prompt: bool = False, **variables) -> str | None:
        try:
            return self.render(messages, tools, template_date="2024-07-26", add_generation_prompt=prompt, **variables)
        except TemplateRefusal:
            return None


def split_inline(content: str) -> tuple[str, str]:
    """Content with a ``<think>`` block at its start -> reasoning and answer; the opening tag may be missing, as where
    the prompt writes it."""
    head, close, answer = content.partition("</think>")
    return (head.strip().removeprefix("<think>").strip(), answer) if close else ("", content)


@functools.cache
def parse_date(text: str) -> datetime.datetime:
    """``data.template_date``: YYYY-MM-DD."""
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise UserError(f"data.template_date must be a date as 2024-07-26; found {text!r}") from None
