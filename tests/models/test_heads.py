"""Heads stand at the true last position of each document, whatever its token and however rows are packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from odd_config import ODD_CONFIG

from postrain.config import OptimizerConfig
from postrain.models.heads import HeadConfig, apply_heads, init_heads, last_positions
from postrain.models.params import init_params
from postrain.models.transformer import compute_hidden
from postrain.objectives.heads import cross_entropy, make_head_loss, squared_error
from postrain.training.optimizer import make_optimizer
from postrain.training.step import init_train_state, make_train_step
from postrain.types import Batch

CONFIG = dataclasses.replace(ODD_CONFIG, init_std=0.2)
HEADS = (HeadConfig("reward"), HeadConfig("kind", 5, bias=True), HeadConfig("value", position="every"))


def test_the_last_position_of_each_document():
    segment_ids = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0] * 8])
    last, present = last_positions(jnp.asarray(segment_ids), 3)
    np.testing.assert_array_equal(last, [[2, 3, 5], [7, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(present, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])


def test_packed_documents_have_the_outputs_of_single_ones():
    params = init_params(CONFIG, jax.random.key(0)) | init_heads(HEADS, CONFIG, jax.random.key(1))
    lengths = [5, 1, 9, 3]
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]
    eos = 7  # ends every document and is what fills the rows up
    documents = [np.append(document, [eos, eos]) for document in documents]

    def run(rows, length):
        tokens = np.full((len(rows), length), eos, np.int32)
        segments, positions = np.zeros((2, len(rows), length), np.int32)
        for b, row in enumerate(rows):
            start = 0
            for i, number in enumerate(row):
                span = slice(start, start + len(documents[number]))
                tokens[b, span], segments[b, span] = documents[number], i + 1
                positions[b, span] = np.arange(len(documents[number]))
                start = span.stop
        hidden = jax.jit(compute_hidden, static_argnums=1)(params, CONFIG, tokens, segments, positions)
        return *apply_heads(params, HEADS, hidden, segments, 3), segments

    packed, masks, segments = run([[0, 1, 2], [3]], 30)
    single, _, _ = run([[i] for i in range(4)], 12)
    np.testing.assert_array_equal(masks["kind"], [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(masks["value"], segments > 0)
    for name in ("reward", "kind"):
        found = packed[name][masks[name]]
        np.testing.assert_allclose(found, single[name][:, 0], atol=1e-5)
    values = np.concatenate([single["value"][i, : len(d)] for i, d in enumerate(documents)])
    np.testing.assert_allclose(packed["value"][masks["value"]], values, atol=1e-5)
    assert packed["kind"].shape == (2, 3, 5) and packed["value"].shape == (2, 30, 1)


def test_ten_steps_of_a_classifier_and_a_reward_follow_torch():
    """The heads alone, on fixed hidden states: the loss, its weights and the update are torch's."""
    heads = (HeadConfig("kind", 4, bias=True), HeadConfig("score"))
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((6, 10, CONFIG.embed_size)).astype(np.float32)
    segments = np.array(
        [[1] * n + [2] * m + [0] * (10 - n - m) for n, m in [(3, 4), (10, 0), (1, 1), (5, 5), (2, 0), (4, 3)]]
    )
    kinds, scores = rng.integers(0, 4, (6, 2)).astype(np.int32), rng.standard_normal((6, 2)).astype(np.float32)
    places = np.zeros_like(segments)
    batch = Batch(
        None, None, (segments > 0).astype(np.float32), segments, places, {"kind": kinds, "score": scores, "h": hidden}
    )
    outputs = lambda params, batch: (*apply_heads(params, heads, batch.fields["h"], batch.segment_ids, 2), None)
    loss_fn = make_head_loss(outputs, {"kind": cross_entropy, "score": squared_error})
    config = OptimizerConfig(learning_rate=0.05, schedule="constant", weight_decay=0.1, weight_decay_exclude=("bias",))
    optimizer, _ = make_optimizer(config, 10)
    params = init_heads(heads, CONFIG, jax.random.key(0))
    linears = {h.name: torch.nn.Linear(CONFIG.embed_size, h.outputs, bias=h.bias) for h in heads}
    for linear in linears.values():  # so that the reference adds no rounding of its own
        linear.double()
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(torch.from_numpy(np.array(params["heads"][name]["kernel"]).T))
        linears["kind"].bias.zero_()
    decayed = [linear.weight for linear in linears.values()]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [linears["kind"].bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.05)
    ends = [
        (b, np.flatnonzero(row == s)[-1], s - 1) for b, row in enumerate(segments) for s in (1, 2) if (row == s).any()
    ]
    rows, at, documents = (np.array(x) for x in zip(*ends, strict=True))

    state = init_train_state(params, {}, optimizer, jax.random.key(0))
    step = make_train_step(loss_fn, optimizer, micro_batches=2)
    for _ in range(10):
        state, metrics = step(state, batch)
        x = torch.from_numpy(hidden[rows, at]).double()
        nll = torch.nn.functional.cross_entropy(linears["kind"](x), torch.from_numpy(kinds[rows, documents]).long())
        error = torch.nn.functional.mse_loss(
            linears["score"](x)[:, 0], torch.from_numpy(scores[rows, documents]).double()
        )
        loss = nll + error
        reference.zero_grad()
        loss.backward()
        reference.step()
        assert abs(float(metrics["train/loss"]) - loss.item()) <= 1e-5 * loss.item()
        for name, part in {"kind": nll, "score": error}.items():
            assert abs(float(metrics[f"train/loss/{name}"]) - part.item()) <= 1e-5 * loss.item()
    assert float(metrics["train/weight/kind"]) == float(metrics["train/weight/score"]) == len(ends)
    for name, linear in linears.items():
        np.testing.assert_allclose(state.params["heads"][name]["kernel"].T, linear.weight.detach(), atol=1e-5)
    np.testing.assert_allclose(state.params["heads"]["kind"]["bias"], linears["kind"].bias.detach(), atol=1e-5)
