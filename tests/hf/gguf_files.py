"""GGUF files of tiny models, written the way llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from postrain.hf.gguf.convert import GEMMA_NAMES, LAYER_NAMES, TOP_NAMES

CORPUS = [
    "the cat sat on the mat, the 1999 cats' mats; she's seen 12345 of them in 2024",
    "déjà vu, naïve café; привет мир, привет; 你好,世界! 東京 タワー",
    "    indented\n\n\tcode(x) = 1.5e-10 * y  # comment\r\n",
] * 3
SENTENCES = [
    "Hello, world! It's 12345.67 - isn't it?  Two  spaces and   7 more\n\n\ttabs\r\nCRLF",
    "Łódź, Straße, naïve café, İstanbul; Привет, мир! Ελληνικά. שלום. مرحبا",
    "你好,世界!東京タワー。한국어 텍스트 नमस्ते ไทย",
    "e\u0301 combining, \u00a0nbsp, \u200bzero width, \ufb01 ligature, 👩‍👧 🇺🇦 ½ Ⅷ ٣٤",
    " leading, trailing ",
    "say <|im_start|> and <|im_end|>user\n",
]


def interleave(rows, heads):
    """What llama.cpp does to the rows of q and k: (first half, second half) of a head -> pairs side by side."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(file, folder, architecture, *, tokenizer=None, drop=(), fields=None, tensors=None, quantised=None):
    """``folder``: a tiny Hugging Face model. ``drop``: names left out; ``fields``, ``tensors``: added or replaced.

    ``quantised``: name -> (bytes of a tensor, its quantisation).
    """
    raw = json.loads((folder / "config.json").read_text())
    rope = raw["rope_parameters"].get("full_attention", raw["rope_parameters"])
    arch = architecture
    metadata = {
        f"{arch}.context_length": raw["max_position_embeddings"],
        f"{arch}.embedding_length": raw["hidden_size"],
        f"{arch}.block_count": raw["num_hidden_layers"],
        f"{arch}.feed_forward_length": raw["intermediate_size"],
        f"{arch}.attention.head_count": raw["num_attention_heads"],
        f"{arch}.attention.head_count_kv": raw["num_key_value_heads"],
        f"{arch}.attention.key_length": raw["head_dim"],
        f"{arch}.rope.dimension_count": raw["head_dim"],
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
    }
    metadata |= tokenizer or byte_level_fields(make_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    values = {name: change(value, raw, arch) for name, value, change in named(load_file(folder / "model.safetensors"))}
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in (metadata | (fields or {})).items():
        add(writer, name, value)
    for name, value in (values | (tensors or {})).items():
        if name not in drop and name not in (quantised or {}):
            writer.add_tensor(name, np.ascontiguousarray(value))
    for name, (value, kind) in (quantised or {}).items():
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(writer, name, value):
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)


def named(tensors):
    """(GGUF name, value, change) of every tensor of a Hugging Face folder."""
    table = GEMMA_NAMES if any("feedforward" in name for name in tensors) else LAYER_NAMES
    parts = {hf: ours for ours, hf in table.items()}
    tops = {hf: ours for ours, hf in TOP_NAMES.items()}
    for name, value in tensors.items():
        if name in tops:
            yield tops[name], value, convert_norm if "norm" in name else keep
            continue
        _, _, layer, *part, kind = name.split(".")
        part = ".".join(part)
        change = {"self_attn.q_proj": convert_q, "self_attn.k_proj": convert_k}.get(part, keep)
        yield f"blk.{layer}.{parts[part]}.{kind}", value, convert_norm if "norm" in part else change


def keep(value, raw, arch):
    return value


def convert_norm(value, raw, arch):
    return value + 1 if arch.startswith("gemma") else value


def convert_q(value, raw, arch):
    return interleave(value, raw["num_attention_heads"]) if arch == "llama" else value


def convert_k(value, raw, arch):
    return interleave(value, raw["num_key_value_heads"]) if arch == "llama" else value


def make_byte_level(pre_tokenizer, normalizer=None, ignore_merges=False, vocab_size=297):
    """A byte-level BPE trained on CORPUS: 2 special tokens, 256 bytes, merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level_fields(tokenizer, pre="gpt-2"):
    """``tokenizer.ggml.*`` of a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
