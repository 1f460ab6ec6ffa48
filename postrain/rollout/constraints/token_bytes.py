"""The bytes that each token stands for, read from the tokenizer's own decoder.

Decoding a sequence is then joining bytes, which is what makes a constraint on text one on ids. Tokenizers differ in
one more thing: some strip the space that a text begins with, so that other bytes are of their first token (``first``).
"""

import json
from typing import NamedTuple

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.rollout.constraints import WrongConstraint


class TokenBytes(NamedTuple):
    """``texts[i]``: the bytes of id i, b"" where it is no text: ``special`` ones, and ids that are no tokens.

    ``special``: id -> name of the tokens that are never text: those that only a template may write, and stop tokens.
    ``first``: the bytes of each id where it is the first of a sequence, if decoding strips spaces there; else None.
    """

    texts: tuple[bytes, ...]
    special: dict[int, str]
    first: tuple[bytes, ...] | None


def read_token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The bytes of all ids below ``tokenizer.vocab_size``. Raises WrongConstraint for a decoder that is not known."""
    # As it is pickled, which is the JSON of its part of tokenizer.json, without the vocabulary.
    decoder = json.loads(tokenizer.fast.decoder.__getstate__()) if tokenizer.fast.decoder else None
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    spell, spell_first = _read_decoder(steps, tokenizer)
    named = {token.content for token in tokenizer.fast.get_added_tokens_decoder().values() if token.special}
    names = {*tokenizer.control_tokens, *named}
    special: dict[int, str] = {}
    texts, first = ([b""] * tokenizer.vocab_size for _ in range(2))
    for name, i in tokenizer.fast.get_vocab(with_added_tokens=True).items():
        if name in names or i in tokenizer.stop_ids:
            special[i] = name
        else:
            texts[i] = spell(name)
            first[i] = spell_first(name) if spell_first else b""
    return TokenBytes(tuple(texts), special, tuple(first) if spell_first else None)


def _read_decoder(steps: list, tokenizer: Tokenizer):
    """(token -> bytes, the same for the first token of a sequence, None if no other) of a decoder's steps."""
    kinds = [step["type"] if step else "none" for step in steps]
    if kinds == ["ByteLevel"]:
        return _spell_byte_level, None
    replacements, dropped, strips_space = [], "", False
    for place, (kind, step) in enumerate(zip(kinds, steps, strict=True)):
        before = kinds[:place]
        is_alone = "Fuse" not in before and "ByteFallback" not in before  # what follows is of tokens as they are named
        if kind == "Replace" and "String" in step["pattern"] and is_alone:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and is_alone:
            if step.get("prepend_scheme", "always") != "never":
                dropped += step["replacement"]  # wherever it stands in the first token
            replacements.append((step["replacement"], " "))
        elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0) and "Fuse" in before:
            strips_space = True
        elif kind not in ("ByteFallback", "Fuse"):
            raise WrongConstraint(
                "tokenizer",
                f"{tokenizer.folder}/tokenizer.json has the decoder {' + '.join(kinds)}: expected ByteLevel, or "
                "Replace, Metaspace, ByteFallback, Fuse and a Strip of one space, in this order; without it the bytes "
                "of tokens are not known, and text cannot be constrained",
            )

    def spell(name: str, dropped: str = "") -> bytes:
        if "ByteFallback" in kinds and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        for old, new in replacements:
            name = name.replace(old, "" if old in dropped else new)
        return name.encode()

    def spell_first(name: str) -> bytes:
        text = spell(name, dropped)
        return text.removeprefix(b" ") if strips_space else text

    return spell, spell_first if dropped or strips_space else None


def _spell_byte_level(name: str) -> bytes:
    """A token of a byte-level vocabulary; an added one with other characters is written as it is."""
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return name.encode()


def _make_byte_characters() -> dict[str, int]:
    """The printable characters that byte-level vocabularies write for the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _make_byte_characters()
