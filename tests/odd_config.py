"""The small model that tests build when no Hugging Face folder is needed: no two of its sizes are alike.

    from odd_config import ODD_CONFIG
    config = dataclasses.replace(ODD_CONFIG, qkv_bias=True)

Where a mesh can be asked of it, its sizes divide: 8 devices along embed and mlp, 4 along heads, 2 along kv heads.
"""

from postrain.models.config import ModelConfig

ODD_CONFIG = ModelConfig(
    vocab_size=301,  # padded to 320 inside
    embed_size=32,
    mlp_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,  # not embed_size / num_heads
    qk_norm="head",
    attention_chunk=16,
)
