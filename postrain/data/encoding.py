"""Text with marks and spans -> token ids and loss mask.

The text is encoded once, as a whole, and the spans' positions are found in the result. Two things are put
right on the way:

* A token that lies over the beginning of a span (a prompt ending in a newline, an answer beginning with one,
  merged into a single token) could never be produced when served, where the prompt is encoded by itself.
  There the two sides are encoded apart, so that the ids before a span are always the ids of the prompt.
* Between marks stands text of a row that spells a token which only templates may write. It is encoded as
  ordinary text by a second tokenizer, whose control tokens have other names: the template's own tokens are
  renamed in the text, the row's are left as they are. All else is split as the first tokenizer would.
"""

import bisect
import dataclasses
import functools
import json
import re

import numpy as np
import tokenizers

from postrain.data.tokenizer import Tokenizer
from postrain.data.turns import MARK_CLOSE, MARK_OPEN, Refusal, Sequence


def encode_sequences(sequences: list[Sequence], tokenizer: Tokenizer) -> list["Encoded"]:
    """Encodes many texts at once (the tokenizer then uses all cores); spans are found by ``Encoded.span``."""
    out: list[Encoded | None] = [None] * len(sequences)
    plain = [i for i, s in enumerate(sequences) if MARK_OPEN not in s.text]
    encodings = tokenizer.fast.encode_batch([sequences[i].text for i in plain], add_special_tokens=False)
    for i, encoding in zip(plain, encodings, strict=True):
        out[i] = Encoded(sequences[i], tokenizer, tokenizer.fast, encoding)
    for i, sequence in enumerate(sequences):
        if out[i] is None:
            escaped = escape(sequence, tokenizer)
            fast = second_tokenizer(tokenizer).fast
            out[i] = Encoded(escaped, tokenizer, fast, fast.encode(escaped.text, add_special_tokens=False))
    return out


class Encoded:
    """One encoded text. ``ids`` are those of ``tokenizer``, also where the second tokenizer made them."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, fast: tokenizers.Tokenizer, encoding):
        self.text, self.spans = sequence.text, sequence.spans
        self.tokenizer, self.fast = tokenizer, fast
        self._ids = list(encoding.ids)
        self._starts = [start for start, _ in encoding.offsets]
        self._anchors = anchor_ids(fast)

    def tokens(self, prefix: list[int], suffix: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [L] and loss mask bool [L], with ``prefix`` put in front and ``suffix``, trained, at the end.

        Raises:
          Refusal: a span's beginning cannot be told in tokens, the last trained token would not stop serving, or
            special tokens of the row cannot be kept as text.
        """
        ranges = []
        for start, end in reversed(self.spans):  # backwards: cutting moves only what comes after
            last = len(self._ids) if end == len(self.text) else bisect.bisect_left(self._starts, end)
            first, grown = self._cut(start)
            ranges = [(first, last + grown)] + [(a + grown, b + grown) for a, b in ranges]
        ids = prefix + self.true_ids() + suffix
        mask = np.zeros(len(ids), bool)
        for first, last in ranges:
            mask[first + len(prefix) : last + len(prefix)] = True
            stop = ids[last + len(prefix) - 1]
            if not suffix and stop not in self.tokenizer.stop_ids:
                raise Refusal(f"the last trained token is {self.tokenizer.decode([stop])!r}, which is no stop token")
        mask[len(ids) - len(suffix) :] = True
        mask[: max(len(prefix), 1)] = False  # nothing predicts the first token
        if not mask.any():
            raise Refusal("it has no token to train on")
        return np.asarray(ids, np.int32), mask

    def _cut(self, at: int) -> tuple[int, int]:
        """Index of the first token after character ``at``, with a token boundary there as when the text before it is
        encoded by itself; and by how many tokens the sequence grew to make that true."""
        if at == 0:
            return 0, 0
        before = bisect.bisect_left(self._starts, at)
        anchor = next((i for i in range(before - 1, -1, -1) if self._ids[i] in self._anchors), None)
        anchor_text = "" if anchor is None else self.fast.id_to_token(self._ids[anchor])
        anchor = anchor or 0
        begin = self._starts[anchor] if anchor_text else 0
        head = _encode_short(self.fast, self.text[begin:at])
        if self._ids[anchor : anchor + len(head)] == head:
            return anchor + len(head), 0
        after = next((i for i in range(before, len(self._ids)) if self._ids[i] in self._anchors), len(self._ids))
        stop = self._starts[after] if after < len(self._ids) else len(self.text)
        # Not at the beginning of a text, where some tokenizers would put a space in front.
        rest = _encode_short(self.fast, anchor_text + self.text[at:stop])[int(bool(anchor_text)) :]
        new, old = head + rest, self._ids[anchor:after]
        if self._decode(new) != self._decode(old):
            raise Refusal("a token lies over the end of the generation prompt, and its two sides do not encode apart")
        self._ids[anchor:after] = new
        # Positions inside the replaced stretch are not asked for again: spans are cut from the last to the first.
        self._starts[anchor:after] = [begin] * len(head) + [at] * len(rest)
        return anchor + len(head), len(new) - len(old)

    def _decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids, skip_special_tokens=False)

    def true_ids(self) -> list[int]:
        """The ids of ``tokenizer``; raises Refusal where special tokens of the row cannot be kept as text."""
        if self.fast is self.tokenizer.fast:
            return self._ids
        second = second_tokenizer(self.tokenizer)
        ids = [second.true_ids.get(i, i) for i in self._ids]
        spelt = sum(i in second.true_ids for i in self._ids)
        if spelt != sum(i in second.control_ids for i in ids):
            raise Refusal("the row spells a special token, and the tokenizer cannot write it as ordinary text")
        return ids


@dataclasses.dataclass(frozen=True)
class SecondTokenizer:
    """``fast`` knows control tokens only by ``names``; ``true_ids``: its ids for them -> the tokenizer's own."""

    fast: tokenizers.Tokenizer
    names: dict[str, str]
    true_ids: dict[int, int]
    control_ids: frozenset[int]


@functools.lru_cache(maxsize=8)
def second_tokenizer(tokenizer: Tokenizer) -> SecondTokenizer:
    """The tokenizer with its control tokens renamed to what no row can spell."""
    control = tokenizer.control_tokens
    names = {text: f"{MARK_OPEN}{i}{MARK_CLOSE}" for text, i in control.items()}
    spec = json.loads(tokenizer.fast.to_str())
    spec["post_processor"] = None  # it may name the tokens, and nothing is added here
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            token["normalized"] = False
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    true_ids = {fast.token_to_id(name): control[text] for text, name in names.items()}
    return SecondTokenizer(fast, names, true_ids, frozenset(control.values()))


def escape(sequence: Sequence, tokenizer: Tokenizer) -> Sequence:
    """Marked text -> text for the second tokenizer: the template's control tokens renamed, the marks taken out."""
    names = second_tokenizer(tokenizer).names
    pattern = re.compile(f"{MARK_OPEN}(.*?){MARK_CLOSE}|{tokenizer.control_pattern.pattern}", re.DOTALL)
    out, length, done = [], 0, 0
    begins, shifts = [0], [0]  # from character begins[i] of the marked text on, positions move by shifts[i]
    for match in pattern.finditer(sequence.text):
        kept = match.group(1) if match.group(1) is not None else names[match.group(0)]
        out += [sequence.text[done : match.start()], kept]
        length += match.start() - done + len(kept)
        done = match.end()
        begins.append(done)
        shifts.append(length - done)
    out.append(sequence.text[done:])
    move = lambda at: at + shifts[bisect.bisect_right(begins, at) - 1]
    return Sequence("".join(out), tuple((move(a), move(b)) for a, b in sequence.spans))


@functools.lru_cache(maxsize=16)
def anchor_ids(fast: tokenizers.Tokenizer) -> frozenset[int]:
    """Added tokens that are not whitespace: the tokenizer splits text at them first, so nothing reaches over them."""
    return frozenset(i for i, token in fast.get_added_tokens_decoder().items() if token.content.strip())


@functools.lru_cache(maxsize=4096)
def _encode_short(fast: tokenizers.Tokenizer, text: str) -> list[int]:
    return fast.encode(text, add_special_tokens=False).ids
