"""A GGUF file -> a Hugging Face folder, without torch.

The `gguf` package reads the file and dequantises it with numpy; here are the names, the config, and the reverse of
what llama.cpp's converter changes: rows of Llama's query and key projections permuted for
interleaved rotary embeddings, one added to Gemma's norms, rope scaling turned into a tensor of factors.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf.quants import dequantize

from postrain.errors import UserError, shorten
from postrain.hf.config import parse_config, parse_dtype
from postrain.hf.families import FAMILIES
from postrain.hf.folders import atomic_folder
from postrain.hf.gguf.file import check_fields, read_gguf
from postrain.hf.gguf.tokenizer import SentencePieceRule, build_tokenizer, write_tokenizer
from postrain.hf.tensors import write_tensors
from postrain.hf.tree import group_layers, list_tensors

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ORIGINAL_POSITIONS = 8192  # of Llama 3.1 to 3.3; the file has only the factors that follow from it


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What ``general.architecture`` means: names and values of config.json, and changes to reverse in the tensors."""

    name: str
    model_type: str
    extra: Callable[..., dict[str, Any]]  # (this, config so far, metadata, tensors) -> more of the config
    layer_names: dict[str, str] = dataclasses.field(default_factory=lambda: LAYER_NAMES)
    permuted: bool = False
    norm_offset: float = 0.0
    required: tuple[str, ...] = ()  # metadata that ``extra`` reads, in addition to those of every architecture
    # Numbers of layers of the sizes that scale queries by (hidden_size / heads)^-1/2, not head_dim^-1/2.
    wide_query_scale: tuple[int, ...] = ()
    sentencepiece: SentencePieceRule = SentencePieceRule()


# A run's fingerprint is of the written config.json, so the order of keys matters (IMPORT_VERSION in hf/find_model.py).


def _llama(architecture: Architecture, config: dict, fields: dict, tensors: dict) -> dict:
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return {"hidden_act": "silu", **biases}


def _qwen2(architecture: Architecture, config: dict, fields: dict, tensors: dict) -> dict:
    return {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}


def _qwen3(architecture: Architecture, config: dict, fields: dict, tensors: dict) -> dict:
    return _qwen2(architecture, config, fields, tensors) | {"attention_bias": "blk.0.attn_q.bias" in tensors}


def _gemma3(architecture: Architecture, config: dict, fields: dict, tensors: dict) -> dict:
    """Gemma 3 (arXiv:2503.19786): every sixth layer is global, with its own rope; the others have a window."""
    pattern = fields.get("gemma3.attention.sliding_window_pattern", 6)
    layers = range(1, config["num_hidden_layers"] + 1)
    head_dim, heads = config["head_dim"], config["num_attention_heads"]
    wide = config["num_hidden_layers"] in architecture.wide_query_scale
    ropes = {"full_attention": config.pop("rope_parameters")}
    ropes["sliding_attention"] = {
        "rope_type": "default",
        "rope_theta": fields.get("gemma3.rope.freq_base_swa", 10_000.0),
    }
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if wide else head_dim,
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "layer_types": ["full_attention" if layer % pattern == 0 else "sliding_attention" for layer in layers],
        "rope_parameters": ropes,
        "final_logit_softcapping": fields.get("gemma3.final_logit_softcapping"),
    }


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", _llama, permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _qwen2),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _qwen3),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _gemma3,
        GEMMA_NAMES,
        norm_offset=1.0,
        required=("attention.sliding_window",),
        wide_query_scale=(62,),  # the 27B; no field of the file says so
        # The scores do not follow the order of its merges.
        sentencepiece=SentencePieceRule(plain_spaces=True, merge_by_id=True, space_prefix=False),
    ),
}


def import_gguf(file: str | os.PathLike, out_folder: str | os.PathLike, *, dtype: str = "bfloat16") -> pathlib.Path:
    """Writes ``out_folder`` with config.json, model.safetensors, tokenizer and generation config; returns it.

    ``dtype`` of the weights: "bfloat16", "float16", "float32". The folder appears whole or not at all. Raises
    UserError when the file is not a whole GGUF, or has an architecture, field or tensor that is not known here.
    """
    file, target = pathlib.Path(file), parse_dtype(dtype, "dtype")
    tensors, fields = read_gguf(file)
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UserError(f"{file}: general.architecture is {name!r}, supported are {supported}")
    if fields.get("split.count", 1) > 1:
        raise UserError(f"{file}: is one part of {fields['split.count']}: merge them with `llama-gguf-split --merge`")
    architecture = ARCHITECTURES[name]
    check_fields(fields, name, file)
    config = _make_config(architecture, name, fields, tensors, file) | {"dtype": dtype}
    sources = _name_tensors(architecture, config, tensors, file)
    tokenizer = build_tokenizer(fields, architecture.sentencepiece, str(file))
    shapes = {hf_name: tuple(int(size) for size in tensors[source].shape[::-1]) for hf_name, source in sources.items()}
    _check_shapes(shapes, config, file)

    def fetch(hf_name: str) -> np.ndarray:
        return _convert(tensors[sources[hf_name]], hf_name, architecture, config, file)

    # Ids that generation starts and stops with: end of text, of turn and of message, whichever the file has.
    stops = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    generation = {"bos_token_id": config["bos_token_id"], "pad_token_id": config["pad_token_id"]}
    generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    generation = {key: value for key, value in generation.items() if value is not None}

    with atomic_folder(out_folder) as folder:
        write_tensors(folder, [(hf_name, shape, target) for hf_name, shape in shapes.items()], fetch)
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(folder, tokenizer, fields, config["max_position_embeddings"])
    return pathlib.Path(out_folder)


def _make_config(architecture: Architecture, name: str, fields: dict, tensors: dict, file: pathlib.Path) -> dict:
    """config.json of the model, from the metadata and the shapes of the tensors."""

    def field(key: str, *default):
        if f"{name}.{key}" not in fields and not default:
            raise UserError(f"{file}: lacks the field {name}.{key}: convert the model again with a newer llama.cpp")
        return fields.get(f"{name}.{key}", *default)

    for key in ("token_embd.weight", "output_norm.weight"):
        if key not in tensors:
            raise UserError(f"{file}: lacks the tensor {key}: it is not a whole model")
    if field("expert_count", 0):
        raise UserError(f"{file}: {name}.expert_count is {field('expert_count')}: experts are not supported")
    for key in architecture.required:
        field(key)
    heads = field("attention.head_count")
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", field("embedding_length") // heads),
        "max_position_embeddings": field("context_length"),
        # Stored as float32: 9.999999747378752e-06 was 1e-05.
        "rms_norm_eps": float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(field, tensors, file),
    }
    for key in ("bos", "eos"):
        config[f"{key}_token_id"] = fields.get(f"tokenizer.ggml.{key}_token_id")
    config["pad_token_id"] = fields.get("tokenizer.ggml.padding_token_id")
    return config | architecture.extra(architecture, config, fields, tensors)


def _rope(field: Callable, tensors: dict, file: pathlib.Path) -> dict:
    head_dim = field("attention.key_length", 0) or field("embedding_length") // field("attention.head_count")
    theta = float(f"{field('rope.freq_base', 10_000.0):.8g}")
    kind = field("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UserError(f"{file}: rope.scaling.type is {kind!r}, supported are none and linear")
    if field("rope.dimension_count", 0) not in (0, head_dim):
        raise UserError(f"{file}: rope.dimension_count {field('rope.dimension_count')} is not the size of a head")
    factor = field("rope.scaling.factor", field("rope.scale_linear", 1.0))
    if ROPE_FACTORS in tensors:
        return _llama3_rope(tensors[ROPE_FACTORS], theta, file)
    if factor not in (0.0, 1.0):
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_rope(tensor, theta: float, file: pathlib.Path) -> dict:
    """Llama 3.1's scaling, read back out of the tensor of factors that llama.cpp made of it."""
    factors = np.asarray(tensor.data, np.float64).reshape(-1)
    low, high, factor = 1.0, 4.0, float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    ramp = (LLAMA3_ORIGINAL_POSITIONS / wavelengths - low) / (high - low)
    expected = np.where(ramp < 0, factor, np.where(ramp > 1, 1.0, 1 / ((1 - ramp) / factor + ramp)))
    if not np.allclose(expected, factors, rtol=1e-4):
        raise UserError(f"{file}: {ROPE_FACTORS} is not the rope scaling of Llama 3.1: not supported")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_POSITIONS,
    }


def _name_tensors(architecture: Architecture, config: dict, tensors: dict, file: pathlib.Path) -> dict[str, str]:
    """Hugging Face name -> name in the GGUF. Raises UserError for tensors unknown or missing."""
    sources, unknown = {}, []
    for name in tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name in TOP_NAMES:
            sources[TOP_NAMES[name]] = name
        elif match and match[2] in architecture.layer_names:
            sources[f"model.layers.{match[1]}.{architecture.layer_names[match[2]]}.{match[3]}"] = name
        elif name != ROPE_FACTORS:
            unknown.append(name)
    if unknown:
        raise UserError(f"{file}: has tensors that a {config['model_type']} model does not: {', '.join(unknown)}")
    # A layer has what any layer has.
    parts = {re.sub(r"\.layers\.\d+\.", ".layers.{}.", name) for name in sources if ".layers." in name}
    expected = [part.replace("{}", str(i)) for i in range(config["num_hidden_layers"]) for part in sorted(parts)]
    if missing := [name for name in expected if name not in sources]:
        raise UserError(f"{file}: lacks tensors: {group_layers(missing)}: download it again")
    order = {name: i for i, name in enumerate(["model.embed_tokens.weight", *expected])}
    return dict(sorted(sources.items(), key=lambda item: order.get(item[0], len(order))))


def _check_shapes(shapes: dict[str, tuple[int, ...]], config: dict, file: pathlib.Path) -> None:
    """Raises UserError when the tensors are not those of ``config``, where the family is one that this library has."""
    family = FAMILIES.get(config["architectures"][0])
    if family is None:
        return
    expected = {tensor.name: tensor.shape for tensor in list_tensors(parse_config(config, str(file)), family)}
    wrong = [
        f"{name} {list(shapes[name]) if name in shapes else 'missing'} instead of {list(shape)}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    wrong += [f"left over {name}" for name in shapes if name not in expected]
    if wrong:
        raise UserError(f"{file}: tensors do not fit its metadata: {shorten(wrong, 4)}: use another file")


def _convert(tensor, hf_name: str, architecture: Architecture, config: dict, file: pathlib.Path) -> np.ndarray:
    """float32 values as Hugging Face has them: dequantised, with the converter's changes reversed."""
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        advice = "take the model in another quantisation"
        raise UserError(f"{file}: tensor {tensor.name} is of type {kind}, which is not supported: {advice}") from error
    values = np.asarray(values, np.float32).reshape([int(size) for size in tensor.shape[::-1]])
    if not np.isfinite(values).all():
        raise UserError(f"{file}: tensor {tensor.name} has values that are not finite: damaged: download it again")
    part = hf_name.split(".")[-2]
    if architecture.permuted and part in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
        # Rows of a head came as pairs (h, h + H/2) side by side; put the first halves before the second.
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    if architecture.norm_offset and part.endswith("norm"):
        values = values - np.float32(architecture.norm_offset)
    return values
