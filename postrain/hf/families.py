"""One small table per model family: which field of config.json means which mechanism, and what tensors are called.

Nothing outside this file knows a family. A new family whose mechanisms exist is a new entry of FAMILIES;
a mechanism that does not exist yet starts in ``postrain.models.config.ModelConfig``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorName:
    """``param``: path in the parameter tree. ``name``: in the safetensors file, ``{}`` being the layer.

    ``transpose``: Hugging Face's linear layers are [out, in], ours [in, out].
    """

    param: str
    name: str
    transpose: bool = False

    @property
    def per_layer(self) -> bool:
        return "{}" in self.name


def _linear(part: str, module: str, name: str) -> tuple[TensorName, TensorName]:
    return (
        TensorName(f"layers.{part}.{name}.kernel", f"model.layers.{{}}.{module}.{name}_proj.weight", transpose=True),
        TensorName(f"layers.{part}.{name}.bias", f"model.layers.{{}}.{module}.{name}_proj.bias"),
    )


# In the order of Hugging Face's modules. A model has those whose parameter its ModelConfig calls for.
TENSORS = (
    TensorName("embed.embedding", "model.embed_tokens.weight"),
    *_linear("attention", "self_attn", "q"),
    *_linear("attention", "self_attn", "k"),
    *_linear("attention", "self_attn", "v"),
    *_linear("attention", "self_attn", "o"),
    TensorName("layers.attention.q_norm.scale", "model.layers.{}.self_attn.q_norm.weight"),
    TensorName("layers.attention.k_norm.scale", "model.layers.{}.self_attn.k_norm.weight"),
    *_linear("mlp", "mlp", "gate"),
    *_linear("mlp", "mlp", "up"),
    *_linear("mlp", "mlp", "down"),
    TensorName("layers.attention_norm.scale", "model.layers.{}.input_layernorm.weight"),
    TensorName("layers.mlp_norm.scale", "model.layers.{}.post_attention_layernorm.weight"),
    TensorName("final_norm.scale", "model.norm.weight"),
    TensorName("unembed.embedding", "lm_head.weight"),
)
# Buffers that old exports carry; they are computed from the config.
IGNORED_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one architecture is read.

    ``mechanisms`` gives those fields of ModelConfig that are not the same for every family, from the
    values of config.json with ``defaults`` (what `transformers` takes for an absent key) filled in.
    """

    model_type: str
    mechanisms: Callable[[dict[str, Any]], dict[str, Any]]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: tuple[TensorName, ...] = TENSORS


FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama",
        lambda c: {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"], "mlp_bias": c["mlp_bias"]},
        {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        lambda c: {"qkv_bias": True},
        {"max_position_embeddings": 32768},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        lambda c: {"qk_norm": "head", "qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]},
        {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 32768},
    ),
}

# Read for every family: sizes and mechanisms.
USED_KEYS = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings hidden_act "
    "initializer_range rope_theta rope_scaling rope_parameters".split()
)
# Change nothing in the logits: token ids, dtypes, remarks of the software that wrote the file, generation.
HARMLESS_KEYS = frozenset(
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id dtype "
    "torch_dtype transformers_version use_cache _name_or_path _model_name_or_path _from_model_config "
    "_attn_implementation_autoset attn_implementation name_or_path pretraining_tp max_window_layers "
    "is_llama_config transformers.js_config unsloth_version unsloth_fixed unsloth_processing_class model_name "
    "output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript "
    "use_bfloat16 id2label label2id problem_type task_specific_params finetuning_task prefix tokenizer_class "
    "chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention "
    "tie_encoder_decoder pruned_heads tf_legacy_loss".split()
)
# Change the logits unless they have one of these values.
NEUTRAL_VALUES: dict[str, tuple] = {
    "attention_dropout": (None, 0),
    "hidden_dropout": (None, 0),
    "residual_dropout": (None, 0),
    "use_sliding_window": (None, False),
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "quantization_config": (None,),
    "auto_map": (None,),
}
