"""Does an export compute what the trained weights compute? One short row of tokens through both.

Exports have gone wrong unseen in many libraries: merges without effect, layers left out, transposed matrices.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.errors import UserError
from postrain.hf.safetensors_io import DTYPES, TensorFiles
from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden, compute_logits
from postrain.sharding import num_row_shards, replicated

LENGTH = 16  # tokens of a row
# Root mean square of the difference, in standard deviations of the logits: rounding every weight to the dtype, through
# all layers, gives a fraction of it; a wrong tensor gives about 1.
TOLERANCES = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def compute_probe_logits(params: dict, config: ModelConfig, mesh: Mesh) -> np.ndarray:
    """float32 logits [B, 16, V] of fixed random tokens, computed in float32, on every host; B as few as ``mesh`` takes.

    ``params``: the whole tree, with or without adapters.
    """
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (num_row_shards(mesh), LENGTH), np.int32)
    config = dataclasses.replace(config, compute_dtype="float32", remat="none")
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        logits = _make_probe(mesh, config)(params, tokens)
    return np.asarray(logits.addressable_data(0))


@functools.cache
def _make_probe(mesh: Mesh, config: ModelConfig):
    def probe(params, tokens_BT):
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
        hidden = compute_hidden(params, config, tokens_BT, np.ones(tokens_BT.shape, np.int32), positions_BT)
        return compute_logits(params, config, hidden)[..., : config.vocab_size]

    return jax.jit(probe, out_shardings=replicated(mesh))


def check_logits(found: np.ndarray, expected: np.ndarray, dtype: str, name: str) -> None:
    """Raises UserError unless ``found``, of the export ``name`` in ``dtype``, is ``expected`` up to rounding."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    error, scale = float(np.sqrt(np.mean((found - expected) ** 2))), float(expected.std())
    if not error <= TOLERANCES[dtype] * scale:
        raise UserError(
            f"{name}: read back, the export's logits differ from the trained model's by {error / (scale or 1):.1e} of "
            f"their spread, expected at most {TOLERANCES[dtype]:g} in {dtype}: the export was deleted"
        )


def find_dtypes(folder: str | os.PathLike) -> list[str]:
    """Those of the tensors of a Hugging Face folder, the one that rounds the most last."""
    return sorted({DTYPES[info.dtype].name for info in TensorFiles(folder).infos.values()}, key=TOLERANCES.get)
