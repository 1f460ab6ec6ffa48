"""Checks that nothing of a row is lost or written twice: what is refused, before and after rendering.

* ``check_not_rendered``: a string that a chat template has written already. Its control tokens would become ordinary
  text, and the template would write them a second time.
* ``check_reasoning``: a message whose ``<think>`` blocks cannot be told from its answer. Templates cut the content at
  a tag of their own choice, so that words vanish, or reasoning without an end is trained as an answer.
* ``check_nothing_dropped``: everything that a trained message holds must be found in what the template renders.
"""

import functools
import json
import re
from collections.abc import Iterator

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.rendering.template import ChatTemplate, split_inline
from postrain.data.rendering.tokenizer import Tokenizer

# How chat templates write turns, whatever the tokenizer. A turn opens with a token and the role's name
# (<|im_start|>user, <|start_header_id|>user, <start_of_turn>user), a token of that name (<|user|>), or [INST].
_TOKEN = r"<[|｜][^<>\s]{1,60}>|<\w{1,40}[|｜]>|</?s>|<bos>|<eos>|<(?:start|end)_of_\w+>|\[gMASK\]"
_BRACKETS = r"\[/?INST\]|\[/?SYSTEM_PROMPT\]"
_ROLES = {
    "system": ("[Ss]ystem|developer", r"\[SYSTEM_PROMPT\]"),
    "user": ("[Uu]ser|human", r"\[INST\]"),
    "assistant": ("[Aa]ssistant|model|bot|chatbot", r"\[/INST\]"),
    "tool": ("tool|observation|ipython", r"\[TOOL_RESULTS\]"),
}
# Reasoning in the content: blocks, or a block at its start whose opening tag the prompt has written.
_BLOCK = re.compile(r"<think>.*?</think>|\A(?:(?!<think>).)*?</think>", re.DOTALL)
_PYTHON = {"true": "True", "false": "False", "null": "None"}


class Refusal(Exception):
    """A turn cannot be trained as it would be served; ``advice`` where the cause is not this row alone."""

    def __init__(self, reason: str, advice: str = ""):
        super().__init__(reason)
        self.advice = advice


# Before rendering


def check_not_rendered(strings: list[tuple[str, str | None, str]], tokenizer: Tokenizer, ref: RowRef) -> None:
    """Checks that no chat template has written a string of the row.

    A string counts as written by one if it begins with a token, opens a turn, and then either opens a turn of the
    assistant, or ends with a token; in a message the latter only if that turn is of its own role. Tokens quoted
    elsewhere are the row's text.

    Args:
      strings: (key, role of the message or None for plain text, the text).

    Raises:
      BadRow: naming the key and what the text begins with.
    """
    for where, role, text in strings:
        if text.lstrip()[:1] in ("<", "[") and (begin := _find_rendered_turn(text, role, tokenizer)):
            raise BadRow(
                ref,
                f"a chat template has written {where} already: it begins {begin[-60:]!r}, which would be ordinary text "
                "to the model",
                "write messages instead, without these tokens: the tokenizer's own chat template writes them",
            )


def _find_rendered_turn(text: str, role: str | None, tokenizer: Tokenizer) -> str:
    """The text up to the name of its first turn's role, if a chat template wrote it; else empty."""
    tokens, begins, ends, opens, answers = _turn_patterns(tokenizer)
    if not begins.match(text) or not (first := opens.search(text)):
        return ""
    if role is None and not tokens.search(text.removesuffix(tokenizer.special_tokens.get("eos_token", ""))):
        return ""  # brackets that are not tokens of this tokenizer: the ordinary text that serving would feed
    own = role is None or (first.lastgroup == role and first.start() == len(text) - len(text.lstrip()))
    written = answers.search(text, first.end()) or (own and ends.search(text, first.end()))
    return text[: first.end()].strip() if written else ""


@functools.lru_cache(maxsize=16)
def _turn_patterns(tokenizer: Tokenizer) -> tuple[re.Pattern, ...]:
    """Patterns of a token, one at the beginning (or a bracket) and at the end, and of what opens a turn: any turn (the
    group is its role) and the assistant's."""
    token = f"(?:{_TOKEN}|{tokenizer.control_pattern.pattern})"
    mark = f"(?:{token}|{_BRACKETS})"
    opens = {
        role: rf"{token}[ \n]?(?:{names})(?=[\s<:]|\Z)|<[|｜](?i:{names})(?:_TOKEN)?[|｜]>|{brackets}"
        for role, (names, brackets) in _ROLES.items()
    }
    any_role = "|".join(f"(?P<{role}>{pattern})" for role, pattern in opens.items())
    return tuple(map(re.compile, (token, rf"\s*{mark}", rf"{mark}\s*\Z", any_role, opens["assistant"])))


def check_reasoning(message: dict, template: ChatTemplate) -> None:
    """Checks that reasoning and answer of an assistant message can be told apart.

    Reasoning is ``reasoning_content``, or one ``<think>`` block at the start of the content. Where the template knows
    nothing of reasoning, tags are text; a block that never ends is refused there too.

    Raises:
      Refusal: naming what cannot be told apart.
    """
    content, field = message["content"], message.get("reasoning_content", "")
    begins, (head, close, rest) = content.lstrip().startswith("<think>"), content.partition("</think>")
    if begins and not close:
        raise Refusal(
            "the content begins with <think> and never closes it: its reasoning would be trained as the answer"
        )
    if not template.reads_reasoning:
        return
    if field.lstrip().startswith("<think>") or "</think>" in field:
        raise Refusal("reasoning_content holds <think> tags, which the chat template writes: give the words alone")
    if field.strip():
        if begins or (close and "<think>" not in head):
            raise Refusal("reasoning stands in reasoning_content and in the content too: put it into one of them")
        return
    words = head.partition("<think>")[0].strip()
    if close and "<think>" in head and words:
        raise Refusal(
            f"words stand before <think> in the content ({words[:40]!r}), and could not be told from reasoning: write "
            "the reasoning first, or as reasoning_content"
        )
    if close and "</think>" in rest:
        raise Refusal(
            "the content has more than one </think>, and only one block can be its reasoning: write the reasoning as "
            "reasoning_content"
        )
    if close and "<think>" not in head and not template.splits_content:
        raise Refusal("the content has </think> without <think>: write the reasoning as reasoning_content")


# After rendering


def reasoning_of(message: dict) -> str:
    """The message's reasoning: its ``reasoning_content``, or a ``<think>`` block at the start of its content."""
    return message.get("reasoning_content", "").strip() or split_inline(message["content"])[0]


def check_nothing_dropped(message: dict, continuation: str) -> None:
    """Checks that the continuation holds the reasoning, the content, and every call's name and arguments.

    Each must have a place of its own.

    Raises:
      Refusal: naming what the template dropped.
    """
    reasoning, answer = message.get("reasoning_content", ""), message["content"]
    if not reasoning.strip():
        reasoning, answer = split_inline(answer)
    pieces = [("reasoning", reasoning.strip()), ("content", answer.strip())]
    for call in message.get("tool_calls", ()):
        name = call["function"]["name"]
        pieces.append((f"tool call {name!r:.40}", name))
        pieces += [
            (f"arguments of the tool call {name!r:.40}", leaf) for leaf in _leaves(call["function"]["arguments"])
        ]
    # Longest first, each place used once: a short piece must not be found inside a longer one.
    for what, piece in sorted(pieces, key=lambda p: -len(p[1])):
        for form in _forms(piece):
            at = continuation.find(form)
            if at >= 0:
                continuation = continuation[:at] + "\0" * len(form) + continuation[at + len(form) :]
                break
        else:
            raise Refusal(f"the chat template drops the {what}: {piece[:40]!r} is not in what it renders")


def check_reasoning_once(message: dict, continuation: str) -> None:
    """Raises Refusal where a block of the content stands behind another one, which the template wrote by itself."""
    reasoning, answer = split_inline(message["content"])
    arguments = [text for call in message.get("tool_calls", ()) for text in _leaves(call["function"]["arguments"])]
    if reasoning and continuation.count("</think>") > 1 + "\n".join([answer, *arguments]).count("</think>"):
        raise Refusal("the chat template writes a <think> block of its own before that of the content")


def shows_answer(text: str, content: str) -> bool:
    """Whether the text holds all that stands outside of the reasoning in an assistant's content."""
    return all(contains(text, piece) for piece in _BLOCK.split(content))


def _leaves(value) -> list[str]:
    """Keys and values of a call's arguments as text, in order."""
    if isinstance(value, dict):
        return [text for k, v in value.items() for text in (k, *_leaves(v))]
    if isinstance(value, list):
        return [text for v in value for text in _leaves(v)]
    return [value if isinstance(value, str) else json.dumps(value)]


def _forms(piece: str) -> Iterator[str]:
    """The ways to write a piece: as it is, inside a JSON string, or as Python's True, False and None."""
    yield piece
    yield json.dumps(piece, ensure_ascii=False)[1:-1]
    yield json.dumps(piece)[1:-1]
    if piece in _PYTHON:
        yield _PYTHON[piece]


def contains(text: str, piece: str) -> bool:
    """Whether the text holds the piece, without the whitespace around it, in one of the ways to write it."""
    piece = piece.strip()
    return any(form in text for form in _forms(piece))
