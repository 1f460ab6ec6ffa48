"""Gradients of one packed batch against torch's on the same documents, every tensor of the folder."""

import re

import jax
import numpy as np
import pytest
import torch
import transformers
from test_hf_parity import GPT_OSS, LLAMA3_ROPE, QWEN_MOE, TIED
from tiny_models import make_tiny_model

from postrain.hf.config import read_family
from postrain.hf.load import load_pretrained
from postrain.hf.save import fetch_tensor
from postrain.hf.tree import list_tensors
from postrain.objectives.sft import make_sft_loss
from postrain.training.model import Forward
from postrain.trees import flatten
from postrain.types import Batch

MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    "qwen3 moe": ("qwen3_moe", QWEN_MOE | {"norm_topk_prob": True}),
    "gemma2": ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **TIED}),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "sliding_window": 6, **TIED}),
    "gpt-oss": ("gpt_oss", GPT_OSS),
    "olmo2": ("olmo2", {}),
}
LENGTHS = [19, 7, 1, 30]


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def folder(request, tmp_path_factory):
    family, odd = MODELS[request.param]
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", family, **odd)


def make_documents(vocab_size):
    rng = np.random.default_rng(0)
    return [(rng.integers(3, vocab_size, n + 1), rng.random(n) < 0.7) for n in LENGTHS]


def pack(documents):
    tokens, targets, masks = [], [], []
    for ids, mask in documents:
        tokens.append(ids[:-1])
        targets.append(ids[1:])
        masks.append(mask)
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(LENGTHS)])
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    row = lambda x, dtype=np.int32: np.asarray(x, dtype)[None]
    arrays = (np.concatenate(x) for x in (tokens, targets))
    return Batch(*map(row, arrays), row(np.concatenate(masks), np.float32), row(segments), row(positions))


def our_gradients(folder, documents):
    config, params = load_pretrained(folder)
    loss_fn = make_sft_loss(Forward(config, chunk=16).nll)

    def mean(params):
        loss, weight = loss_fn(params, pack(documents), None).losses["sft"]
        return loss / weight

    loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    leaves = flatten(grads)
    return float(loss), {t.name: fetch_tensor(leaves, t) for t in list_tensors(config, read_family(folder))}


def torch_gradients(folder, documents):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total, count = 0.0, sum(int(mask.sum()) for _, mask in documents)
    for ids, mask in documents:
        ids = torch.from_numpy(ids)
        logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total - (logprobs * torch.from_numpy(mask)).sum() / count
    total.backward()
    return total.item(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def find(reference, name):
    """A file's tensor among the reference's: it keeps the gate and up kernels of all experts in one."""
    if name in reference:
        return reference[name]
    prefix, expert, kernel = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name).groups()
    if kernel == "down":
        return reference[f"{prefix}.down_proj"][int(expert)]
    fused = reference[f"{prefix}.gate_up_proj"][int(expert)]
    half = len(fused) // 2
    return fused[:half] if kernel == "gate" else fused[half:]


def test_loss_and_every_gradient(folder):
    documents = make_documents(301)
    loss, grads = our_gradients(folder, documents)
    expected_loss, reference = torch_gradients(folder, documents)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    for name, grad in grads.items():
        expected = find(reference, name)
        assert np.abs(expected).max() > 0 or ".experts." in name, name
        np.testing.assert_allclose(grad, expected, atol=1e-3 * np.abs(expected).max() + 1e-9, err_msg=name)
