"""Text -> ids and mask: the texts that trained_spans.py has planned, encoded, and their spans found in the tokens.

A text is encoded once, as a whole, and the spans are found in its tokens. Two cases need more:

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

import numpy as np
import tokenizers

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.rendering.bpe_cache import Ids, encode_texts
from postrain.data.rendering.row_checks import Refusal, check_not_rendered
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.rendering.trained_spans import MARK_CLOSE, MARK_OPEN, Sequence, mark


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


def encode_parts(
    texts: list[str], names: list[str], tokenizer: Tokenizer, ref: RowRef, before: int
) -> list[np.ndarray]:
    """int32 ids of texts of one row that follow each other, nothing added. Raises BadRow.

    They are encoded as one, after what stands before them: some tokenizers put a space in front of a text, and so in
    front of each part that is encoded by itself, and some of those also after a special token. Only where a token would
    lie over the end of a part, each is encoded by itself.

    Args:
      names: the keys of the texts.
      before: the id of the token before the first of them.
    """
    check_not_rendered([(repr(name), None, text) for name, text in zip(names, texts, strict=True)], tokenizer, ref)
    marked = [mark(text, tokenizer.control_pattern) for text in texts]
    lead = tokenizer.fast.id_to_token(before) if before in anchor_ids(tokenizer.fast) else "\n"
    bounds = list(itertools.accumulate(map(len, marked), initial=len(lead)))
    whole = Sequence(lead + "".join(marked), tuple(itertools.pairwise(bounds)))
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
