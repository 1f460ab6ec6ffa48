"""A student of some layers of another model is what transformers computes with these layers alone."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.save import save_layers

WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("family", "sizes", "layers"),
    [
        ("llama", {"num_hidden_layers": 5, "tie_word_embeddings": True, "dtype": "bfloat16"}, [0, 3, 4]),
        ("gemma3", WINDOWS | {"head_dim": 12}, [1, 2]),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}, [2, 0]),
    ],
)
def test_the_student_computes_with_the_chosen_layers(tmp_path, family, sizes, layers):
    source = make_tiny_model(tmp_path / "source", family, **sizes)
    save_layers(source, tmp_path / "student", layers)
    load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    whole, student = load(source), load(tmp_path / "student")
    assert student.config.num_hidden_layers == len(layers) == len(student.model.layers)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[i] for i in layers])
    whole.config = whole.model.config = student.config
    for i, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = i
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 260, (2, 19)))
    torch.testing.assert_close(student(ids).logits, whole(ids).logits, rtol=0, atol=1e-5)
    config, _ = load_pretrained(tmp_path / "student")
    assert config.num_layers == len(layers)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (source / name).read_bytes()


def test_layers_whose_windows_follow_from_their_places_are_refused(tmp_path):
    source = make_tiny_model(tmp_path / "source", "gemma3", **WINDOWS)
    raw = json.loads((source / "config.json").read_text())
    raw["layer_types"], raw["sliding_window_pattern"] = None, 2
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="which have an attention window follows from their places"):
        save_layers(source, tmp_path / "student", [0, 2])
    save_layers(source, tmp_path / "student", [2, 3])
    assert load_pretrained(tmp_path / "student")[0].layer_windows == (5, 0)


def test_layers_that_are_not_there_are_refused(tmp_path):
    source = make_tiny_model(tmp_path / "source", "llama")
    for layers in ([], [0, 3], [-1]):
        with pytest.raises(UserError, match="expected some of 0 to 2, which .*source has"):
            save_layers(source, tmp_path / "student", layers)
    (source / "model.safetensors").unlink()  # and before weights are read
    with pytest.raises(UserError, match="expected some of 0 to 2"):
        save_layers(source, tmp_path / "student", [3])
    assert not (tmp_path / "student").exists()


def test_tensors_have_the_dtypes_of_their_own_layers(tmp_path):
    source = make_tiny_model(tmp_path / "source", "llama")
    name = "model.layers.{}.mlp.up_proj.weight".format
    tensors = load_file(source / "model.safetensors")
    tensors[name(1)] = tensors[name(1)].to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    save_layers(source, tmp_path / "student", [1, 2])
    student = load_file(tmp_path / "student" / "model.safetensors")
    assert [student[name(i)].dtype for i in range(2)] == [torch.bfloat16, torch.float32]
