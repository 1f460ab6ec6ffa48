"""Runs of models with windows, caps, sinks and experts: trained, sampled from, exported, and the export is right."""

import pytest
from sft_runs import make_inputs, make_values
from tiny_models import make_tiny_model

import postrain
from postrain.compute.workdir import read_metrics
from postrain.errors import UserError
from postrain.hf.verify import verify

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


def test_adapters_on_experts_are_refused_as_a_peft_folder_before_training(inputs, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "qwen3_moe", **EXPERTS)
    values = make_values(inputs, model={"path": str(folder), "lora": {"rank": 4}}, export={"format": "adapter"})
    with pytest.raises(UserError, match="'model.lora.targets': PEFT's format has no adapters of experts"):
        postrain.train(values, tmp_path / "run")
    values["model"]["lora"]["targets"] = ["q", "k", "v", "o"]
    postrain.train(values | {"train": {"steps": 2}}, tmp_path / "run")
    assert (tmp_path / "run" / "export" / "adapter_config.json").is_file()
