"""Logits of a folder on both sides."""

import functools

import jax
import numpy as np
import torch
import transformers

from postrain.hf.load import load_pretrained
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


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, ids, segments, positions):
    return compute_logits(params, config, compute_hidden(params, config, ids, segments, positions))


def our_logits(params, config, ids):
    """float32 logits [B, T, V] here, one document a row."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return np.asarray(_logits(params, config, ids, np.ones_like(ids), positions))[..., : config.vocab_size]


def folder_logits(folder, ids):
    config, params = load_pretrained(folder)
    return our_logits(params, config, ids)


def relative_difference(ours, reference):
    """Largest absolute difference, in standard deviations of the reference."""
    return float(np.abs(ours - reference).max() / reference.std())
