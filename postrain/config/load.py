"""Config files, and the keys that the command line overrides.

A config file ``configs/NAME.py`` has ``get_config(arg=None) -> ml_collections.ConfigDict``; the command line
overrides keys as ``--config.optimizer.learning_rate=1e-5``.
"""

import ast
import dataclasses
import difflib
import importlib.util
import os
import pathlib
import traceback
import typing
from typing import Any, Literal

from postrain.config.check import plain_dict, resolve
from postrain.config.schema import Config
from postrain.errors import UserError


def load_config(spec: str, overrides: dict[str, str] | None = None) -> Config:
    """The checked config of a file, with the keys that the command line overrides.

    Args:
        spec: ``path/to/config.py`` or ``path/to/config.py:arg``; ``arg`` is the argument of its ``get_config``.
        overrides: dotted key -> value as written on the command line, a Python literal or bare words, with commas
            where the key takes several: ``{"optimizer.learning_rate": "1e-5", "data.train": "a.jsonl,b.jsonl"}``.

    Raises:
        UserError: no such file, an error inside it, an unknown key, a value of the wrong type or range.
    """
    path, _, arg = spec.partition(":")
    values = plain_dict(_run_config_file(path, arg or None))
    for key, text in (overrides or {}).items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--config.{key}: {section!r} is a value, not a section; its keys cannot be overridden")
        place[leaf] = _parse_override(text, _find_type(key))
    return resolve(values)


def _run_config_file(path: str, arg: str | None) -> Any:
    file = pathlib.Path(path)
    _check_config_file(path, file)
    spec = importlib.util.spec_from_file_location("postrain_user_config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file (expected NAME.py or NAME.py:ARG)")
    module = importlib.util.module_from_spec(spec)
    running = False
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config: {path} has no function get_config(arg=None)")
        running = True
        return module.get_config() if arg is None else module.get_config(arg)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # any error of the user's own file is the user's to put right
        where, text = _locate_error(error, file) or path, " ".join(str(error).split())
        if running and arg is not None and isinstance(error, ValueError):  # how a config file refuses a variant
            raise UserError(f"--config={path}:{arg}: {text} ({where})") from error
        raise UserError(f"--config: {where}: {type(error).__name__}: {text}") from error


def _check_config_file(path: str, file: pathlib.Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        inside = ", ".join(str(one) for one in sorted(file.glob("*.py"))[:5]) if path else ""
        hint = f", such as {inside}" if inside else ""
        raise UserError(f"--config: {path or 'its value'} is {'a folder' if path else 'empty'}, expected NAME.py{hint}")
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
    hint = f"; did you mean {file.parent / near[0]}?" if near else ""
    raise UserError(f"--config: no file {path}{hint}")


def _locate_error(error: BaseException, file: pathlib.Path) -> str:
    """``FILE:LINE`` of an error that the config ``file`` (or a file that it imports) raised; "" if not known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == os.path.realpath(file)]
    return f"{file}:{lines[-1]}" if lines else ""


def _find_type(key: str) -> Any:
    """The type of a dotted key without its range; None where there is no such key."""
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _parse_override(text: str, kind: Any) -> Any:
    """The value of a key of type ``kind``: lists may be ``a,b`` or ``[a,b]``, words need no quotes.

    >>> _parse_override("q,v", tuple[str, ...])
    ['q', 'v']
    """
    literal = _parse_literal(text)
    if kind is str or typing.get_origin(kind) is Literal:
        return literal if isinstance(literal, str) else text
    if typing.get_origin(kind) is tuple:
        if isinstance(literal, (list, tuple, dict)):
            return literal
        if literal is None or (isinstance(literal, str) and literal != text):  # a name in quotes may have commas
            return literal
        words = text.strip()
        words = words[1:-1] if words[:1] == "[" and words[-1:] == "]" else words
        return [word.strip() for word in words.split(",") if word.strip()]
    return literal


def _parse_literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets in brackets without end
        return text
