"""Variants of the loss in a run: they train, are told apart from the likelihood, and resume to the same bytes."""

import pytest
from sft_runs import crash_at_batch, make_values, read_folder, read_lines, without_perf

import postrain
from postrain.errors import UserError

OPTIONS = {"label_smoothing": 0.1, "z_loss_coef": 1e-3, "focal_gamma": 0.5, "nll_clip": 20.0, "noise": 5.0}


def test_a_run_with_every_variant_resumes_to_the_same_bytes(inputs, tmp_path):
    values = make_values(inputs, train={"steps": 4, "micro_batches": 2}, checkpoint={"every": 2}, eval={"every": 2})
    values["sft"] = OPTIONS
    postrain.train(values, tmp_path / "whole")
    lines = without_perf(read_lines(tmp_path / "whole" / "metrics.jsonl"))
    for line in lines[1:]:
        assert line["train/loss"] != line["train/nll"] > 0
    plain = make_values(inputs, train={"steps": 4, "micro_batches": 2}, checkpoint={"every": 2}, eval={"every": 2})
    postrain.train(plain, tmp_path / "plain")
    before = [read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("whole", "plain")]
    assert before[0]["eval/loss"] == before[1]["eval/loss"], "what is measured is the likelihood, without noise"

    with crash_at_batch(4):
        postrain.train(values, tmp_path / "parts")
    postrain.train(values, tmp_path / "parts")
    assert without_perf(read_lines(tmp_path / "parts" / "metrics.jsonl"))[-1] == lines[-1]
    assert read_folder(tmp_path / "parts" / "export") == read_folder(tmp_path / "whole" / "export")


def test_another_recipe_does_not_read_them(inputs, tmp_path):
    values = make_values(inputs, model={"lora": {"rank": 4}}, eval={"generate_rows": 0})
    with pytest.raises(UserError, match=r"config keys 'sft\.\*' are not read by recipe 'preference'"):
        postrain.train(values | {"recipe": "preference", "sft": {"noise": 1.0}}, tmp_path / "run")
