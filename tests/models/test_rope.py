"""Rotary frequencies are those of the reference to the last bit, nearly: far positions multiply what is off."""

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from postrain.models.config import RopeConfig
from postrain.models.transformer import compute_inverse_frequencies

KINDS = {
    "linear": {"factor": 8.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 32.0},
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("theta", [1e4, 150_000.0, 5e5, 1e6])
@pytest.mark.parametrize("kind", ["default", *KINDS])
def test_frequencies_are_the_reference_s(kind, theta, head_dim):
    stated = KINDS.get(kind, {})
    parameters = {"rope_type": kind, "rope_theta": theta, **stated}
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**sizes, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    names = {"original_max_position_embeddings": "original_max_positions"}
    ours = compute_inverse_frequencies(
        RopeConfig(theta, kind, **{names.get(name, name): value for name, value in stated.items()}), head_dim
    )
    np.testing.assert_array_max_ulp(ours, expected, 1 if kind in ("default", "linear") else 2)
    assert np.mean(ours != expected) < 0.1
