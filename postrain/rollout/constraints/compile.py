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
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.rollout.constraints import ConstraintFactory, WrongConstraint, pack_ids
from postrain.rollout.constraints.json_schema import OPTIONS, prepare_schema
from postrain.rollout.constraints.patterns import translate
from postrain.rollout.constraints.token_bytes import read_token_bytes

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
CACHED = 256  # compiled constraints of a tokenizer that are kept
_END = b"<|end of text|>"
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
        stop_ids: the ids that end a text, none of which may be text itself; None: the tokenizer's.

    Compiled constraints are kept by (spec, tokenizer). Raises WrongConstraint, which names what is wrong and where.
    """
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        found = sorted(spec) if isinstance(spec, Mapping) else spec
        raise WrongConstraint("constraint", f"expected one of {', '.join(KINDS)}, found {found!r:.80}")
    [(kind, value)] = spec.items()
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    compilers = _COMPILERS.setdefault(tokenizer, {})
    if size not in compilers:
        compilers[size] = _Compiler(tokenizer, size)
    stops = compilers[size].check_stops(tokenizer.stop_ids if stop_ids is None else stop_ids)
    try:
        try:
            key = json.dumps(value)  # not sorted: the order of properties is the order in which they are written
        except (TypeError, ValueError):
            raise WrongConstraint(kind, f"expected what JSON can hold, found {value!r:.80}") from None
        return compilers[size].make_factory(kind, key, stops)
    except RecursionError:
        raise WrongConstraint(kind, "it is nested too deeply") from None
    except UnicodeEncodeError:
        raise WrongConstraint(kind, "it has half of a surrogate pair, which no token has") from None


# tokenizer -> vocab_size -> compiler
_COMPILERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _Compiled(NamedTuple):
    """A constraint before its first token."""

    kind: str
    matcher: Any
    first: Any  # the same for the first token, where its bytes are others; else None
    words: np.ndarray  # ids that may ever come, but stop ids
    named: frozenset[int]  # the special ones of them


class _Compiler:
    """llguidance's view of one tokenizer, and what was compiled for it.

    Its vocabulary goes on past that of the model: by the 256 bytes, since what is left of a first token may be no token
    itself, and by the end of a text, which stands for the stop ids of whoever asks.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.library = _import_library()
        self.vocab_size, self.folder = vocab_size, tokenizer.folder
        self.tokens = read_token_bytes(tokenizer)
        fit = lambda texts: [*texts[:vocab_size], *[b""] * (vocab_size - len(texts))]
        self.texts = fit(self.tokens.texts)
        self.special = {name: i for i, name in self.tokens.special.items() if i < vocab_size}
        self.tokenizer, self.first, self.first_tokenizer = self._make_tokenizer(self.texts), None, None
        if self.tokens.first is not None:
            self.first = fit(self.tokens.first)
            self.first_tokenizer = self._make_tokenizer(self.first)
            stripped = [i for i, text in enumerate(self.texts) if text and not self.first[i]]
            self.stripped_words = pack_ids(stripped, vocab_size)
        self.text_words = pack_ids([i for i, text in enumerate(self.texts) if text], vocab_size)
        self.compile = functools.lru_cache(CACHED)(self._compile)
        self.make_factory = functools.lru_cache(CACHED)(self._make_factory)

    def check_stops(self, stop_ids: Iterable[int]) -> tuple[int, ...]:
        """``stop_ids`` in order. Raises WrongConstraint for none, and for one that is text."""
        stops = tuple(sorted({i for i in stop_ids if 0 <= i < self.vocab_size}))
        if not stops:
            raise WrongConstraint(
                "tokenizer", f"{self.folder} has no stop token, so that no text could end: give stop_ids"
            )
        if texts := [i for i in stops if self.texts[i]]:
            text = self.texts[texts[0]].decode(errors="backslashreplace")
            raise WrongConstraint(
                "stop_ids", f"{texts[0]} is the text {text!r}, which a constraint may need: expected ids that are not"
            )
        return stops

    def _make_tokenizer(self, texts: list[bytes]):
        special = {i: name.encode() for name, i in self.special.items()}
        named = [special.get(i, text) for i, text in enumerate(texts)]
        end = self.vocab_size + 256
        source = _TokenSource([*named, *(bytes([i]) for i in range(256)), _END], [*sorted(special), end], end)
        return self.library.LLTokenizer(source, eos_token=[end])

    def _make_factory(self, kind: str, value: str, stops: tuple[int, ...]) -> ConstraintFactory:
        compiled = self.compile(kind, value)
        if wrong := sorted(compiled.named.intersection(stops)):
            raise WrongConstraint(
                kind, f"names {self.tokens.special[wrong[0]]}, which ends a text: leave it out, texts end with it"
            )
        return lambda: TextConstraint(self, compiled, stops)

    def _compile(self, kind: str, value: str) -> _Compiled:
        rules, names = _write_grammar(kind, json.loads(value))
        grammar = self.library.LLMatcher.grammar_from_lark(_EXACT + rules)
        named = frozenset(self.special[name] for name in names if name in self.special)
        words = self.text_words | pack_ids(sorted(named), self.vocab_size)
        matcher = self._match(self.tokenizer, grammar, kind)
        first = self._match(self.first_tokenizer, grammar, kind) if self.first_tokenizer is not None else None
        return _Compiled(kind, matcher, first, words, named)

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

    def __init__(self, compiler: _Compiler, compiled: _Compiled, stops: tuple[int, ...]):
        self._compiler, self._kind, self._words, self._stops = compiler, compiled.kind, compiled.words, stops
        self._matcher = compiled.matcher.deep_copy()
        # Until the first token, where its bytes are others.
        self._first = None if compiled.first is None else compiled.first.deep_copy()
        self._stop_words = pack_ids(list(stops), compiler.vocab_size)
        self._done = False

    def allowed(self) -> np.ndarray:
        """As in ``Constraint``; empty where the grammar has led to what has no end.

        Raises WrongConstraint where the library has met one of its limits.
        """
        if self._done:
            return np.zeros_like(self._words)
        matcher = self._matcher if self._first is None else self._first
        words = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: len(self._words)]
        if matcher.is_error():
            if _is_dead_end(matcher.get_error()):
                return np.zeros_like(self._words)
            raise WrongConstraint(self._kind, f"cannot be followed: {_first_lines(matcher.get_error())}")
        if self._first is not None:
            words = words | self._compiler.stripped_words
        words = words & self._words
        return words | self._stop_words if matcher.is_accepting() else words

    def advance(self, token: int) -> None:
        token = int(token)
        if self._done or not 0 <= token < self._compiler.vocab_size:
            raise ValueError(f"id {token} after the end of the text, or outside the vocabulary")
        if token in self._stops:
            taken, self._done = self._matcher.is_accepting(), True
        else:
            taken = self._words[token // 32] >> np.uint32(token % 32) & 1 and self._take(token)
        if not taken:
            raise ValueError(f"id {token} is not allowed here by {self._kind}")

    def _take(self, token: int) -> bool:
        compiler = self._compiler
        if self._first is None or compiler.first[token] == compiler.texts[token]:
            self._first = None
            return self._matcher.consume_token(token)
        self._first = None
        return all(self._matcher.consume_token(compiler.vocab_size + byte) for byte in compiler.first[token])

    def is_done(self) -> bool:
        return self._done


def _write_grammar(kind: str, value: Any) -> tuple[str, set[str]]:
    """The rules of a constraint, in llguidance's Lark, and the names of special tokens in them."""
    if kind == "json_object":
        if value is not True:
            raise WrongConstraint(kind, f"expected true, found {value!r:.40}")
        return _write_json({"type": "object"}), set()
    if kind == "json_schema":
        return _write_json(prepare_schema(value)), set()
    if kind == "choice":
        return f"start: /{_write_choices(value)}/", set()
    if not isinstance(value, str) or not value:
        raise WrongConstraint(kind, f"expected a text, found {value!r:.40}")
    if kind == "regex":
        return f"start: /{translate(value, kind)}/", set()
    return _prepare_grammar(value)


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


# What has a meaning of its own in a grammar; in comments, strings and regular expressions nothing else has one.
_PARTS = re.compile(
    r"""(?P<comment>(?://|\#)[^\n]*)
    | (?P<text>"(?:\\.|[^"\\])*" | /(?:\\.|[^/\\])+/)
    | (?P<directive>%[a-z]+)
    | (?P<ids><\[)
    | <(?P<name>[^<>\[\]\s]+)>
    | \b(?P<option>temperature|stop)\s*=""",
    re.VERBOSE,
)


def _prepare_grammar(text: str) -> tuple[str, set[str]]:
    """A grammar of the user, its JSON schemas prepared, and the special tokens that it names.

    Raises WrongConstraint for what would be passed over.
    """
    parts, end, names = [], 0, set()
    while found := _PARTS.search(text, end):
        parts.append(text[end : found.start()])
        end = found.end()
        if found["ids"]:
            raise WrongConstraint(
                "grammar", "ids of tokens (<[...]>) may name what is no token: write <name> of a token"
            )
        if found["option"]:
            raise WrongConstraint("grammar", f"{found['option']}= of a rule cannot be kept here: leave it out")
        if found["directive"] == "%llguidance":
            raise WrongConstraint(
                "grammar", "%llguidance sets options of the library, which are set here: leave it out"
            )
        if found["name"]:
            names.add(f"<{found['name']}>")
        if found["directive"] == "%json":
            schema, end = _read_json(text, end)
            parts.append(f"%json {json.dumps({'x-guidance': OPTIONS, **prepare_schema(schema)})}")
        else:
            parts.append(found.group())
    return "".join([*parts, text[end:]]), names


def _read_json(text: str, start: int) -> tuple[dict, int]:
    """The schema that begins at ``start``, past white space, and where it ends."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        schema, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError as e:
        raise WrongConstraint("grammar", f"expected a JSON schema after %json: {e}") from None
    if not isinstance(schema, dict):
        raise WrongConstraint("grammar", f"expected an object after %json, found {schema!r:.40}")
    return schema, end


def _is_dead_end(message: str) -> bool:
    """Whether the library has found that no text goes on here."""
    return message.startswith("NoExtension")


def _first_lines(message: str) -> str:
    """The library's message in one line, without the lines of the grammar that it was given."""
    if "LexerTooComplex" in message or "ParserTooComplex" in message:
        return "it is too complex"
    if "recursion limit" in message or "too deeply nested" in message:
        return "it is nested too deeply"
    if _is_dead_end(message):
        return "no text satisfies it"
    if "oneOf constraints" in message:
        return "the schemas of a oneOf must exclude each other, as by the const of a required property: write anyOf"
    lines = [line.strip() for line in message.partition("<state>")[0].strip().splitlines()]
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
