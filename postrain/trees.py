"""Nested dicts (configs, parameter trees) by dotted path."""

from typing import Any


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> ``{"a.b.c": leaf}``; an empty dict leaves nothing."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
