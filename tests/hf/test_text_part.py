"""The language model of a folder that has a vision tower too: read, verified, and exported as a model of its own."""

import json

import numpy as np
import pytest
import torch
import transformers
from hf_compare import assert_parity, random_ids, torch_logits
from safetensors.numpy import load_file, save_file
from tiny_models import ODD_SIZES, make_tiny_tokenizer, randomize

from postrain.config import resolve
from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.save import save_pretrained
from postrain.hf.verify.compare import verify, verify_random
from postrain.recipes import train

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "model"
    text = transformers.Gemma3TextConfig(**ODD_SIZES, sliding_window=6, query_pre_attn_scalar=20)
    vision = transformers.SiglipVisionConfig(**VISION, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """The same with the modules' names of transformers 5, and no more in text_config than differs from the defaults."""
    other = tmp_path_factory.mktemp("other")
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in tensors)
    rename = lambda name: "model." + name.replace("language_model.model.", "language_model.")
    save_file({rename(name): value for name, value in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    default = transformers.Gemma3TextConfig().to_dict()
    text = {key: value for key, value in raw["text_config"].items() if key == "model_type" or default.get(key) != value}
    assert "num_key_value_heads" in text and "rms_norm_eps" not in text
    (other / "config.json").write_text(json.dumps(raw | {"text_config": text}))
    return other


@pytest.mark.parametrize("name", ["folder", "other"])
def test_logits_and_export(name, folder, request, tmp_path):
    source = request.getfixturevalue(name)
    ids = random_ids(300)
    theirs = torch_logits(folder, ids)
    config, params = load_pretrained(source)
    assert_parity(folder, params, config, ids)

    save_pretrained(tmp_path / "export", params, config, source_folder=source)
    raw = json.loads((tmp_path / "export" / "config.json").read_text())
    assert raw["architectures"] == ["Gemma3ForCausalLM"] and raw["model_type"] == "gemma3_text"
    names = load_file(tmp_path / "export" / "model.safetensors")
    assert all(name.startswith("model.") and "language" not in name and "vision" not in name for name in names)
    assert {str(value.dtype) for value in names.values()} == {"bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "Gemma3ForCausalLM"
    np.testing.assert_array_equal(torch_logits(model, ids), theirs)


def test_verify(folder):
    report = verify(folder)
    assert report.passed, str(report)
    report = verify_random(folder, num_layers=2)
    assert report.passed, str(report)


def test_a_missing_tensor_is_named_as_a_text_model_would(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    tensors["language_model.model.surplus"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"missing: model.layers.1.mlp.up_proj.weight; left over: model.surplus"):
        load_pretrained(tmp_path)


def test_an_adapter_s_folder_is_refused_before_training(folder, tmp_path):
    """`peft` would look for other names than the exported ones: it would load nothing and say so in a warning."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    values = {
        "model": {"path": str(folder), "lora": {"rank": 2}},
        "data": {"train": [{"path": str(rows)}], "sequence_length": 32, "batch_size": 1},
        "train": {"steps": 1},
        "export": {"format": "adapter"},
    }
    with pytest.raises(UserError, match="export.format' = 'adapter': .* holds more than a language model"):
        train(resolve(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()
