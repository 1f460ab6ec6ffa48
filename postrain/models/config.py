"""ModelConfig: which mechanisms a transformer has. Fields name mechanisms, never model families."""

import dataclasses
import math

import numpy as np

VOCAB_MULTIPLE = 64


def accumulation_dtype(dtype) -> np.dtype:
    """Of norms, rotations, softmaxes, routers, logits and sums of products: float32, or float64 where ``dtype`` is.

    Never a cast to float32 itself: a float64 run is the yardstick of the others (postrain.hf.verify), and must be
    float64 throughout.
    """
    return np.promote_types(dtype, np.float32)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how its frequencies are scaled.

    ``kind``: "default"; "linear" (positions / factor); "llama3" (Llama 3.1: low frequencies divided by
    ``factor``, a smooth ramp between ``high_freq_factor`` and ``low_freq_factor`` wavelengths of
    ``original_max_positions``); "yarn" (Peng et al. 2023, arXiv:2309.00071: the ramp is over the planes, between
    those that turn ``beta_slow`` and ``beta_fast`` times in ``original_max_positions``, its ends rounded outwards
    with ``truncate``; cos and sin are multiplied by ``attention_factor``).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): y += (x A) B * alpha / rank.

    ``targets`` are names of linear layers: "q", "k", "v", "o", "gate", "up", "down"; ``ranks`` gives those of them
    that have another rank, which is then the one that alpha is divided by. ``dora`` (Liu et al. 2024,
    arXiv:2402.09353): y = m * (x (W + A B alpha / rank)) / ||W + A B alpha / rank||, with a trained magnitude m of each
    output channel and the norm over its inputs, a constant for backward (section 4.3).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    ranks: tuple[tuple[str, int], ...] = ()
    dora: bool = False

    def rank_of(self, target: str) -> int:
        return dict(self.ranks).get(target, self.rank)


@dataclasses.dataclass(frozen=True)
class NewRows:
    """Rows of new tokens that train beside a frozen embedding: those of ids first, ..., first + count - 1."""

    first: int
    count: int


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in the place of the MLP, see postrain.models.moe.

    ``router``: "softmax_topk" (softmax over all experts, then the k largest; ``norm_topk``: divided by their sum) or
    "topk_softmax" (the k largest logits, then softmax over those).
    """

    num_experts: int  # E
    experts_per_token: int  # k
    mlp_size: int  # F, hidden units of one expert
    router: str = "softmax_topk"
    norm_topk: bool = True
    router_bias: bool = False
    expert_bias: bool = False
    swiglu_alpha: float = 1.702  # of the activation "clamped_swiglu"
    swiglu_limit: float = 7.0
    load_balance_coef: float = 0.0  # weights of the router losses in the training loss
    z_coef: float = 0.0
    load_balance_over: str = "batch"  # tokens that are to be balanced: of a micro-"batch", or of each "row" of it
    backend: str = "auto"  # of the grouped matrix products: "ragged_dot" or "blocks"


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
    moe: MoeConfig | None = None  # experts in the place of the MLP; ``mlp_size`` is not used then
    activation: str = "silu"  # of the gate: "silu", "gelu_tanh"; of experts also "clamped_swiglu"
    qk_norm: str = "none"  # RMSNorm of queries and keys: "none", over the H of each "head", or over "all" heads
    pre_norms: bool = True  # RMSNorm of what goes into attention and MLP
    post_norms: bool = False  # RMSNorm of what comes out of them, before it joins the residual stream
    norm_plus_one: bool = False  # norms multiply by 1 + scale
    embed_multiplier: float = 1.0  # of the embedded tokens, rounded to the compute dtype
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    layer_windows: tuple[int, ...] = ()  # per layer: keys that a query sees, itself included; 0 = all. (): all 0
    local_rope: RopeConfig | None = None  # of the layers with a window, where it is another
    query_multiplier: float | None = None  # of q k^T; None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # c: scores become c tanh(score / c); 0: they stay
    attention_sinks: bool = False  # one learned logit a head in the softmax's denominator
    logits_softcap: float = 0.0
    init_std: float = 0.02
    # How it is computed, not what.
    compute_dtype: str = "float32"  # "bfloat16" on accelerators
    fp8: bool = False  # products with the layers' matrices in float8, see postrain.models.fp8; not those of experts
    remat: str = "none"  # "none", "dots" (keep matrix products), "full" (keep layer inputs)
    attention: str = "auto"  # back end, see postrain.models.attention.dispatch
    attention_chunk: int = 128  # positions per block of the chunked back end
    lora: LoraConfig | None = None
    new_rows: NewRows | None = None
    quantization: str = "none"  # of a frozen base: "none", "nf4", "int8", see postrain.models.quantized

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_multiplier is None else self.query_multiplier

    @property
    def padded_vocab_size(self) -> int:
        """Rows that the embedding really has here: cut back at export, never predicted."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
