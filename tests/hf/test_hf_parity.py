"""Tiny random models of odd shapes: our logits are those of transformers, and an export gives them back unchanged."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
import transformers
from hf_compare import assert_parity, folder_logits, random_ids, torch_logits
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.save import save_pretrained

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT_OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6, "swiglu_limit": 1.5}
TIED = {"tie_word_embeddings": True}
MODELS = {
    "llama untied": ("llama", {}),
    "llama tied, one kv head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama gelu, every head its kv": ("llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 untied": ("qwen3", {"head_dim": 14, "rms_norm_eps": 1e-5}),
    "qwen3 tied, biases, one kv head": (
        "qwen3",
        {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1, "vocab_size": 320},
    ),
    "qwen3 windows in the last layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "mistral windows": ("mistral", {"sliding_window": 6}),
    "mistral without windows, no head_dim": ("mistral", {"sliding_window": None, "head_dim": None, "hidden_size": 48}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, **TIED}),
    "gemma2 one kv head, caps off": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0, "num_key_value_heads": 1, "sliding_window": 3}
        | {"num_hidden_layers": 5, **TIED},
    ),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 20, **TIED}),
    "gemma3 linear rope, pattern of its own": (
        "gemma3",
        {"num_hidden_layers": 4, "sliding_window": 4, "num_key_value_heads": 1, "rope_parameters": GEMMA_ROPES}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"], **TIED},
    ),
    "qwen3 moe": ("qwen3_moe", QWEN_MOE),
    "qwen3 moe, weights of the chosen add up to 1": (
        "qwen3_moe",
        QWEN_MOE | {"norm_topk_prob": True, "num_experts_per_tok": 3, "num_key_value_heads": 1, **TIED},
    ),
    "gpt-oss": ("gpt_oss", GPT_OSS),
    "gpt-oss, one kv head": (
        "gpt_oss",
        GPT_OSS | {"num_key_value_heads": 1, "num_experts_per_tok": 1, "swiglu_limit": 0.7, "num_hidden_layers": 2},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 tied, every head its kv": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True, **TIED}),
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def folder(request, tmp_path_factory):
    family, odd = MODELS[request.param]
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", family, max_shard_size="40KB", **odd)


def test_logits_are_those_of_transformers(folder):
    config, params = load_pretrained(folder)
    assert_parity(folder, params, config, random_ids(config.vocab_size))


def test_export_gives_identical_logits_in_transformers(folder, tmp_path):
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", params, config, source_folder=folder, max_shard_bytes=30_000)
    ids = random_ids(config.vocab_size)
    assert np.array_equal(torch_logits(tmp_path / "out", ids), torch_logits(folder, ids))
    assert read_tensors(tmp_path / "out") == read_tensors(folder)
    largest = max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    largest_tensor = max(len(content) for _, _, content in read_tensors(folder).values())
    assert largest < max(30_000, largest_tensor) + 4_000  # a tensor above the limit is alone in its shard


def read_tensors(folder):
    """Every tensor of a folder as (dtype, shape, bytes), read by the safetensors package."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                tensor = handle.get_tensor(name)
                tensors[name] = str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()
    return tensors


def test_old_config_keys_mean_the_same(tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling with ``type``; 5 writes rope_parameters."""
    folder = make_tiny_model(tmp_path / "model", "llama", rope_parameters=LLAMA3_ROPE)
    ids = random_ids(301)
    before = folder_logits(folder, ids)
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    raw["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (folder / "config.json").write_text(json.dumps(raw))
    assert np.array_equal(folder_logits(folder, ids), before)
    config, params = load_pretrained(folder)
    assert_parity(folder, params, config, ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_as_loaded_and_chosen(dtype, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "qwen3", dtype=dtype)
    config, params = load_pretrained(folder)
    assert params["final_norm"]["scale"].dtype == jnp.float32
    save_pretrained(tmp_path / "same", params, config, source_folder=folder)
    assert read_tensors(tmp_path / "same") == read_tensors(folder)
    assert (tmp_path / "same" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    save_pretrained(tmp_path / "float32", params, config, source_folder=folder, dtype="float32")
    assert json.loads((tmp_path / "float32" / "config.json").read_text())["dtype"] == "float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    assert model.dtype == torch.float32
    ids = random_ids(301)
    assert np.array_equal(torch_logits(tmp_path / "float32", ids), torch_logits(folder, ids))


def test_load_in_bfloat16(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", dtype="bfloat16")
    _, params = load_pretrained(folder, dtype="bfloat16")
    _, wide = load_pretrained(folder)
    kernel, wide_kernel = (tree["layers"]["mlp"]["down"]["kernel"] for tree in (params, wide))
    assert kernel.dtype == jnp.bfloat16 and np.array_equal(np.asarray(kernel, np.float32), wide_kernel)


def test_vocabulary_padding_is_zero_inside_and_cut_outside(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", vocab_size=301)
    config, params = load_pretrained(folder)
    for name in ("embed", "unembed"):
        rows = np.array(params[name]["embedding"])
        assert rows.shape == (320, 40) and not rows[301:].any() and rows[:301].any(axis=1).all()
        rows[301:] = 7.0  # training must not, but if it did, nothing of it may leave
        params[name]["embedding"] = jnp.asarray(rows)
    save_pretrained(tmp_path / "out", params, config, source_folder=folder)
    assert read_tensors(tmp_path / "out") == read_tensors(folder)


def test_side_files_travel_unchanged(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("stays")
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", params, config, source_folder=folder)
    expected = {path.name for path in folder.iterdir()} - {"notes.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    for name in expected - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_an_older_export_is_replaced(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", params, config, source_folder=folder, max_shard_bytes=30_000)
    save_pretrained(tmp_path / "out", params, config, source_folder=folder)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    config, params = load_pretrained(folder)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e6)
    with pytest.raises(UserError, match="model.norm.weight has values that are not finite in float16, such as "):
        save_pretrained(tmp_path / "out", params, config, source_folder=folder, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_adapters_must_be_merged_first(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    config, params = load_pretrained(folder)
    params["layers"]["mlp"]["up"]["lora_a"] = jnp.zeros((3, 40, 2))
    with pytest.raises(ValueError, match="layers.mlp.up.lora_a"):
        save_pretrained(tmp_path / "out", params, config, source_folder=folder)
    assert not (tmp_path / "out").exists()
