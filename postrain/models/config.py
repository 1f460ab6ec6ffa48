"""ModelConfig: which mechanisms a transformer has. Fields name mechanisms, never model families."""

import dataclasses
import math

VOCAB_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how its frequencies are scaled.

    ``kind``: "default"; "linear" (positions / factor); "llama3" (Llama 3.1: low frequencies divided by
    ``factor``, a smooth ramp between ``high_freq_factor`` and ``low_freq_factor`` wavelengths of
    ``original_max_positions``).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): y += (x A) B * alpha / rank.

    ``targets`` are names of linear layers: "q", "k", "v", "o", "gate", "up", "down".
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are counts; ``vocab_size`` is the tokenizer's side of it."""

    vocab_size: int  # rows of the embedding in the Hugging Face folder
    embed_size: int  # D, the residual stream
    mlp_size: int  # F, hidden units of the gated MLP
    num_layers: int
    num_heads: int  # N
    num_kv_heads: int  # K, divides N
    head_dim: int  # H, need not be D / N
    max_positions: int = 4096  # what the model was made for; longer documents and prompts are warned of
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    activation: str = "silu"  # of the gate
    qk_norm: bool = False  # RMSNorm over H of every query and key head (Qwen3)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    init_std: float = 0.02
    # How it is computed, not what.
    compute_dtype: str = "float32"  # "bfloat16" on accelerators
    remat: str = "none"  # "none", "dots" (keep matrix products), "full" (keep layer inputs)
    attention: str = "auto"  # back end, see postrain.models.attention
    attention_chunk: int = 128  # positions per block of the chunked back end
    lora: LoraConfig | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Rows that the embedding really has here: cut back at export, never predicted."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
