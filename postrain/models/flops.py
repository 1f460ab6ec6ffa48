"""Floating-point operations that a step needs, and MFU: their share of the devices' peak.

Counted are the matrix products that the maths needs, 2 operations per multiply-add, and nothing else: no padding,
no recomputation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, calls that model FLOPs), no elementwise work.
Different from the usual 6 x parameters x tokens: a frozen matrix needs no weight gradient; a packed document attends
to itself alone, causally; only loss-bearing tokens are projected onto the vocabulary.
"""

import collections
import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from postrain.models.config import ModelConfig
from postrain.models.lora import lora_specs
from postrain.models.params import param_specs, shapes_of


@dataclasses.dataclass(frozen=True)
class BatchStats:
    """What of a packed batch costs operations; sums over its rows."""

    tokens: int  # positions of a document, padding excluded
    trained_tokens: int  # loss-bearing positions
    attention_pairs: float  # (query, key) pairs that the average layer's attention sees

    def __add__(self, other: "BatchStats") -> "BatchStats":
        pairs = self.attention_pairs + other.attention_pairs
        return BatchStats(self.tokens + other.tokens, self.trained_tokens + other.trained_tokens, pairs)


def count_batch(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> BatchStats:
    """From ``segment_ids`` and ``loss_mask`` [B, T] of a numpy batch."""
    segment_ids = np.asarray(arrays["segment_ids"])
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    lengths = np.diff(np.append(np.flatnonzero(starts), segment_ids.size))
    lengths = lengths[segment_ids[starts] > 0].astype(np.int64)
    trained = int(np.count_nonzero(arrays["loss_mask"]))
    return BatchStats(int(lengths.sum()), trained, count_pairs(config, lengths))


def count_pairs(config: ModelConfig, lengths: np.ndarray) -> float:
    """(query, key) pairs that the average layer sees in documents of ``lengths``: a key is of the query's document,
    not after it, and within the layer's window."""
    layers = collections.Counter(config.layer_windows or (0,))
    total = 0
    for window, times in layers.items():
        reach = np.minimum(lengths, window) if window else lengths
        total += times * int((reach * (reach + 1) // 2 + (lengths - reach) * reach).sum())
    return total / layers.total()


def count_flops(config: ModelConfig, stats: BatchStats) -> dict[str, float]:
    """Operations of one forward and backward pass over a batch: "linear", "adapters", "attention", "unembedding".

    With adapters, or rows of new tokens that train alone, the base is frozen. The total is the sum of the values.
    """
    frozen = config.lora is not None or config.new_rows is not None
    passes = 2 if frozen else 3  # forward, gradient of the input, gradient of the weight
    linear = _count_met(config, param_specs(config), ("kernel",))  # not embeddings, norms, biases
    adapters = _count_met(config, lora_specs(config), ("lora_a", "lora_b")) if config.lora else 0
    attention_size = config.num_heads * config.head_dim * config.num_layers
    return {
        "linear": 2.0 * passes * linear * stats.tokens,
        "adapters": 2.0 * 3 * adapters * stats.tokens,
        "attention": 2.0 * 3 * 2 * attention_size * stats.attention_pairs,  # scores and values, each with two gradients
        "unembedding": 2.0 * passes * config.embed_size * config.vocab_size * stats.trained_tokens,
    }


def _count_met(config: ModelConfig, specs: dict, names: tuple[str, ...]) -> int:
    """Scalars in the leaves ``names`` of all layers that a token meets: of the experts those that it is routed to."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(specs["layers"])):
        keys = [part.key for part in path]
        if keys[-1] in names:
            if config.moe is not None and keys[0] == "moe" and keys[1] != "router":
                total += leaf.size * config.moe.experts_per_token // config.moe.num_experts
            else:
                total += leaf.size
    return total


def format_formula(config: ModelConfig) -> str:
    """``count_flops`` of this model as a function of the batch, on one short line; docs/training.md has the factors."""
    units = {
        "tokens": BatchStats(1, 0, 0),
        "trained tokens": BatchStats(0, 1, 0),
        "attention pairs": BatchStats(0, 0, 1),
    }
    terms = [f"{format_count(sum(count_flops(config, one).values()))} x {name}" for name, one in units.items()]
    return f"FLOPs/step = {' + '.join(terms)} (docs/training.md)"


def format_count(number: float) -> str:
    """``454M``: three digits and what they count."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


# --- the peak of the devices, and what of it a step reaches ---

# Dense bfloat16 peak of one JAX device, from the vendors' data sheets, by device kind without vendor and memory.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "V100": 125e12,
    "V100 PCIe": 112e12,
    "T4": 65e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
# Words of a device kind that do not change its peak: vendor, board, memory.
_NO_MATTER = re.compile(r"NVIDIA|Tesla|RTX|SXM\d*|\d+GB?|HBM\w*", re.IGNORECASE)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Operations per second of all ``devices`` together; None when their kind is not in the table.

    Accelerators: the bfloat16 peak of the data sheet. CPU: no data sheet says, so a large float32 matrix
    product is timed once; all CPU devices of a process share the same cores and count once.
    """
    if devices[0].platform == "cpu":
        return measure_matmul_rate(devices[0])
    peak = PEAK_FLOPS.get(simplify_kind(devices[0].device_kind))
    return peak * len(devices) if peak else None


def simplify_kind(kind: str) -> str:
    """``NVIDIA A100-PCIE-40GB`` -> ``A100 PCIe``: what is left must be a whole name, "L40" is not "L4"."""
    words = [word for word in re.split(r"[ -]", kind) if word and not _NO_MATTER.fullmatch(word)]
    return " ".join("PCIe" if word.lower() == "pcie" else word for word in words)


@functools.cache
def measure_matmul_rate(device: jax.Device, size: int = 1024, repeats: int = 8) -> float:
    """Operations per second of the fastest of ``repeats`` float32 products [size, size]; takes about 0.5 s."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def compute_perf(
    config: ModelConfig, stats: BatchStats, seconds: float, devices: Sequence[jax.Device], row_groups: int = 1
) -> dict[str, float]:
    """``perf/tokens_per_second`` (of all hosts, padding excluded) and, where the peak is known, ``perf/mfu``.

    Args:
        stats: this host's rows of all batches worked off in ``seconds``.
        devices: this host's; the others have as many.
        row_groups: hosts with rows of their own (``data_process``); those that share rows work on them together. The
            rows of other groups are taken to cost what these do.
    """
    perf = {"perf/tokens_per_second": stats.tokens * row_groups / seconds}
    peak = peak_flops(devices)
    if peak is not None:
        flops = sum(count_flops(config, stats).values()) * row_groups
        perf["perf/mfu"] = flops / seconds / (peak * jax.process_count())
    return perf
