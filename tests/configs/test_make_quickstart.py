"""The quickstart's conversations are what their script makes, and the held-out rows are what it claims."""

import importlib.util
import json
import pathlib

import pytest

DATA = pathlib.Path(__file__).resolve().parents[2] / "configs" / "data"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_quickstart", DATA / "make_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [[message["content"] for message in json.loads(line)["messages"]] for line in lines]


def test_the_files_are_remade_byte_for_byte(script, tmp_path):
    script.main(tmp_path)
    for name in ("quickstart_train.jsonl", "quickstart_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_every_held_out_row_combines_values_never_together_in_training(script):
    trained = set()
    for _, _, answer in read("quickstart_train"):
        trained |= script.pairs(json.loads(answer))
    for _, request, answer in read("quickstart_eval"):
        assert script.pairs(json.loads(answer)) - trained, request


def test_every_single_value_is_seen_in_training(script):
    trained, held_out = (
        {fact for _, _, answer in read(name) for fact in script.facts(json.loads(answer))}
        for name in ("quickstart_train", "quickstart_eval")
    )
    everything = {(key, value) for key, values in script.CATEGORICAL.items() for value in values}
    assert trained == everything
    assert held_out <= trained


def test_no_frame_and_no_request_is_shared(script):
    assert not set(script.TRAIN_FRAMES) & set(script.EVAL_FRAMES)
    train, held_out, _ = script.make_rows()
    assert {row.frame for row in train} == set(script.TRAIN_FRAMES)
    assert {row.frame for row in held_out} == set(script.EVAL_FRAMES)
    trained = {row.request.lower() for row in train}
    assert not [row.request for row in held_out if row.request.lower() in trained]


def test_answers_are_one_line_with_the_schema_keys_in_order(script):
    order = ["genres", "mood", "limits", "exclude", "people", "language"]
    for name in ("quickstart_train", "quickstart_eval"):
        for system, request, answer in read(name):
            query = json.loads(answer)
            assert system == script.SYSTEM
            assert list(query) == [key for key in order if key in query] and query
            assert "\n" not in answer and len(request.split()) <= script.MAX_WORDS
