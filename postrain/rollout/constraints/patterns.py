"""Regular expressions of Python's ``re``, written for the library that compiles them, whose dialect is Rust's.

The two agree on most, and differ in silence on the rest: ``a++`` is possessive here and a repetition of a repetition
there, ``[a&&b]`` a set of two characters or an intersection, ``\\w`` another set of letters. So a pattern is parsed
as Python parses it and every construct is written out. What is generated then matches under ``re``. ``\\d``, ``\\w``
and ``\\s`` generate ASCII alone, which every dialect accepts.
"""

import re
import warnings
from re import _constants, _parser

from postrain.rollout.constraints import WrongConstraint

ANYTHING = "(?s:.*)"
# Category -> what of it is generated, and all that some dialect counts to it, which a negation leaves out.
_CLASSES = {
    "DIGIT": ("0-9", r"\p{Nd}"),
    "SPACE": (r" \t\n\r\x0B\x0C", r"\s\x1C-\x1F\x{85}\x{FEFF}"),
    "WORD": ("0-9A-Za-z_", r"\w\p{L}\p{N}"),
}
_REFUSED = {
    "ASSERT": "a look-ahead or look-behind",
    "ASSERT_NOT": "a negative look-ahead or look-behind",
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}
_EDGES = {"AT_BEGINNING": "left", "AT_BEGINNING_STRING": "left", "AT_END": "right", "AT_END_STRING": "right"}


def translate(pattern: str, kind: str, *, place: str = "", search: bool = False) -> str:
    """``pattern`` in Rust's syntax, for the whole text: what ``re.fullmatch``, or with ``search`` ``re.search`` finds.

    ``kind``: of constraint, and ``place`` in it, such as "#/pattern: ", for messages. Raises WrongConstraint for what
    is no pattern, or has parts that cannot be constrained: look-around, back-references, boundaries in the middle,
    ``(?m)``.
    """
    try:
        with warnings.catch_warnings():  # of sets that a later version of re may read otherwise
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
    except RecursionError:
        raise WrongConstraint(kind, f"{place}{_quote(pattern)} is nested too deeply") from None
    except (re.error, TypeError, OverflowError) as e:
        raise WrongConstraint(
            kind, f"{place}{_quote(pattern)} is not a regular expression of Python's re: {e}"
        ) from None
    writer = _Writer(pattern, kind, place)
    if tree.state.flags & re.MULTILINE:
        writer.refuse("the flag m")
    return writer.write_whole(list(tree), tree.state.flags, search, search)


def _quote(pattern) -> str:
    """In a message, where it may be long."""
    text = repr(pattern)
    return text if len(text) <= 60 else text[:60] + "..."


class _Writer:
    def __init__(self, pattern: str, kind: str, place: str):
        self.pattern, self.kind, self.place = pattern, kind, place

    def refuse(self, what: str):
        raise WrongConstraint(
            self.kind, f"{self.place}{_quote(self.pattern)} has {what}, which cannot be constrained: write it without"
        )

    def write_whole(self, items: list, flags: int, left: bool, right: bool) -> str:
        """Alternatives that reach both ends of the text. ``left``, ``right``: whether other text may stand there."""
        while items and str(items[0][0]) == "AT" and _EDGES.get(str(items[0][1])) == "left":
            items, left = items[1:], False
        while items and str(items[-1][0]) == "AT" and _EDGES.get(str(items[-1][1])) == "right":
            items, right = items[:-1], False
        if len(items) == 1 and str(items[0][0]) == "BRANCH":
            parts = [self.write_whole(list(branch), flags, left, right) for branch in items[0][1][1]]
            return f"(?:{'|'.join(parts)})"
        if len(items) == 1 and str(items[0][0]) == "SUBPATTERN":
            _, added, removed, inner = items[0][1]
            return self.write_whole(list(inner), flags & ~removed | added, left, right)
        return (ANYTHING if left else "") + self.write_all(items, flags) + (ANYTHING if right else "")

    def write_all(self, items, flags: int) -> str:
        return "".join(self.write(str(op), value, flags) for op, value in items)

    def write(self, op: str, value, flags: int) -> str:
        if op in _REFUSED:
            self.refuse(_REFUSED[op])
        if op == "LITERAL":
            return self.write_set([("LITERAL", value)], flags)
        if op == "NOT_LITERAL":
            return self.write_set([("NEGATE", None), ("LITERAL", value)], flags)
        if op == "IN":
            return self.write_set([(str(kind), what) for kind, what in value], flags)
        if op == "ANY":
            return "(?s:.)" if flags & re.DOTALL else r"[^\n]"
        if op == "BRANCH":
            return f"(?:{'|'.join(self.write_all(branch, flags) for branch in value[1])})"
        if op == "SUBPATTERN":
            _, added, removed, inner = value
            return f"(?:{self.write_all(inner, flags & ~removed | added)})"
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            most = "" if most is _constants.MAXREPEAT else most
            return f"(?:{self.write_all(inner, flags)}){{{least},{most}}}"
        if op == "AT":
            self.refuse(f"a boundary ({str(value).lower()}) inside")
        self.refuse(f"{op.lower()}")

    def write_set(self, items: list, flags: int) -> str:
        negated = items[0][0] == "NEGATE"
        parts = []
        for kind, value in items[negated:]:
            if kind == "CATEGORY":
                name = str(value).removeprefix("CATEGORY_")
                narrow, wide = _CLASSES[name.removeprefix("NOT_")]
                if name.startswith("NOT_"):
                    parts.append(f"[^{narrow if negated else wide}]")
                else:
                    parts.append(wide if negated else narrow)
                continue
            first, last = (value, value) if kind == "LITERAL" else value
            parts.append(self.write_range(first, last))
            if flags & re.IGNORECASE:
                parts.append(self.write_other_case(first, last, negated))
        return f"[{'^' if negated else ''}{''.join(parts)}]"

    def write_range(self, first: int, last: int) -> str:
        if first <= 0xDFFF and last >= 0xD800:  # halves of pairs, which are no characters by themselves
            if first >= 0xD800 and last <= 0xDFFF:
                self.refuse("half of a surrogate pair")
            below = self.write_range(first, 0xD7FF) if first < 0xD800 else ""
            return below + (self.write_range(0xE000, last) if last > 0xDFFF else "")
        return f"\\x{{{first:X}}}" + (f"-\\x{{{last:X}}}" if last > first else "")

    def write_other_case(self, first: int, last: int, negated: bool) -> str:
        """The ASCII letters of a range in the other case. Letters beyond ASCII have more than one."""
        if last > 127 or negated:
            self.refuse("the flag i beside a negated set or a character beyond ASCII")
        other = [chr(i).swapcase() for i in range(first, last + 1) if chr(i).isalpha()]
        return "".join(other)
