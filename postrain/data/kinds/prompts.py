"""Kind prompts: prompts to generate answers to, with metadata for the functions that score the answers.

Rows are ``{"prompt": ..., "tools": [...]}``. The prompt is text, or messages of which the last is not the assistant's.
Every other key is metadata and travels with the batch. The tokens are those that serving feeds (``render_prompt``;
text without any template), and none is trained.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from postrain.data.bad_row import FUNCTION_ADVICE, BadRow, RowRef, check_string, name_keys
from postrain.data.documents import Rendered
from postrain.data.messages import check_keys, parse_messages, parse_tools
from postrain.data.rendering.render import BATCH, encode_prompts
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.row_keys import MEDIA_KEYS, PROMPT_KEYS, Keys, is_empty

FORMS = {"prompts": ("prompt",)}
# Every other key is metadata, which a function that scores answers reads: none but these is refused.
_KEYS = Keys(("prompt", "tools"), PROMPT_KEYS | MEDIA_KEYS)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, text or normalised messages, and the metadata of its row."""

    prompt: str | list[dict]
    tools: tuple[dict, ...] | None
    metadata: dict[str, Any]
    ref: RowRef


def parse_prompt(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Prompt:
    """One row, checked. Raises BadRow."""
    check_keys(raw, _KEYS, ref, set())
    prompt, tools = raw.get("prompt"), parse_tools(raw.get("tools"), ref)
    if is_empty(prompt):
        raise BadRow(ref, f"expected a 'prompt', text or a list of messages; found {name_keys(raw)}", FUNCTION_ADVICE)
    if isinstance(prompt, str):
        check_string(prompt, "prompt", ref)
        if tools:
            raise BadRow(ref, "a string is plain text, which has no 'tools': write the prompt as a list of messages")
    else:
        prompt = parse_messages(prompt, ref, unread, "prompt", weighted=True)
        if prompt[-1]["role"] == "assistant":
            raise BadRow(ref, "the prompt must not end with an assistant message, which is to be generated")
    metadata = {key: value for key, value in raw.items() if key not in _KEYS.read}
    _check_json(metadata, "", ref)
    return Prompt(prompt, tools, metadata, ref)


def _check_json(value: Any, where: str, ref: RowRef) -> None:
    """Raises BadRow for values that JSON does not have: metadata is saved and fingerprinted as JSON."""
    if isinstance(value, dict):
        for key, inside in value.items():
            name = f"{where}.{key}" if where else f"{key}"
            if not isinstance(key, str):
                raise BadRow(ref, f"key {name} of the metadata must be a string; found {type(key).__name__}")
            _check_json(inside, name, ref)
    elif isinstance(value, list | tuple):
        for i, inside in enumerate(value):
            _check_json(inside, f"{where}[{i}]", ref)
    elif not isinstance(value, str | int | float | None):
        raise BadRow(
            ref,
            f"{where!r} is metadata, which must be JSON (text, numbers, lists, objects); found {type(value).__name__}",
        )


def render_prompts(
    examples: Iterable[Prompt], tokenizer: Tokenizer, *, template_date: str, default_system: str
) -> Iterator[list[Rendered] | BadRow]:
    """One sequence of each example, or its BadRow."""
    examples = iter(examples)
    while batch := list(itertools.islice(examples, BATCH)):
        rendered = encode_prompts(
            [(e.prompt, e.tools, e.ref) for e in batch],
            tokenizer,
            template_date=template_date,
            default_system=default_system,
        )
        for example, tokens in zip(batch, rendered, strict=True):
            if isinstance(tokens, BadRow):
                yield tokens
                continue
            mask = np.zeros(len(tokens), bool)
            yield [Rendered(tokens, mask, example.ref, reads_last=True, metadata=example.metadata)]
