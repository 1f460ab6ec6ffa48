"""Adapters in `peft` and here are the same adapters."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from hf_compare import our_logits, random_ids, relative_difference, torch_logits
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_adapter, save_adapter
from postrain.hf.save import save_pretrained
from postrain.models.config import LoraConfig
from postrain.models.lora import init_lora, merge_lora
from postrain.models.params import merge_params

ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request, tmp_path_factory):
    odd = {"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": request.param == "qwen3"}
    return make_tiny_model(tmp_path_factory.mktemp(request.param) / "base", request.param, **odd)


def make_adapter(base, **lora):
    config, params = load_pretrained(base)
    config = dataclasses.replace(config, lora=LoraConfig(**lora))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return config, params, jax.tree.map(noise, init_lora(config, jax.random.key(0), params))


def load_in_peft(base, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 5, "alpha": 7.5},
        {"rank": 2, "alpha": 4.0, "targets": ("q", "down")},
        {"rank": 2, "alpha": 2.0, "ranks": (("v", 5), ("up", 1))},
        {"rank": 3, "alpha": 4.0, "dora": True},
    ],
    ids=str,
)
def test_peft_gives_our_logits(base, lora, tmp_path):
    config, params, adapter = make_adapter(base, **lora)
    save_adapter(tmp_path / "adapter", adapter, config, base_folder=base)
    ids = random_ids(301)
    ours = our_logits(merge_params(adapter, params), config, ids)
    assert relative_difference(ours, torch_logits(load_in_peft(base, tmp_path / "adapter"), ids)) <= 1e-4
    assert relative_difference(ours, torch_logits(base, ids)) > 0.1  # the adapter does something


def test_merged_export_gives_the_adapters_logits(base, tmp_path):
    config, params, adapter = make_adapter(base, rank=3, alpha=6.0, ranks=(("o", 2),), dora=True)
    merged = merge_lora(merge_params(adapter, params), config)
    save_pretrained(tmp_path / "merged", merged, dataclasses.replace(config, lora=None), source_folder=base)
    save_adapter(tmp_path / "adapter", adapter, config, base_folder=base)
    ids = random_ids(301)
    theirs = torch_logits(load_in_peft(base, tmp_path / "adapter"), ids)
    assert relative_difference(torch_logits(tmp_path / "merged", ids), theirs) <= 1e-4


def test_round_trip_is_exact(base, tmp_path):
    config, _, adapter = make_adapter(base, rank=4, alpha=32.0, targets=("v", "gate"), ranks=(("gate", 2),), dora=True)
    save_adapter(tmp_path / "adapter", adapter, config, base_folder=base)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    found, loaded = load_adapter(tmp_path / "adapter", dataclasses.replace(config, lora=None))
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def test_an_adapter_does_not_take_the_place_of_its_base(base):
    config, _, adapter = make_adapter(base, rank=4)
    before = sorted(path.name for path in base.iterdir())
    with pytest.raises(UserError, match="is the folder that the model was loaded from"):
        save_adapter(base, adapter, config, base_folder=base)
    assert sorted(path.name for path in base.iterdir()) == before


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_of_peft_loads_here(base, use_rslora, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=use_rslora)
    model = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    config, params = load_pretrained(base)
    config, adapter = load_adapter(tmp_path / "adapter", config)
    assert config.lora.rank == 3 and config.lora.targets == ALL
    ids = random_ids(301)
    ours = our_logits(merge_params(adapter, params), config, ids)
    assert relative_difference(ours, torch_logits(model, ids)) <= 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base = make_tiny_model(tmp_path_factory.mktemp("saved") / "base", "llama")
    config, _, adapter = make_adapter(base, rank=2, alpha=4.0)
    save_adapter(base.parent / "adapter", adapter, config, base_folder=base)
    return base.parent / "adapter", config


@pytest.fixture
def adapter_folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "adapter"), saved[1]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector missing"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"rank_pattern": {"q_proj": 8}}, r"instead of \[8, 40\]"),
        ({"rank_pattern": {"layers.1.mlp.up_proj": 8}}, "rank_pattern gives mlp.up_proj other values in other layers"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters has 'mlp.experts.down_proj'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": 3}, r"instead of \[3, 40\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapter_configs_that_are_refused(adapter_folder, keys, named):
    folder, config = adapter_folder
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | keys))
    with pytest.raises(UserError, match=named) as caught:
        load_adapter(folder, config)
    assert "\n" not in str(caught.value)


def test_adapter_tensors_that_are_refused(adapter_folder, tmp_path):
    folder, config = adapter_folder
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({name: value for name, value in tensors.items() if name != gone}, file)
    with pytest.raises(UserError, match=f"{gone} missing"):
        load_adapter(folder, config)
    other = "base_model.model.lm_head.lora_A.weight"
    save_file(tensors | {other: np.zeros((2, 40), np.float32)}, file)
    with pytest.raises(UserError, match=other):
        load_adapter(folder, config)
    named = r"expected names such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for part, by_hand in (("model.model.", "model."), ("lora_A.weight", "lora_A.default.weight")):
        save_file({name.replace(part, by_hand): value for name, value in tensors.items()}, file)
        with pytest.raises(UserError, match=rf"{by_hand}.* belongs to no linear layer .*{named}"):
            load_adapter(folder, config)
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        load_adapter(folder, config)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="adapter_config.json"):
        load_adapter(folder, config)
