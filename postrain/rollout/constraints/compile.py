"""Constraints on text, as ids of one tokenizer: JSON schemas, regular expressions, choices, grammars.

The work is llguidance's (the extra ``constraints``): of a grammar and the bytes of every token it gives the set of
tokens that may come next. What a constraint allows is exact: no tokenization is forced, a token is allowed when some
text of the language goes on with its bytes, and stop ids when the text may end.
"""

import collections
import functools
import json
import re
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.rollout.constraints import ConstraintFactory, WrongConstraint, pack_ids
from postrain.rollout.constraints.json_schema import OPTIONS, prepare_schema
from postrain.rollout.constraints.patterns import translate
from postrain.rollout.constraints.token_bytes import read_token_bytes

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
CACHED = 256  # compiled constraints of a tokenizer that are kept
_EXACT = '%llguidance { "no_forcing": true }\n'  # the model chooses the tokens of a text that is certain


def compile_constraint(
    spec: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
) -> ConstraintFactory:
    """Makes constraints of one kind: call the result once for each sequence that is generated.

    Args:
        spec: one key and its value: ``{"json_schema": schema}``; ``{"json_object": True}``, any JSON object;
            ``{"regex": pattern}``, what ``re.fullmatch`` accepts; ``{"choice": [text, ...]}``, one of several texts;
            ``{"grammar": text}``, in llguidance's variant of Lark.
        tokenizer: of the model. Each answer, decoded by it, is a text of the language.
        vocab_size: of the model; None: the tokenizer's.
        stop_ids: the ids that end a text; None: the tokenizer's.

    Compiled constraints are kept by (spec, tokenizer). Raises WrongConstraint, which names what is wrong and where.
    """
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        found = sorted(spec) if isinstance(spec, Mapping) else spec
        raise WrongConstraint("constraint", f"expected one of {', '.join(KINDS)}, found {found!r:.80}")
    stops = tuple(sorted(tokenizer.stop_ids if stop_ids is None else stop_ids))
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    compilers = _COMPILERS.setdefault(tokenizer, {})
    if (size, stops) not in compilers:
        compilers[size, stops] = _Compiler(tokenizer, size, stops)
    [(kind, value)] = spec.items()
    try:
        try:
            key = json.dumps(value)  # not sorted: the order of properties is the order in which they are written
        except (TypeError, ValueError):
            raise WrongConstraint(kind, f"expected what JSON can hold, found {value!r:.80}") from None
        return compilers[size, stops].compile(kind, key)
    except RecursionError:
        raise WrongConstraint(kind, "it is nested too deeply") from None


# tokenizer -> (vocab_size, stop_ids) -> compiler
_COMPILERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _Compiler:
    """llguidance's view of one tokenizer, and what was compiled for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]):
        self.library = _import_library()
        self.vocab_size = vocab_size
        self.stop_ids = tuple(i for i in stop_ids if i < vocab_size)
        if not self.stop_ids:
            raise WrongConstraint(
                "tokenizer", f"{tokenizer.folder} has no stop token, so that no text could end: give stop_ids"
            )
        self.tokens = read_token_bytes(tokenizer)
        special = {i for i in (*self.tokens.special, *self.stop_ids) if i < vocab_size}
        texts = [b"" if i in special else text for i, text in enumerate(self.tokens.texts[:vocab_size])]
        self.texts = texts + [b""] * (vocab_size - len(texts))
        self.special = {name: i for i, name in self.tokens.special.items() if i in special and i not in self.stop_ids}
        named = [self.tokens.special.get(i, "").encode() if i in special else text for i, text in enumerate(self.texts)]
        self.tokenizer = self._make_tokenizer(named, sorted(special))
        self.first_tokenizer = None
        if self.tokens.strips_space:
            self.first_tokenizer = self._make_tokenizer([text.removeprefix(b" ") for text in named], sorted(special))
        self.text_words = pack_ids([i for i, text in enumerate(self.texts) if text] + [*self.stop_ids], vocab_size)
        self.space_words = pack_ids([i for i, text in enumerate(self.texts) if text == b" "], vocab_size)
        self.byte_ids = {text: i for i, text in enumerate(self.texts) if len(text) == 1}
        self.compile = functools.lru_cache(CACHED)(self._compile)

    def _make_tokenizer(self, texts: list[bytes], special: list[int]):
        source = _TokenSource(texts, special, self.stop_ids[0])
        return self.library.LLTokenizer(source, eos_token=list(self.stop_ids))

    def _compile(self, kind: str, value: str) -> ConstraintFactory:
        decoded = json.loads(value)
        grammar = self.library.LLMatcher.grammar_from_lark(_EXACT + _write_grammar(kind, decoded))
        words = self.text_words
        if kind == "grammar":
            named = [i for name, i in self.special.items() if name in decoded]
            words = words | pack_ids(named, self.vocab_size)
        matcher = self._match(self.tokenizer, grammar, kind)
        first = self._match(self.first_tokenizer, grammar, kind) if self.first_tokenizer is not None else None

        def make() -> TextConstraint:
            return TextConstraint(self, kind, matcher.deep_copy(), first and first.deep_copy(), words)

        return make

    def _match(self, tokenizer, grammar: str, kind: str):
        matcher = self.library.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise WrongConstraint(kind, f"cannot be compiled: {_first_lines(matcher.get_error())}")
        if warnings := matcher.get_grammar_warnings():
            raise WrongConstraint(kind, f"would not be kept as it is written: {_first_lines(warnings[0])}")
        matcher.compute_bitmask()
        if matcher.is_error():
            raise WrongConstraint(kind, f"nothing can be generated under it: {_first_lines(matcher.get_error())}")
        return matcher


class _TokenSource:
    """The attributes that llguidance reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id

    def __call__(self, text) -> list[int]:
        raise AssertionError("text is never tokenized here: nothing is forced")


class TextConstraint:
    """A ``Constraint`` on the text of one sequence."""

    def __init__(self, compiler: _Compiler, kind: str, matcher, first, words: np.ndarray):
        # first: until the first token, where decoding strips the space that a text begins with
        self._compiler, self._kind, self._matcher, self._first, self._words = compiler, kind, matcher, first, words
        self._done = False

    def allowed(self) -> np.ndarray:
        """As in ``Constraint``. Raises WrongConstraint where the library has met one of its limits."""
        if self._done:
            return np.zeros_like(self._words)
        matcher = self._matcher if self._first is None else self._first
        words = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._words)]
        if matcher.is_error():
            raise WrongConstraint(self._kind, f"too complex to follow: {_first_lines(matcher.get_error())}")
        if self._first is not None:
            words = words | self._compiler.space_words
        return words & self._words

    def advance(self, token: int) -> None:
        token = int(token)
        if self._done or not 0 <= token < self._compiler.vocab_size:
            raise ValueError(f"id {token} after the end of the text, or outside the vocabulary")
        if token in self._compiler.stop_ids:
            taken, self._done = self._matcher.is_accepting(), True
        else:
            taken = self._words[token // 32] >> np.uint32(token % 32) & 1 and self._take(token)
        if not taken:
            raise ValueError(f"id {token} is not allowed here by {self._kind}")

    def _take(self, token: int) -> bool:
        if self._first is None:
            return self._matcher.consume_token(token)
        self._first = None
        text = self._compiler.texts[token]
        if not text.startswith(b" "):
            return self._matcher.consume_token(token)
        return all(self._matcher.consume_token(self._compiler.byte_ids[bytes([byte])]) for byte in text[1:])

    def is_done(self) -> bool:
        return self._done


def _write_grammar(kind: str, value: Any) -> str:
    """The rules of a constraint, in llguidance's Lark."""
    if kind == "json_object":
        if value is not True:
            raise WrongConstraint(kind, f"expected true, found {value!r:.40}")
        return _write_json({"type": "object"})
    if kind == "json_schema":
        return _write_json(prepare_schema(value))
    if kind == "choice":
        return f"start: /{_write_choices(value)}/"
    if not isinstance(value, str) or not value:
        raise WrongConstraint(kind, f"expected a text, found {value!r:.40}")
    if kind == "regex":
        return f"start: /{translate(value, kind)}/"
    return _check_grammar(value)


def _write_json(schema: Any) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return f"start: %json {json.dumps({'x-guidance': OPTIONS, **schema})}"


def _write_choices(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise WrongConstraint("choice", f"expected a list of one text or more, found {choices!r:.60}")
    for i, text in enumerate(choices):
        if not text:
            raise WrongConstraint("choice", f"choice {i} is empty: leave it out")
        if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            raise WrongConstraint(
                "choice", f"choice {i} has half of a surrogate pair, which no token has: {text!r:.60}"
            )
    places = collections.defaultdict(list)
    for i, text in enumerate(choices):
        places[text].append(i)
    ordered = sorted(choices)
    for one, other in zip(ordered, ordered[1:], strict=False):  # a text comes just before those that begin with it
        if other.startswith(one):
            first, second = places[one][0], places[other][-1]
            raise WrongConstraint(
                "choice",
                f"choice {first} ({one!r:.40}) is the beginning of choice {second} ({other!r:.40}): after it the text "
                "may end and go on; give texts of which none begins another, or a regex",
            )
    return "|".join("".join(f"\\x{{{ord(character):X}}}" for character in text) for text in choices)


def _check_grammar(text: str) -> str:
    """A grammar of the user, its JSON schemas prepared. Raises WrongConstraint for what would be passed over."""
    if found := re.search(r"^\s*[?!]?[\w.-]+\s*\[[^\]\n]*\b(temperature|stop)\s*=", text, re.MULTILINE):
        raise WrongConstraint("grammar", f"{found.group(1)}= of a rule cannot be kept here: leave it out")
    if re.search(r"<\[", text):
        raise WrongConstraint("grammar", "ids of tokens (<[...]>) may name what is no token: write <name> of a token")
    parts, end = [], 0
    for found in re.finditer(r"%json\s*", text):
        if found.start() < end:
            continue
        try:
            schema, after = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError as e:
            raise WrongConstraint("grammar", f"expected a JSON schema after %json: {e}") from None
        if not isinstance(schema, dict):
            raise WrongConstraint("grammar", f"expected an object after %json, found {schema!r:.40}")
        parts += [text[end : found.start()], "%json ", json.dumps({"x-guidance": OPTIONS, **prepare_schema(schema)})]
        end = after
    return "".join([*parts, text[end:]])


def _first_lines(message: str) -> str:
    """The library's message in one line, without the lines of the grammar that it was given."""
    if "recursion limit" in message or "too deeply nested" in message:
        return "it is nested too deeply"
    if "oneOf constraints" in message:
        return "the schemas of a oneOf must exclude each other, as by the const of a required property: write anyOf"
    lines = [line.strip() for line in message.strip().splitlines()]
    text = " ".join(line for line in lines if line and not re.match(r"(\d+ \||\^)", line))
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)[:200]


def _import_library():
    try:
        import llguidance
    except ImportError:
        raise WrongConstraint(
            "constraint", "llguidance is not installed: pip install 'postrain[constraints]', and try again"
        ) from None
    return llguidance
