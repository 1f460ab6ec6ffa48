"""Whatever is drawn under a constraint is a text of its language, and what cannot be kept is refused by name."""

import decimal
import gc
import itertools
import json
import re
import sys
import warnings
import weakref

import numpy as np
import pytest
import tokenizers
from constrained_samples import check_value, make_schema, sample
from real_tokenizers import get_tokenizer_folder
from tiny_models import make_tiny_tokenizer

from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.rollout.constraints import WrongConstraint, json_schema, pack_ids, unpack_ids
from postrain.rollout.constraints import compile as compile_module
from postrain.rollout.constraints.compile import _TokenSource as TokenSource
from postrain.rollout.constraints.compile import compile_constraint
from postrain.rollout.constraints.token_bytes import read_token_bytes

# A byte-level vocabulary, sentencepiece's with bytes to fall back on, and the same with a space that decoding strips.
REAL = ("qwen3", "gemma3", "phi3")
OTHERS = ("qwen3_5", "llama3", "gptoss", "deepseek_v3", "mistral_nemo", "smollm3", "granite3_3", "mistral_small")
EVERY = [*REAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """256 bytes and four special tokens: a text is as many ids as it has bytes."""
    return load_tokenizer(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def real():
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(get_tokenizer_folder(name))
        return loaded[name]

    return load


def accepts(make, tokenizer, text):
    """Whether the ids of ``text``, and then a stop id, are allowed one after the other."""
    constraint = make()
    for token in [*tokenizer.encode_text(text), min(tokenizer.stop_ids)]:
        if token not in unpack_ids(constraint.allowed()):
            return False
        constraint.advance(token)
    return constraint.is_done() and not constraint.allowed().any()


def check_schemas(tokenizer, rng, count, **limits):
    """``count`` random schemas, a text of each: JSON of the schema, which is accepted when it is written anew too."""
    done = refused = 0
    while done < count:
        schema = make_schema(rng)
        try:
            make = compile_constraint({"json_schema": schema}, tokenizer)
        except WrongConstraint as e:
            assert "satisf" in str(e), (str(e), schema)
            refused += 1
            continue
        text = tokenizer.decode(sample(make(), tokenizer, rng, **limits))
        value = json.loads(text)
        check_value(value, schema)
        again = json.dumps(value, ensure_ascii=False)
        if not re.search(r"[0-9]e|Infinity", again):  # bounded numbers are written without exponents
            assert accepts(make, tokenizer, again), (again, schema)
        done += 1
    assert refused < count / 4


def test_random_schemas_of_bytes(tiny):
    check_schemas(tiny, np.random.default_rng(0), 400)


@pytest.mark.parametrize("name", REAL)
def test_random_schemas_of_real_tokens(real, name):
    check_schemas(real(name), np.random.default_rng(1), 8, soft_limit=12)


@pytest.mark.slow
def test_ten_thousand_schemas(tiny, real):
    check_schemas(tiny, np.random.default_rng(2), 9_000)
    check_schemas(real("phi3"), np.random.default_rng(3), 700)
    for name in (*REAL, *OTHERS):
        check_schemas(real(name), np.random.default_rng(4), 30, soft_limit=12)


REGEXES = [
    r"\d{3}-(?:foo|bar)",
    r"^[A-Z][a-z]*( [A-Z][a-z]*){0,2}$",
    r"\w+\s\S+",
    r"[^\W\d_]{2,5}",
    r"(?i)yes|no",
    r"(?i:[a-c]x)[^a-c]",
    r"a*?b+",
    r"[a&&b]{1,3}[[]",
    r"(?s).{0,3}\n.",
    r".{2}|\.",
    r"\D\W",
    r"(?x) a  b # comment",
    r"[\x00-\U0010FFFF&&[^x]]?",
    "[\\]\\-/\"'é日😀]{1,4}",
    r"()|x",
    r"(?:^a|b$)",
    r"\Aa|\Z",
]


@pytest.mark.parametrize("pattern", REGEXES)
def test_regular_expressions_are_pythons(tiny, pattern):
    rng = np.random.default_rng(0)
    make = compile_constraint({"regex": pattern}, tiny)
    texts = {tiny.decode(sample(make(), tiny, rng)) for _ in range(25)}
    for text in texts:
        with warnings.catch_warnings(action="ignore"):  # of sets that a later re may read otherwise
            assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("pattern", ["^a|b$", "a|b", "^a", "b$", "^(?:a$|b)", r"^$", r"\d", "(?s)a.b"])
def test_patterns_of_a_schema_are_searched_for(tiny, pattern):
    schema = {"type": "string", "pattern": pattern, "maxLength": 3}
    make = compile_constraint({"json_schema": schema}, tiny)
    texts = ["", "a", "b", "ab", "ba", "xa", "bx", "xax", "x", "1", "a\nb", "ab\n", "\nb"]
    for text in texts:
        # `$` is the end of the text here; in Python also before a last line break
        assert accepts(make, tiny, json.dumps(text)) == bool(re.search(pattern.replace("$", r"\Z"), text)), text


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(a", "not a regular expression"),
        (r"\p{L}", "not a regular expression"),
        ("a++b", "possessive"),
        ("(?>a)b", "atomic"),
        ("(?=a)b", "look-ahead"),
        ("(?<!a)b", "negative look"),
        (r"(a)\1", "back-reference"),
        (r"a\bc", "boundary"),
        ("a^b", "boundary"),
        ("(?m)^a$", "flag m"),
        ("(?i)é", "flag i"),
        ("(?i)[^a]", "flag i"),
        ("\ud800", "surrogate"),
        ("", "expected a text"),
        (3, "expected a text"),
    ],
)
def test_regular_expressions_that_cannot_be_kept(tiny, pattern, what):
    with pytest.raises(WrongConstraint, match=what):
        compile_constraint({"regex": pattern}, tiny)


CHOICES = ["yes", " no", "maybe é", 'a "quoted" \\ text\n', "日本語", "😀", "</think>", "/* */", "Yes", "y\u0000"]


@pytest.mark.parametrize("name", EVERY)
def test_choices_of_every_tokenizer(real, name):
    """Each comes out as it was written, by whatever tokens, and as the tokenizer splits it."""
    tokenizer, rng = real(name), np.random.default_rng(0)
    make = compile_constraint({"choice": CHOICES}, tokenizer)
    found = {tokenizer.decode(sample(make(), tokenizer, rng)) for _ in range(20)}
    assert found <= set(CHOICES) and len(found) > 3
    for text in CHOICES:
        assert accepts(make, tokenizer, text), text
    assert (
        not accepts(make, tokenizer, "ye") and not accepts(make, tokenizer, "no") and not accepts(make, tokenizer, "")
    )


@pytest.mark.parametrize("name", EVERY)
def test_bytes_of_tokens_are_what_decoding_gives(real, name):
    tokenizer, rng = real(name), np.random.default_rng(0)
    tokens = read_token_bytes(tokenizer)
    texts = np.array([i for i, text in enumerate(tokens.texts) if text])
    first = tokens.first or tokens.texts
    assert not np.isin(texts, list(tokens.special)).any()
    assert len(texts) + len(tokens.special) == len(tokenizer.ids)
    for _ in range(300):
        ids = rng.choice(texts, 4)
        joined = first[ids[0]] + b"".join(tokens.texts[i] for i in ids[1:])
        try:
            assert tokenizer.decode(ids) == joined.decode()
        except UnicodeDecodeError:  # a part of a character: decoders differ in how many marks they write for it
            assert "\ufffd" in tokenizer.decode(ids)
    assert set(tokenizer.control_tokens.values()) <= {*tokens.special} and tokenizer.stop_ids <= {*tokens.special}


@pytest.mark.parametrize("name", REAL)
def test_special_tokens_and_ids_that_are_none_never_come(real, name):
    """Not where any text may come, nor of a model with more rows than the tokenizer has tokens."""
    tokenizer = real(name)
    size = tokenizer.vocab_size + 77
    special = list(set(read_token_bytes(tokenizer).special) - tokenizer.stop_ids)
    for spec in ({"regex": r"(?s).*"}, {"grammar": "start: /(?s:.*)/"}, {"grammar": 'start: A\nA: ~"x"'}):
        constraint = compile_constraint(spec, tokenizer, vocab_size=size)()
        words = constraint.allowed()
        assert words.dtype == np.uint32 and words.shape == (-(-size // 32),)
        allowed = unpack_ids(words)
        assert len(allowed) > 0.9 * tokenizer.vocab_size - len(special)
        assert not np.isin(special, allowed).any() and np.isin(list(tokenizer.stop_ids), allowed).all()
        assert np.isin(allowed, list(tokenizer.ids)).all()


def test_a_grammar_may_name_a_special_token(real):
    tokenizer = real("phi3")
    grammar = 'start: "call" <|system|> %json {"type": "integer", "minimum": 10, "maximum": 99}'
    make = compile_constraint({"grammar": grammar}, tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(10):
        text = tokenizer.decode(sample(make(), tokenizer, rng))
        assert re.fullmatch(r"call<\|system\|>\d\d", text)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('start: "a" // %json here', "a"),
        ('start: "a" # %llguidance {}', "a"),
        ('start: "a %json b"', "a %json b"),
        ('start: /[<\\[]x/ "<[" "stop="', "[x<[stop="),
        ('start: "\\"//" /\\/[\\/]\\// "%json"', '"/////%json'),
        ('start: %json {"type": "null", "description": "<[ stop= // \\" <|x|>"} "a"', "nulla"),
    ],
)
def test_a_grammar_is_read_as_its_language_is(tiny, grammar, text):
    """Strings, expressions, comments and the text of schemas are no directives."""
    assert accepts(compile_constraint({"grammar": grammar}, tiny), tiny, text)


def test_where_no_text_goes_on_nothing_is_allowed(tiny):
    constraint = compile_constraint({"grammar": 'start: "a" x\nx: x "b"'}, tiny)()
    constraint.advance(tiny.encode_text("a")[0])
    assert not constraint.allowed().any() and not constraint.is_done()


def make_bounds(rng):
    """A schema of one bound or two, of as many digits as a float has."""
    kind = str(rng.choice(["integer", "number"]))
    make = lambda: float(
        f"{int(rng.normal() * 10 ** rng.integers(17))}e{rng.integers(-12, 3) if kind == 'number' else rng.integers(3)}"
    )
    low, high = sorted(int(x) if x.is_integer() and rng.random() < 0.5 else x for x in (make(), make()))
    if rng.random() < 0.3:
        low = int(rng.integers(-3, 3))
        high = low + float(rng.random())
    bounds = {str(rng.choice(["minimum", "exclusiveMinimum"])): low}
    bounds |= {str(rng.choice(["maximum", "exclusiveMaximum"])): high}
    for key in list(bounds)[rng.integers(2) :: 2] if rng.random() < 0.5 else ():
        del bounds[key]
    return {"type": kind, **bounds}


def list_neighbours(number):
    """Texts of a number and of others around it, near and far."""
    exact = decimal.Decimal(repr(number))
    near = {exact + sign * decimal.Decimal(10) ** power for sign in (0, 1, -1) for power in range(-20, 12)}
    texts = {format(one, "f") for one in near} | {"0", "-0", "0.0", "-0.0"}
    return texts | {text.rstrip("0").rstrip(".") for text in texts if "." in text}


def test_bounds_are_kept_to_the_last_digit(tiny):
    """Also those that float64 cannot tell from their neighbours, and exclusive ones within one whole number."""
    rng, compiled, seen = np.random.default_rng(0), 0, {True: 0, False: 0}
    while compiled < 80:
        schema = make_bounds(rng)
        try:
            make = compile_constraint({"json_schema": schema}, tiny)
        except WrongConstraint as e:
            assert re.search(r"satisf|2\*\*53|range", str(e))
            continue
        compiled += 1
        low, xlow, high, xhigh = (
            decimal.Decimal(repr(schema[key])) if key in schema else None
            for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        )
        for text in {text for key, bound in schema.items() if key != "type" for text in list_neighbours(bound)}:
            if schema["type"] == "integer" and "." in text:
                continue
            value, accepted = decimal.Decimal(text), accepts(make, tiny, text)
            seen[accepted] += 1
            if accepted:
                assert (low is None or value >= low) and (high is None or value <= high), (schema, text)
                assert (xlow is None or value > xlow) and (xhigh is None or value < xhigh), (schema, text)
    assert min(seen.values()) > 1000


def test_decimals(tiny):
    """Multiples and bounds are of the number as it is written, not as a float rounds it."""
    rng = np.random.default_rng(0)
    schema = {"type": "number", "multipleOf": 0.01, "minimum": -0.3, "exclusiveMaximum": 12.345}
    make = compile_constraint({"json_schema": schema}, tiny)
    for _ in range(60):
        value = decimal.Decimal(tiny.decode(sample(make(), tiny, rng)))
        assert value % decimal.Decimal("0.01") == 0
        assert decimal.Decimal("-0.3") <= value < decimal.Decimal("12.345")


def test_dates_of_leap_years(tiny):
    make = compile_constraint({"json_schema": {"type": "string", "format": "date"}}, tiny)
    for date, exists in (("2024-02-29", True), ("2000-02-29", True), ("2023-02-29", False), ("1900-02-29", False)):
        assert accepts(make, tiny, f'"{date}"') == exists
    for date in ("2024-04-31", "2024-13-01", "0000-01-01", "2024-1-1", "2024-02-30"):
        assert not accepts(make, tiny, f'"{date}"')


def test_a_key_has_one_spelling(tiny):
    """Under another one it would be a key of its own for the grammar, and the same one for who reads the JSON."""
    schema = {"type": "object", "properties": {'q"\n': {"type": "integer"}}, "additionalProperties": {"type": "null"}}
    make = compile_constraint({"json_schema": schema}, tiny)
    assert accepts(make, tiny, '{"q\\"\\n": 1, "other": null}')
    for text in (
        '{"q\\u0022\\n": null}',
        '{"q\\"\\u000a": null}',
        '{"q\\"\\n": null}',
        '{"q\\"\\n": 1, "q\\"\\n": null}',
    ):
        assert not accepts(make, tiny, text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "properties": {"age": {"minimun": 3}}}, "#/properties/age/minimun: .*write minimum"),
        ({"not": {"type": "null"}}, "#/not: this keyword is not supported"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
        ({"type": "array", "contains": {}}, "#/contains"),
        ({"if": {}, "then": {}}, "#/if"),
        ({"dependentRequired": {}}, "#/dependentRequired"),
        ({"propertyNames": {}}, "#/propertyNames"),
        ({"unevaluatedProperties": False}, "#/unevaluatedProperties"),
        ({"nullable": True, "type": "string"}, "#/nullable"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "#/x-guidance"),
        ({"items": [{}], "prefixItems": [{}]}, "#/items"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": {}, "additionalItems": False},
            "additionalItems",
        ),
        ({"$schema": "https://example.org/mine"}, r"#/\$schema"),
        ({"properties": {"a": {"$id": "b"}}}, r"#/properties/a/\$id"),
        ({"$anchor": "a"}, r"#/\$anchor"),
        ({"type": "string", "format": "iri"}, "#/format: expected one of date"),
        ({"type": "string", "format": "unknown"}, "#/format"),
        ({"type": "strin"}, "#/type: expected one of null"),
        ({"type": []}, "#/type"),
        ({"const": 2**53 + 1}, "#/const: .*9007199254740993"),
        ({"enum": [{"a": [-(2**60)]}]}, "#/enum/0/a/0"),
        ({"type": "integer", "minimum": 2**70}, r"#/minimum: expected a bound up to 2\*\*53"),
        ({"const": 1.9781649235905385}, "#/const: expected a number of at most 15 digits.*1.9781649235905385"),
        ({"type": "number", "exclusiveMinimum": 1e23}, r"#/exclusiveMinimum: expected a bound up to 2\*\*53"),
        ({"multipleOf": 1 / 3}, "#/multipleOf: expected a number of at most 15 digits"),
        ({"enum": [4.9e19]}, "#/enum/0: expected a number of at most 15 digits"),
        ({"type": "integer", "minimum": "3"}, "#/minimum: expected a number, found '3'"),
        ({"type": "string", "minLength": -1}, "#/minLength"),
        ({"type": "string", "maxLength": True}, "#/maxLength"),
        ({"enum": []}, "#/enum"),
        ({"anyOf": []}, "#/anyOf"),
        ({"properties": []}, "#/properties"),
        ({"required": "a"}, "#/required"),
        ({"properties": {"a\x01": {}}}, "control characters"),
        ({"const": "\x7f"}, "control characters"),
        ({"enum": ["a", "\x7f"]}, "#/enum/1: .*control characters"),
        ({"patternProperties": {"a": {}, "[a]": {}}}, r"#/patternProperties: expected patterns that differ.*'\[a\]'"),
        (
            {
                "type": "object",
                "patternProperties": {"^x": {"$ref": "#"}},
                "properties": {"x1": {}},
                "required": ["x1"],
            },
            "no value satisfies",
        ),
        ({"const": "\ud800"}, "control characters|not JSON"),
        ({"type": "string", "pattern": "(?=a)"}, "#/pattern: .*look-ahead"),
        ({"patternProperties": {"(": {}}}, "patternProperties.*not a regular expression"),
        ({"type": "object", "minProperties": 2}, "#/minProperties: .*written twice"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, r"#/\$ref: .*found '#/\$defs/b'"),
        ({"$ref": "https://example.org/s.json"}, r"#/\$ref"),
        ({"$ref": "#/default", "default": {"type": "string"}}, r"#/\$ref"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf must exclude each other"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "integer", "minimum": float("nan")}, "not JSON"),
        ({"$ref": "#"}, "no value satisfies"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no value satisfies"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no value satisfies"),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "no value satisfies"),
        (False, "no value satisfies"),
        (3, "expected a schema"),
        ({"items": 3}, "#/items: expected a schema"),
    ],
)
def test_schemas_that_cannot_be_kept(tiny, schema, message):
    with pytest.raises(WrongConstraint, match=message) as found:
        compile_constraint({"json_schema": schema}, tiny)
    assert isinstance(found.value, UserError) and "\n" not in str(found.value)
    assert str(found.value).startswith("json_schema: ") and found.value.kind == "json_schema"


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (True, ["3", "null"], [""]),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
        ({"type": "integer", "maximum": 2**63 - 1}, ["3", "9007199254740992"], ["9007199254740993"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.5", "0.001"], ["0", "0.0", "-0", "0.51"]),
        ({"enum": [7995446620962700.0, 2.0]}, ["7995446620962700", "2"], ["7995446620962701", "3"]),
        ({"items": [{"type": "null"}], "additionalItems": False, "type": "array"}, ["[]", "[null]"], ["[null,1]"]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "x", "type": "null"}, ["null"], ["1"]),
        ({"type": "array", "items": {"$ref": "#"}}, ["[]", "[[],[[]]]"], ["[1]"]),
        ({"type": "string", "pattern": "^2", "format": "date"}, ['"2024-01-31"'], ['"1999-01-01"', '"2x"']),
        ({"properties": {"a": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": {"const": 1}}}, ['{"a":1}'], ['{"a":2}']),
        ({"type": "string", "maxLength": 2}, ['"😀é"', '"\\n"'], ['"abc"']),
        (
            {
                "type": "object",
                "patternProperties": {"^x": {"type": "string"}},
                "required": ["x1"],
                "additionalProperties": False,
            },
            ['{"x1":"a"}'],
            ['{"x1":1}', "{}", '{"y":"a"}'],
        ),
        ({"examples": [1], "default": 2, "deprecated": True, "const": None}, ["null"], ["1", "2"]),
    ],
)  # fmt: skip
def test_schemas_of_earlier_drafts_and_their_corners(tiny, schema, good, bad):
    make = compile_constraint({"json_schema": schema}, tiny)
    assert [text for text in good if not accepts(make, tiny, text)] == []
    assert [text for text in bad if accepts(make, tiny, text)] == []


def test_json_objects(tiny):
    rng = np.random.default_rng(0)
    make = compile_constraint({"json_object": True}, tiny)
    for _ in range(30):
        assert isinstance(json.loads(tiny.decode(sample(make(), tiny, rng))), dict)
    assert not accepts(make, tiny, "[]") and accepts(make, tiny, '{\n  "a": [1.5e3, {}]\n}')


def test_white_space_does_not_go_on_for_ever(tiny):
    make = compile_constraint({"json_object": True}, tiny)
    assert accepts(make, tiny, "{" + " " * 64 + "}") and not accepts(make, tiny, "{" + " " * 65 + "}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "expected one of json_schema"),
        ({"json": {}}, r"found \['json'\]"),
        ({"regex": "a", "choice": ["a"]}, "expected one of"),
        ("json_object", "expected one of"),
        ({"json_object": False}, "json_object: expected true"),
        ({"regex": re.compile("a")}, "expected what JSON can hold"),
        ({"choice": []}, "choice: expected a list of one text or more"),
        ({"choice": "ab"}, "expected a list"),
        ({"choice": [1]}, "expected a list"),
        ({"choice": ["a", ""]}, "choice 1 is empty"),
        ({"choice": ["no", "yes please", "yes"]}, r"choice 2 \('yes'\) is the beginning of choice 1"),
        ({"choice": ["a", "b", "a"]}, r"choice 0 \('a'\) is the beginning of choice 2"),
        ({"choice": ["a", "\ud800"]}, "choice 1 has half of a surrogate pair"),
        ({"grammar": 'start: "\ud800"'}, "grammar: it has half of a surrogate pair"),
        ({"grammar": 'start: x\nx: x "a"'}, "grammar: nothing can be generated under it: no text satisfies it$"),
        ({"grammar": '%llguidance {"allow_invalid_utf8": true}\nstart: /(?s:.*)/'}, "%llguidance sets options"),
        ({"grammar": '%llguidance {"no_forcing": false}\nstart: "a"'}, "%llguidance sets options"),
        ({"grammar": 'start: "a" /b/ <[5]> // c'}, "ids of tokens"),
        ({"grammar": 'start: "/" %json {"minimun": 3} "/"'}, "#/minimun"),
        ({"grammar": "start: nothing"}, "grammar: cannot be compiled: unknown name"),
        ({"grammar": "start: <[5]>"}, "ids of tokens"),
        ({"grammar": "start: <|nothing|>"}, "grammar: cannot be compiled"),
        ({"grammar": "start: a\na[temperature=0.7]: /x/"}, "temperature= of a rule"),
        ({"grammar": 'start: a "y"\na[stop="x"]: /.*/'}, "stop= of a rule"),
        ({"grammar": 'start: %json {"minimun": 3}'}, "#/minimun"),
        ({"grammar": "start: %json {"}, "expected a JSON schema after %json"),
        ({"grammar": 3}, "expected a text"),
    ],
)
def test_constraints_that_cannot_be(tiny, spec, message):
    with pytest.raises(WrongConstraint, match=message):
        compile_constraint(spec, tiny)


def nest(depth, parts):
    schema = "{}"
    for _ in range(depth):
        schema = parts[0] + schema + parts[1]
    return schema


@pytest.mark.parametrize(
    "spec",
    [
        {"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000},
        {"grammar": "start: %json " + nest(3000, ('{"items":', "}"))},
        {"json_schema": json.loads(nest(300, ('{"items":', "}")))},
        {"json_schema": json.loads(nest(150, ('{"anyOf":[', "]}")))},
        {"json_schema": {"const": json.loads(nest(400, ("[", "]")))}},
        {"regex": nest(5000, ("(", ")"))},
    ],
    ids=["grammar", "schema in a grammar", "items", "anyOf", "const", "regex"],
)
def test_what_is_nested_too_deeply_is_refused(tiny, spec):
    with pytest.raises(WrongConstraint, match="too deeply|recursion") as found:
        compile_constraint(spec, tiny)
    assert len(str(found.value)) < 300


def test_large_counts_are_no_work(tiny):
    for spec in (
        {"json_schema": {"type": "array", "minItems": 10**9}},
        {"json_schema": {"type": "array", "prefixItems": [{"type": "null"}], "items": {}, "minItems": 10**10}},
        {"json_schema": {"type": "string", "minLength": 10**9}},
        {"regex": "(a{1,100000}b){1,100000}"},
        {"choice": [f"value {i:04d}" for i in range(3000)]},
    ):
        assert compile_constraint(spec, tiny)().allowed().any()


def test_what_may_end_is_looked_for_once(monkeypatch):
    """The parts of a schema come before the whole, so that a deep nest is not gone through once a level."""
    seen, ends = [], json_schema._ends
    monkeypatch.setattr(json_schema, "_ends", lambda node, *rest: seen.append(node) or ends(node, *rest))
    json_schema.prepare_schema(json.loads(nest(100, ('{"type":"array","minItems":1,"items":', "}"))))
    assert 100 < len(seen) < 210


def test_a_tokenizer_whose_decoder_is_not_known(real):
    tokenizer = real("phi3")
    fast = tokenizers.Tokenizer.from_str(tokenizer.fast.to_str())
    fast.decoder = tokenizers.decoders.WordPiece()
    other = load_tokenizer(get_tokenizer_folder("phi3"))
    other.fast = fast
    with pytest.raises(WrongConstraint, match="decoder WordPiece: expected ByteLevel"):
        compile_constraint({"choice": ["a"]}, other)


def test_ids_that_are_not_allowed_are_refused(tiny):
    make = compile_constraint({"choice": ["ab", "cd"]}, tiny)
    [a], [b], [c] = (tiny.encode_text(text) for text in "abc")
    [stop] = tiny.stop_ids
    for wrong in (b, stop, -1, tiny.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong}"):
            make().advance(wrong)
    constraint = make()
    constraint.advance(a)
    with pytest.raises(ValueError, match="is not allowed"):
        constraint.advance(c)
    constraint = make()
    for token in (a, b, stop):
        assert not constraint.is_done()
        constraint.advance(token)
    assert constraint.is_done() and not constraint.allowed().any()
    with pytest.raises(ValueError, match="after the end"):
        constraint.advance(stop)


def test_sequences_do_not_share_their_state(tiny):
    make = compile_constraint({"choice": ["ab", "cd"]}, tiny)
    first, second = make(), make()
    first.advance(tiny.encode_text("a")[0])
    assert unpack_ids(first.allowed()).tolist() == tiny.encode_text("b")
    assert sorted(unpack_ids(second.allowed()).tolist()) == sorted(tiny.encode_text("ac"))


def test_compiled_constraints_are_kept(tmp_path):
    tokenizer = load_tokenizer(make_tiny_tokenizer(tmp_path))
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}, "required": ["a", "b"]}
    make = compile_constraint({"json_schema": schema}, tokenizer)
    assert compile_constraint({"json_schema": json.loads(json.dumps(schema))}, tokenizer) is make
    # Properties are written in the order of the schema, so that another order is another constraint.
    other = schema | {"properties": {"a": {"type": "null"}, "b": {"type": "null"}}}
    assert accepts(make, tokenizer, '{"b":null,"a":null}') and not accepts(make, tokenizer, '{"a":null,"b":null}')
    assert accepts(compile_constraint({"json_schema": other}, tokenizer), tokenizer, '{"a":null,"b":null}')
    assert compile_constraint({"json_schema": schema}, tokenizer, stop_ids=(0,)) is not make
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None  # what was compiled goes with its tokenizer


def test_a_text_that_cannot_end_is_refused(tiny):
    with pytest.raises(WrongConstraint, match="no stop token"):
        compile_constraint({"json_object": True}, tiny, stop_ids=())


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = load_tokenizer(make_tiny_tokenizer(tmp_path))
    with pytest.raises(WrongConstraint, match=r"pip install 'postrain\[constraints\]'"):
        compile_constraint({"json_object": True}, tokenizer)


def test_other_stop_ids_end_a_text(tiny):
    constraint = compile_constraint({"regex": "a?"}, tiny, stop_ids=(0, 2))()
    assert {0, 2} < set(unpack_ids(constraint.allowed()).tolist())
    constraint.advance(0)
    assert constraint.is_done()


def test_stop_ids_share_what_was_compiled(tmp_path, monkeypatch):
    """What clients send as stop ids costs no vocabulary of the library and no compilation."""
    made = []
    monkeypatch.setattr(compile_module, "_TokenSource", lambda *parts: made.append(1) or TokenSource(*parts))
    tokenizer = load_tokenizer(make_tiny_tokenizer(tmp_path))
    special = sorted(set(read_token_bytes(tokenizer).special))
    makes = {
        compile_constraint({"regex": "a?"}, tokenizer, stop_ids=stops)
        for stops in ((i,) * n for i in special for n in (1, 3))
    }
    assert len(made) == 1 and len(makes) == len(special) > 2


def test_stop_ids_that_are_text_are_refused(tiny):
    [a] = tiny.encode_text("}")
    with pytest.raises(WrongConstraint, match=rf"stop_ids: {a} is the text '}}'"):
        compile_constraint({"json_object": True}, tiny, stop_ids=(a, *tiny.stop_ids))
    [stop] = tiny.stop_ids
    name = read_token_bytes(tiny).special[stop]
    with pytest.raises(WrongConstraint, match="grammar: names .*, which ends a text"):
        compile_constraint({"grammar": f'start: "a" {name}'}, tiny)


METASPACE = [
    "</s>",
    "\u2581",
    "\u2581\u2581",
    "a",
    "\u2581a",
    "b",
    "a\u2581b",
    "\u2581\u00e9",
    "\u2581\u65e5\u672c",
    "c",
]


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    """A sentencepiece vocabulary without bytes, whose decoder drops every space mark of the first token."""
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram([(name, -1.0) for name in METASPACE], 0))
    fast.pre_tokenizer, fast.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    fast.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("metaspace")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return load_tokenizer(folder)


@pytest.mark.parametrize("pattern", [" a", "ab?", "\u00e9", "(?: )*\u65e5\u672ca", "a? ?b", "[ab]?"])
def test_the_first_token_is_what_decoding_gives(metaspace, pattern):
    """Of all sequences of up to three tokens those are allowed whose text is of the language."""
    make = compile_constraint({"regex": pattern}, metaspace)
    texts, count = range(1, len(METASPACE)), 0
    for length in range(4):
        for ids in itertools.product(texts, repeat=length):
            constraint, path = make(), [*ids, 0]
            while path and path[0] in unpack_ids(constraint.allowed()):
                constraint.advance(path.pop(0))
            assert constraint.is_done() == bool(re.fullmatch(pattern, metaspace.decode(ids))), ids
            count += constraint.is_done()
    assert count


def test_decoders_whose_order_gives_other_bytes_are_refused(metaspace):
    other = load_tokenizer(metaspace.folder)
    fast = tokenizers.Tokenizer.from_str(metaspace.fast.to_str())
    steps = tokenizers.decoders.Fuse(), tokenizers.decoders.Metaspace()
    fast.decoder = tokenizers.decoders.Sequence(list(steps))
    other.fast = fast
    with pytest.raises(WrongConstraint, match=r"decoder Fuse \+ Metaspace: expected"):
        compile_constraint({"choice": ["a"]}, other)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_words_of_ids(size):
    ids = np.flatnonzero(np.random.default_rng(size).random(size) < 0.5)
    words = pack_ids(ids, size)
    assert words.dtype == np.uint32 and len(words) == -(-size // 32)
    assert [i for i in range(32 * len(words)) if int(words[i // 32]) >> i % 32 & 1] == ids.tolist()
    assert unpack_ids(words).tolist() == ids.tolist()
