"""A nested dict -> the frozen Config, every key checked; and back."""

import dataclasses
import difflib
import functools
import math
import pathlib
import re
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from postrain.config.functions import DATASET_PREFIX, PREFIX, identify_dataset, identify_function
from postrain.config.rules import check_rules
from postrain.config.schema import Config, Dataset, SourceConfig
from postrain.errors import UserError
from postrain.trees import flatten

PLAIN = (str, int, float, bool, type(None))
RECIPE_KINDS = {"preference": "preference"}  # the default of data.train.kind, where it is not sft
HOW_TO_GET_A_MODEL = "give the folder of a model, or its name on the Hugging Face hub, such as Qwen/Qwen3-0.6B"


def resolve(values: Any) -> Config:
    """A ConfigDict or nested dict -> the Config with its defaults.

    A source of ``data.train`` and ``data.eval`` may be a path in place of a dict, and a single one needs no list.

    Raises:
      UserError: naming the key that does not exist (and the nearest that does), has a value of the wrong type or range,
        or contradicts another one.
    """
    config = _read_section(_fill_kinds(plain_dict(values)), Config, "")
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raises UserError where a Config, perhaps changed by hand, lacks a key or has keys that contradict each other."""
    _check_choice(config.recipe, list_recipes(), "recipe")
    if not config.data.train:
        raise UserError("config key 'data.train' is empty: give at least one source of training rows")
    if not config.model.path:
        raise UserError(f"config key 'model.path' is empty: {HOW_TO_GET_A_MODEL}")
    check_rules(config)


def _fill_kinds(values: dict) -> dict:
    """``values`` with the kind of the recipe's rows in sources that do not name a kind."""
    kind, data = RECIPE_KINDS.get(values.get("recipe", "")), values.get("data")
    if kind is None or not isinstance(data, dict):
        return values

    def fill(source):
        source = {SourceConfig.SHORT_FOR: source} if isinstance(source, str) else source
        return {"kind": kind} | source if isinstance(source, dict) else source

    filled = dict(data)
    for key in ("train", "eval"):
        sources = data.get(key) or ()
        sources = [sources] if isinstance(sources, (str, dict)) else sources
        if isinstance(sources, (list, tuple)):
            filled[key] = [fill(source) for source in sources]
    return values | {"data": filled}


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
    """One ``section.key = value`` a line; keys that differ from their default are marked with ``*``."""
    values, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
    return "\n".join(f"{'*' if value != defaults.get(key) else ' '} {key} = {value!r}" for key, value in values.items())


def plain_dict(values: Any) -> dict:
    """The nested dict that a ConfigDict holds; a dict is returned as it is. Raises UserError for anything else."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    if not isinstance(values, dict):
        raise UserError(f"get_config must return a ConfigDict, found {type(values).__name__}")
    return values


# Paths


def check_paths(config: Config) -> None:
    """Raises UserError where the model, its tokenizer or the chat template of a config is not on this machine."""
    check_model_path(config.model.path)
    if config.model.tokenizer:
        check_model_path(config.model.tokenizer, "config key 'model.tokenizer'")
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


# Values, by the types of the schema. Each function returns a value as its type, or raises UserError naming ``key``.


@functools.cache
def list_types(section: type) -> dict[str, Any]:
    """Key -> type of a section, with its ranges."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@functools.cache
def list_recipes() -> tuple[str, ...]:
    """The names that ``recipe`` may have: of the files in postrain/recipes."""
    folder = pathlib.Path(__file__).parents[1] / "recipes"
    return tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))


def _read_value(value: Any, kind: Any, key: str) -> Any:
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
        return value if isinstance(value, str) and value.startswith(PREFIX) else _read_value(value, arguments[0], key)
    if origin is Literal:
        return _check_choice(_check_type(value, str, key), arguments, key)
    if origin is Annotated:
        number, limits = _check_type(value, arguments[0], key), arguments[1]
        if math.isinf(number):
            raise UserError(f"config key '{key}' must be a finite number, found {number}")
        if expected := limits.explain_refusal(number):
            raise UserError(f"config key '{key}' must be {expected}, found {number!r}")
        return number
    return _check_type(value, kind, key)


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


def _check_type(value: Any, kind: type, key: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        raise UserError(f"config key '{key}' must be {kind.__name__}, found {value!r} ({type(value).__name__})")
    return value


def _check_choice(value: str, choices: Iterable[str], key: str) -> str:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config key '{key}' must be one of {', '.join(choices)}; found {value!r}{hint}")
    return value
