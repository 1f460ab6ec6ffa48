"""Floating-point operations that a step needs.

Counted are the matrix products that the maths needs, 2 operations per multiply-add, and nothing else: no padding,
no recomputation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, calls that model FLOPs), no elementwise work.
Different from the usual 6 x parameters x tokens: a frozen matrix needs no weight gradient; a packed document attends
to itself alone, causally; only loss-bearing tokens are projected onto the vocabulary.
"""

import collections
import dataclasses
from collections.abc import Mapping

import jax
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
    """From ``segment_ids`` and ``loss_mask`` [B, T] of a numpy batch, and ``positions`` where prefixes are shared."""
    segment_ids = np.asarray(arrays["segment_ids"])
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    lengths = np.diff(np.append(np.flatnonzero(starts), segment_ids.size))
    lengths = lengths[segment_ids[starts] > 0].astype(np.int64)
    trained = int(np.count_nonzero(arrays["loss_mask"]))
    if "prefix_starts" not in arrays:
        return BatchStats(int(lengths.sum()), trained, count_pairs(config, lengths))
    # What a query sees is what a document of its position and one more would add, wherever those before it stand.
    seen = np.asarray(arrays["positions"])[segment_ids > 0].astype(np.int64) + 1
    return BatchStats(seen.size, trained, count_pairs(config, seen) - count_pairs(config, seen - 1))


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


def format_formula(config: ModelConfig, projects: bool = True) -> str:
    """``count_flops`` of this model as a function of the batch, on one short line; docs/training.md has the factors.

    ``projects``: onto the vocabulary.
    """
    units = {
        "tokens": BatchStats(1, 0, 0),
        "trained tokens": BatchStats(0, int(projects), 0),
        "attention pairs": BatchStats(0, 0, 1),
    }
    units = {name: one for name, one in units.items() if one != BatchStats(0, 0, 0)}
    terms = [f"{format_count(sum(count_flops(config, one).values()))} x {name}" for name, one in units.items()]
    return f"FLOPs/step = {' + '.join(terms)} (docs/training.md)"


def format_count(number: float) -> str:
    """``454M``: three digits and what they count."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"
