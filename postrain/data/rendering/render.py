"""Rendering: examples -> tokens and loss mask, by the tokenizer's own chat template.

``render`` (training), ``render_prompt`` (sampling and serving) and the evaluation of held-out rows all go through
the same two steps: trained_spans.py decides which text is prompt and which is trained, and describes what is refused;
encoding.py turns that text into ids.

Plain text gets the tokenizer's BOS, where it adds one, and its EOS at the end. A prompt/completion row of two
strings is plain text of which the completion and the EOS are trained. Special tokens spelt in rows are encoded as
ordinary text, everywhere; an EOS spelt at the end of plain text is taken as the end.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from postrain.data.documents import Rendered
from postrain.data.messages import (
    BadRow,
    Conversation,
    Example,
    PromptCompletion,
    RowRef,
    checked_strings,
    parse_messages,
    parse_tools,
)
from postrain.data.rendering.encoding import encode_sequences
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.rendering.trained_spans import Refusal, Renderer, Sequence, mark, plan_sequences
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
    batch: list = []
    for example in examples:
        try:
            batch.append((example.ref, *_plan(example, tokenizer, template_date, default_system)))
        except BadRow as e:
            batch.append((example.ref, e, (), ()))
        if len(batch) == BATCH:
            yield from _encode(batch, tokenizer)
            batch = []
    yield from _encode(batch, tokenizer)


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
    options = {"template_date": template_date, "default_system": default_system, "thinking": thinking}
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
        checked_strings(messages, "prompt", ref)
        return Sequence(mark(messages, tokenizer.control_pattern), ()), tokenizer.prefix_ids
    messages = parse_messages(messages, ref)
    renderer = Renderer(tokenizer, messages, parse_tools(tools, ref), template_date, default_system, ref)
    variables = {} if thinking is None else {name: thinking for name in renderer.template.switches}
    try:
        return Sequence(renderer.render(len(renderer.messages), True, variables), ()), []
    except Refusal as e:
        raise BadRow(ref, str(e), e.advice) from None


def split_prompt(rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and expected reply of the last trained turn: for generating and scoring held-out rows.

    Returns:
      tokens int32 [P] before the last run of trained tokens, and that run int32 [R], stop token included.
    """
    last = int(np.flatnonzero(rendered.loss_mask)[-1]) + 1
    untrained = np.flatnonzero(~rendered.loss_mask[:last])
    first = int(untrained[-1]) + 1 if len(untrained) else 0
    return rendered.tokens[:first], rendered.tokens[first:last]


def _plan(example: Example, tokenizer: Tokenizer, template_date: str, default_system: str):
    """Texts to encode, and the ids to put before and after."""
    if isinstance(example, Conversation):
        return plan_sequences(example, tokenizer, template_date, default_system), [], []
    if tokenizer.eos_id is None:
        raise UserError(f"{tokenizer.folder}: tokenizer_config.json names no eos_token, which plain text must end with")
    if isinstance(example, PromptCompletion):
        head, body = example.prompt, example.completion
    else:
        head, body = "", example.text
    body = body.removesuffix(tokenizer.special_tokens["eos_token"])
    head, body = (mark(text, tokenizer.control_pattern) for text in (head, body))
    return [Sequence(head + body, ((len(head), len(head) + len(body)),))], tokenizer.prefix_ids, [tokenizer.eos_id]


def _encode(batch: list, tokenizer: Tokenizer) -> Iterator[list[Rendered] | BadRow]:
    flat = [s for _, plan, _, _ in batch if not isinstance(plan, BadRow) for s in plan]
    encoded = iter(encode_sequences(flat, tokenizer))
    for ref, plan, prefix, suffix in batch:
        if isinstance(plan, BadRow):
            yield plan
            continue
        parts = [next(encoded) for _ in plan]
        try:
            yield [
                Rendered(tokens, mask, ref, template_switches=switches)
                for e in parts
                for tokens, mask, switches in e.sequences(prefix, suffix)
            ]
        except Refusal as e:
            yield BadRow(ref, str(e), e.advice)
