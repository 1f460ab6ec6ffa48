"""config.json of published models, key by key as their folders on the Hugging Face hub have it: facts.

Written down from public listings of those files and from what is known of them; of a few, keys that name token ids or
software versions may be those of a sibling. Every key that a publisher added is here, also those that nothing reads.
"""

import json
import pathlib

import transformers

GEMMA3_PATTERN = [*["sliding_attention"] * 5, "full_attention"]


def llama(hidden, mlp, layers, heads, kv=8, **more):
    """Llama 3.1 and later; ``more`` lays other keys over these, and ``...`` leaves one out."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return without_absent(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": scaling,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 128256,
        }
        | more
    )


def llama32(hidden, layers, heads):
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    more = {"head_dim": hidden // heads, "rope_scaling": scaling, "tie_word_embeddings": True}
    return llama(hidden, 8192, layers, heads, **more, eos_token_id=128001, transformers_version="4.45.0.dev0")


def llama2(hidden, mlp, layers, heads, kv):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000}
    older = dict.fromkeys(["attention_bias", "attention_dropout", "mlp_bias", "rope_theta"], ...)
    more = {"max_position_embeddings": 4096, "rope_scaling": None, "torch_dtype": "float16", **ids, **older}
    return llama(hidden, mlp, layers, heads, kv, **more, transformers_version="4.31.0.dev0")


def smollm2(hidden, mlp, layers, heads, kv, **more):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 49152}
    older = {"mlp_bias": ..., "attention_dropout": 0.0}
    js = {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
    own = {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000}
    sizes = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    return llama(hidden, mlp, layers, heads, kv, **ids | older | js | own | sizes | more)


def mistral(hidden, mlp, heads, layers, positions, vocab, theta, **more):
    return without_absent(
        {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": positions,
            "model_type": "mistral",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.0.dev0",
            "use_cache": True,
            "vocab_size": vocab,
        }
        | more
    )


def qwen2(hidden, mlp, layers, heads, kv, window_layers, tied, window=32768, vocab=151936, **more):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "max_window_layers": window_layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": window,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    } | more


def qwen3(hidden, mlp, layers, heads, tied, kv=8, **more):
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128}
    own |= {"max_position_embeddings": 40960, "rope_scaling": None, "rope_theta": 1000000}
    return qwen2(hidden, mlp, layers, heads, kv, layers, tied, None) | own | {"transformers_version": "4.51.0"} | more


def qwen3_moe(hidden, mlp, layers, heads, kv, expert, **more):
    own = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": expert}
    own |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 128}
    own |= {"num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001}
    return without_absent(qwen3(hidden, mlp, layers, heads, False, kv) | own | more)


def qwen3_coder(*sizes, **more):
    own = {"attention_bias": ..., "bos_token_id": ..., "qkv_bias": False, "use_qk_norm": True}
    own |= {"shared_expert_intermediate_size": 0, "router_aux_loss_coef": 0.0, "rope_theta": 10000000}
    return qwen3_moe(*sizes, **own, max_position_embeddings=262144, **more)


def gemma2(hidden, mlp, layers, heads, kv, **more):
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "vocab_size": 256000,
    } | more


def gemma3_text(hidden, mlp, layers, **more):
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262144,
    } | more


def gemma3(hidden, mlp, layers, **more):
    text = {"hidden_size": hidden, "intermediate_size": mlp, "model_type": "gemma3_text", "num_hidden_layers": layers}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text | more,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": vision,
    }


def gpt_oss(layers, experts):
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    unpacked = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {"modules_to_not_convert": unpacked, "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling | {"rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    }


def olmo2(hidden, mlp, layers, heads, kv, **more):
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0",
        "use_cache": False,
        "vocab_size": 100352,
    } | more


def without_absent(raw):
    return {key: value for key, value in raw.items() if value is not ...}


GEMMA3_270M = {"_sliding_window_pattern": 6, "layer_types": GEMMA3_PATTERN * 3, "use_bidirectional_attention": False}
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": llama2(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-13b-hf": llama2(5120, 13824, 40, 40, 40) | {"_name_or_path": "meta-llama/Llama-2-13b-hf"},
    "meta-llama/Meta-Llama-3-8B": llama(
        4096, 14336, 32, 32, rope_scaling=None, max_position_embeddings=8192, mlp_bias=..., eos_token_id=128001
    ),
    "meta-llama/Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B-Instruct": llama(8192, 28672, 80, 64),
    "meta-llama/Llama-3.1-405B": llama(16384, 53248, 126, 128, eos_token_id=128001),
    "meta-llama/Llama-3.2-1B": llama32(2048, 16, 32),
    "meta-llama/Llama-3.2-3B": llama32(3072, 28, 24),
    "meta-llama/Llama-3.3-70B-Instruct": llama(8192, 28672, 80, 64, transformers_version="4.47.0"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": smollm2(576, 1536, 30, 9, 3, initializer_range=0.041666666666666664),
    "HuggingFaceTB/SmolLM2-360M-Instruct": smollm2(960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": smollm2(2048, 8192, 24, 32, 32, rope_theta=130000),
    "mistralai/Mistral-7B-v0.1": mistral(4096, 14336, 32, 32, 32768, 32000, 10000.0, sliding_window=4096),
    "mistralai/Mistral-7B-Instruct-v0.3": mistral(4096, 14336, 32, 32, 32768, 32768, 1000000.0),
    "mistralai/Mistral-Nemo-Base-2407": mistral(5120, 14336, 32, 40, 131072, 131072, 1000000.0, head_dim=128),
    "mistralai/Mistral-Small-24B-Base-2501": mistral(5120, 32768, 32, 40, 32768, 131072, 100000000.0, head_dim=128),
    "Qwen/Qwen2.5-0.5B-Instruct": qwen2(896, 4864, 24, 14, 2, 21, True),
    "Qwen/Qwen2.5-1.5B-Instruct": qwen2(1536, 8960, 28, 12, 2, 21, True),
    "Qwen/Qwen2.5-3B-Instruct": qwen2(2048, 11008, 36, 16, 2, 70, True),
    "Qwen/Qwen2.5-7B": qwen2(3584, 18944, 28, 28, 4, 28, False, 131072, 152064, use_mrope=False),
    "Qwen/Qwen2.5-14B-Instruct": qwen2(5120, 13824, 48, 40, 8, 70, False, 131072, 152064),
    "Qwen/Qwen2.5-32B-Instruct": qwen2(5120, 27648, 64, 40, 8, 70, False, 131072, 152064),
    "Qwen/Qwen2.5-72B-Instruct": qwen2(8192, 29568, 80, 64, 8, 70, False, 131072, 152064),
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": qwen3(5120, 17408, 40, 40, False),
    "Qwen/Qwen3-32B": qwen3(5120, 25600, 64, 64, False),
    "Qwen/Qwen3-30B-A3B": qwen3_moe(2048, 6144, 48, 32, 4, 768),
    "Qwen/Qwen3-235B-A22B": qwen3_moe(4096, 12288, 94, 64, 4, 1536),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": qwen3_coder(2048, 5472, 48, 32, 4, 768, max_window_layers=28),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": qwen3_coder(6144, 8192, 62, 96, 8, 2560, num_experts=160),
    "google/gemma-2-2b": gemma2(2304, 9216, 26, 8, 4),
    "google/gemma-2-9b": gemma2(3584, 14336, 42, 16, 8, sliding_window_size=4096),
    "google/gemma-2-27b": gemma2(4608, 36864, 46, 32, 16, sliding_window_size=4096)
    | {"head_dim": 128, "query_pre_attn_scalar": 144, "_attn_implementation": "eager"},
    "google/gemma-3-270m": gemma3_text(640, 2048, 18, **GEMMA3_270M),
    "google/gemma-3-1b-it": gemma3_text(1152, 6912, 26, sliding_window_pattern=6, cache_implementation="hybrid"),
    "google/gemma-3-4b-it": gemma3(2560, 10240, 34),
    "google/gemma-3-12b-it": gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
    "google/gemma-3-27b-it": gemma3(
        5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
    ),
    "openai/gpt-oss-20b": gpt_oss(24, 32),
    "openai/gpt-oss-120b": gpt_oss(36, 128),
    "allenai/OLMo-2-0425-1B": olmo2(2048, 8192, 16, 16, 16),
    "allenai/OLMo-2-1124-7B-Instruct": olmo2(4096, 11008, 32, 32, 32) | {"_name_or_path": "allenai/open_instruct_dev"},
    "allenai/OLMo-2-1124-13B": olmo2(5120, 13824, 40, 40, 40),
    "allenai/OLMo-2-0325-32B": olmo2(5120, 27648, 64, 40, 8),
}
RECIPE_MODELS = (  # of configs/models.py
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-30B-A3B",
    "google/gemma-3-4b-it",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "openai/gpt-oss-20b",
)


def in_transformers(name: str) -> transformers.PretrainedConfig:
    """What the installed `transformers` reads in the file, without the quantisation."""
    raw = {key: value for key, value in PUBLISHED[name].items() if key != "quantization_config"}
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))


CONFIGS = {name: lambda name=name: in_transformers(name) for name in RECIPE_MODELS}


def write_published_config(folder, name: str):
    """``folder/name`` with the model's config.json; returns it."""
    folder = pathlib.Path(folder) / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name], indent=2))
    return folder
