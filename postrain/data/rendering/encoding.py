"""Loss masks: text with marks and trained spans -> token ids and mask.

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
import json
import re

import numpy as np
import tokenizers

from postrain.data.rendering.bpe_cache import Ids, encode_texts
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.rendering.trained_spans import MARK_CLOSE, MARK_OPEN, Refusal, Sequence


def encode_sequences(sequences: list[Sequence], tokenizer: Tokenizer) -> list["Encoded"]:
    """Encodes many texts at once; spans are found by ``Encoded.sequences``."""
    out: list[Encoded | None] = [None] * len(sequences)
    plain = [i for i, s in enumerate(sequences) if MARK_OPEN not in s.text]
    for i, ids in zip(plain, encode_texts(tokenizer.fast, [sequences[i].text for i in plain]), strict=True):
        out[i] = Encoded(sequences[i], tokenizer, tokenizer.fast, ids)
    for i, sequence in enumerate(sequences):
        if out[i] is None:
            escaped = escape(sequence, tokenizer)
            fast = second_tokenizer(tokenizer).fast
            out[i] = Encoded(escaped, tokenizer, fast, *encode_texts(fast, [escaped.text]))
    return out


class Encoded:
    """One encoded text. Ids are those of ``tokenizer``, also where the second tokenizer made them."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, fast: tokenizers.Tokenizer, encoded: Ids):
        self.text, self.spans = sequence.text, sequence.spans
        self.template_switches = sequence.template_switches or ("",) * len(sequence.spans)
        self.tokenizer, self.fast = tokenizer, fast
        self._ids, self._starts, self._places = encoded

    def sequences(self, prefix: list[int], suffix: list[int]) -> list[tuple[np.ndarray, np.ndarray, tuple[str, ...]]]:
        """Token ids int32 [L] and loss mask bool [L], with ``prefix`` put in front and ``suffix``, trained, at the end.
        The third is ``Sequence.template_switches`` of its spans, or nothing where all of them are empty.

        One triple for all spans, and one more for each span, but the last, whose beginning had to be cut: after it
        the ids are no longer those that serving would encode for a later prompt.

        Raises:
          Refusal: no token boundary fits a span's beginning, the last trained token would not stop serving, or
            special tokens of the row cannot be kept as text.
        """
        whole, apart = [], []
        for span, switch in zip(self.spans, self.template_switches, strict=True):
            ids, first, last = self._cut(*span)
            is_cut = ids is not self._ids
            (apart if is_cut and span != self.spans[-1] else whole).append((ids, first, last, switch))
        groups = [[cut] for cut in apart]
        groups += [whole] if whole else []
        groups.sort(key=lambda group: group[0][1])
        return [self._finish(group, prefix, suffix) for group in groups]

    def _finish(self, group, prefix: list[int], suffix: list[int]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        ids, _, end, _ = group[-1]  # only the last of a group may be cut; the others' places are the same in its ids
        ids = np.concatenate([prefix, self.true_ids(ids[:end]), suffix], dtype=np.int32, casting="unsafe")
        mask = np.zeros(len(ids), bool)
        for _, first, last, _ in group:
            mask[first + len(prefix) : last + len(prefix)] = True
            stop = int(ids[last + len(prefix) - 1])
            if not suffix and stop not in self.tokenizer.stop_ids:
                raise Refusal(f"the last trained token is {self.tokenizer.decode([stop])!r}, which is not a stop token")
        mask[len(ids) - len(suffix) :] = True
        mask[: max(len(prefix), 1)] = False  # nothing predicts the first token
        if not mask.any():
            raise Refusal("it has no token to train on")
        switches = tuple(switch for *_, switch in group)
        return ids, mask, switches if any(switches) else ()

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
        anchor, anchor_text = (0, "") if left is None else (places[left], self.fast.id_to_token(int(ids[places[left]])))
        head = list(_encode_short(self.fast, self.text[starts[left] if anchor_text else 0 : begin]))
        first = anchor + len(head)
        if ids[anchor:first].tolist() == head:
            return ids, first, last
        right = next((i for i in range(before, len(places)) if int(ids[places[i]]) in anchors), None)
        after, stop = (len(ids), len(self.text)) if right is None else (places[right], starts[right])
        # After the anchor, not at the beginning of a text, where some tokenizers would put a space in front.
        rest = _encode_short(self.fast, anchor_text + self.text[begin:stop])[int(bool(anchor_text)) :]
        if self._decode([*head, *rest]) != self._decode(ids[anchor:after].tolist()):
            raise Refusal(
                "a token lies over the end of the generation prompt, and its sides cannot be encoded separately"
            )
        cut = np.concatenate([ids[:anchor], np.array([*head, *rest], np.int32), ids[after:]])
        return cut, first, last + len(cut) - len(ids)

    def _decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids, skip_special_tokens=False)

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


def second_tokenizer(tokenizer: Tokenizer) -> SecondTokenizer:
    """The tokenizer with its control tokens renamed to what no row can spell."""
    return _rename_control_tokens(tokenizer.fast, tuple(tokenizer.control_tokens.items()))


@functools.lru_cache(maxsize=8)
def _rename_control_tokens(original: tokenizers.Tokenizer, control: tuple[tuple[str, int], ...]) -> SecondTokenizer:
    names = {text: f"{MARK_OPEN}{i}{MARK_CLOSE}" for text, i in control}
    spec = json.loads(original.to_str())
    spec["post_processor"] = None  # it may name the tokens, and nothing is added here
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            token["normalized"] = False
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    # New names are not in the model's vocabulary, so ids of added tokens may come out shifted.
    added = {token.content: i for i, token in original.get_added_tokens_decoder().items()}
    true_ids = {fast.token_to_id(names.get(text, text)): i for text, i in added.items()}
    left = {fast.token_to_id(text) for text in names} - {None}
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
    return Sequence("".join(out), tuple((move(a), move(b)) for a, b in sequence.spans), sequence.template_switches)


@functools.lru_cache(maxsize=16)
def anchor_ids(fast: tokenizers.Tokenizer) -> frozenset[int]:
    """Added tokens that are not whitespace: the tokenizer splits text at them first, so nothing reaches over them."""
    return frozenset(i for i, token in fast.get_added_tokens_decoder().items() if token.content.strip())


@functools.lru_cache(maxsize=4096)
def _encode_short(fast: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(fast.encode(text, add_special_tokens=False).ids)
