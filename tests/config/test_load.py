"""Config files and overrides: what is written on the command line means what it looks like, mistakes are placed."""

import os
import pathlib
import re

import pytest

from postrain.config.load import load_config
from postrain.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
            "trackers.wandb_project": "2024",
        },
    )
    assert config.model.path == "some/folder"
    assert config.optimizer.learning_rate == 1e-5
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert [source.path for source in config.data.eval] == ["c.jsonl"]
    assert config.data.shuffle is False
    assert config.model.lora.rank == 8
    assert config.optimizer.name == "lion"
    assert config.trackers.wandb_project == "2024"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg=None):\n    return 3\n", "get_config must return a ConfigDict, found int"),
        ("def get_config(arg=None):\n    a = 1\n    return b\n", "c.py:3: NameError: name 'b' is not defined"),
        ("def get_config(\n", "c.py:1: SyntaxError"),
        ("import math\n\nx = 1 / 0\n", "c.py:3: ZeroDivisionError: division by zero"),
        ("\nraise ValueError('two\\nlines')\n", "c.py:2: ValueError: two lines"),
        ("import sys\nsys.exit('no')\n", "c.py:2: SystemExit: no"),
        ("def get_config(arg):\n    return {}\n", "c.py: TypeError: get_config() missing 1 required"),
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


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q,v", ("q", "v")),
        ("q, v", ("q", "v")),
        ("[q,v]", ("q", "v")),
        ("['q', 'v']", ("q", "v")),
        ("('q',)", ("q",)),
        ("q", ("q",)),
        ("'q'", ("q",)),
    ],
)
def test_lists_need_no_quotes(text, targets, tmp_path):
    file = write_minimal(tmp_path)
    assert load_config(file, {"model.lora.targets": text}).model.lora.targets == targets


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("a.jsonl,b.parquet", ["a.jsonl", "b.parquet"]),
        ("data/*.jsonl", ["data/*.jsonl"]),
        ("[ab].jsonl", ["[ab].jsonl"]),
        ("'a,b.jsonl'", ["a,b.jsonl"]),
        ("['a,b.jsonl', 'c.jsonl']", ["a,b.jsonl", "c.jsonl"]),
        ("2024", ["2024"]),
        ("{'path': 'a.jsonl', 'name': 'chat'}", ["a.jsonl"]),
        ("[{'path': 'a.jsonl', 'name': 'chat'}, 'b.jsonl']", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_sources_are_one_path_or_several(text, paths, tmp_path):
    config = load_config(write_minimal(tmp_path), {"data.train": text, "data.eval": text})
    assert [source.path for source in config.data.train] == [source.path for source in config.data.eval] == paths
    assert config.data.train[0].name == ("chat" if "chat" in text else "")


def test_an_empty_list_is_none(tmp_path):
    file = write_minimal(tmp_path)
    assert [load_config(file, {"data.eval": text}).data.eval for text in ("", "[]", "None")] == [(), (), ()]


def write_minimal(folder):
    """A config file with held-out rows to override."""
    data = {"train": "x.jsonl", "eval": "y.jsonl"}
    (folder / "c.py").write_text(
        f"def get_config(arg=None):\n    return {{'model': {{'path': 'm'}}, 'data': {data}}}\n"
    )
    return str(folder / "c.py")


def test_a_mistake_in_an_imported_file_is_placed_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_config.py").write_text("x = (\n")
    (tmp_path / "c.py").write_text("\nimport helper_of_config\n")
    with pytest.raises(UserError, match=r"helper_of_config\.py:1: SyntaxError"):
        load_config(str(tmp_path / "c.py"))


def test_the_line_is_found_by_a_relative_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("c.py").write_text(
        "def get_config(arg=None):\n    raise ValueError(f'no variant {arg}, there is small')\n"
    )
    with pytest.raises(UserError, match=re.escape("--config=c.py:big: no variant big, there is small (c.py:2)")):
        load_config("c.py:big")
    with pytest.raises(UserError, match=re.escape("--config: c.py:2: ValueError: no variant None")):
        load_config("c.py")


def test_a_folder_or_an_empty_value_is_not_a_config_file(tmp_path):
    (tmp_path / "sft.py").write_text("")
    with pytest.raises(
        UserError, match=rf"--config: {tmp_path} is a folder, expected NAME.py, such as .*{os.sep}sft.py"
    ):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match="--config: its value is empty, expected NAME.py"):
        load_config("")


def test_a_colon_in_the_name_of_a_folder_is_no_variant(tmp_path):
    (tmp_path / "a:b").mkdir()
    file = tmp_path / "a:b" / "c.py"
    file.write_text(
        "def get_config(arg='x'):\n    return {'model': {'path': 'm'}, 'data': {'train': arg + '.jsonl'}}\n"
    )
    for spec, path in ((f"{file}", "x.jsonl"), (f"{file}:y:z", "y:z.jsonl")):
        assert load_config(spec).data.train[0].path == path
    with pytest.raises(UserError, match=r"no file .*a:b/d.py; did you mean .*a:b/c.py"):
        load_config(str(tmp_path / "a:b" / "d.py"))


def test_every_shipped_config_resolves():
    for file in sorted((ROOT / "configs").glob("*.py")):
        config = load_config(str(file), {"model.path": "m", "data.train": "x.jsonl"})
        assert config.model.path == "m"


def test_the_general_template_has_its_variants():
    overrides = {"model.path": "m", "data.train": "x.jsonl"}
    sft = str(ROOT / "configs" / "sft.py")
    assert load_config(sft, overrides).model.lora.rank == 16
    assert load_config(sft + ":full", overrides).model.lora.rank == 0
    with pytest.raises(
        UserError, match=re.escape(f"--config={sft}:ful: no variant 'ful', there are lora, full ({sft}:")
    ):
        load_config(sft + ":ful", overrides)
    assert load_config(sft, overrides).optimizer.warmup_steps > 0
