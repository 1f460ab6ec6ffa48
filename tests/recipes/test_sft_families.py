"""Runs of models with windows, caps, sinks and experts: trained, sampled from, exported, and the export is right."""

import pytest
from sft_runs import make_inputs, make_values
from tiny_models import make_tiny_model

import postrain
from postrain.errors import UserError
from postrain.hf.verify.compare import verify
from postrain.report.workdir import read_metrics

EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "gemma2": ({"sliding_window": 6, "tie_word_embeddings": True}, {"rank": 4}),
    "gemma3": ({"num_hidden_layers": 7, "sliding_window": 6, "tie_word_embeddings": True}, {"rank": 0}),
    "gpt_oss": ({"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}, {"rank": 0}),
    "qwen3_moe": (EXPERTS, {"rank": 4}),
    "olmo2": ({}, {"rank": 4}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("family", MODELS)
def test_trains_and_exports_what_transformers_computes(inputs, tmp_path, family):
    odd, lora = MODELS[family]
    folder = make_tiny_model(tmp_path / "model", family, **odd)
    values = make_values(inputs, model={"path": str(folder), "lora": lora}, train={"steps": 4}, eval={"every": 4})
    postrain.train(values, tmp_path / "run")
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert verify(tmp_path / "run" / "export").passed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts_are_exported_as_peft_has_them(inputs, tmp_path, family):
    folder = make_tiny_model(tmp_path / "model", family, **MODELS[family][0])
    lora = {"rank": 2, "ranks": {"up": 3}}
    values = make_values(
        inputs,
        model={"path": str(folder), "lora": lora},
        export={"format": "adapter"},
        train={"steps": 2},
        eval={"every": 2},
    )
    postrain.train(values, tmp_path / "run")
    assert verify(tmp_path / "run" / "export").passed


def test_magnitudes_of_experts_are_refused_before_training(inputs, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "qwen3_moe", **EXPERTS)
    values = make_values(inputs, model={"path": str(folder), "lora": {"rank": 4, "dora": True}})
    with pytest.raises(UserError, match="'model.lora.dora': experts have no magnitudes, found targets down, gate, up"):
        postrain.train(values, tmp_path / "run")
