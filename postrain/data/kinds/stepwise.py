"""Kind stepwise: an answer in steps, each of them right or wrong.

Rows are ``{"prompt": ..., "completions": [step, ...], "labels": [true or false, ...]}``, as trl's stepwise rows. The
prompt is text, or messages of which the last is not the assistant's; steps are text. The tokens are those of the
prompt that serving feeds (``kinds/prompts.py``), then those of the steps, each with a line break after it. They are
encoded as one text, in which every step ends with a token; only where a token would lie over the end of a step, as
where the next one begins with spaces, each is encoded by itself. The array of a batch is ``steps``: at the last token
of a step 2 for a right and 1 for a wrong one, else 0.

The steps after a cut would have no labels, so a row is not cut to a length.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from postrain.data.bad_row import FUNCTION_ADVICE, BadRow, RowRef, check_string, name_keys
from postrain.data.documents import Field, Layout, Rendered
from postrain.data.kinds.prompts import Prompt, parse_prompt
from postrain.data.messages import check_keys
from postrain.data.rendering.encode import encode_parts
from postrain.data.rendering.render import BATCH, encode_prompts
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.row_keys import INPUT_KEYS, LOSS_KEYS, MEDIA_KEYS, PROMPT_KEYS, REASONING_KEYS, Keys

FIELD, WRONG, RIGHT = "steps", 1, 2
FORMS = {"stepwise": ("completions", "labels")}
LAYOUT = Layout({FIELD: (np.dtype(np.int32), ())})  # of its batches
SEPARATOR = "\n"  # after every step
_REFUSED = PROMPT_KEYS | MEDIA_KEYS | INPUT_KEYS | REASONING_KEYS | LOSS_KEYS
_KEYS = Keys(("prompt", "completions", "labels", "tools"), _REFUSED)


@dataclasses.dataclass(frozen=True)
class Steps:
    """A prompt, the steps of one answer to it, and whether each is right; no labels where they are only scored."""

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    ref: RowRef

    @property
    def form(self) -> Literal["messages", "prompt"]:
        return "prompt" if isinstance(self.prompt.prompt, str) else "messages"


def parse_steps(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Steps:
    """One row, checked. ``unread`` takes the keys that are not read. Raises BadRow."""
    check_keys(raw, _KEYS, ref, unread)
    if raw.get("completions") is None or raw.get("labels") is None:
        raise BadRow(
            ref, f"expected 'completions', the steps, and their 'labels'; found {name_keys(raw)}", FUNCTION_ADVICE
        )
    steps, labels = parse_completions(raw, ref), raw["labels"]
    if not isinstance(labels, list | tuple) or len(labels) != len(steps):
        found = f"{len(labels)} labels" if isinstance(labels, list | tuple) else repr(labels)
        raise BadRow(ref, f"expected a list with one label for each of the {len(steps)} steps; found {found:.40}")
    for i, label in enumerate(labels):
        if not isinstance(label, bool | int) or label not in (0, 1):
            raise BadRow(ref, f"labels[{i}] must be true or false; found {label!r:.40}")
    return Steps(parse_step_prompt(raw, ref), steps, tuple(map(bool, labels)), ref)


def parse_step_prompt(raw: dict, ref: RowRef) -> Prompt:
    return parse_prompt({key: raw[key] for key in ("prompt", "tools") if key in raw}, "prompts", ref, set())


def parse_completions(raw: dict, ref: RowRef) -> tuple[str, ...]:
    """The steps of a row. Raises BadRow where one is empty or no text."""
    steps = raw["completions"]
    if not isinstance(steps, list | tuple) or not steps:
        raise BadRow(ref, f"'completions' must be a list of steps; found {steps!r:.40}")
    for i, step in enumerate(steps):
        if not check_string(step, f"completions[{i}]", ref).strip():
            raise BadRow(ref, f"completions[{i}] is empty: expected the text of a step")
    return tuple(steps)


def render_steps(
    examples: Iterable[Steps], tokenizer: Tokenizer, *, template_date: str, default_system: str
) -> Iterator[list[Rendered] | BadRow]:
    """One sequence of each example, or its BadRow."""
    options: dict[str, Any] = {"template_date": template_date, "default_system": default_system}
    examples = iter(examples)
    while batch := list(itertools.islice(examples, BATCH)):
        prompts = encode_prompts([(e.prompt.prompt, e.prompt.tools, e.ref) for e in batch], tokenizer, **options)
        for example, prompt in zip(batch, prompts, strict=True):
            try:
                yield prompt if isinstance(prompt, BadRow) else [_join(example, prompt, tokenizer)]
            except BadRow as error:
                yield error


def _join(example: Steps, prompt: np.ndarray, tokenizer: Tokenizer) -> Rendered:
    names = [f"completions[{i}]" for i in range(len(example.steps))]
    if not len(prompt):
        raise BadRow(example.ref, "'prompt' has no tokens: the steps have nothing to follow")
    texts = [step + SEPARATOR for step in example.steps]
    parts = encode_parts(texts, names, tokenizer, example.ref, before=int(prompt[-1]))
    tokens = np.concatenate([prompt, *parts]).astype(np.int32)
    ends = len(prompt) + np.cumsum([len(part) for part in parts]) - 1
    steps = np.zeros(len(tokens), np.int32)
    steps[ends] = [RIGHT if label else WRONG for label in example.labels]
    mask = np.arange(len(tokens)) >= len(prompt)
    fields = (Field(FIELD, steps, "token"),)
    return Rendered(tokens, mask, example.ref, fields=fields, reads_last=True, form=example.form)
