"""The losses of reward models, metrics and gradients do not depend on how rows and positions lie on devices."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig, RewardSection
from postrain.models.config import LoraConfig
from postrain.models.heads import HeadConfig, head_specs, init_heads
from postrain.models.lora import init_lora, lora_specs
from postrain.models.params import axes_of, init_params, logical_axes, shapes_of
from postrain.objectives.reward import make_reward_loss
from postrain.sharding import make_global_batch, make_mesh, named_shardings
from postrain.training.model import Forward
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.types import Batch, LossSums

CONFIG = dataclasses.replace(ODD_CONFIG, lora=LoraConfig(4), attention_chunk=8, tie_embeddings=True)
HEAD = HeadConfig("score", 1, "every")
FORWARD, OPTIMIZER = Forward(CONFIG, chunk=16), optax.sgd(1.0)
ROWS, LENGTH = 8, 40
# Answers of each row, two by two a pair: 15 pairs, an odd number; one row has none.
LENGTHS = ([7, 9, 5, 3], [1, 1, 20, 2], [12, 26], [6, 5, 4, 3, 2, 1], [], [3, 30, 2, 2], [2] * 8, [19, 8])
PAIRS = sum(map(len, LENGTHS)) // 2


def make_arrays() -> dict:
    rng = np.random.default_rng(0)
    names = ("tokens", "targets", "segment_ids", "positions", "group_ids", "steps")
    arrays = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    arrays |= {name: np.zeros((ROWS, LENGTH), np.float32) for name in ("loss_mask", "scores")}
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for i, length in enumerate(lengths):
            at = row, slice(start, start + length)
            arrays["tokens"][at] = rng.integers(0, CONFIG.vocab_size, length)
            arrays["segment_ids"][at], arrays["group_ids"][at] = i + 1, i // 2 + 1
            arrays["positions"][at] = np.arange(length)
            arrays["scores"][at] = (i + row) % 2 - 0.5
            arrays["steps"][row, start + length - 1] = 1 + i % 2
            start += length
    return arrays


def losses_of(params, batch, rng) -> LossSums:
    """Of pairs, with a second loss, and of steps."""
    outputs = functools.partial(FORWARD.outputs, head=HEAD)
    pairs = make_reward_loss(outputs, RewardSection(centering_coef=0.1, margin=0.5, margin_of="scores"), held_out=True)
    steps = make_reward_loss(outputs, RewardSection(loss="stepwise"))
    pairs, steps = pairs(params, batch, rng), steps(params, batch, rng)
    metrics = pairs.metrics | {f"steps/{name}": value for name, value in steps.metrics.items()}
    return LossSums(pairs.losses | {"steps": steps.losses["reward"]}, metrics)


def take_step(mesh, micro_batches):
    """(metrics, what the step subtracts from adapters and head: their gradient)."""
    base = init_params(CONFIG, jax.random.key(0))
    specs = lora_specs(CONFIG) | head_specs([HEAD], CONFIG.embed_size)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    trained = init_lora(CONFIG, jax.random.key(1)) | init_heads([HEAD], CONFIG, jax.random.key(2))
    params = jax.device_put(jax.tree.map(noise, trained), named_shardings(axes_of(specs), mesh, shapes_of(specs)))
    frozen = jax.device_put(base, named_shardings(logical_axes(CONFIG), mesh, base))
    shardings = shardings_of(abstract_train_state(params, frozen, OPTIMIZER, mesh=mesh))
    state = init_train_state(params, frozen, OPTIMIZER, jax.random.key(0), mesh=mesh)
    coefs = {"centering": 0.1, "steps": 0.5}
    step = make_train_step(
        losses_of, OPTIMIZER, loss_coefs=coefs, micro_batches=micro_batches, mesh=mesh, state_shardings=shardings
    )
    batch, before = Batch.from_arrays(make_global_batch(make_arrays(), mesh)), jax.device_get(state.params)
    state, metrics = step(state, batch)
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)


@pytest.fixture(scope="module")
def one_device():
    return take_step(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 1)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [(MeshConfig(2, 2, 2), 2), (MeshConfig(8, 1, 1), 1), (MeshConfig(1, 2, 1, 1, 4), 4)],
    ids=str,
)
def test_any_mesh_gives_the_one_device_losses_and_gradients(mesh, micro_batches, one_device):
    metrics, moved = take_step(make_mesh(mesh), micro_batches)
    expected, expected_moved = one_device
    assert metrics["train/weight/reward"] == PAIRS == 15 and metrics["train/weight/steps"] == 2 * PAIRS
    assert metrics.keys() == expected.keys() and 0 < metrics["train/accuracy"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    for (path, found), leaf in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(expected_moved), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=jax.tree_util.keystr(path))
