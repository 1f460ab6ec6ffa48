"""Texts under a constraint at infinite temperature: every allowed id is as likely as any other.

``make_schema(rng)`` is a random JSON schema of all supported keywords, ``sample`` one text under a constraint, and
``check_value`` the judge: the package jsonschema, and Python's own readers for formats.
"""

import datetime
import functools
import ipaddress
import re
import uuid

import jsonschema
import numpy as np

from postrain.rollout.constraints import unpack_ids
from postrain.rollout.constraints.token_bytes import read_token_bytes

NAMES = ["a", "b", "name", "é", 'q"uote', "back\\slash", "line\nbreak", "sla/sh", "til~de", "😀", "", "x y"]
PATTERNS = [
    r"^[a-c]{2,4}$",
    r"\d+",
    r"^\w+\s\w+$",
    r"^a+$|x",
    r"[^\W\d]",
    r"^(?:foo|ba[rz])?$",
    r"(?i)^yes$",
    r"^\S{3}$",
]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri"]
CLOSING = ('"', "}", "]", '"}', '"]', '":', ":", "1", "x", "@")  # what leads to the end of JSON, and of the patterns


def sample(constraint, tokenizer, rng, soft_limit=40, limit=3000):
    """Ids of one whole text, the stop id left out. After ``soft_limit`` ids those that lead to its end come first."""
    tiers = tokenizer.stop_ids, find_closing(tokenizer)
    ids = []
    while not constraint.is_done():
        words = constraint.allowed()
        allowed = unpack_ids(words)
        assert len(allowed), tokenizer.decode(ids)
        if len(ids) > soft_limit and rng.random() < 0.7:
            leading = ([i for i in tier if words[i // 32] >> np.uint32(i % 32) & 1] for tier in tiers)
            allowed = next((some for some in leading if some), allowed)
        ids.append(int(rng.choice(allowed)))
        constraint.advance(ids[-1])
        assert len(ids) < limit, tokenizer.decode(ids)
    assert ids[-1] in tokenizer.stop_ids
    return ids[:-1]


@functools.cache
def find_closing(tokenizer):
    texts = {text.encode() for text in CLOSING}
    return [i for i, text in enumerate(read_token_bytes(tokenizer).texts) if text in texts]


def make_schema(rng, depth=0, references=()):
    """A random schema; some of them have no value."""
    kinds = ["integer", "number", "string", "boolean", "null", "enum", "const", "any"]
    kinds += ["object", "object", "array", "anyOf", "oneOf", "allOf", "types", "map"] * (depth < 3)
    kinds += ["$ref"] * bool(references)
    kind = str(rng.choice(kinds))
    below = lambda: make_schema(rng, depth + 1, references)
    schema = _MAKERS[kind](rng, below, references)
    if rng.random() < 0.2:
        schema = {"title": "t", "description": "d", **schema, "x-order": 1}
    if depth == 0 and rng.random() < 0.3:  # a list of itself, and a part that is named
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": make_schema(rng, 3),
                    "next": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            },
            "leaf": make_schema(rng, 3),
        }
        schema = {"type": "array", "items": make_schema(rng, 2, ("#/$defs/node", "#/$defs/leaf")), "maxItems": 3} | {
            "$defs": schema["$defs"]
        }
    return schema


def make_value(rng, depth=0):
    options = [None, True, False, int(rng.integers(-50, 50)), make_float(rng), make_float(rng), "text", 'q"\\\n', "é😀"]
    value = options[rng.integers(len(options))]
    if depth < 2 and rng.random() < 0.3:
        value = [make_value(rng, depth + 1) for _ in range(rng.integers(3))]
    if depth < 2 and rng.random() < 0.3:
        value = {name: make_value(rng, depth + 1) for name in pick(rng, NAMES, 3)}
    return value


def make_float(rng):
    """Of a few digits to the most that are taken, and of powers of ten on both sides."""
    return float(f"{int(rng.normal() * 10 ** rng.integers(15))}e{rng.integers(-12, 2)}")


def pick(rng, options, most):
    return [options[i] for i in rng.permutation(len(options))[: rng.integers(most + 1)]]


def make_number(rng, below, references):
    schema = {"type": str(rng.choice(["integer", "number"]))}
    low = float(rng.choice([-1000, -7, -1, 0, 1, 3, 99])) + (0.5 if schema["type"] == "number" else 0)
    low = int(low) if low.is_integer() else low
    if rng.random() < 0.5:
        schema[str(rng.choice(["minimum", "exclusiveMinimum"]))] = low
    if rng.random() < 0.5:
        schema[str(rng.choice(["maximum", "exclusiveMaximum"]))] = low + int(rng.choice([2, 50, 10_000]))
    if schema["type"] == "integer" and rng.random() < 0.3:
        schema["multipleOf"] = int(rng.choice([1, 2, 3, 7, 10]))
    return schema


def make_string(rng, below, references):
    schema = {"type": "string"}
    if rng.random() < 0.3:
        schema["pattern"] = PATTERNS[rng.integers(len(PATTERNS))]
    elif rng.random() < 0.3:
        schema["format"] = FORMATS[rng.integers(len(FORMATS))]
    else:
        low = int(rng.integers(4))
        schema |= {"minLength": low} if rng.random() < 0.5 else {}
        schema |= {"maxLength": low + int(rng.integers(8))} if rng.random() < 0.7 else {}
    return schema


def make_object(rng, below, references):
    names = pick(rng, NAMES, 4)
    schema = {"type": "object", "properties": {name: below() for name in names}}
    schema["required"] = pick(rng, names, 4)
    others = rng.random()
    if others < 0.5:
        schema["additionalProperties"] = False
    elif others < 0.7:
        schema["additionalProperties"] = below()
    if rng.random() < 0.2:
        schema["patternProperties"] = {"^p_": below()}
    return schema


def make_map(rng, below, references):
    low = int(rng.integers(2))
    schema = {"type": "object", "additionalProperties": below(), "minProperties": low, "maxProperties": low + 2}
    if rng.random() < 0.4:
        schema |= {"properties": {'q"uote': below()}, "required": ['q"uote'], "minProperties": low + 1}
        schema["maxProperties"] += 1
    return schema


def make_array(rng, below, references):
    schema = {"type": "array", "minItems": int(rng.integers(3))}
    schema |= {"items": below()} if rng.random() < 0.8 else {}
    schema |= {"prefixItems": [below() for _ in range(rng.integers(1, 3))]} if rng.random() < 0.3 else {}
    schema |= {"maxItems": schema["minItems"] + int(rng.integers(3))} if rng.random() < 0.7 else {}
    return schema


def make_one_of(rng, below, references):
    return {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "value": below()}, "required": ["kind"]}
            for kind in ("one", "two")
        ]
    }


def make_all_of(rng, below, references):
    first, second = pick(rng, NAMES, 2), pick(rng, NAMES, 2)
    parts = [{"type": "object", "properties": {name: below() for name in first}, "required": first}]
    parts += [{"properties": {name: below() for name in second if name not in first}, "required": second[:1]}]
    return {"allOf": parts}


def make_types(rng, below, references):
    schema = {"type": pick(rng, ["null", "boolean", "integer", "string", "array"], 3) or ["null"]}
    return schema | {"minLength": 2, "maxLength": 5, "minimum": 3, "maxItems": 2}


_MAKERS = {
    "integer": make_number,
    "number": make_number,
    "string": make_string,
    "boolean": lambda rng, below, references: {"type": "boolean"},
    "null": lambda rng, below, references: {"type": "null"},
    "enum": lambda rng, below, references: {"enum": [make_value(rng) for _ in range(rng.integers(1, 4))]},
    "const": lambda rng, below, references: {"const": make_value(rng)},
    "any": lambda rng, below, references: {},
    "object": make_object,
    "map": make_map,
    "array": make_array,
    "anyOf": lambda rng, below, references: {"anyOf": [below() for _ in range(rng.integers(1, 4))]},
    "oneOf": make_one_of,
    "allOf": make_all_of,
    "types": make_types,
    "$ref": lambda rng, below, references: {"$ref": references[rng.integers(len(references))]},
}

FORMAT_CHECKER = jsonschema.FormatChecker(formats=())


def checks(name):
    def register(function):
        FORMAT_CHECKER.checks(name, raises=ValueError)(lambda text: not isinstance(text, str) or bool(function(text)))
        return function

    return register


checks("date")(datetime.date.fromisoformat)
checks("time")(lambda text: datetime.time.fromisoformat(shorten_fraction(text)) is not None)
checks("date-time")(lambda text: datetime.datetime.fromisoformat(shorten_fraction(text)))
checks("uuid")(uuid.UUID)
checks("ipv4")(ipaddress.IPv4Address)
checks("ipv6")(ipaddress.IPv6Address)
checks("email")(lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+", text))
checks("hostname")(lambda text: all(re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", one) for one in text.split(".")))
checks("duration")(lambda text: re.fullmatch(r"P(?=.)(\d+[YMWD])*(T(?=.)(\d+[HMS])+)?", text))
checks("uri")(lambda text: re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) and not re.search(r'[\s<>"{}|\\^`]', text))


def shorten_fraction(text):
    """Python reads up to six digits of a fraction of a second."""
    return re.sub(r"(\.\d{1,6})\d*", r"\1", text)


def check_value(value, schema):
    """Raises where ``value`` is not of ``schema``."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
    validator.validate(value)
