"""New tokens: read from the config, checked, and added to the tokenizer's vocabulary.

Their ids are the tokenizer's next free ones: the format of tokenizer.json has no gaps. Many models have more rows than
their tokenizer has ids (Qwen: 151,936 for 151,669), so the first new tokens may take rows that the model has and never
uses; some have fewer (Gemma 3 270M: 262,144 for 262,145).
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

from postrain.config import NewTokensSection
from postrain.errors import UserError, shorten

_SHOWN = 8  # wrong tokens in one message


class NewToken(NamedTuple):
    """A new token, from the config or its file."""

    text: str
    start: str  # its rows start as the mean of the rows of this text's tokens; "": of all old rows
    where: str  # file:line or config key, for messages


class NewTokens(NamedTuple):
    """The new tokens of a vocabulary, at its end: token i has id ``first + i``."""

    first: int
    texts: tuple[str, ...]
    start_ids: tuple[tuple[int, ...], ...]  # old ids whose rows' mean a new row starts as; (): all old ones
    special: bool

    @property
    def stop(self) -> int:
        """One more than the last new id."""
        return self.first + len(self.texts)


def read_new_tokens(section: NewTokensSection) -> tuple[NewToken, ...]:
    """The tokens of a config, in order, () for none. Raises UserError naming those that are empty or repeated."""
    if section.file:
        path = pathlib.Path(section.file)
        try:
            text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.new_tokens.file: {path} cannot be read: {error}") from None
        # Not `splitlines`, which also cuts at Unicode's other separators.
        lines = text.removesuffix("\n").split("\n") if text else []
        places = [(line.removesuffix("\r"), f"{path}:{number}") for number, line in enumerate(lines, 1)]
        if not places:
            raise UserError(f"model.new_tokens.file: {path} is empty: expected one token on each line")
    else:
        places = [(token, f"model.new_tokens.tokens[{i}]") for i, token in enumerate(section.tokens)]
    tokens, wrong, seen = [], [], {}
    for line, where in places:
        text, tab, start = line.partition("\t")
        tokens.append(NewToken(text, start, where))
        if not text.strip():
            wrong.append(f"{where} is empty")
        elif text != text.strip():
            wrong.append(f"{where}: {text!r} starts or ends with a space: it would rarely be found in text")
        elif text in seen:
            wrong.append(f"{where}: {text!r} comes twice, first in {seen[text]}")
        elif tab and not start.strip():
            wrong.append(f"{where}: {text!r} has a tab and no text after it")
        seen.setdefault(text, where)
    _check_no_errors(wrong)
    return tuple(tokens)


def add_new_tokens(fast: tokenizers.Tokenizer, tokens: Sequence[NewToken], special: bool) -> NewTokens:
    """Adds ``tokens`` to ``fast``. Raises UserError naming those that it has, or cannot use as one token."""
    unknown = getattr(fast.model, "unk_token", None)
    unknown_id = None if unknown is None else fast.token_to_id(unknown)
    wrong, start_ids = [], []
    for token in tokens:
        ids = fast.encode(token.text, add_special_tokens=False).ids
        found = ids[0] if len(ids) == 1 and ids[0] != unknown_id else fast.token_to_id(token.text)
        if found is not None:
            wrong.append(f"{token.where}: {token.text!r} is one token of the tokenizer already, id {found}")
        start_ids.append(tuple(fast.encode(token.start, add_special_tokens=False).ids if token.start else ()))
        if token.start and not start_ids[-1]:
            wrong.append(f"{token.where}: the text {token.start!r} has no tokens")
    _check_no_errors(wrong)
    first = 1 + max(fast.get_vocab(with_added_tokens=True).values())
    options = {"normalized": False, "special": special}
    fast.add_tokens([tokenizers.AddedToken(token.text, **options) for token in tokens])
    for i, token in enumerate(tokens):
        ids = fast.encode(token.text, add_special_tokens=False).ids
        if ids != [first + i]:
            wrong.append(f"{token.where}: {token.text!r} comes out as ids {ids}, expected {first + i} alone")
        # Decoders of byte-level vocabularies take an added token's characters for bytes, where they can be some.
        back = fast.decode([first + i], skip_special_tokens=False)
        if back.strip() != token.text.strip():
            wrong.append(f"{token.where}: {token.text!r} is decoded as {back!r}: write it in ASCII")
    _check_no_errors(wrong)
    return NewTokens(first, tuple(token.text for token in tokens), tuple(start_ids), special)


def _check_no_errors(wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"new tokens: {shorten(wrong, _SHOWN, '; ')}: leave these out or write them differently")
