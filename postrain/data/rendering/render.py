"""Rendering: examples -> tokens and loss mask, by the tokenizer's own chat template.

``render`` (training), ``render_prompt`` (sampling and serving) and the evaluation of held-out rows all go through
the same two steps: trained_spans.py decides which text is prompt and which is trained, and describes what is refused;
``encode_sequences`` turns that text into ids.

Plain text gets the tokenizer's BOS, where it adds one, and its EOS at the end. A prompt/completion row of two
strings is plain text of which the completion and the EOS are trained. Special tokens spelt in rows are encoded as
ordinary text, everywhere; an EOS spelt at the end of plain text is taken as the end, and so is the BOS that the
tokenizer adds at the beginning.

The text is encoded once, as a whole, and the spans are found in its tokens. Two cases need more:

* A token that lies over the beginning of a span (a prompt ending in a newline, an answer beginning with one,
  merged into a single token) could never be produced when served, where the prompt is encoded by itself.
  There the two sides are encoded separately, so that the ids before a span are always the ids of the prompt; later
  turns, whose prompts serving encodes as a whole, then go into a sequence of their own.
* Text of a row that spells a token which only templates may write stands between marks. It is encoded as
  ordinary text by a second tokenizer, whose control tokens have other names: the template's own tokens are
  renamed in the text, the row's are not. The rest is split as by the first tokenizer.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers

from postrain.data.bad_row import BadRow, RowRef, check_string
from postrain.data.documents import Rendered
from postrain.data.messages import Conversation, Example, PromptCompletion, parse_messages, parse_tools
from postrain.data.rendering.bpe_cache import Ids, encode_texts
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
            is_plain = isinstance(example, PromptCompletion)
            try:
                yield [
                    Rendered(tokens, mask, example.ref, template_switches=switches, weights=weights, is_plain=is_plain)
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


def encode_parts(texts: list[str], names: list[str], tokenizer: Tokenizer, ref: RowRef) -> list[np.ndarray]:
    """int32 ids of texts of one row that follow each other, nothing added; ``names``: their keys. Raises BadRow.

    They are encoded as one, after a line break: some tokenizers put a space in front of a text, and so in front of each
    part that is encoded by itself. Only where a token would lie over the end of a part, each is.
    """
    check_not_rendered([(repr(name), None, text) for name, text in zip(names, texts, strict=True)], tokenizer, ref)
    marked = [mark(text, tokenizer.control_pattern) for text in texts]
    bounds = list(itertools.accumulate(map(len, marked), initial=1))
    whole = Sequence("\n" + "".join(marked), tuple(itertools.pairwise(bounds)))
    try:
        if (parts := _encode_spans(whole, tokenizer)) is None:
            alone = encode_sequences([Sequence(text, ()) for text in marked], tokenizer)
            parts = [encoded.true_ids() for encoded in alone]
        return [np.array(ids, np.int32) for ids in parts]
    except Refusal as e:
        raise BadRow(ref, str(e), e.advice) from None


def _encode_spans(sequence: Sequence, tokenizer: Tokenizer) -> list[np.ndarray] | None:
    """The ids of each span; None where a token lies over one of their ends. They follow each other, to the text's end.

    Raises Refusal.
    """
    fast = tokenizer.fast
    if MARK_OPEN in sequence.text:
        sequence, fast = escape(sequence, tokenizer), second_tokenizer(tokenizer).fast
    found = fast.encode(sequence.text, add_special_tokens=False)
    starts, ids = [start for start, _ in found.offsets], np.asarray(found.ids, np.int32)
    places = [bisect.bisect_left(starts, begin) for begin, _ in sequence.spans] + [len(ids)]
    for place, (begin, _) in zip(places, sequence.spans, strict=False):
        if place == 0 or found.offsets[place - 1][1] > begin:
            return None
    encoded = Encoded(sequence, tokenizer, fast, Ids(ids, starts, range(len(ids))))
    return [encoded.true_ids(ids[start:stop]) for start, stop in itertools.pairwise(places)]


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


# Text -> ids and mask


def encode_sequences(sequences: list[Sequence], tokenizer: Tokenizer) -> list["Encoded"]:
    """Encodes many texts at once; spans are found by ``Encoded.sequences``."""
    out: dict[int, Encoded] = {}
    plain = [i for i, s in enumerate(sequences) if MARK_OPEN not in s.text]
    for i, ids in zip(plain, encode_texts(tokenizer.fast, [sequences[i].text for i in plain]), strict=True):
        out[i] = Encoded(sequences[i], tokenizer, tokenizer.fast, ids)
    for i, sequence in enumerate(sequences):
        if i not in out:
            escaped = escape(sequence, tokenizer)
            fast = second_tokenizer(tokenizer).fast
            out[i] = Encoded(escaped, tokenizer, fast, *encode_texts(fast, [escaped.text]))
    return [out[i] for i in range(len(sequences))]


class Encoded:
    """One encoded text. Ids are those of ``tokenizer``, also where the second tokenizer made them."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, fast: tokenizers.Tokenizer, encoded: Ids):
        self.text, self.spans = sequence.text, sequence.spans
        self.template_switches = sequence.template_switches or ("",) * len(sequence.spans)
        self.weights = sequence.weights or (1.0,) * len(sequence.spans)
        self.tokenizer, self.fast = tokenizer, fast
        self._ids, self._starts, self._places = encoded

    def sequences(
        self, prefix: list[int], suffix: list[int]
    ) -> list[tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray | None]]:
        """Token ids int32 [L] and loss mask bool [L], with ``prefix`` put in front and ``suffix``, trained, at the end.
        The third is ``Sequence.template_switches`` of its spans, or nothing where all of them are empty, the fourth the
        weights of their tokens, float32 [L], or None where all are 1.

        One tuple for all spans, and one more for each span, but the last, whose beginning had to be cut: after it
        the ids are no longer those that serving would encode for a later prompt.

        Raises:
          Refusal: no token boundary fits a span's beginning, the last trained token would not stop serving, or
            special tokens of the row cannot be kept as text.
        """
        whole, apart = [], []
        for span, *said in zip(self.spans, self.template_switches, self.weights, strict=True):
            ids, first, last = self._cut(*span)
            is_cut = ids is not self._ids
            (apart if is_cut and span != self.spans[-1] else whole).append((ids, first, last, *said))
        groups = [[cut] for cut in apart]
        groups += [whole] if whole else []
        groups.sort(key=lambda group: group[0][1])
        found = []
        for group in groups:
            # Only the last of a group may be cut; the others' places are the same in its ids.
            ids, _, end, *_ = group[-1]
            ids = np.concatenate([prefix, self.true_ids(ids[:end]), suffix], dtype=np.int32, casting="unsafe")
            mask, weights = np.zeros(len(ids), bool), np.ones(len(ids), np.float32)
            for _, first, last, _, weight in group:
                mask[first + len(prefix) : last + len(prefix)] = True
                weights[first + len(prefix) : last + len(prefix)] = weight
                stop = int(ids[last + len(prefix) - 1])
                if not suffix and stop not in self.tokenizer.stop_ids:
                    raise Refusal(
                        f"the last trained token is {self.tokenizer.decode([stop])!r}, which is not a stop token"
                    )
            mask[len(ids) - len(suffix) :] = True
            mask[: max(len(prefix), 1)] = False  # nothing predicts the first token
            if not mask.any():
                raise Refusal("it has no token to train on")
            switches = tuple(switch for *_, switch, _ in group)
            weighted = weights if (weights != 1).any() else None
            found.append((ids, mask, switches if any(switches) else (), weighted))
        return found

    def _cut(self, begin: int, end: int) -> tuple[np.ndarray, int, int]:
        """Ids with a token boundary at character ``begin`` as when the text before it is encoded by itself, and
        the indices of the first token of the span and of the first after it. The ids are ``self._ids`` itself where
        nothing had to change."""
        ids, starts, places = self._ids, self._starts, self._places
        # A span ends at the end of the text or after an added token, where the place of a token is always known.
        at_end = bisect.bisect_left(starts, end)
        last = places[at_end] if end < len(self.text) and at_end < len(places) else len(ids)
        if begin == 0:
            return ids, 0, last
        anchors = anchor_ids(self.fast)
        before = bisect.bisect_left(starts, begin)
        left = next((i for i in range(before - 1, -1, -1) if int(ids[places[i]]) in anchors), None)
        anchor, anchor_text, text_start = 0, "", 0
        if left is not None:
            anchor, anchor_text = places[left], self.fast.id_to_token(int(ids[places[left]])) or ""
            text_start = starts[left] if anchor_text else 0
        head = list(_encode_short(self.fast, self.text[text_start:begin]))
        first = anchor + len(head)
        if ids[anchor:first].tolist() == head:
            return ids, first, last
        right = next((i for i in range(before, len(places)) if int(ids[places[i]]) in anchors), None)
        after, stop = (len(ids), len(self.text)) if right is None else (places[right], starts[right])
        decode = functools.partial(self.fast.decode, skip_special_tokens=False)
        # After the anchor or a line break, not at the beginning of a text, where some tokenizers put a space in front.
        for lead in (anchor_text, "\n"):
            lead_ids, rest = _encode_short(self.fast, lead), _encode_short(self.fast, lead + self.text[begin:stop])
            if rest[: len(lead_ids)] == lead_ids:
                rest = rest[len(lead_ids) :]
                if decode([*head, *rest]) == decode(ids[anchor:after].tolist()):
                    break
        else:
            raise Refusal(
                "a token lies over the end of the generation prompt, and its sides cannot be encoded separately"
            )
        cut = np.concatenate([ids[:anchor], np.array([*head, *rest], np.int32), ids[after:]])
        return cut, first, last + len(cut) - len(ids)

    def true_ids(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Ids (default: all) in the vocabulary of ``tokenizer``.

        Raises:
          Refusal: special tokens of the row cannot be kept as text.
        """
        ids = self._ids if ids is None else ids
        if self.fast is self.tokenizer.fast:
            return ids
        second, ids = second_tokenizer(self.tokenizer), ids.tolist()
        if any(i in second.control_in_vocabulary for i in ids):
            raise Refusal("the row spells a special token, and the tokenizer cannot write it as ordinary text")
        return np.array([second.true_ids.get(i, i) for i in ids], np.int32)


@dataclasses.dataclass(frozen=True)
class SecondTokenizer:
    """A tokenizer whose control tokens have other names: ``fast`` knows them by ``names`` alone.

    Attributes:
      true_ids: its ids of added tokens -> the tokenizer's own.
      control_in_vocabulary: ids that the control tokens' old names still have in the model's vocabulary; a model
        that spells them out of ordinary text (a Unigram model may) cannot keep them apart.
    """

    fast: tokenizers.Tokenizer
    names: dict[str, str]
    true_ids: dict[int, int]
    control_in_vocabulary: frozenset[int]


@functools.lru_cache(maxsize=8)
def second_tokenizer(tokenizer: Tokenizer) -> SecondTokenizer:
    """The tokenizer with its control tokens renamed to what no row can spell."""
    original = tokenizer.fast
    names = {text: f"{MARK_OPEN}{i}{MARK_CLOSE}" for text, i in tokenizer.control_tokens.items()}
    spec = json.loads(original.to_str())
    spec["post_processor"] = None  # it may name the tokens, and nothing is added here
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            token["normalized"] = False
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    # New names are not in the model's vocabulary, so ids of added tokens may come out shifted.
    added = {token.content: i for i, token in original.get_added_tokens_decoder().items()}
    renamed = {fast.token_to_id(names.get(text, text)): i for text, i in added.items()}
    true_ids = {new: i for new, i in renamed.items() if new is not None}
    left = {i for i in map(fast.token_to_id, names) if i is not None}
    return SecondTokenizer(fast, names, true_ids, frozenset(left - true_ids.keys()))


def escape(sequence: Sequence, tokenizer: Tokenizer) -> Sequence:
    """Marked text -> text for the second tokenizer: the template's control tokens renamed, the marks taken out."""
    names = second_tokenizer(tokenizer).names
    pattern = re.compile(f"{MARK_OPEN}(.*?){MARK_CLOSE}|{tokenizer.control_pattern.pattern}", re.DOTALL)
    out, length, done = [], 0, 0
    begins, shifts = [0], [0]  # from character begins[i] of the marked text on, positions move by shifts[i]
    for match in pattern.finditer(sequence.text):
        text = match.group(1) if match.group(1) is not None else names[match.group(0)]
        out += [sequence.text[done : match.start()], text]
        length += match.start() - done + len(text)
        done = match.end()
        begins.append(done)
        shifts.append(length - done)
    out.append(sequence.text[done:])
    move = lambda at: at + shifts[bisect.bisect_right(begins, at) - 1]
    return dataclasses.replace(sequence, text="".join(out), spans=tuple((move(a), move(b)) for a, b in sequence.spans))


@functools.lru_cache(maxsize=16)
def anchor_ids(fast: tokenizers.Tokenizer) -> frozenset[int]:
    """Added tokens that are not whitespace: the tokenizer splits text at them first, so nothing reaches over them."""
    return frozenset(i for i, token in fast.get_added_tokens_decoder().items() if token.content.strip())


@functools.lru_cache(maxsize=4096)
def _encode_short(fast: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(fast.encode(text, add_special_tokens=False).ids)
