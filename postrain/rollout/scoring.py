"""How a generated answer is scored against the expected one. Each function: (found, expected) -> 0.0 or 1.0."""

import json
from collections.abc import Callable


def exact_match(found: str, expected: str) -> float:
    """The same text, but for white space around it."""
    return float(found.strip() == expected.strip())


def valid_json(found: str, expected: str) -> float:
    """One JSON value and nothing else, whatever it says."""
    del expected
    try:
        json.loads(found, parse_constant=_refuse)  # NaN and Infinity are Python's, not JSON's
    except ValueError:
        return 0.0
    return 1.0


def _refuse(constant: str):
    raise ValueError(constant)


SCORES: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "valid_json": valid_json}
