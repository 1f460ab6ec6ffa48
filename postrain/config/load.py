"""Config file and command line -> the frozen Config, every key checked; and back.

A config file ``configs/NAME.py`` has ``get_config(arg=None) -> ml_collections.ConfigDict``; the command line
overrides keys as ``--config.optimizer.learning_rate=1e-5``.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import pathlib
import re
import traceback
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from postrain.config.functions import DATASET_PREFIX, PREFIX, identify_dataset, identify_function
from postrain.config.row_kinds import find_row_kind
from postrain.config.rules import check_rules
from postrain.config.schema import Config, Dataset, SourceConfig
from postrain.errors import UserError
from postrain.files import check_text
from postrain.trees import flatten

PLAIN = (str, int, float, bool, type(None))
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}  # of their types, in messages
PATHS = (  # keys in which ~ is the home of the user
    "model.path",
    "model.tokenizer",
    "distill.teacher",
    "model.new_tokens.file",
    "data.train.path",
    "data.eval.path",
    "data.chat_template",
    "data.stream.cache_folder",
)
HOW_TO_GET_A_MODEL = "give the folder of a model, or its name on the Hugging Face hub, such as Qwen/Qwen3-0.6B"


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
    if ".py:" in spec or spec.endswith(".py"):  # there may be colons in front of it
        before, suffix, arg = spec.partition(".py:")
        path = before + ".py" * bool(suffix)
    file = pathlib.Path(path)
    if file.is_dir():
        inside = ", ".join(str(one) for one in sorted(file.glob("*.py"))[:5]) if path else ""
        hint = f", such as {inside}" if inside else ""
        raise UserError(f"--config: {path or 'its value'} is {'a folder' if path else 'empty'}, expected NAME.py{hint}")
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise UserError(f"--config: no file {path}{hint}")
    source = importlib.util.spec_from_file_location("postrain_user_config", file)
    if source is None or source.loader is None:
        raise UserError(f"--config: {path} is not a Python file (expected NAME.py or NAME.py:ARG)")
    module = importlib.util.module_from_spec(source)
    running = False
    try:
        source.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config: {path} has no function get_config(arg=None)")
        running = True
        values = module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # any error of the user's own file is the user's to put right
        where, text = _locate_error(error, file) or path, " ".join(str(error).split())
        if running and arg and isinstance(error, ValueError):  # how a config file refuses a variant
            raise UserError(f"--config={path}:{arg}: {text} ({where})") from error
        raise UserError(f"--config: {where}: {type(error).__name__}: {text}") from error
    return resolve(values, overrides)


def resolve(values: Any, overrides: dict[str, str] | None = None) -> Config:
    """A ConfigDict or nested dict -> the Config with its defaults. ``overrides``: as in ``load_config``.

    A source of ``data.train`` and ``data.eval`` may be a path in place of a dict, and a single one needs no list.

    Raises:
      UserError: naming the key that does not exist (and the nearest that does), has a value of the wrong type or range,
        or contradicts another one.
    """
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    if not isinstance(values, dict):
        raise UserError(f"get_config must return a ConfigDict, found {type(values).__name__}")
    for key, text in (overrides or {}).items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--config.{key}: {section!r} is a value, not a section; its keys cannot be overridden")
        kind: Any = Config  # becomes the type of the key without its range, None where there is no such key
        for part in (*sections, leaf):
            kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
        place[leaf] = _parse_override(text, kind)
    if (row_kind := find_row_kind(values)) != SourceConfig.kind:
        values = _fill_kinds(values, row_kind)
    config = _read_section(values, Config, "")
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raises UserError where a Config, perhaps changed by hand, lacks a key or has keys that contradict each other."""
    recipes = (pathlib.Path(__file__).parents[1] / "recipes").glob("*.py")
    names = sorted(file.stem for file in recipes if not file.stem.startswith("_"))
    _check_choice(config.recipe, names, "recipe")
    if not config.data.train:
        raise UserError("config key 'data.train' is empty: give at least one source of training rows")
    if not config.model.path:
        raise UserError(f"config key 'model.path' is empty: {HOW_TO_GET_A_MODEL}")
    check_rules(config)


# Of the config file and the command line


def _locate_error(error: BaseException, file: pathlib.Path) -> str:
    """``FILE:LINE`` of an error that the config ``file`` (or a file that it imports) raised; "" if not known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == os.path.realpath(file)]
    return f"{file}:{lines[-1]}" if lines else ""


def _parse_override(text: str, kind: Any) -> Any:
    """The value of a key of type ``kind``: lists may be ``a,b`` or ``[a,b]``, words need no quotes.

    >>> _parse_override("q,v", tuple[str, ...])
    ['q', 'v']
    """
    try:
        switch = text.lower() in ("true", "false")
        literal = text.lower() == "true" if switch else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: brackets in brackets without end
        literal = text
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


# Values, by the types of the schema


def _fill_kinds(values: dict, kind: str) -> dict:
    """``values`` with ``kind`` in the sources that do not name a kind."""
    data = values.get("data")
    if not isinstance(data, dict):
        return values
    filled = dict(data)
    for key in ("train", "eval"):
        sources = data.get(key) or ()
        sources = [sources] if isinstance(sources, (str, dict)) else sources
        if isinstance(sources, (list, tuple)):
            named = [{SourceConfig.SHORT_FOR: one} if isinstance(one, str) else one for one in sources]
            filled[key] = [{"kind": kind} | one if isinstance(one, dict) else one for one in named]
    return values | {"data": filled}


@functools.cache
def list_types(section: type) -> dict[str, Any]:
    """Key -> type of a section, with its ranges."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _read_section(values: Any, section: type, prefix: str) -> Any:
    if isinstance(values, str) and hasattr(section, "SHORT_FOR"):
        values = {section.SHORT_FOR: values}
    if not isinstance(values, dict):
        raise UserError(f"config key '{prefix[:-1]}' is a section of keys, found {values!r}")
    types = list_types(section)
    for key in values:
        if key not in types:
            raise UserError(f"config key '{prefix}{key}' does not exist{_suggest(key, prefix, types)}")
    return section(**{key: _read_value(value, types[key], prefix + key) for key, value in values.items()})


def _read_value(value: Any, kind: Any, key: str) -> Any:
    """``value`` as the type ``kind`` of the schema. Raises UserError naming ``key``."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_section(value, kind, key + ".")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if arguments[:1] == (Dataset,):
        if value is not None and not (isinstance(value, str) and value.startswith((PREFIX, DATASET_PREFIX))):
            identify_dataset(value, key)
        return value
    if origin is tuple:
        values = (value,) if isinstance(value, (str, dict)) and value else value or ()
        if not isinstance(values, (list, tuple)):
            raise UserError(f"config key '{key}' must be a list, found {value!r}")
        return tuple(_read_value(item, arguments[0], key) for item in values)
    if origin is typing.Union:  # of choices and a function
        if callable(value):
            identify_function(value, key)
            return value
        if isinstance(value, str) and value.startswith(PREFIX):
            return value
        return _read_value(value, arguments[0], key)
    # A text, a switch or a number, perhaps one of a few or in a range.
    plain = str if origin is Literal else kind
    if origin is Annotated:
        plain, limits = arguments
    if plain is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not plain:  # not isinstance: True would be a number
        raise UserError(f"config key '{key}' must be {WORDS[plain]}, found {value!r}")
    if origin is Literal:
        _check_choice(value, arguments, key)
    if origin is Annotated:
        if isinstance(value, float) and math.isinf(value):
            raise UserError(f"config key '{key}' must be a finite number, found {value}")
        if expected := limits.explain_refusal(value):
            raise UserError(f"config key '{key}' must be {expected}, found {value!r}")
    if key not in PATHS:
        return value
    check_text(value, f"config key '{key}' =")
    return os.path.expanduser(value)


_OTHER_NAMES = {"dpo": "sigmoid", "s-dpo": "softmax", "bt": "bradley_terry"}  # what others call a choice


def _check_choice(value: str, choices: Iterable[str], key: str) -> None:
    if value not in choices:
        meant = _OTHER_NAMES.get(value, "")
        near = [meant] if meant in choices else difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config key '{key}' must be one of {', '.join(choices)}; found {value!r}{hint}")


def _suggest(key: str, prefix: str, siblings: Iterable[str]) -> str:
    """Names the key that was probably meant: of this section, else of the whole config."""
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    if prefix == "mesh.":  # whose axes have other names elsewhere
        return f"; 'mesh' has {', '.join(siblings)}"
    everywhere = {name.rsplit(".", 1)[-1]: name for name in flatten(to_dict(Config()))}
    near = difflib.get_close_matches(key, everywhere, n=1)
    if near:
        return f"; did you mean '{everywhere[near[0]]}'?"
    return f"; '{prefix.rstrip('.')}' has {', '.join(siblings)}" if prefix else f"; there are {', '.join(siblings)}"


# Back to plain values


def to_dict(config: Config) -> dict:
    """Plain nested dicts and lists, as config.json holds them; ``resolve`` turns them back.

    A function becomes its name and a hash of its text, a dataset its type: they can be compared, and not used.
    """

    def plain(value):
        if dataclasses.is_dataclass(value):  # not by dataclasses.asdict, which would copy the rows of a dataset
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if callable(value):
            return identify_function(value, "data.train.kind")
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value if isinstance(value, PLAIN) else identify_dataset(value, "data.train.dataset")

    return plain(config)


def format_config(config: Config) -> str:
    """One ``section.key = value`` a line, of the keys that differ from their default."""
    values, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
    return "\n".join(f"{key} = {value!r}" for key, value in values.items() if value != defaults.get(key))


# Paths


def check_paths(config: Config) -> None:
    """Raises UserError where the model, its tokenizer or the chat template of a config is not on this machine."""
    check_model_path(config.model.path)
    if config.model.tokenizer:
        check_model_path(config.model.tokenizer, "config key 'model.tokenizer'")
    if config.distill.teacher:
        check_model_path(config.distill.teacher, "config key 'distill.teacher'")
    for key, path, expected in (
        ("model.new_tokens.file", config.model.new_tokens.file, "a file with a token a line"),
        ("data.chat_template", config.data.chat_template, "a jinja template, or nothing"),
    ):
        if path and not pathlib.Path(path).is_file():
            raise UserError(f"config key '{key}' = {path!r} is not a file: expected {expected}")


def check_model_path(path: str, where: str = "config key 'model.path'") -> None:
    """Raises UserError where ``path`` is neither a folder nor a GGUF file, a package or a name on the hub.

    Those three are looked for when they are read. Call this first: otherwise the first reader of a folder fails with a
    less helpful message.
    """
    if path.startswith("pypi:") or path.endswith(".gguf") or is_hub_name(path):
        return
    folder = pathlib.Path(path)
    if not path or not folder.is_dir():
        found = "a file, expected a folder" if folder.is_file() else "a folder that does not exist"
        found = f"= {path!r} is {found}" if path else "is empty"
        raise UserError(f"{where} {found}: {HOW_TO_GET_A_MODEL}")


def is_hub_name(path: str) -> bool:
    """Whether ``path`` names a repository on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION.

    A folder or file of that name on this machine takes precedence.
    """
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@\S+)?", path) and not path.endswith(".gguf")
    return bool(named) and not pathlib.Path(path).exists()
