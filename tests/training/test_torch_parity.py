"""Ten updates of the real step on packed rows follow a plain torch loop on padded rows of the same documents."""

import jax
import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from postrain.config import OptimizerConfig
from postrain.data.bad_row import RowRef
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_row
from postrain.data.rendering.render import Rendered
from postrain.hf.load import load_pretrained
from postrain.objectives.sft import make_sft_loss
from postrain.training.model import Forward
from postrain.training.optimizer import make_optimizer
from postrain.training.step import init_train_state, make_train_step
from postrain.types import Batch

STEPS, DOCUMENTS, ROWS, LENGTH = 10, 9, 4, 128
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 0.5


def make_documents(step: int) -> list[Rendered]:
    rng = np.random.default_rng(step)
    documents = []
    for i in range(DOCUMENTS):
        tokens = rng.integers(0, 301, rng.integers(2, 60)).astype(np.int32)
        mask = rng.random(len(tokens)) < 0.5
        mask[-1] = True
        documents.append(Rendered(tokens, mask, RowRef("test", "test", i)))
    return documents


def pack_documents(documents: list[Rendered]) -> Batch:
    lengths = np.array([len(d.tokens) - 1 for d in documents])
    bins = pack(lengths, LENGTH, window=100)
    assert len(bins) <= ROWS
    bins = [*bins, *[[]] * (ROWS - len(bins))]
    rows = [assemble_row([documents[i] for i in indices], LENGTH) for indices in bins]
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def torch_losses(folder) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        documents = make_documents(step)
        longest = max(len(d.tokens) for d in documents)
        padded = lambda x, fill, n=longest: np.pad(x, (0, n - len(x)), constant_values=fill)
        tokens = torch.tensor(np.stack([padded(d.tokens, 0) for d in documents])).long()
        targets = np.stack([padded(np.where(d.loss_mask, d.tokens, -100), -100) for d in documents])
        attend = torch.tensor(np.stack([padded(np.ones(len(d.tokens), int), 0) for d in documents]))
        logits = model(input_ids=tokens, attention_mask=attend).logits[:, :-1]
        targets = torch.tensor(targets)[:, 1:].long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_ten_adamw_steps(tmp_path, family, micro_batches):
    folder = make_tiny_model(tmp_path / "model", family, tie_word_embeddings=family == "qwen3")
    config, params = load_pretrained(folder)
    loss_fn = make_sft_loss(Forward(config, chunk=64).nll)
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"), STEPS)
    step = make_train_step(loss_fn, optimizer, micro_batches=micro_batches, max_grad_norm=MAX_GRAD_NORM)
    state = init_train_state(params, {}, optimizer, jax.random.key(0))
    losses, programs = [], []
    for i in range(STEPS):
        state, metrics = step(state, pack_documents(make_documents(i)))
        losses.append(float(metrics["train/loss"]))
        programs.append(step._cache_size())
    np.testing.assert_allclose(losses, torch_losses(folder), rtol=1e-4)
    assert losses[0] != losses[-1]
    assert programs[1:] == [programs[1]] * (STEPS - 1), "a step was compiled again after the second"
