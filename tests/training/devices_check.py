"""Run by test_devices.py in its own process with eight CPU devices: every mesh gives what one device gives."""

import dataclasses
import pathlib
import re
import sys

import jax
import numpy as np
import optax

from postrain.config import MeshConfig, OptimizerConfig
from postrain.models.config import LoraConfig, ModelConfig
from postrain.models.lora import init_lora, lora_specs
from postrain.models.params import abstract_params, axes_of, init_params, logical_axes, shapes_of
from postrain.objectives.sft import make_sft_loss
from postrain.sharding import constrain, make_global_batch, make_mesh, named_shardings
from postrain.training.model import Forward
from postrain.training.optimizer import make_optimizer
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.types import Batch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from toy_network import (  # noqa: E402
    COEFS,
    LOGICAL_AXES,
    ROW_WEIGHTS,
    compute_loss,
    compute_losses,
    compute_mean_loss,
    make_batch,
    make_params,
)

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


def check_losses():
    """Several losses with weights of their own are those of one batch on one device."""
    batch = make_batch() | {"row_weights": ROW_WEIGHTS}
    (loss, means), grads = jax.value_and_grad(compute_mean_loss, has_aux=True)(make_params(), batch)
    optimizer = optax.sgd(1.0)
    for *sizes, micro_batches in [(8, 1, 1, 1), (8, 1, 1, 2), (2, 2, 2, 4), (1, 2, 1, 4)]:
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = make_mesh(MeshConfig(*sizes), devices)
        params = jax.device_put(make_params(), named_shardings(LOGICAL_AXES, mesh, make_params()))
        shardings = shardings_of(abstract_train_state(params, {}, optimizer, mesh=mesh))
        state = init_train_state(params, {}, optimizer, jax.random.key(0), mesh=mesh)
        step = make_train_step(
            compute_losses,
            optimizer,
            loss_coefs=COEFS,
            micro_batches=micro_batches,
            mesh=mesh,
            state_shardings=shardings,
        )
        state, metrics = step(state, make_global_batch(batch, mesh))
        np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-5)
        for name, mean in means.items():
            np.testing.assert_allclose(metrics[f"train/loss/{name}"], mean, rtol=1e-5)
        for name, leaf in leaves(state.params).items():
            moved = np.asarray(leaves(make_params())[name]) - np.asarray(leaf)
            np.testing.assert_allclose(moved, leaves(grads)[name], atol=1e-6, err_msg=f"{sizes} {name}")
    print("losses ok")


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


MODEL = ModelConfig(101, 16, 48, 2, 4, 2, 8, tie_embeddings=False, qk_norm="head", attention_chunk=8)


def make_packed_batch():
    """Documents of all lengths, rows with few and with many trained tokens."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 101, (2, 8, 24), dtype=np.int32)
    segment_ids = np.cumsum(rng.random((8, 24)) < 0.2, axis=1, dtype=np.int32) + 1
    segment_ids[::2, 20:] = 0
    starts = np.maximum.accumulate(np.where(np.diff(segment_ids, axis=1, prepend=-1) != 0, np.arange(24), 0), axis=1)
    mask = (rng.random((8, 24)) < np.linspace(0.1, 0.9, 8)[:, None]) & (segment_ids > 0)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": mask.astype(np.float32),
        "segment_ids": segment_ids,
        "positions": (np.arange(24) - starts).astype(np.int32),
    }


def train_model(config, mesh, micro_batches):
    """Two steps of the real model; weights are float32 and exact data are compared, so SGD keeps rounding small."""
    optimizer, _ = make_optimizer(OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.9), 10)
    base_shardings = named_shardings(logical_axes(config), mesh, abstract_params(config))
    params, frozen = jax.device_put(init_params(config, jax.random.key(0)), base_shardings), {}
    if config.lora is not None:
        specs = lora_specs(config)
        adapters = jax.tree.map(lambda x: x + 0.01, init_lora(config, jax.random.key(1)))  # B = 0 has no gradient to A
        adapters = jax.device_put(adapters, named_shardings(axes_of(specs), mesh, shapes_of(specs)))
        params, frozen = adapters, params
    shardings = shardings_of(abstract_train_state(params, frozen, optimizer, mesh=mesh))
    state = init_train_state(params, frozen, optimizer, jax.random.key(0), mesh=mesh)
    loss_fn = make_sft_loss(Forward(config, chunk=16).nll)
    step = make_train_step(
        loss_fn, optimizer, micro_batches=micro_batches, mesh=mesh, state_shardings=shardings, max_grad_norm=1.0
    )
    batch, history = Batch(**make_global_batch(make_packed_batch(), mesh)), []
    for _ in range(2):
        state, metrics = step(state, batch)
        history.append([float(value) for value in metrics.values()])
    assert shardings_of(state) == shardings
    return state, history


def check_model():
    for lora, meshes in ((None, [(1, 4, 2, 2)]), (LoraConfig(4), [(2, 2, 2, 2)])):
        config = dataclasses.replace(MODEL, lora=lora)
        expected, expected_history = train_model(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 1)
        for *sizes, micro_batches in meshes:
            state, history = train_model(config, make_mesh(MeshConfig(*sizes)), micro_batches)
            np.testing.assert_allclose(history, expected_history, rtol=1e-5)
            for name, leaf in leaves((state.params, state.frozen)).items():
                want = leaves((expected.params, expected.frozen))[name]
                np.testing.assert_allclose(leaf, want, atol=1e-6, err_msg=f"{sizes} {name}")
    print("model ok")


CHECKS = {
    "meshes": check_meshes,
    "losses": check_losses,
    "layout": check_layout,
    "communication": check_communication,
    "model": check_model,
}

if __name__ == "__main__":
    assert jax.device_count() == 8
    CHECKS[sys.argv[1]]()
