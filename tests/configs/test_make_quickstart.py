"""The quickstart's conversations are what their script makes, and the held-out rows are what it claims."""

import importlib.util
import itertools
import json
import pathlib

import pytest

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
DATA = pathlib.Path(__file__).resolve().parents[2] / "configs" / "data"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_quickstart", DATA / "make_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    lines = (DATA / f"quickstart_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [[message["content"] for message in json.loads(line)["messages"]] for line in lines]


def test_the_files_are_remade_byte_for_byte(script, tmp_path):
    script.main(tmp_path)
    for split in SPLITS:
        name = f"quickstart_{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize("split", HELD_OUT)
def test_every_held_out_row_combines_values_never_together_in_training(script, split):
    trained = set()
    for _, _, answer in read("train"):
        trained |= script.pairs(json.loads(answer))
    for _, request, answer in read(split):
        assert script.pairs(json.loads(answer)) - trained, request


def test_every_single_value_is_seen_in_training(script):
    facts = {split: {f for _, _, answer in read(split) for f in script.facts(json.loads(answer))} for split in SPLITS}
    everything = {(key, value) for key, values in script.CATEGORICAL.items() for value in values}
    assert facts["train"] == everything
    assert facts["validation"] <= everything and facts["test"] <= everything


def test_no_frame_and_no_request_is_shared(script):
    frames = {"train": script.TRAIN_FRAMES, "validation": script.VALIDATION_FRAMES, "test": script.TEST_FRAMES}
    rows, _ = script.make_rows()
    requests = {split: {row.request.lower() for row in of_split} for split, of_split in rows.items()}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not set(frames[first]) & set(frames[second])
        assert not requests[first] & requests[second]
    for split in HELD_OUT:
        assert {row.frame for row in rows[split]} == set(frames[split])
    assert {row.frame for row in rows["train"]} <= set(script.TRAIN_FRAMES)


def test_answers_are_one_line_with_the_schema_keys_in_order(script):
    order = ["genres", "mood", "limits", "exclude", "people", "language"]
    for split in SPLITS:
        for system, request, answer in read(split):
            query = json.loads(answer)
            assert system == script.SYSTEM
            assert list(query) == [key for key in order if key in query] and query
            assert "\n" not in answer and len(request.split()) <= script.MAX_WORDS
