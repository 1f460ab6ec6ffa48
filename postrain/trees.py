"""Nested dicts (configs, parameter trees) by dotted path."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> ``{"a.b.c": leaf}``. An empty dict has no leaf, and no path in the result."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """``{"a.b.c": leaf}`` -> nested dicts: the inverse of ``flatten`` for trees without empty dicts."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
