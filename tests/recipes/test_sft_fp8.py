"""A run with float8 products learns, and exports the weights that it trained, whatever they were multiplied in."""

import pytest
from sft_runs import make_values

import postrain
from postrain.hf.verify.compare import verify
from postrain.report.workdir import read_metrics


@pytest.mark.parametrize("rank", [0, 4])
def test_learns_and_exports(inputs, rank, tmp_path):
    model = {"path": str(inputs / "model"), "fp8": True, "lora": {"rank": rank}}
    postrain.train(make_values(inputs, model=model), tmp_path / "run")
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert verify(tmp_path / "run" / "export").passed
