"""Rendering: examples -> tokens and loss mask, by the tokenizer's own chat template.

``render`` (training), ``render_prompt`` (sampling and serving) and the evaluation of held-out rows all go through
the same two steps: trained_spans.py decides which text is prompt and which is trained, and describes what is refused;
encode.py turns that text into ids.

Plain text gets the tokenizer's BOS, where it adds one, and its EOS at the end. A prompt/completion row of two
strings is plain text of which the completion and the EOS are trained. Special tokens spelt in rows are encoded as
ordinary text, everywhere; an EOS spelt at the end of plain text is taken as the end, and so is the BOS that the
tokenizer adds at the beginning.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from postrain.data.bad_row import BadRow, RowRef, check_string
from postrain.data.documents import Rendered
from postrain.data.messages import Conversation, Example, PromptCompletion, parse_messages, parse_tools
from postrain.data.rendering.encode import encode_sequences, second_tokenizer
from postrain.data.rendering.row_checks import Refusal, check_not_rendered
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.rendering.trained_spans import (
    DEFAULT_SYSTEM,
    MARK_CLOSE,
    MARK_OPEN,
    Renderer,
    Sequence,
    mark,
    plan_sequences,
)
from postrain.errors import UserError

TEMPLATE_DATE = "2024-07-26"  # as data.template_date
BATCH = 256  # rows that render_many encodes together


def render(
    example: Example, tokenizer: Tokenizer, *, template_date: str = TEMPLATE_DATE, default_system: str = ""
) -> list[Rendered]:
    """The training sequences of one row: one, or one per turn where the template renders earlier turns differently.

    Args:
      example: from ``parse_row`` or a ``Source``.
      tokenizer: from ``load_tokenizer``.
      template_date: YYYY-MM-DD, for templates that print today's date.
      default_system: content of a system message for conversations that have none.

    Raises:
      BadRow: the row cannot be trained as it would be served; the reason says why.
      UserError: the tokenizer has no usable chat template, or no EOS for plain text.
    """
    (result,) = render_many([example], tokenizer, template_date=template_date, default_system=default_system)
    if isinstance(result, BadRow):
        raise result
    return result


def render_many(
    examples: Iterable[Example], tokenizer: Tokenizer, *, template_date: str = TEMPLATE_DATE, default_system: str = ""
) -> Iterator[list[Rendered] | BadRow]:
    """``render`` for many rows, in order and faster; a refused row comes out as its BadRow instead of raising."""
    _check_default_system(default_system)
    examples = iter(examples)
    while batch := list(itertools.islice(examples, BATCH)):
        plans: list[tuple[list[Sequence], list[int], list[int]] | BadRow] = []
        for example in batch:
            try:
                plans.append(_plan(example, tokenizer, template_date, default_system))
            except BadRow as e:
                plans.append(e)
        texts = [text for plan in plans if not isinstance(plan, BadRow) for text in plan[0]]
        encoded = iter(encode_sequences(texts, tokenizer))
        for example, plan in zip(batch, plans, strict=True):
            if isinstance(plan, BadRow):
                yield plan
                continue
            parts = [next(encoded) for _ in plan[0]]
            form = _name_form(example)
            try:
                yield [
                    Rendered(tokens, mask, example.ref, template_switches=switches, weights=weights, form=form)
                    for part in parts
                    for tokens, mask, switches, weights in part.sequences(*plan[1:])
                ]
            except Refusal as e:
                yield BadRow(example.ref, str(e), e.advice)


def _plan(
    example: Example, tokenizer: Tokenizer, template_date: str, default_system: str
) -> tuple[list[Sequence], list[int], list[int]]:
    """Texts to encode, and the ids to put before and after."""
    check_not_rendered(_strings(example), tokenizer, example.ref)
    if isinstance(example, Conversation):
        return plan_sequences(example, tokenizer, template_date, default_system), [], []
    if tokenizer.eos_id is None:
        raise UserError(f"{tokenizer.folder}: tokenizer_config.json names no eos_token, which plain text must end with")
    if isinstance(example, PromptCompletion):
        head, body = example.prompt, example.completion
    else:
        head, body = "", example.text
    head, body = _without_named_tokens(head, body, tokenizer, example)
    head, body = (mark(text, tokenizer.control_pattern) for text in (head, body))
    return [Sequence(head + body, ((len(head), len(head) + len(body)),))], tokenizer.prefix_ids, [tokenizer.eos_id]


# Tokens that are tags of HTML too: text that begins or ends with one may mean the tag.
_HTML = ("<s>", "</s>")


def _without_named_tokens(head: str, body: str, tokenizer: Tokenizer, example: Example) -> tuple[str, str]:
    """Plain text without the BOS that it begins with and the EOS that it ends with, which are put there as tokens.

    Raises BadRow where they would be trained as ordinary text: a second one, or a BOS that the tokenizer does not add.
    """
    begin, end = ("'prompt'", "'completion'") if isinstance(example, PromptCompletion) else ("'text'", "'text'")
    eos, closed = tokenizer.special_tokens["eos_token"], body.endswith(tokenizer.special_tokens["eos_token"])
    body = body.removesuffix(eos)
    if body.rstrip().endswith(eos) and (closed or eos not in _HTML):
        raise BadRow(
            example.ref,
            f"{end} ends with {eos!r} twice, or before whitespace: only one at the very end is taken as the end, "
            "and any other would be trained as ordinary text: leave it out, it is added to every row",
        )
    if head:
        return _without_bos(head, begin, closed, tokenizer, example.ref), body
    return head, _without_bos(body, begin, closed, tokenizer, example.ref)


def _without_bos(text: str, where: str, closed: bool, tokenizer: Tokenizer, ref: RowRef) -> str:
    bos = tokenizer.special_tokens.get("bos_token")
    if not bos or not text.startswith(bos) or (bos in _HTML and not closed):
        return text
    added = "one" if tokenizer.bos_id in tokenizer.prefix_ids else "none"
    text = text.removeprefix(bos)
    if added == "none" or text.startswith(bos):
        raise BadRow(
            ref,
            f"{where} begins with {bos!r}, which would be ordinary text to the model: leave it out (this tokenizer "
            f"puts {added} before text)",
        )
    return text


def _name_form(example: Example) -> Literal["messages", "prompt", "text"]:
    if isinstance(example, Conversation):
        return "messages"
    return "prompt" if isinstance(example, PromptCompletion) else "text"


def _check_default_system(text: str) -> None:
    """Raises UserError for text that is not Unicode: bytes of a command line that are not UTF-8, for instance."""
    try:
        check_string(text, DEFAULT_SYSTEM, RowRef("", "", 0))
    except BadRow as e:
        raise UserError(e.reason) from None


def _strings(example: Example) -> list[tuple[str, str | None, str]]:
    """The key of each text of a row, the role of its message or None, and the text."""
    if isinstance(example, Conversation):
        return _contents(example.messages)
    if isinstance(example, PromptCompletion):
        return [("'prompt'", None, example.prompt), ("'completion'", None, example.completion)]
    return [("'text'", None, example.text)]


def _contents(messages: Iterable[dict]) -> list[tuple[str, str | None, str]]:
    return [(f"messages[{i}].content", m["role"], m["content"]) for i, m in enumerate(messages)]


def render_prompt(
    messages,
    tokenizer: Tokenizer,
    *,
    tools=None,
    template_date: str = TEMPLATE_DATE,
    default_system: str = "",
    thinking: bool | None = None,
) -> np.ndarray:
    """The prompt, int32 [P], that serving feeds before it generates a reply to ``messages``.

    Args:
      messages: OpenAI-style messages, ending with the one to reply to; or a string, for plain completion.
      tools: function schemas, or None.
      thinking: for templates with a switch for reasoning; None leaves it at the template's default.

    Raises:
      BadRow: the messages are malformed or the template refuses them.
    """
    options: dict[str, Any] = {"template_date": template_date, "default_system": default_system, "thinking": thinking}
    (result,) = encode_prompts([(messages, tools, RowRef("prompt", "prompt", 1))], tokenizer, **options)
    if isinstance(result, BadRow):
        raise result
    return result


def encode_prompts(
    prompts: list[tuple],
    tokenizer: Tokenizer,
    *,
    template_date: str,
    default_system: str,
    thinking: bool | None = None,
) -> Iterator[np.ndarray | BadRow]:
    """``render_prompt`` for many at once, each (messages, tools, ref); a refused one comes out as its BadRow."""
    _check_default_system(default_system)
    plans: list[tuple[Sequence, list[int]] | BadRow] = []
    for messages, tools, ref in prompts:
        try:
            plans.append(_plan_prompt(messages, tools, ref, tokenizer, template_date, default_system, thinking))
        except BadRow as e:
            plans.append(e)
    encoded = iter(encode_sequences([plan[0] for plan in plans if not isinstance(plan, BadRow)], tokenizer))
    for (_, _, ref), plan in zip(prompts, plans, strict=True):
        try:
            yield plan if isinstance(plan, BadRow) else np.array([*plan[1], *next(encoded).true_ids()], np.int32)
        except Refusal as e:
            yield BadRow(ref, str(e), e.advice)


def _plan_prompt(
    messages, tools, ref, tokenizer, template_date, default_system, thinking
) -> tuple[Sequence, list[int]]:
    """The text of a prompt and the ids before it."""
    if isinstance(messages, str):
        check_string(messages, "prompt", ref)
        check_not_rendered([("'prompt'", None, messages)], tokenizer, ref)
        text = _without_bos(messages, "'prompt'", False, tokenizer, ref)
        return Sequence(mark(text, tokenizer.control_pattern), ()), tokenizer.prefix_ids
    # Earlier answers are context: what the template drops of them is refused as it is in training.
    messages = [
        m | {"train": False} if m["role"] == "assistant" else m for m in parse_messages(messages, ref, weighted=True)
    ]
    check_not_rendered(_contents(messages), tokenizer, ref)
    renderer = Renderer(tokenizer, messages, parse_tools(tools, ref), template_date, default_system, ref)
    variables = {} if thinking is None else {name: thinking for name in renderer.template.switches}
    end = len(renderer.messages)
    try:
        text = renderer.render(end, True, variables)
        renderer.check_prompt(text, end, variables)
    except Refusal as e:
        raise BadRow(ref, str(e), e.advice or renderer.advise_on_tools()) from None
    return Sequence(text, ()), []


def split_prompt(rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and expected reply of the last trained turn: for generating and scoring held-out rows.

    Returns:
      tokens int32 [P] before the last run of trained tokens, and that run int32 [R], stop token included.
    """
    last = int(np.flatnonzero(rendered.loss_mask)[-1]) + 1
    untrained = np.flatnonzero(~rendered.loss_mask[:last])
    first = int(untrained[-1]) + 1 if len(untrained) else 0
    return rendered.tokens[:first], rendered.tokens[first:last]


def decode_parts(ids: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of token ids in pieces, each with whether it spells a control token out of ordinary text."""
    text = tokenizer.decode(ids)
    control = frozenset(tokenizer.control_tokens.values())
    if len(tokenizer.control_pattern.findall(text)) == sum(i in control for i in ids.tolist()):
        return [(text, False)]
    # The second tokenizer writes the control tokens under other names, and nothing else.
    second = second_tokenizer(tokenizer)
    ids_of = {true: i for i, true in second.true_ids.items()}
    renamed = second.fast.decode([ids_of.get(i, i) for i in ids.tolist()], skip_special_tokens=False)
    real = {name: token for token, name in second.names.items()}
    parts = []
    for i, piece in enumerate(re.split(f"({tokenizer.control_pattern.pattern})", renamed)):
        piece = re.sub(f"{MARK_OPEN}.*?{MARK_CLOSE}", lambda m: real[m[0]], piece)
        parts += [(piece, i % 2 == 1)] if piece else []
    return parts
