"""BPE cache: token ids of text, word by word, each distinct word encoded once.

Byte-level BPE tokenizers cut text into words with a regular expression and encode each word by itself. The library
does so anew for every text; a look-up of the words gives the same ids several times faster. ``_UNIT`` cuts text only
where a word is known to end: the units between its cuts are one word or several.

For the tokenizers whose expression is in ``_SPLITS`` a word begins, in any context,

* after an ASCII letter, at any ASCII character that is neither a letter nor an apostrophe
* after an ASCII digit, at any that is not a digit
* after ASCII punctuation, at a space or tab
* at a single space between two characters that are not spaces
* at the last space of white space, if ASCII punctuation or an ASCII letter follows
* after a single line break between two other characters, but between punctuation and a slash

and each side, encoded by itself, is cut as it is within the text. Others (Unigram models, a space put in front of text,
added tokens that take white space with them) are left to the library.
"""

import array
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = frozenset({_GPT2, _LLAMA3, _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), _O200K})  # GPT-2, Llama 3, Qwen, gpt-oss

_SPACE, _OTHER = r"[\s\u180e]", r"[^\s\u180e]"  # U+180E was white space in older Unicode
_WORD, _PUNCTUATION = r"[A-Za-z]++(?:'[A-Za-z]++)*+", r"[!-/:-@\[-`{-~]"
_LAST_SPACE = r"(?= [!-/:-~])"
_UNIT = re.compile(
    rf" ?{_WORD}(?=[\t\n\r -&(-@\[-`{{-~])"  # nearly all of them
    rf"|\n(?={_OTHER})"
    rf"|\s+{_LAST_SPACE}"
    rf"|\s*+{_PUNCTUATION}*+(?:{_WORD}(?=[\t\n\r -&(-@\[-`{{-~])|[0-9]++(?=[\t\n\r -/:-~]))"
    rf"|\s*+{_PUNCTUATION}++(?:(?=[ \t])|\n(?=[^\s\u180e/])|\s+{_LAST_SPACE})"
    rf"|{_SPACE}*+{_OTHER}++(?:{_SPACE}++{_OTHER}++)*?"
    rf"(?:(?= {_OTHER})|\n(?=[^\s\u180e/])|{_SPACE}+{_LAST_SPACE}|{_SPACE}*+\Z)"
    rf"|{_SPACE}++\Z"
)
_KNOWN = 1 << 17  # units in the cache, some 30 MiB; a full cache is emptied
_LONGEST = 48  # characters of a cached unit: longer ones hardly ever occur twice


class Ids(NamedTuple):
    """One encoded text.

    Attributes:
      ids: int32 [L], of its tokens; read-only.
      starts: characters, ascending, at which a token is known to start: of every added token, and of what follows it.
      places: the index of the token at each of ``starts``.
    """

    ids: np.ndarray
    starts: Sequence[int]
    places: Sequence[int]


def encode_texts(fast: tokenizers.Tokenizer, texts: list[str]) -> list[Ids]:
    """Ids of each text, equal to ``fast.encode(text, add_special_tokens=False)``."""
    words = find_words(fast, repr(fast.get_added_tokens_decoder()))  # tokens may be added after the first use
    if words:
        return words.encode(texts)
    encodings = fast.encode_batch(texts, add_special_tokens=False)
    return [Ids(np.asarray(e.ids, np.int32), [at for at, _ in e.offsets], range(len(e.ids))) for e in encodings]


class Words:
    """``encode_texts`` for a tokenizer that ends its words where ``_UNIT`` does. Thread-safe."""

    def __init__(self, fast: tokenizers.Tokenizer, added: dict[str, int]):
        self._fast, self._known = fast, {}  # unit -> its ids, the bytes of int32s, which are quickly joined
        self._added = {text: array.array("i", [i]).tobytes() for text, i in added.items()}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._split_added = re.compile(f"({'|'.join(longest_first)})").split if added else lambda text: [text]

    def encode(self, texts: list[str]) -> list[Ids]:
        split, looked_up, unknown = [], [], set()
        for text in texts:
            pieces = self._split_added(text)  # text, added token, text, ..., text
            split.append(pieces)
            looked_up.append([])
            for piece in pieces[::2]:
                units = _UNIT.findall(piece)
                found = list(map(self._known.get, units))
                # Only the units that are not known are kept as strings, by their number: thousands of the others would
                # not fit into the processor's cache. They are rare, so that this is faster than a loop over all.
                missing, at = {}, -1
                for _ in range(found.count(None)):
                    at = found.index(None, at + 1)
                    missing[at] = units[at]
                looked_up[-1].append((found, missing))
                unknown.update(missing.values())
        encoded: dict[str, bytes] = {}
        if unknown:
            units = list(unknown)
            encodings = self._fast.encode_batch_fast(units, add_special_tokens=False)
            ids = [array.array("i", encoding.ids).tobytes() for encoding in encodings]
            encoded = dict(zip(units, ids, strict=True))
            if len(self._known) + len(encoded) > _KNOWN:
                self._known.clear()
            short = ((unit, ids) for unit, ids in encoded.items() if len(unit) <= _LONGEST)
            self._known.update(itertools.islice(short, _KNOWN))
        return [self._join(*both, encoded) for both in zip(split, looked_up, strict=True)]

    def _join(self, split: list[str], looked_up: list, encoded: dict[str, bytes]) -> Ids:
        pieces, starts, places, start, place = [], [], [], 0, 0
        for number, text in enumerate(split):
            if not text:
                continue
            starts.append(start)
            places.append(place)
            start += len(text)
            if number % 2:
                ids = self._added[text]
            else:
                found, missing = looked_up[number // 2]
                for at, unit in missing.items():
                    found[at] = encoded[unit]
                ids = b"".join(found)
            pieces.append(ids)
            place += len(ids) // 4
        return Ids(np.frombuffer(b"".join(pieces), np.int32), starts, places)


@functools.lru_cache(maxsize=8)
def find_words(fast: tokenizers.Tokenizer, added_tokens: str) -> Words | None:
    """None where the tokenizer is not known to end its words at the ends of units.

    ``added_tokens``: those that it has now, as text; with others it is another tokenizer.
    """
    added, model = fast.get_added_tokens_decoder(), fast.model
    # The parts of a tokenizer, as in tokenizer.json; {} for None.
    normalizer, before = (
        {} if part is None else json.loads(part.__getstate__()) for part in (fast.normalizer, fast.pre_tokenizer)
    )
    if not isinstance(model, tokenizers.models.BPE) or model.dropout or fast.truncation or fast.padding:
        return None
    if normalizer not in ({}, {"type": "NFC"}):
        return None
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    cuts_words = any(step.get("type") == "Split" or step.get("use_regex") for step in steps)
    if not (cuts_words and all(map(_keeps_units, steps))):
        return None
    takes_space = any(t.lstrip or t.rstrip or t.single_word or re.search(r"\s", t.content) for t in added.values())
    if normalizer and any(t.normalized for t in added.values()):  # these are searched in the normalized text
        return None
    if takes_space or len({t.normalized for t in added.values()}) > 1:  # one sort is searched before the other
        return None
    return Words(fast, {token.content: i for i, token in added.items()})


def _keeps_units(step: dict) -> bool:
    """Whether this step of the pre-tokenizer cuts a text as it cuts its units."""
    if step.get("type") == "Split":
        return step["pattern"].get("Regex") in _SPLITS and step["behavior"] == "Isolated" and not step["invert"]
    if step.get("type") == "ByteLevel":
        return not step["add_prefix_space"]
    return step.get("type") == "Digits"
