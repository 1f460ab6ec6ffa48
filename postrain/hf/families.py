"""One small table per model family: which field of config.json means which mechanism, and what tensors are called.

Nothing outside this file knows a family. A new family whose mechanisms exist is a new entry of FAMILIES;
a mechanism that does not exist yet starts in ``postrain.models.config.ModelConfig``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from postrain.models.config import MoeConfig

PROJECTION = "lm_head.weight"  # onto the vocabulary, in every family
BARE_PREFIXES = ("embed_tokens.", "layers.", "norm.")  # of a folder without the level ``model.``


@dataclasses.dataclass(frozen=True)
class TensorName:
    """``param``: path in the parameter tree. ``name``: in the file, the first ``{}`` the layer, a second the expert.

    ``transpose``: Hugging Face's linear layers are [out, in], ours [in, out]. ``part``: the tensor in the file
    holds several parameters in turns along its last axis, this one at part, part + parts, ...
    """

    param: str
    name: str
    transpose: bool = False
    part: int = 0
    parts: int = 1

    @property
    def per_layer(self) -> bool:
        return "{}" in self.name

    @property
    def per_expert(self) -> bool:
        return self.name.count("{}") == 2


def _linear(part: str, module: str, name: str) -> tuple[TensorName, TensorName]:
    return (
        TensorName(f"layers.{part}.{name}.kernel", f"model.layers.{{}}.{module}.{name}_proj.weight", transpose=True),
        TensorName(f"layers.{part}.{name}.bias", f"model.layers.{{}}.{module}.{name}_proj.bias"),
    )


def _norms(**modules: str) -> tuple[TensorName, ...]:
    """The norms of a layer, parameter = module: the same module name is another norm in another family."""
    return tuple(
        TensorName(f"layers.{param}.scale", f"model.layers.{{}}.{module}.weight") for param, module in modules.items()
    )


MLP_TENSORS = (*_linear("mlp", "mlp", "gate"), *_linear("mlp", "mlp", "up"), *_linear("mlp", "mlp", "down"))


def _tensors(norms: tuple[TensorName, ...], mlp: tuple[TensorName, ...] = MLP_TENSORS) -> tuple[TensorName, ...]:
    """In the order of Hugging Face's modules. A model has those whose parameter its ModelConfig calls for."""
    return (
        TensorName("embed.embedding", "model.embed_tokens.weight"),
        *_linear("attention", "self_attn", "q"),
        *_linear("attention", "self_attn", "k"),
        *_linear("attention", "self_attn", "v"),
        *_linear("attention", "self_attn", "o"),
        TensorName("layers.attention.q_norm.scale", "model.layers.{}.self_attn.q_norm.weight"),
        TensorName("layers.attention.k_norm.scale", "model.layers.{}.self_attn.k_norm.weight"),
        TensorName("layers.attention.sinks", "model.layers.{}.self_attn.sinks"),
        *mlp,
        *norms,
        TensorName("final_norm.scale", "model.norm.weight"),
        TensorName("unembed.embedding", PROJECTION),
    )


PRE_NORMS = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
TENSORS = _tensors(PRE_NORMS)
POST_NORM_TENSORS = _tensors(
    _norms(post_attention_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm")
)
SANDWICH_NORM_TENSORS = _tensors(
    _norms(
        attention_norm="input_layernorm",
        post_attention_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    )
)
QWEN_MOE_TENSORS = _tensors(
    PRE_NORMS,
    (
        TensorName("layers.moe.router.kernel", "model.layers.{}.mlp.gate.weight", transpose=True),
        *(
            TensorName(f"layers.moe.{name}.kernel", f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj.weight", True)
            for name in ("gate", "up", "down")
        ),
    ),
)
GPT_OSS_TENSORS = _tensors(
    PRE_NORMS,
    (
        TensorName("layers.moe.router.kernel", "model.layers.{}.mlp.router.weight", transpose=True),
        TensorName("layers.moe.router.bias", "model.layers.{}.mlp.router.bias"),
        TensorName("layers.moe.gate.kernel", "model.layers.{}.mlp.experts.gate_up_proj", part=0, parts=2),
        TensorName("layers.moe.up.kernel", "model.layers.{}.mlp.experts.gate_up_proj", part=1, parts=2),
        TensorName("layers.moe.gate.bias", "model.layers.{}.mlp.experts.gate_up_proj_bias", part=0, parts=2),
        TensorName("layers.moe.up.bias", "model.layers.{}.mlp.experts.gate_up_proj_bias", part=1, parts=2),
        TensorName("layers.moe.down.kernel", "model.layers.{}.mlp.experts.down_proj"),
        TensorName("layers.moe.down.bias", "model.layers.{}.mlp.experts.down_proj_bias"),
    ),
)
# Buffers that old exports carry; they are computed from the config.
IGNORED_TENSORS = (r"(.*\.)?rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one architecture is read.

    ``mechanisms`` gives those fields of ModelConfig that are not the same for every family, from the values of
    config.json with ``defaults`` (what `transformers` takes for an absent key) filled in. A key of ``defaults`` is
    one that the family knows: another family may have it only with a value that means nothing (NEUTRAL_VALUES).
    """

    model_type: str
    mechanisms: Callable[[dict[str, Any]], dict[str, Any]]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: tuple[TensorName, ...] = TENSORS
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # keys that say what the family is in any case
    local_rope: bool = False  # the layers with a window have a rope of their own
    classifier: str = ""  # the architecture of its ``*ForSequenceClassification``


def _layer_windows(c: dict[str, Any], is_local: Callable[[int], bool]) -> dict[str, Any]:
    """``layer_windows`` from ``layer_types``, or from the layers that ``is_local`` names where the key is absent."""
    local, window = "sliding_attention", c["sliding_window"]
    if not window:
        return {"layer_windows": ()}
    types = c.get("layer_types") or [local if is_local(i) else "" for i in range(c["num_hidden_layers"])]
    return {"layer_windows": tuple(window if kind == local else 0 for kind in types) if local in types else ()}


def _qwen_windows(c: dict[str, Any]) -> dict[str, Any]:
    used = c | {"sliding_window": c["sliding_window"] if c["use_sliding_window"] else None}
    return _layer_windows(used, lambda i: i >= c["max_window_layers"])


def _gemma(c: dict[str, Any]) -> dict[str, Any]:
    return {
        "norm_plus_one": True,
        "post_norms": True,
        "embed_multiplier": c["hidden_size"] ** 0.5,
        "query_multiplier": c["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": float(c["attn_logit_softcapping"] or 0),
        "logits_softcap": float(c["final_logit_softcapping"] or 0),
        "qkv_bias": c["attention_bias"],
        "o_bias": c["attention_bias"],
    }


def _gpt_oss(c: dict[str, Any]) -> dict[str, Any]:
    moe = MoeConfig(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c["intermediate_size"],
        router="topk_softmax",
        router_bias=True,
        expert_bias=True,
        swiglu_alpha=c["swiglu_alpha"],
        swiglu_limit=c["swiglu_limit"],
    )
    mechanisms = {"attention_sinks": True, "qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]}
    mechanisms |= {"activation": "clamped_swiglu", "moe": moe}
    return mechanisms | _layer_windows(c, lambda i: i % 2 == 0)


def _qwen_moe(c: dict[str, Any]) -> dict[str, Any]:
    experts = c["num_local_experts"], c["num_experts_per_tok"], c["moe_intermediate_size"]
    mechanisms = {"qk_norm": "head", "qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]}
    mechanisms["moe"] = MoeConfig(*experts, norm_topk=c["norm_topk_prob"])
    used = c | {"sliding_window": c["sliding_window"] if c["use_sliding_window"] else None}
    return mechanisms | _layer_windows(used, lambda i: True)


GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
QWEN_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
GEMMA_DEFAULTS = {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama",
        lambda c: {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"], "mlp_bias": c["mlp_bias"]},
        {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        lambda c: _layer_windows(c, lambda i: True),
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        lambda c: {"qkv_bias": True} | _qwen_windows(c),
        QWEN_DEFAULTS | {"max_position_embeddings": 32768},
        fixed={"qkv_bias": True},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        lambda c: (
            {"qk_norm": "head", "qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]} | _qwen_windows(c)
        ),
        QWEN_DEFAULTS | {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 32768},
        fixed={"use_qk_norm": True},
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        lambda c: _gemma(c) | _layer_windows(c, lambda i: i % 2 == 0),
        GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192}
        | {"num_key_value_heads": 4},
        SANDWICH_NORM_TENSORS,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        lambda c: (
            {"qk_norm": "head"} | _gemma(c) | _layer_windows(c, lambda i: (i + 1) % c["sliding_window_pattern"] > 0)
        ),
        GEMMA_DEFAULTS
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 131072}
        | {"num_key_value_heads": 4, "num_attention_heads": 8, "vocab_size": 262_208, "sliding_window_pattern": 6}
        | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        SANDWICH_NORM_TENSORS,
        local_rope=True,
        classifier="Gemma3TextForSequenceClassification",
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        _qwen_moe,
        {"attention_bias": False, "max_position_embeddings": 32768, "num_key_value_heads": 4}
        | {"use_sliding_window": False, "sliding_window": 4096, "num_local_experts": 128, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 768, "norm_topk_prob": False},
        QWEN_MOE_TENSORS,
        fixed={"use_qk_norm": True},
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        _gpt_oss,
        {"attention_bias": True, "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64}
        | {"sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4, "rms_norm_eps": 1e-5}
        | {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_theta": 150_000.0, "rope_parameters": GPT_OSS_ROPE}
        | {"layer_types": None, "initial_context_length": None},
        GPT_OSS_TENSORS,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        lambda c: (
            {"pre_norms": False, "post_norms": True, "qk_norm": "all"}
            | {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]}
        ),
        {"attention_bias": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        POST_NORM_TENSORS,
    ),
}
FAMILIES = {
    name: dataclasses.replace(f, classifier=f.classifier or name.replace("ForCausalLM", "ForSequenceClassification"))
    for name, f in FAMILIES.items()
}


class TextPart(NamedTuple):
    """The language model inside a folder that holds more, such as Gemma 3 with its vision tower.

    Its architecture, its section of config.json, the prefixes of its tensors' names. It is read as if it were a folder
    of its own, and exported as one, without the other parts.
    """

    architecture: str
    section: str
    prefixes: dict[str, str]  # in the file -> in a folder of its own
    other_prefixes: tuple[str, ...]  # of all other tensors


TEXT_PARTS = {
    "Gemma3ForConditionalGeneration": TextPart(
        "Gemma3ForCausalLM",
        "text_config",
        {  # as transformers 4 wrote them, as 5 does
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
            "language_model.": "model.",
        },
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
}


def find_text_part(raw: dict) -> TextPart | None:
    """The text part that the content of a config.json names, None where the whole is a language model."""
    return next((TEXT_PARTS[name] for name in raw.get("architectures") or () if name in TEXT_PARTS), None)


# Read for every family: sizes and mechanisms.
USED_KEYS = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings hidden_act "
    "quantization_config initializer_range rope_theta rope_scaling rope_parameters original_max_position_embeddings "
    "layer_types".split()
)
# Change nothing in the logits: token ids, dtypes, remarks of the software that wrote the file, the implementation that
# it chose, generation.
HARMLESS_KEYS = frozenset(
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
    "decoder_start_token_id dtype torch_dtype transformers_version use_cache _name_or_path _model_name_or_path "
    "_from_model_config name_or_path _commit_hash model_name base_model_name "
    "_attn_implementation _attn_implementation_internal _attn_implementation_autoset attn_implementation "
    "_experts_implementation _experts_implementation_internal experts_implementation "
    "_flash_attn_2_enabled flash_attention use_flash_attn use_flash_attention use_flash_attention_2 "
    "pretraining_tp max_window_layers _sliding_window_pattern router_aux_loss_coef output_router_logits "
    "is_llama_config transformers.js_config unsloth_version unsloth_fixed unsloth_processing_class "
    "initializer_factor init_std gradient_checkpointing use_reentrant neftune_noise_alpha "
    "model_max_length max_seq_len max_seq_length max_seq_len_cached max_sequence_length seq_length "
    "tokenizer_class tokenizer_name tokenizer_padding_side padding_side num_logits_to_keep logits_to_keep "
    "output_attentions output_hidden_states output_logits output_scores return_dict return_dict_in_generate "
    "tie_last_hidden_states base_model_tp_plan base_model_pp_plan tp_plan keys_to_ignore_at_inference "
    "classifier_dropout token_classification_bias image_token_id image_token_index mm_tokens_per_image "
    "torchscript use_bfloat16 id2label label2id num_labels problem_type postrain_trained_on "
    "task_specific_params finetuning_task prefix chunk_size_feed_forward cache_implementation cache_config "
    "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty length_penalty renormalize_logits guidance_scale "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens is_decoder cross_attention_hidden_size add_cross_attention "
    "tie_encoder_decoder pruned_heads tf_legacy_loss".split()
)
# Change the logits, here, in `transformers` or in the model that the file was written for, unless they have one of
# these values. `tests/hf/test_config_keys.py` looks for what `transformers` reads without declaring it.
NEUTRAL_VALUES: dict[str, tuple] = {
    "attention_dropout": (None, 0),
    "hidden_dropout": (None, 0),
    "residual_dropout": (None, 0),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "use_sliding_window": (None, False),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "use_mrope": (None, False),
    "mrope_section": (None,),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "position_embedding_type": (None, "rope", "rotary"),
    "alibi": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "clip_qkv": (None,),
    "qkv_bias": (None, False),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "qk_layer_norms": (None, False),
    "use_parallel_residual": (None, False),
    "auto_map": (None, {}),
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "first_k_dense_replace": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "num_mtp_layers": (None, 0),
    "per_layer_config": (None, {}),
    "mlp_layer_types": (None,),
    "kv_sharing_modes": (None,),
    "fusion_config": (None,),
    "transformers_weights": (None, "model.safetensors"),
    "quantization": (None,),
    "compression_config": (None,),
    "decoder": (None,),
    "generator": (None,),
    "text_config": (None,),
    "text_encoder": (None,),
    "vision_config": (None,),
    # Would take the place of what `transformers` reads through, or of the same thing under a name of an older model.
    "attribute_map": (None, {}),
    "default_theta": (None,),
    "default_rope_type": (None, "default"),
    "sub_configs_defaults": (None, {}),
    "embed_dim": (None,),
    "num_heads": (None,),
    "unpadded_vocab_size": (None,),
    "logits_mup_width_multiplier": (None, 1),
    "chain_hidden_post_norm": (None, False),
    "distributed_config": (None,),
    "mtp_layer_types": (None,),
    "mtp_mlp_layer_types": (None,),
    "mtp_per_layer_config": (None,),
    "mtp_hidden_states_first": (None, False),
}
# Of those whose name does not say it: what the model would compute.
MEANINGS = {
    **dict.fromkeys(
        ("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "mlp_layer_types"),
        "layers with a dense MLP among layers of experts",
    ),
    "shared_expert_intermediate_size": "an expert that every token is routed to",
    "per_layer_config": "layers of other sizes",
}
# Keys under which software repeats the value of another one: they must agree.
REPEATED_KEYS = {
    "hidden_activation": "hidden_act",
    "sliding_window_size": "sliding_window",
    "experts_per_token": "num_experts_per_tok",
}
