"""Loss and gradients of the real model do not depend on the mesh."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig
from postrain.models import transformer
from postrain.models.config import LoraConfig, MoeConfig, NewRows
from postrain.models.lora import adapter_specs, init_lora, lora_specs
from postrain.models.params import (
    axes_of,
    frozen_specs,
    init_from_specs,
    init_params,
    make_packer,
    merge_params,
    param_specs,
    shapes_of,
)
from postrain.objectives.sft import make_sft_loss
from postrain.sharding import batch_sharding, make_mesh, named_shardings
from postrain.training.model import Forward
from postrain.types import Batch

CONFIG = dataclasses.replace(ODD_CONFIG, qkv_bias=True, tie_embeddings=False, init_std=0.2, lora=LoraConfig(rank=4))
CONFIG = dataclasses.replace(CONFIG, new_rows=NewRows(first=288, count=13))
# Windows, sinks and experts, whose load is balanced over rows that devices have in parts.
MOE = MoeConfig(8, 3, 24, router_bias=True, expert_bias=True, load_balance_coef=0.3, z_coef=0.1)
EXPERTS = dataclasses.replace(
    CONFIG,
    moe=dataclasses.replace(MOE, load_balance_over="row"),
    activation="clamped_swiglu",
    layer_windows=(7, 0, 19),
    attention_sinks=True,
    attention_softcap=3.0,
)
CONFIGS = {"plain": CONFIG, "experts": EXPERTS}
LENGTHS = [[9, 25, 3], [37], [20, 20], [1, 2, 30], [40], [10, 10, 10, 10], [5], [33, 6]]


@functools.cache
def make_batch():
    rng = np.random.default_rng(0)
    shape = len(LENGTHS), 40
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, lengths in enumerate(LENGTHS):
        offset = 0
        for i, length in enumerate(lengths):
            segment_ids[row, offset : offset + length] = i + 1
            positions[row, offset : offset + length] = np.arange(length)
            offset += length
    tokens, targets = (rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32) for _ in range(2))
    loss_mask = ((rng.random(shape) < 0.5) * (segment_ids > 0)).astype(np.float32)
    return Batch(tokens, targets, loss_mask, segment_ids, positions)


def loss_and_gradients(params, batch, config):
    return loss_and_gradients_of(lambda params: params, params, batch, config)


def loss_and_gradients_of(whole, params, batch, config):
    """``whole(params)`` is the whole tree."""
    loss_fn = make_sft_loss(Forward(config, chunk=16).nll)

    def mean(params):
        sums = loss_fn(whole(params), batch, None)
        loss, weight = sums.losses["sft"]
        return loss / weight, {name: term.total for name, term in sums.metrics.items()}

    (loss, metrics), grads = jax.value_and_grad(mean, has_aux=True)(params)
    return loss, metrics, grads


@functools.cache
def make_params(config):
    frozen = init_params(config, jax.random.key(0))
    adapters = init_from_specs(adapter_specs(config), config, jax.random.key(1))
    # B must not be zero. Not a constant either: a common component in every output makes the rest cancel.
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    return merge_params(adapters, frozen)


@functools.cache
def one_device(config):
    batch, params = jax.device_put((make_batch(), make_params(config)), jax.devices()[0])
    return jax.device_get(jax.jit(loss_and_gradients, static_argnums=2)(params, batch, config))


MESHES = [
    MeshConfig(data=8, fsdp=1, tensor=1),
    MeshConfig(data=1, fsdp=8, tensor=1),
    MeshConfig(data=2, fsdp=4, tensor=1),
    MeshConfig(data=1, fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=1, tensor=4),
    MeshConfig(data=1, fsdp=1, sequence=8),
    MeshConfig(data=2, fsdp=1, sequence=4),
    MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
]
EXPERT_MESHES = [
    MeshConfig(data=1, fsdp=1, expert=8),
    MeshConfig(data=1, fsdp=1, expert=2, sequence=4),
    MeshConfig(data=1, fsdp=1, tensor=2, expert=2, sequence=2),
    MeshConfig(data=2, fsdp=1, tensor=2, expert=2),
    MeshConfig(data=1, fsdp=2, expert=2, sequence=2),
]


CASES = [("plain", "none", mesh) for mesh in MESHES] + [("experts", "none", mesh) for mesh in EXPERT_MESHES]
CASES += [
    (name, remat, meshes[-1])
    for remat in ("dots", "full")
    for name, meshes in (("plain", MESHES), ("experts", EXPERT_MESHES))
]


@pytest.mark.parametrize(("name", "remat", "sizes"), CASES, ids=str)
def test_any_mesh_gives_the_one_device_loss_and_gradients(name, remat, sizes):
    config = dataclasses.replace(CONFIGS[name], remat=remat)
    mesh = make_mesh(sizes)
    params = make_params(CONFIGS[name])
    axes = merge_params(axes_of(adapter_specs(config)), axes_of(param_specs(config)))
    shardings = named_shardings(axes, mesh, params)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings)
        batch = jax.device_put(make_batch(), batch_sharding(mesh))
        step = jax.jit(loss_and_gradients, static_argnums=2, out_shardings=(None, None, shardings))
        loss, metrics, grads = jax.device_get(step(params, batch, config))
    expected_loss, expected_metrics, expected_grads = one_device(CONFIGS[name])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], expected_metrics["accuracy"])
    for (path, grad), expected in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_cannot_touch_another_on_another_device(name):
    """Other tokens in the first document: the hidden states of all other documents stay to the bit."""
    config, mesh = CONFIGS[name], make_mesh(MeshConfig(data=1, fsdp=1, expert=2, sequence=4))
    batch, params = make_batch(), make_params(config)
    first = batch.segment_ids == 1
    changed = np.where(first, (batch.tokens + 7) % config.vocab_size, batch.tokens)
    run = jax.jit(lambda p, tokens: transformer.compute_hidden(p, config, tokens, batch.segment_ids, batch.positions))
    with jax.set_mesh(mesh):
        before, after = (np.asarray(run(params, tokens)) for tokens in (batch.tokens, changed))
    np.testing.assert_array_equal(before[~first], after[~first])
    assert np.abs(before[first] - after[first]).max() > 0.1


def test_queries_of_a_row_stay_split():
    """Over ``sequence`` keys and values are gathered, and nothing else that is as long as a row."""
    config, mesh = dataclasses.replace(CONFIG, lora=None), make_mesh(MeshConfig(data=2, fsdp=1, sequence=4))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init_params(config, jax.random.key(0)))
    with jax.set_mesh(mesh):
        text = jax.jit(loss_and_gradients, static_argnums=2).lower(shapes, make_batch(), config).compile().as_text()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text))
    assert gathered and gathered <= {"4,40,2,12", "40,4,2,12", "4,2,12,40"}, gathered


@functools.cache
def make_quantized(kind):
    """Config, frozen base and adapters of a DoRA run over a quantised base."""
    lora = LoraConfig(rank=4, ranks=(("q", 2),), dora=True)
    config = dataclasses.replace(CONFIG, quantization=kind, lora=lora, remat="full")
    base, specs = init_params(config, jax.random.key(0)), param_specs(config)
    for name in ("embed", "unembed"):
        base[name] = {"embedding": make_packer(specs[name]["embedding"], kind)(base[name]["embedding"])}
    for part in ("attention", "mlp"):
        for name, linear in base["layers"][part].items():
            if "kernel" in linear:
                linear["kernel"] = make_packer(specs["layers"][part][name]["kernel"], kind)(linear["kernel"])
    adapters = init_lora(config, jax.random.key(1), base)
    return config, base, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)


def adapter_gradients(adapters, base, batch, config):
    return loss_and_gradients_of(lambda adapters: merge_params(adapters, base), adapters, batch, config)


@functools.cache
def quantized_on_one_device(kind):
    config, base, adapters = make_quantized(kind)
    arrays = jax.device_put((adapters, base, make_batch()), jax.devices()[0])
    return jax.device_get(jax.jit(adapter_gradients, static_argnums=3)(*arrays, config))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("sizes", MESHES[1:4], ids=str)
def test_a_quantised_base_gives_the_one_device_loss_and_gradients(sizes, kind):
    config, base, adapters = make_quantized(kind)
    mesh = make_mesh(sizes)
    lay = lambda specs, tree: jax.device_put(tree, named_shardings(axes_of(specs), mesh, shapes_of(specs)))
    with jax.set_mesh(mesh):
        arrays = lay(lora_specs(config), adapters), lay(frozen_specs(config), base)
        batch = jax.device_put(make_batch(), batch_sharding(mesh))
        found = jax.device_get(jax.jit(adapter_gradients, static_argnums=3)(*arrays, batch, config))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(quantized_on_one_device(kind)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))
