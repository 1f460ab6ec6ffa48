"""A config is checked before anything else happens, and every mistake is answered in one line."""

import dataclasses
import inspect
import pathlib
import re
import typing

import pytest

from postrain import config as config_lib
from postrain.config import CHOICES, Config, format_config, load_config, resolve, to_dict
from postrain.errors import UserError

MINIMAL = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}
ROOT = pathlib.Path(__file__).resolve().parents[1]
SECTIONS = [
    cls for cls in vars(config_lib).values() if dataclasses.is_dataclass(cls) and cls.__module__ == config_lib.__name__
]


def with_key(key, value):
    values = {section: dict(keys) for section, keys in MINIMAL.items()}
    *sections, leaf = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[leaf] = value
    return values


def error_of(values):
    with pytest.raises(UserError) as caught:
        resolve(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_filled_in_and_frozen():
    config = resolve(MINIMAL)
    assert config.data.train[0].path == "rows.jsonl"
    assert config.data.train[0].kind == "auto"
    assert config.optimizer == Config().optimizer
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


def test_to_dict_and_back():
    config = resolve(with_key("model.lora.targets", ["q", "v"]))
    assert config.model.lora.targets == ("q", "v")
    assert resolve(to_dict(config)) == config


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.learning_rat", 1e-5, "did you mean 'optimizer.learning_rate'?"),
        ("optimiser", {}, "did you mean 'optimizer'?"),
        ("train.learning_rate", 1e-5, "did you mean 'optimizer.learning_rate'?"),
        ("data.train", {"path": "x.jsonl", "kid": "text"}, "did you mean 'data.train.kind'?"),
        ("train.zzzzz", 1, "'train' has steps, epochs, micro_batches, seed, log_every"),
        ("train.steps", 1.5, "config key 'train.steps' must be int, found 1.5 (float)"),
        ("train.steps", True, "must be int, found True (bool)"),
        ("train.steps", -1, "config key 'train.steps' must be at least 0, found -1"),
        ("data.batch_size", 0, "config key 'data.batch_size' must be at least 1, found 0"),
        ("optimizer.learning_rate", float("nan"), "must be at least 0, found nan"),
        ("data.shuffle", "yes", "must be bool, found 'yes'"),
        ("data.packing", "best-fit", "one of best_fit, none; found 'best-fit'; did you mean 'best_fit'?"),
        ("model.lora.targets", ["q", "z"], "config key 'model.lora.targets' must be one of q, k, v, o"),
        ("model.lora", 8, "config key 'model.lora' is a section of keys, found 8"),
        ("data.train", 7, "config key 'data.train' must be a list, found 7"),
        ("data.train", [], "config key 'data.train' is empty"),
        ("model.path", "", "config key 'model.path' is empty"),
        ("train.epochs", 0, "config keys 'train.steps' and 'train.epochs' are both 0"),
        ("train.micro_batches", 3, "'train.micro_batches' = 3 does not divide 'data.batch_size' = 8"),
        ("export.format", "adapter", "needs 'model.lora.rank' above 0"),
        ("model.lora", {"rank": 8, "targets": []}, "config key 'model.lora.targets' is empty"),
        ("model.lora", {"rank": 8, "alpha": 0}, "config key 'model.lora.alpha' = 0"),
        ("train.epochs", float("inf"), "config key 'train.epochs' must be a finite number, found inf"),
        ("train.epochs", 10**400, "config key 'train.epochs' must be a finite number, found inf"),
        ("optimizer.learning_rate", float("-inf"), "must be a finite number, found -inf"),
        ("checkpoint", {"keep_best": 1}, "'checkpoint.metric' = 'eval/loss' needs held-out rows: give 'data.eval'"),
        ("checkpoint", {"keep_best": 1, "metric": "loss"}, "expected a name that starts with train/ or eval/"),
    ],
)
def test_a_wrong_key_or_value_is_named(key, value, words):
    assert words in error_of(with_key(key, value))


def test_whole_numbers_serve_as_floats():
    learning_rate = resolve(with_key("optimizer.learning_rate", 1)).optimizer.learning_rate
    assert learning_rate == 1.0 and isinstance(learning_rate, float)


def test_overrides_are_literals_or_words(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config(arg='a'):\n    return {'model': {'path': arg}, 'data': {'train': 'x.jsonl'}}\n")
    config = load_config(
        f"{file}:some/folder",
        {
            "optimizer.learning_rate": "1e-5",
            "data.train": "('a.jsonl', 'b.jsonl')",
            "data.shuffle": "False",
            "data.eval": "c.jsonl",
            "model.lora.rank": "8",
            "optimizer.name": "lion",
        },
    )
    assert config.model.path == "some/folder"
    assert config.optimizer.learning_rate == 1e-5
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert [source.path for source in config.data.eval] == ["c.jsonl"]
    assert config.data.shuffle is False
    assert config.model.lora.rank == 8
    assert config.optimizer.name == "lion"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg=None):\n    return 3\n", "get_config must return a ConfigDict, found int"),
        ("def get_config(arg=None):\n    a = 1\n    return b\n", "c.py:3: NameError: name 'b' is not defined"),
        ("def get_config(\n", "c.py:1: SyntaxError"),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, text, words):
    file = tmp_path / "c.py"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(str(file))


def test_a_missing_config_file_names_its_neighbour(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(UserError, match="did you mean .*quickstart.py"):
        load_config(str(tmp_path / "quickstar.py"))


def test_an_override_cannot_enter_a_value(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config(arg=None):\n    return {'model': {'path': 'm'}}\n")
    with pytest.raises(UserError, match="'path' is a value"):
        load_config(str(file), {"model.path.x": "1"})


def test_the_print_marks_what_differs_from_the_defaults():
    lines = format_config(resolve(MINIMAL)).splitlines()
    assert "* model.path = 'some/model'" in lines
    assert "  optimizer.name = 'adamw'" in lines


def test_every_key_is_documented_where_it_is_defined():
    bare = []
    for cls in SECTIONS:
        for line in inspect.getsource(cls).splitlines():
            key = re.match(r"    (\w+): ", line)
            if key and "#" not in line and not re.search(r"(Section|Config)\b", line):
                bare.append(f"{cls.__name__}.{key[1]}")
    assert bare == []


def test_every_key_is_used_somewhere():
    sources = [path.read_text() for path in (ROOT / "postrain").rglob("*.py") if path.name != "config.py"]
    sources.append((ROOT / "postrain" / "models" / "config.py").read_text())
    unused = [
        f"{cls.__name__}.{field.name}"
        for cls in SECTIONS
        for field in dataclasses.fields(cls)
        if not any(re.search(rf"(\.|\"){field.name}\b", source) for source in sources)
    ]
    assert unused == []


def test_every_choice_is_of_a_key_that_exists():
    for key in (*CHOICES, *config_lib.AT_LEAST_ONE, *config_lib.MAY_BE_NEGATIVE):
        kind = Config
        for part in key.split("."):
            kind = typing.get_type_hints(kind)[part]
            kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        assert kind in (str, int, float)


def test_every_shipped_config_resolves():
    for file in sorted((ROOT / "configs").glob("*.py")):
        config = load_config(str(file), {"model.path": "m", "data.train": "x.jsonl"})
        assert config.model.path == "m"


def test_the_general_template_has_its_variants():
    overrides = {"model.path": "m", "data.train": "x.jsonl"}
    sft = str(ROOT / "configs" / "sft.py")
    assert load_config(sft, overrides).model.lora.rank == 16
    assert load_config(sft + ":full", overrides).model.lora.rank == 0
    with pytest.raises(UserError, match="no variant 'ful'"):
        load_config(sft + ":ful", overrides)


def test_the_best_may_be_by_scores_that_the_run_has():
    values = MINIMAL | {"data": {"train": "a.jsonl", "eval": "b.jsonl"}}
    values["checkpoint"] = {"keep_best": 1, "metric": "eval/exact_match", "mode": "max"}
    assert "needs 'eval.generate_rows' above 0" in error_of(values)
    assert resolve(values | {"eval": {"generate_rows": 2}}).checkpoint.keep_best == 1
    assert "'exact_match' in 'eval.metrics'" in error_of(
        values | {"eval": {"generate_rows": 2, "metrics": ["valid_json"]}}
    )
