"""Adapters of experts as `peft` has them: of the parameters that transformers fuses a layer's experts into.

`peft` (LoraConfig.target_parameters, ParamWrapper) gives each fused parameter one pair of matrices: A [E * R, in] with
an expert's rows together, B [out, R * E] with a rank's columns together. Gate and up are one parameter, so that their
two adapters become one of the sum of their ranks, in which each has its own columns of A and B: the same product.
An adapter that was trained as one reads back as two that share A.

Legend: E experts, I and O the sizes in and out of one linear layer, r its rank, R that of the fused parameter.
"""

import numpy as np

from postrain.models.config import LoraConfig

MODULE = "mlp.experts"
PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}  # in transformers' order, with the layers in each


def list_parameters(lora: LoraConfig) -> dict[str, str]:
    """Each fused parameter that has adapters -> the module of its matrices in the file.

    `peft` wraps once for each, the last one outermost.
    """
    found = [name for name, targets in PARAMETERS.items() if set(targets) & set(lora.targets)]
    return {name: f"{MODULE}." + "base_layer." * (len(found) - 1 - i) for i, name in enumerate(found)}


def pack_a(a_EIr: list[np.ndarray]) -> np.ndarray:
    """A of a fused parameter, [E * R, I], of those of its linear layers."""
    a_ERI = np.concatenate([a.swapaxes(1, 2) for a in a_EIr], axis=1)
    return a_ERI.reshape(-1, a_ERI.shape[-1])


def pack_b(b_ErO: dict[str, np.ndarray], members: tuple[str, ...], interleaved: bool) -> np.ndarray:
    """B of a fused parameter, [sum of O, R * E], of those of its linear layers by name; a missing layer's part is zero.

    ``members``: all linear layers of the parameter, whose output channels take turns where ``interleaved``, or follow
    on each other. `peft` scales by alpha / R where the layers had alpha / r, which goes into the numbers.
    """
    some = next(iter(b_ErO.values()))
    rank, size_out = sum(b.shape[1] for b in b_ErO.values()), some.shape[-1]
    out_ERMO = np.zeros((len(some), rank, len(members), size_out), some.dtype)
    start = 0
    for i, name in enumerate(members):
        if name in b_ErO:
            stop = start + b_ErO[name].shape[1]
            out_ERMO[:, start:stop, i] = b_ErO[name] * (rank / (stop - start))
            start = stop
    order = (3, 2, 1, 0) if interleaved else (2, 3, 1, 0)
    return out_ERMO.transpose(order).reshape(len(members) * size_out, -1)


def unpack_a(matrix: np.ndarray, num_experts: int) -> np.ndarray:
    """[E, I, R] of A in the file."""
    return matrix.reshape(num_experts, -1, matrix.shape[-1]).swapaxes(1, 2)


def unpack_b(matrix: np.ndarray, num_experts: int, member: int, num_members: int, interleaved: bool) -> np.ndarray:
    """[E, R, O] of one of the linear layers of B in the file."""
    per_rank = matrix.reshape(matrix.shape[0], -1, num_experts)
    size = matrix.shape[0] // num_members
    rows = per_rank[member::num_members] if interleaved else per_rank[member * size : (member + 1) * size]
    return rows.transpose(2, 1, 0)
