"""A JSON schema, checked and rewritten for the library that compiles it, so that nothing of it is lost in silence.

The library refuses standard keywords that it does not know, but passes over misspelt ones, and keeps some to the
letter of its own reading: whole numbers beyond 2**53 are rounded, a key may be written twice, patterns are Rust's,
``format: date`` has a 30th of February's neighbours. What comes out of ``prepare_schema`` has none of that.
"""

import decimal
import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from postrain.rollout.constraints import WrongConstraint
from postrain.rollout.constraints.patterns import translate

KIND = "json_schema"
# White space between tokens of JSON, so long that indentation fits and no model goes on with it for ever.
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"
# Control characters that JSON has short escapes for are written with them; \u would give a key a second spelling.
OPTIONS = {"whitespace_pattern": WHITE_SPACE, "json_allowed_escapes": 'nrbtf\\"'}
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_LARGEST = 2**53

_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $comment contentMediaType contentEncoding".split()
)
_SCHEMAS = frozenset(("items", "additionalProperties"))
_LISTS = frozenset(("anyOf", "allOf", "oneOf", "prefixItems"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_NUMBERS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_COUNTS = frozenset("minItems maxItems minProperties maxProperties minLength maxLength".split())
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_OTHERS = frozenset(("type", "const", "enum", "$ref", "required", "pattern", "format"))
KEYWORDS = _SCHEMAS | _LISTS | _MAPS | _NUMBERS | _COUNTS | _OTHERS

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAYS = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
_DATE = f"(?:{_YEAR}-(?:{_DAYS})|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}
_LIBRARY_FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


class _Found:
    """What is noted of a schema's parts while they are prepared."""

    def __init__(self):
        self.places: dict[str, Any] = {}  # JSON pointer -> the prepared part there
        self.references: list[tuple[str, str]] = []  # where each $ref is, and to what
        self.patterns: dict[str, str] = {}  # of keys, as they are written for the library -> Python's


def prepare_schema(schema: Any) -> Any:
    """The schema in the library's words, draft 2020-12, annotations left out.

    Raises WrongConstraint with the place of what is misspelt, not supported or contradicts itself, as a JSON pointer.
    """
    try:
        schema = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise WrongConstraint(KIND, f"expected a JSON schema, found what is not JSON: {e}") from None
    if isinstance(schema, dict):
        schema = _take_header(schema)
    found = _Found()
    prepared = _prepare(schema, "#", found)
    for place, reference in found.references:
        if reference not in found.places:
            raise WrongConstraint(
                KIND, f"{place}: expected the place of a schema in this one, such as #/$defs/name; found {reference!r}"
            )
    _check_can_end(found)
    return prepared


def _take_header(schema: dict) -> dict:
    """The schema without the keys that its root alone may have."""
    draft = schema.get("$schema", "https://json-schema.org/draft/2020-12/schema")
    if not isinstance(draft, str) or not re.fullmatch(r"https?://json-schema\.org/(draft[-/][\w-]+/)?schema#?", draft):
        raise WrongConstraint(KIND, f"#/$schema: expected a draft of json-schema.org, found {draft!r}")
    return {key: value for key, value in schema.items() if key not in ("$schema", "$id", "id")}


def _prepare(node: Any, place: str, found: _Found) -> Any:
    """``node`` and what is below it, each noted under its place."""
    found.places[place] = node
    if isinstance(node, bool):
        return node
    if not isinstance(node, dict):
        raise WrongConstraint(KIND, f"{place}: expected a schema (an object, true or false), found {node!r:.40}")
    prepared: dict[str, Any] = {}
    found.places[place] = prepared
    for key, value in node.items():
        here = f"{place}/{_escape(key)}"
        below = lambda part, one, here=here: _prepare(one, f"{here}/{_escape(str(part))}", found)
        if key in _ANNOTATIONS or (key.startswith("x-") and key != "x-guidance"):
            continue
        if key == "items" and isinstance(value, list):
            _check(here, "prefixItems" not in node, "a list beside prefixItems", "one of the two")
            prepared["prefixItems"] = [below(i, one) for i, one in enumerate(value)]
        elif key == "additionalItems" and isinstance(node.get("items"), list):
            prepared["items"] = _prepare(value, here, found)
        elif key in _SCHEMAS:
            prepared[key] = _prepare(value, here, found)
        elif key in _LISTS:
            _check(here, isinstance(value, list) and value, value, "a list of schemas")
            prepared[key] = [below(i, one) for i, one in enumerate(value)]
        elif key in _MAPS:
            _check(here, isinstance(value, dict), value, "an object of schemas")
            names = {name: name for name in value}
            if key == "properties":
                names = {name: _write_key(name, f"{here}/{_escape(name)}") for name in value}
            elif key == "patternProperties":
                names = _write_key_patterns(value, here, found)
            prepared[key] = {names[name]: below(name, one) for name, one in value.items()}
        elif key in _NUMBERS and isinstance(value, bool) and key.startswith("exclusive"):
            continue  # draft 4: below, with the bound that it is about
        elif key == "$ref":
            _check(here, isinstance(value, str), value, "a text such as #/$defs/name")
            found.references.append((here, value))
            prepared[key] = value
        elif key in KEYWORDS:
            _check_value(key, value, here)
            prepared[key] = _as_whole(value) if key in ("const", "enum") else value
        else:
            near = difflib.get_close_matches(key, KEYWORDS, 1)
            raise WrongConstraint(
                KIND, f"{here}: this keyword is not supported: {f'write {near[0]}' if near else 'leave it out'}"
            )
    _move_exclusive(node, prepared)
    _narrow_bounds(prepared, place)
    _check_key_count(prepared, place)
    _move_patterns(prepared, place)
    return prepared


def _check(place: str, holds, found: Any, expected: str) -> None:
    if not holds:
        raise WrongConstraint(KIND, f"{place}: expected {expected}, found {found!r:.60}")


def _check_value(key: str, value: Any, place: str) -> None:
    if key in _NUMBERS:
        _check(place, isinstance(value, (int, float)) and not isinstance(value, bool), value, "a number")
        if key == "multipleOf":
            _check_representable(value, place)
    elif key in _COUNTS:
        _check(place, isinstance(value, int) and not isinstance(value, bool) and value >= 0, value, "a whole number")
    elif key == "type":
        names = value if isinstance(value, list) else [value]
        _check(place, names and all(name in _TYPES for name in names), value, f"one of {', '.join(_TYPES)}, or a list")
    elif key == "const":
        _check_representable(value, place)
    elif key == "enum":
        _check(place, isinstance(value, list) and value, value, "a list of values")
        _check_representable(value, place)
    elif key == "required":
        _check(place, isinstance(value, list) and all(isinstance(one, str) for one in value), value, "a list of names")
        for name in value:
            _write_key(name, place)
    elif key == "format":
        known = (*_FORMATS, *_LIBRARY_FORMATS)
        _check(place, value in known, value, f"one of {', '.join(known)}")


def _check_representable(value: Any, place: str) -> None:
    """Refuses what would come out as another value."""
    if isinstance(value, (list, dict)):
        for key, one in enumerate(value) if isinstance(value, list) else value.items():
            _check_representable(one, f"{place}/{_escape(str(key))}")
            if isinstance(key, str):
                _write_key(key, place)
    elif isinstance(value, str):
        _write_key(value, place)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check(place, _is_exact(value), value, f"a number of at most 15 digits and up to 2**53 ({_LARGEST})")


def _is_exact(value: int | float) -> bool:
    """Whether the library reads the number as it is written: it has float64, and reads them not to the last bit."""
    if abs(value) > _LARGEST:
        return False
    _, digits, exponent = decimal.Decimal(repr(value)).normalize().as_tuple()
    # 15 digits and a power of ten that are float64 themselves: their product or quotient is rounded once.
    return isinstance(value, int) or (len(digits) <= 15 and abs(exponent) <= 22)


def _as_whole(value: Any) -> Any:
    """``value`` with whole numbers as such, also 2.0, which the library would take for a range of numbers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_as_whole(one) for one in value]
    return {key: _as_whole(one) for key, one in value.items()} if isinstance(value, dict) else value


def _narrow_bounds(node: dict, place: str) -> None:
    """Bounds that the library would not keep become the nearest ones inside of them that it does.

    It rounds those of many digits, and takes whole exclusive bounds of decimals for inclusive ones.
    """
    types = node.get("type", _TYPES)
    is_decimal = "number" in ([types] if isinstance(types, str) else types)
    for side, away in (("Minimum", 1), ("Maximum", -1)):
        bounds = []
        for key in (side.lower(), f"exclusive{side}"):
            if key not in node:
                continue
            value = node[key]
            exact = decimal.Decimal(repr(value))
            is_exclusive = key.startswith("exclusive")
            if not _is_exact(value):
                bounds.append(_round_inward(exact, away, f"{place}/{key}", value))
            elif is_exclusive and is_decimal and exact == exact.to_integral_value():
                bounds.append(exact + away * decimal.Decimal(10) ** min(0, len(str(abs(int(exact)))) - 14))
            elif is_exclusive:
                continue  # kept as it is
            else:
                bounds.append(exact)
            del node[key]
        if bounds:
            bound = max(bounds) if away > 0 else min(bounds)
            node[side.lower()] = int(bound) if bound == bound.to_integral_value() else float(bound)


def _round_inward(value: decimal.Decimal, away: int, place: str, found: Any) -> decimal.Decimal:
    """15 digits of a bound, rounded up (``away`` 1) or down; beyond 2**53, that."""
    if abs(value) > _LARGEST:
        _check(place, value * away < 0, found, f"a bound up to 2**53 ({_LARGEST})")
        return decimal.Decimal(-away * _LARGEST)
    rounding = decimal.ROUND_CEILING if away > 0 else decimal.ROUND_FLOOR
    rounded = decimal.Context(prec=15, rounding=rounding).plus(value)
    if abs(rounded) < 1:
        rounded = rounded.quantize(decimal.Decimal("1e-22"), rounding)
    return rounded


def _write_key(text: str, place: str) -> str:
    if found := _UNWRITABLE.search(text):
        raise WrongConstraint(KIND, f"{place}: expected text without control characters, found {found.group()!r}")
    return text


def _write_key_patterns(names: Iterable[str], place: str, found: _Found) -> dict[str, str]:
    """Patterns of keys -> as they are written for the library."""
    written: dict[str, str] = {}
    for name in names:
        one = _write_pattern(name, f"{place}/{_escape(name)}")
        same = [other for other, text in written.items() if text == one]
        _check(place, not same, [*same, name], "patterns that differ, as a key is given once")
        written[name] = one
        found.patterns[one] = name
    return written


def _write_pattern(pattern: str, place: str) -> str:
    return f"^(?:{translate(pattern, KIND, place=f'{place}: ', search=True)})$"


def _move_exclusive(node: dict, prepared: dict) -> None:
    """``exclusiveMinimum: true`` of draft 4 makes the bound beside it exclusive."""
    for side in ("Minimum", "Maximum"):
        bound = side.lower()
        if node.get(f"exclusive{side}") is True and bound in prepared:
            prepared[f"exclusive{side}"] = prepared.pop(bound)


def _check_key_count(node: dict, place: str) -> None:
    """Keys beyond ``properties`` may be written twice, which is one key: a count that needs two of them may fail."""
    named = set(node.get("required", ())) | set(node.get("properties", ()))
    is_open = node.get("additionalProperties", True) is not False or "patternProperties" in node
    if is_open and node.get("minProperties", 0) > len(set(node.get("required", ()))) + 1:
        raise WrongConstraint(
            KIND,
            f"{place}/minProperties: expected at most {len(set(node.get('required', ()))) + 1} here, found "
            f"{node['minProperties']}: a key that is not named may be written twice, which counts once; name the keys "
            f"under properties and required{' and set additionalProperties to false' if named else ''}",
        )


def _move_patterns(node: dict, place: str) -> None:
    """Patterns and dates in the library's dialect; both of one node as ``allOf``."""
    patterns = []
    if "pattern" in node:
        pattern = node.pop("pattern")
        _check(f"{place}/pattern", isinstance(pattern, str), pattern, "a text")
        patterns.append(_write_pattern(pattern, f"{place}/pattern"))
    if node.get("format") in _FORMATS:
        patterns.append(f"^{_FORMATS[node.pop('format')]}$")
    if patterns:
        node["pattern"] = patterns[0]
    if len(patterns) == 2:
        node["allOf"] = [*node.get("allOf", ()), {"pattern": patterns[1]}]


def _check_can_end(found: "_Found") -> None:
    """Refuses a schema that leads back to itself with no way out: every text of it would go on for ever."""
    places = list(reversed(found.places.items()))  # parts before the whole: what has no references takes one round
    ending: set[str] = set()
    unknown = {id(node) for _, node in places}  # nodes that are not known to end
    before = -1
    while before < len(ending):
        before = len(ending)
        for place, node in places:
            if place not in ending and _ends(node, found.patterns, ending, unknown):
                ending.add(place)
                unknown.discard(id(node))
    if "#" not in ending:
        raise WrongConstraint(KIND, "no value satisfies it: every one would need another of its own kind inside")


def _ends(node: Any, patterns: dict[str, str], ending: set[str], unknown: set[int]) -> bool:
    """Whether some value of ``node`` is finite, by those of its parts that are known to be."""
    if isinstance(node, bool):
        return node
    ends = lambda part: part if isinstance(part, bool) else id(part) not in unknown
    if "$ref" in node and node["$ref"] not in ending:
        return False
    if not all(map(ends, node.get("allOf", ()))):
        return False
    if not all(any(map(ends, node[key])) for key in ("anyOf", "oneOf") if key in node):
        return False
    types = node.get("type", _TYPES)
    types = {types} if isinstance(types, str) else set(types)
    if "const" in node or "enum" in node or types - {"array", "object"}:
        return True
    least, first = node.get("minItems", 0), node.get("prefixItems", [])
    items = [*first[:least], *([node.get("items", True)] if least > len(first) else [])]
    required = set(node.get("required", ()))
    members = [part for name in required for part in _find_members(node, name, patterns)]
    if node.get("minProperties", 0) > len(required):
        named = [part for name, part in node.get("properties", {}).items() if name not in required]
        others = [*node.get("patternProperties", {}).values(), node.get("additionalProperties", True)]
        members.append(any(map(ends, (*named, *others))))
    return ("array" in types and all(map(ends, items))) or ("object" in types and all(map(ends, members)))


def _find_members(node: dict, name: str, patterns: dict[str, str]) -> list:
    """The schemas that the value of the key ``name`` is of."""
    members = [part for key, part in node.get("patternProperties", {}).items() if re.search(patterns[key], name)]
    if name in node.get("properties", {}):
        members.append(node["properties"][name])
    return members or [node.get("additionalProperties", True)]


def _escape(key: str) -> str:
    """A key as part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")
