"""The recipe trains on rows of kind sft, however they come to be, and says so of others."""

import json

import pytest
from sft_runs import make_values, read_folder

from postrain.config.load import load_config
from postrain.errors import UserError
from postrain.recipes import train
from postrain.report.workdir import read_config

CONFIG = """
def to_chat(row):
    question, answer = row["messages"]
    return {{"prompt": [question], "completion": [answer]}} if "red" not in answer["content"] else None


def get_config():
    values = {values!r}
    values["data"]["train"] = [{{"path": {path!r}, "kind": to_chat}}]
    return values
"""


def values_of(inputs, steps):
    plain = {"export": {"format": "none"}, "checkpoint": {"every": 0}, "eval": {"every": 0, "before": False}}
    return make_values(inputs, **plain, train={"steps": steps}, data={"eval": ""})


def write_config(tmp_path, inputs, steps, rows="train.jsonl", change=lambda text: text):
    path = tmp_path / "config.py"
    path.write_text(change(CONFIG.format(values=values_of(inputs, steps), path=str(inputs / rows))))
    return str(path)


def test_a_function_of_the_config_file_trains_resumes_and_is_refused_when_changed(inputs, tmp_path):
    train(write_config(tmp_path, inputs, 2), tmp_path / "run")
    assert read_config(tmp_path / "run").data.train[0].kind.startswith("function to_chat ")
    train(write_config(tmp_path, inputs, 3), tmp_path / "run")
    before = read_folder(tmp_path / "run" / "checkpoints")
    changed = write_config(tmp_path, inputs, 4, change=lambda text: text.replace('"red"', '"blue"'))
    with pytest.raises(UserError, match="source 'train': rows went through function to_chat .*, now function to_chat"):
        train(changed, tmp_path / "run")
    assert read_folder(tmp_path / "run" / "checkpoints") == before


def test_a_config_changed_by_hand_keeps_its_function(inputs, tmp_path):
    metrics = train(load_config(write_config(tmp_path, inputs, 1)), tmp_path / "run")
    assert metrics["train/loss"] > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_another_kind_are_refused_in_one_line(inputs, tmp_path, streaming):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    values = values_of(inputs, 1)
    values["data"] |= {"train": [{"path": str(path), "kind": "preference"}], "streaming": streaming}
    values["data"]["stream"] = {"shards": 1}
    with pytest.raises(UserError) as error:
        train(values, tmp_path / "run")
    assert "source 'pairs' has rows of kind preference, and the recipe reads rows of kind sft" in str(error.value)
    assert "\n" not in str(error.value)
