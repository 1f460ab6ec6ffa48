"""Which kind of rows a config trains on: that of its recipe, or of the loss of its recipe."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from postrain.config.schema import UNPAIRED_LOSSES, Config


@dataclasses.dataclass(frozen=True)
class RowKinds:
    """Kinds of rows that a recipe reads: ``usual``, but for some values of the config key ``key`` another one.

    ``others``: value of the key -> kind. ``variants``: kind -> variant of the recipe's file in configs/ that reads it.
    """

    usual: str
    key: str = ""
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)


# By recipe; one that is not named here reads rows of kind sft.
RECIPE_KINDS = {
    "sft": RowKinds("sft"),
    "preference": RowKinds(
        "preference", "preference.loss", dict.fromkeys(UNPAIRED_LOSSES, "labelled"), {"labelled": "kto"}
    ),
    "reward": RowKinds(
        "preference",
        "reward.loss",
        {"stepwise": "stepwise", "cross_entropy": "labelled", "squared_error": "labelled"},
        {"stepwise": "steps", "labelled": "classes"},
    ),
    "distill": RowKinds("sft", "distill.teacher", {"": "kd"}),  # what a teacher reads, or what it has said
}


def format_reader(kind: str, wanted: str = "") -> str:
    """The first recipe that reads a kind of rows, and what to do to use it; "" where none does.

    ``wanted``: the kind that the config reads in its place.
    """
    if (kind, wanted) == ("sft", "kd"):
        return "a teacher to answer: run `postrain teach` first, or set 'distill.teacher'"
    for recipe, kinds in RECIPE_KINDS.items():
        losses = " or ".join(repr(value) for value, other in kinds.others.items() if other == kind)
        if losses or kind == kinds.usual:
            choice = f" with '{kinds.key}' = {losses}" if losses else ""
            variant = f":{kinds.variants[kind]}" if kind in kinds.variants else ""
            dropped = f" without ':{kinds.variants[wanted]}' ('{kinds.key}')" if wanted in kinds.variants else ""
            return f"recipe {recipe!r}{choice}: use a config like configs/{recipe}.py{variant}{dropped}"
    return ""


def find_row_kind(config: Config | Mapping[str, Any]) -> str:
    """The kind of rows that the recipe of a Config reads, or of nested dicts that are yet to become one."""
    kinds = RECIPE_KINDS.get(_read(config, "recipe"), RowKinds("sft"))
    return kinds.others.get(_read(config, kinds.key), kinds.usual) if kinds.key else kinds.usual


def _read(config: Config | Mapping[str, Any], key: str) -> str:
    """The value of a key, in dicts that lack it its default."""
    get = operator.attrgetter(key)
    if isinstance(config, Config):
        return get(config)
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else get(Config())
