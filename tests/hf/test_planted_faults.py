"""`postrain verify` sees a fault of one part in a million in any sub-layer, on any processor.

The logits of a faulty model depart from the reference's by more than the tolerance in float64, by far less than any
float32 comparison could tell from rounding.
"""

import dataclasses

import jax
import pytest
from hf_compare import our_logits, random_ids, reference_logits, relative_difference
from test_hf_parity import GPT_OSS, LLAMA3_ROPE, QWEN_MOE, TIED
from tiny_models import make_tiny_model

from postrain.hf.load import load_pretrained
from postrain.hf.verify.compare import TOLERANCE

MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
    "gemma2": ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **TIED}),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "sliding_window": 6, **TIED}),
    "gpt-oss": ("gpt_oss", GPT_OSS),
    "qwen3 moe": ("qwen3_moe", QWEN_MOE | {"norm_topk_prob": True}),
    "olmo2": ("olmo2", {}),
}
FIELDS = {  # of ModelConfig and of what is inside it, changed by one part in a million
    "llama": ["rope.theta", "rope.factor", "rope.low_freq_factor"],
    "gemma2": ["attention_softcap", "logits_softcap", "query_multiplier", "embed_multiplier", "rope.theta"],
    "gemma3": ["embed_multiplier", "query_multiplier", "local_rope.theta", "rope.theta"],
    "gpt-oss": ["moe.swiglu_alpha", "moe.swiglu_limit", "rope.attention_factor", "rope.factor", "rope.theta"],
    "qwen3 moe": ["rope.theta"],
    "olmo2": ["rope.theta"],
}


def scale_field(config, path: str):
    name, _, rest = path.partition(".")
    value = getattr(config, name)
    return dataclasses.replace(config, **{name: scale_field(value, rest) if rest else value * (1 + 1e-6)})


def scale_leaf(params: dict, path: tuple) -> dict:
    """One row, or one number of a vector, of the second layer where there are layers: a norm would hide all at once."""

    def scale(where, leaf):
        if where != path:
            return leaf
        index = (1, ..., 3) if where[0].key == "layers" else (..., 3)
        return leaf.at[index].multiply(1 + 1e-6)

    return jax.tree_util.tree_map_with_path(scale, params)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_and_every_constant(name, tmp_path):
    family, odd = MODELS[name]
    folder = make_tiny_model(tmp_path / "model", family, **odd)
    config, params = load_pretrained(folder)
    ids = random_ids(config.vocab_size)
    exact = reference_logits(folder, ids, "float64")
    departure = lambda params, config: relative_difference(our_logits(params, config, ids, "float64"), exact)
    assert departure(params, config) <= TOLERANCE / 1000

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {jax.tree_util.keystr(path): departure(scale_leaf(params, path), config) for path in paths}
    found |= {field: departure(params, scale_field(config, field)) for field in FIELDS[name]}
    found["norm_eps"] = departure(params, dataclasses.replace(config, norm_eps=config.norm_eps + 1e-6))
    hidden = {fault: value for fault, value in found.items() if not value > TOLERANCE}
    assert not hidden, f"not seen: {hidden}"
    assert len(paths) >= 12
