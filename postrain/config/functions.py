"""Functions and datasets as values of a config: their identity in config.json and in the fingerprint of the data."""

import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from postrain.errors import UserError

PREFIX, DATASET_PREFIX = "function ", "dataset "  # of every identity


def identify_function(function: Callable, key: str) -> str:
    """``function NAME DIGEST``: the name as written in its file, and a hash of its text (not of functions it calls).

    Raises:
      UserError: naming the config ``key``, where it is not a function with a name and a text, or where it reads
        variables of a function around it.
    """
    name, where = getattr(function, "__qualname__", ""), f"config key '{key}'"
    advice = "write it with `def` in the config file, outside of other functions"
    if not inspect.isfunction(function):
        raise UserError(f"{where}: expected a function, found {function!r:.80}: {advice}")
    if "<lambda>" in name:
        raise UserError(f"{where} is a lambda, which has no name to report and compare: {advice}")
    if function.__closure__:
        inside = ", ".join(function.__code__.co_freevars)
        raise UserError(
            f"{where}: {name} reads variables of the function around it ({inside}), so that its text does not say what "
            f"it does: {advice}"
        )
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise UserError(
            f"{where}: the source text of {name} cannot be found, so that a changed function would not be noticed: "
            f"{advice}"
        ) from None
    return f"{PREFIX}{name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def identify_dataset(dataset: Any, key: str) -> str:
    """``function NAME DIGEST`` of a function that makes a dataset, ``dataset TYPE`` of a Grain dataset.

    Raises:
      UserError: naming the config ``key``, where it is neither, or a function as ``identify_function`` refuses.
    """
    if inspect.isfunction(dataset):
        return identify_function(dataset, key)
    if isinstance(dataset, str):
        raise UserError(f"config key '{key}' = {dataset!r}: config.json only names it: run with the config file")
    kinds = [cls.__name__ for cls in type(dataset).__mro__ if cls.__module__.split(".")[0] == "grain"]
    if not {"MapDataset", "IterDataset"} & set(kinds):
        raise UserError(
            f"config key '{key}': expected a grain.MapDataset, a grain.IterDataset or a function that returns one, "
            f"found {dataset!r:.80}"
        )
    return f"{DATASET_PREFIX}{type(dataset).__qualname__}"
