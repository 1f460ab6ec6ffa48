"""Run by test_devices.py in its own process with eight CPU devices: every mesh gives what one device gives."""

import dataclasses
import re
import sys

import jax
import numpy as np
from toy_network import LOGICAL_AXES, compute_loss, make_batch, make_params

from postrain.compute.optimizer import make_optimizer
from postrain.compute.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.config import MeshConfig, OptimizerConfig
from postrain.sharding import constrain, make_global_batch, make_mesh, named_shardings

CONFIG = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.9)


def pinned_loss(params, batch, rng):
    """The same loss with an activation pinned, as the real model does."""
    pinned = {name: constrain(array, ("batch", "sequence")) for name, array in batch.items()}
    return compute_loss(params, pinned, rng)


def train(mesh, micro_batches, config=CONFIG):
    optimizer, _ = make_optimizer(config, 10)
    params, shardings = make_params(), None
    if mesh is not None:
        params = jax.device_put(params, named_shardings(LOGICAL_AXES, mesh, params))
        shardings = shardings_of(abstract_train_state(params, {}, optimizer, mesh=mesh, ema=True))
    state = init_train_state(params, {}, optimizer, jax.random.key(0), mesh=mesh, ema=True)
    step = make_train_step(
        pinned_loss,
        optimizer,
        micro_batches=micro_batches,
        mesh=mesh,
        state_shardings=shardings,
        max_grad_norm=0.5,
        ema_decay=0.9,
    )
    history, start = [], {name: value.sharding for name, value in leaves(state).items()}
    for seed in range(3):
        batch = make_batch(seed)
        batch = batch if mesh is None else make_global_batch(batch, mesh)
        state, metrics = step(state, batch)
        history.append([float(value) for value in metrics.values()])
    if mesh is not None:
        for name, value in leaves(state).items():
            assert value.sharding == start[name], f"{name} went from {start[name]} to {value.sharding}"
    return state, history, step


def leaves(state):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def check_meshes():
    expected, expected_history, _ = train(None, 1)
    for *sizes, micro_batches in [(8, 1, 1, 2), (1, 8, 1, 1), (1, 1, 8, 4), (2, 2, 2, 1), (2, 2, 2, 4), (1, 4, 2, 2)]:
        state, history, _ = train(make_mesh(MeshConfig(*sizes)), micro_batches)
        np.testing.assert_allclose(history, expected_history, rtol=1e-5)
        for name, leaf in leaves(state.params).items():
            np.testing.assert_allclose(leaf, leaves(expected.params)[name], atol=1e-6, err_msg=f"{sizes} {name}")
    print("meshes ok")


def check_layout():
    """Parameters, moments and average are really in parts; factored moments, which have no part, are whole."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    state, _, _ = train(mesh, 1)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
        kernel = tree["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size, kernel.sharding
    for name in ("adafactor", "muon"):
        train(mesh, 1, dataclasses.replace(CONFIG, name=name))
    print("layout ok")


def check_communication():
    """A batch is cut into micro-batches in place: no rows travel, whatever their number."""
    mesh = make_mesh(MeshConfig(8, 1, 1))
    state, _, step = train(mesh, 2)
    text = step.lower(state, make_global_batch(make_batch(), mesh)).compile().as_text()
    assert "all-reduce" in text
    moved = re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)\(", text)
    assert not moved, moved
    print("communication ok")


if __name__ == "__main__":
    assert jax.device_count() == 8
    {"meshes": check_meshes, "layout": check_layout, "communication": check_communication}[sys.argv[1]]()
