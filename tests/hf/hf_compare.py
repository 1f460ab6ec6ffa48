"""Logits of a folder on both sides, in float32 and in float64."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import torch
import transformers

from postrain.hf.find_model import find_model
from postrain.hf.load import load_pretrained
from postrain.hf.verify.compare import MOST_TIMES, TOLERANCE
from postrain.hf.verify.reference import Reference
from postrain.models.transformer import compute_hidden, compute_logits


def random_ids(vocab_size, shape=(2, 37), seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def torch_logits(model_or_folder, ids):
    """float32 logits [B, T, V] of the reference with plain attention."""
    model = model_or_folder
    if not isinstance(model, torch.nn.Module):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.numpy()


def reference_logits(folder, ids, dtype):
    """Logits [B, T, V] of the reference of `postrain verify`, in "float32" or "float64"."""
    reference = Reference(find_model(folder), dtype)
    return np.stack([reference.logits(row)[0] for row in ids])


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, ids, segments, positions):
    return compute_logits(params, config, compute_hidden(params, config, ids, segments, positions))


def our_logits(params, config, ids, dtype="float32"):
    """Logits [B, T, V] here, one document a row, all of it computed in ``dtype``."""
    config = dataclasses.replace(config, compute_dtype=dtype)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        return np.asarray(_logits(params, config, ids, np.ones_like(ids), positions))[..., : config.vocab_size]


def folder_logits(folder, ids):
    config, params = load_pretrained(folder)
    return our_logits(params, config, ids)


def relative_difference(ours, reference):
    """Largest absolute difference, in standard deviations of the reference."""
    return float(np.abs(ours - reference).max() / reference.std())


def measure(folder, params, config, ids):
    """Differences of our float64, our float32 and the reference's float32 logits from the reference's float64 ones."""
    exact = reference_logits(folder, ids, "float64")
    ours = [our_logits(params, config, ids, dtype) for dtype in ("float64", "float32")]
    return [relative_difference(side, exact) for side in (*ours, reference_logits(folder, ids, "float32"))]


def assert_parity(folder, params, config, ids):
    """The mathematics are the reference's, and float32 rounds about as well as there."""
    wide, ours, theirs = measure(folder, params, config, ids)
    assert wide <= TOLERANCE
    assert ours <= MOST_TIMES * theirs
