"""The rejected searches of configs/quickstart_reward.py are wrong in one value each, and the rows load."""

import importlib.util
import json
import pathlib

from postrain.config.load import load_config
from postrain.data.bad_row import RowRef
from postrain.data.kinds.preference import parse_preference
from postrain.trees import flatten

FILE = pathlib.Path(__file__).parents[2] / "configs" / "quickstart_reward.py"


def test_a_rejected_search_has_one_wrong_value():
    spec = importlib.util.spec_from_file_location("quickstart_reward", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changed = set()
    for name in ("train", "test"):
        lines = (module.DATA / f"quickstart_{name}.jsonl").read_text().splitlines()
        for number, line in enumerate(lines, 1):
            row = module.to_pair(json.loads(line))
            assert row == module.to_pair(json.loads(line)), "the same in every run"
            parse_preference(row, "pair", RowRef(name, name, number), set())
            right, wrong = (flatten(json.loads(row[key][0]["content"])) for key in ("chosen", "rejected"))
            assert right.keys() == wrong.keys()
            keys = [key for key in right if right[key] != wrong[key]]
            assert len(keys) == 1
            if isinstance(right[keys[0]], list):
                assert len(set(right[keys[0]]) - set(wrong[keys[0]])) == 1 and len(set(wrong[keys[0]])) == len(
                    wrong[keys[0]]
                )
            changed.add(keys[0])
    assert len(changed) == 8


def test_both_variants_load():
    for variant in ("", ":small"):
        config = load_config(f"{FILE}{variant}")
        assert config.recipe == "reward" and config.data.train[0].kind.__name__ == "to_pair"
