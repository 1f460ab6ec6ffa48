"""Heads other than the vocabulary: values, rewards, classes, several of them over one trunk.

A trunk is the transformer without its projection onto the vocabulary (``init_trunk``). A head is a linear map of the
hidden states, at every position (a value of each) or at the last one of each document (a reward, a class). Which
position is last is known from ``segment_ids``, never from token values: padding may be the end token.

Legend: B rows, T positions, S documents of a row at most, D embed_size, K outputs of a head.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from postrain.models.config import ModelConfig, accumulation_dtype
from postrain.models.params import ParamSpec, init_from_specs, param_specs

POSITIONS = ("every", "last")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """``outputs`` numbers at ``position``: 1 for a value ("every") or a reward ("last"), else one for each class."""

    name: str  # of its parameters, and of its targets in ``Batch.fields``
    outputs: int = 1  # K
    position: str = "last"
    bias: bool = False
    zeros: bool = False  # whether all of it starts at 0, so that its first outputs are 0, not random

    def __post_init__(self):
        if self.position not in POSITIONS or self.outputs < 1:
            raise ValueError(f"head {self.name!r}: position one of {POSITIONS} and outputs >= 1, found {self}")


def head_specs(heads: Sequence[HeadConfig], embed_size: int) -> dict[str, Any]:
    """``{"heads": {name: {"kernel": [D, K], "bias": [K]}}}`` of ParamSpec."""
    specs = {}
    for head in heads:
        init = "zeros" if head.zeros else "normal"
        specs[head.name] = {"kernel": ParamSpec((embed_size, head.outputs), ("embed", None), init)}
        if head.bias:
            specs[head.name]["bias"] = ParamSpec((head.outputs,), (None,), "zeros")
    return {"heads": specs}


def init_heads(heads: Sequence[HeadConfig], config: ModelConfig, rng: jax.Array) -> dict:
    """Random float32 parameters of the heads (std ``config.init_std``; biases, and heads that start so, zero)."""
    return init_from_specs(head_specs(heads, config.embed_size), config, rng)


def init_trunk(config: ModelConfig, rng: jax.Array) -> dict:
    """Random float32 layers and final norm: what is left of a model when its input and output are others."""
    specs = {name: spec for name, spec in param_specs(config).items() if name not in ("embed", "unembed")}
    return init_from_specs(specs, config, rng)


def last_positions(segment_ids_BT: jax.Array, max_documents: int) -> tuple[jax.Array, jax.Array]:
    """Where each document of a row ends: int32 [B, S], and bool [B, S], whether the row has that document.

    Document s of a row is the one of segment id s + 1, S = ``max_documents``.
    """
    positions = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    ids = jnp.arange(1, max_documents + 1, dtype=segment_ids_BT.dtype)
    last = jnp.where(segment_ids_BT[:, None] == ids[:, None], positions, -1).max(-1)
    return jnp.maximum(last, 0), last >= 0


def apply_head(params: dict, head: HeadConfig, hidden: jax.Array) -> jax.Array:
    """[..., K] from hidden states [..., D], in their ``accumulation_dtype``; ``params`` is the whole tree."""
    p, dtype = params["heads"][head.name], accumulation_dtype(hidden.dtype)
    out = jnp.einsum("...d,dk->...k", hidden, p["kernel"].astype(hidden.dtype), preferred_element_type=dtype)
    return out + p["bias"].astype(dtype) if head.bias else out


def apply_heads(
    params: dict, heads: Sequence[HeadConfig], hidden_BTD: jax.Array, segment_ids_BT: jax.Array, max_documents: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Outputs of every head by name, and bool masks of those that stand for something.

    At "every" position: [B, T, K] and [B, T], False for padding. At the "last" one: [B, S, K] and [B, S], False for
    documents that a row does not have; S = ``max_documents``.
    """
    last_BS, present_BS = last_positions(segment_ids_BT, max_documents)
    ends_BSD = jnp.take_along_axis(hidden_BTD, last_BS[..., None], axis=1)
    places = {"every": (hidden_BTD, segment_ids_BT > 0), "last": (ends_BSD, present_BS)}
    outputs = {head.name: apply_head(params, head, places[head.position][0]) for head in heads}
    return outputs, {head.name: places[head.position][1] for head in heads}
