"""config.json of the published models that configs/models.py names, for `postrain plan`: their sizes are facts."""

import pathlib

import transformers

LLAMA_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def qwen3(hidden, mlp, layers, heads, tied):
    return transformers.Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )


def llama(hidden, mlp, layers, heads):
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=dict(LLAMA_ROPE),
    )


def qwen3_moe():
    return transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def gemma3():
    text = transformers.Gemma3TextConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        sliding_window=1024,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    return transformers.Gemma3Config(text_config=text, architectures=["Gemma3ForConditionalGeneration"])


CONFIGS = {
    "Qwen/Qwen3-0.6B": lambda: qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-8B": lambda: qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-30B-A3B": qwen3_moe,
    "google/gemma-3-4b-it": gemma3,
    "meta-llama/Llama-3.1-8B-Instruct": lambda: llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B-Instruct": lambda: llama(8192, 28672, 80, 64),
    "openai/gpt-oss-20b": lambda: transformers.GptOssConfig(  # its defaults are the 120B's
        architectures=["GptOssForCausalLM"], num_hidden_layers=24, num_local_experts=32
    ),
}


def write_published_config(folder, name: str):
    """``folder/name`` with the model's config.json; returns it."""
    folder = pathlib.Path(folder) / name
    CONFIGS[name]().save_pretrained(folder)
    return folder
