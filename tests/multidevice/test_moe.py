"""The mixture of experts gives one device's output, gradients and losses on any mesh, and stays split there."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from postrain import sharding
from postrain.models.config import MoeConfig
from postrain.models.moe import LOGICAL_AXES, logical_axes, moe_mlp, router_loss_sum
from postrain.models.quantized import quantize
from postrain.sharding import batch_sharding, make_mesh, named_shardings

D, F = 40, 24
COEFS = {"load_balance_coef": 0.3, "z_coef": 0.1}
QWEN = MoeConfig(num_experts=8, experts_per_token=3, mlp_size=F, **COEFS)
GPT_OSS = dataclasses.replace(QWEN, router="topk_softmax", router_bias=True, expert_bias=True, load_balance_over="row")
CONFIGS = {"qwen": (QWEN, "silu"), "gpt_oss": (GPT_OSS, "clamped_swiglu")}


def make_params(config, rank=2):
    rng = np.random.default_rng(0)
    size_e, size_f = config.num_experts, config.mlp_size
    normal = lambda *shape: (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(np.float32)
    p = {"router": {"kernel": 2 * normal(D, size_e)}}
    if config.router_bias:
        p["router"]["bias"] = normal(1, size_e)[0]
    for name, size_in, size_out in (("gate", D, size_f), ("up", D, size_f), ("down", size_f, D)):
        p[name] = {"kernel": normal(size_e, size_in, size_out)}
        p[name] |= {"lora_a": normal(size_e, size_in, rank), "lora_b": normal(size_e, rank, size_out)}
        if config.expert_bias:
            p[name]["bias"] = normal(size_e, 1, size_out)[:, 0]
    return p


def make_batch(batch=8, length=12):
    rng = np.random.default_rng(1)
    x, probe = (rng.standard_normal((batch, length, D)).astype(np.float32) for _ in range(2))
    mask = np.arange(length) < rng.integers(0, length + 1, (batch, 1))
    mask[0] = True
    routing = np.full((batch, length, 3), -1, np.int32)  # half of the tokens replay experts
    routing[:, ::2] = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (batch, length // 2, 1)), axis=-1)[..., :3]
    return x, probe, mask, routing


def loss_and_gradients(p, x, probe, mask, routing, config, activation):
    def loss(p, x):
        y, aux = moe_mlp(x, p, config, activation=activation, mask_BT=mask, routing=routing, lora_alpha=1.0)
        return (y * probe).sum() + router_loss_sum(aux, config), (y, aux)

    (total, (y, aux)), (dp, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(p, x)
    return {"loss": total, "y": y, "aux": aux, "dx": dx, "dp": dp}


STEP = jax.jit(loss_and_gradients, static_argnums=(5, 6))


@functools.cache
def one_device(name, config, batch, length):
    arrays = jax.device_put((make_params(config), *make_batch(batch, length)), jax.devices()[0])
    return jax.device_get(STEP(*arrays, config, CONFIGS[name][1]))


def shardings_of(p, mesh):
    axes = {name: {leaf: LOGICAL_AXES[name][leaf] for leaf in leaves} for name, leaves in p.items()}
    return named_shardings(axes, mesh, p)


def mesh_of(**sizes):
    return make_mesh(types.SimpleNamespace(**({"data": 1, "fsdp": 1} | sizes)))


def check(name, mesh, config=None, batch=8, length=12):
    config = config or CONFIGS[name][0]
    p, arrays = make_params(config), make_batch(batch, length)
    rows = batch_sharding(mesh) if batch % 8 == 0 else NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        p = jax.device_put(p, shardings_of(p, mesh))
        found = jax.device_get(STEP(p, *jax.device_put(arrays, rows), config, CONFIGS[name][1]))
    expected = one_device(name, config, batch, length)
    np.testing.assert_array_equal(found["aux"].expert_ids, expected["aux"].expert_ids)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


MESHES = [
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"expert": 2, "tensor": 2, "sequence": 2},
    {"fsdp": 2, "expert": 2, "sequence": 2},
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_any_mesh_gives_the_one_device_output_and_gradients(name, sizes):
    check(name, mesh_of(**sizes))


def test_sizes_that_the_mesh_does_not_divide():
    config = dataclasses.replace(GPT_OSS, num_experts=6, mlp_size=21)
    check("gpt_oss", mesh_of(expert=4, tensor=2), config)  # experts and hidden units whole on every device
    check("gpt_oss", mesh_of(data=2, fsdp=2, expert=2), batch=3, length=6)  # rows whole on every device
    check("gpt_oss", mesh_of(fsdp=2, expert=2, sequence=2), batch=2, length=6)


def test_every_token_may_go_to_one_device():
    """There is no capacity that could drop any."""
    mesh = mesh_of(expert=2, data=4)
    p, (x, probe, mask, _) = make_params(QWEN), make_batch()
    routing = np.tile(np.array([2, 0, 1], np.int32), (8, 12, 1))
    expected = jax.device_get(STEP(p, x, probe, mask, routing, QWEN, "silu"))
    with jax.set_mesh(mesh):
        found = jax.device_get(STEP(p, x, probe, mask, routing, QWEN, "silu"))
    np.testing.assert_allclose(found["y"], expected["y"], atol=1e-5 * np.abs(expected["y"]).max())
    gradient = found["dp"]["gate"]["kernel"]
    assert not gradient[3:].any() and gradient[:3].all()


def test_rows_may_be_split_over_the_expert_axis_too():
    mesh = mesh_of(data=2, expert=4)
    expected = one_device("qwen", QWEN, 8, 12)
    with jax.set_mesh(mesh):
        p = make_params(QWEN)
        rows = NamedSharding(mesh, PartitionSpec(("data", "expert")))
        arguments = jax.device_put(p, shardings_of(p, mesh)), *jax.device_put(make_batch(), rows)
        found = jax.device_get(STEP(*arguments, QWEN, "silu"))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_experts_may_be_laid_over_other_axes(monkeypatch):
    """One line of the table: experts over fsdp too. The rows that fsdp splits are then gathered for the layer."""
    monkeypatch.setitem(sharding.PARAM_RULES, "experts", ("expert", "fsdp"))
    config = dataclasses.replace(QWEN, norm_topk=False)  # another one: what is traced does not depend on the table
    assert shardings_of(make_params(config), mesh_of(fsdp=4, expert=2))["up"]["kernel"].shard_shape((8, D, F))[0] == 1
    check("qwen", mesh_of(fsdp=4, expert=2), config)


def compiled_text(mesh, config=QWEN):
    p = make_params(config)
    with jax.set_mesh(mesh):
        shardings = shardings_of(p, mesh)
        out = {"loss": None, "y": batch_sharding(mesh), "aux": None, "dx": batch_sharding(mesh), "dp": shardings}
        step = jax.jit(loss_and_gradients, static_argnums=(5, 6), out_shardings=out)
        shapes = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        arrays = [shapes(x, batch_sharding(mesh)) for x in make_batch()]
        return step.lower(jax.tree.map(shapes, p, shardings), *arrays, config, "silu").compile().as_text()


def collectives(text):
    """(operation, shape) of every collective in a compiled program."""
    found = re.findall(r"= (\([^=]*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text)
    return [
        (kind, tuple(map(int, sizes.split(",")))) for out, kind in found for sizes in re.findall(r"\[([\d,]+)\]", out)
    ]


def test_experts_stay_on_their_devices():
    """No device ever holds a kernel of all experts, nor reduces one: only outputs of tokens are added up."""
    whole = 8 * D * F
    for kind, shape in collectives(compiled_text(mesh_of(expert=8))):
        assert np.prod(shape) < whole, (kind, shape)


def test_gradients_of_split_kernels_are_scattered():
    """Over fsdp each device gets its own slice of the gradient's sum, not all of it."""
    found = collectives(compiled_text(mesh_of(fsdp=4, expert=2)))
    local = (8 // 2, D // 4, F)
    assert ("reduce-scatter", local) in found
    assert not any(kind == "all-reduce" and np.prod(shape) >= 4 * D * F for kind, shape in found)


def test_tokens_are_gathered_and_their_outputs_added_up_once_each_way():
    """Rows are split over experts outside the layer. Forward tokens are gathered and partial outputs added up, backward
    gradients of the output are gathered and those of the input added up: [8, 12, D] each, and no more."""
    found = [kind for kind, shape in collectives(compiled_text(mesh_of(expert=8))) if np.prod(shape) == 8 * 12 * D]
    assert found.count("all-gather") == 2 and len(found) == 4, found


def test_a_bfloat16_layer_runs_split():
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    x, _, mask, _ = make_batch()
    expected, _ = moe_mlp(jnp.asarray(x, jnp.bfloat16), make_params(QWEN), QWEN, mask_BT=mask)
    with jax.set_mesh(mesh):
        y, _ = jax.jit(lambda x, p: moe_mlp(x, p, QWEN, mask_BT=mask))(jnp.asarray(x, jnp.bfloat16), make_params(QWEN))
    assert y.dtype == jnp.bfloat16
    y, expected = (np.asarray(a, np.float32) for a in (y, expected))
    np.testing.assert_allclose(y, expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("sizes", [{"expert": 4, "fsdp": 2}, {"tensor": 2, "fsdp": 4}, {"data": 8}], ids=str)
def test_quantised_experts_give_the_one_device_output(sizes, kind):
    config, (x, probe, mask, _) = CONFIGS["gpt_oss"][0], make_batch()
    p = make_params(config)
    for name, axis in (("gate", -2), ("up", -2), ("down", -1)):
        p[name]["kernel"] = quantize(p[name]["kernel"], kind, axis)

    def loss(x, p, mask):
        return (moe_mlp(x, p, config, activation="clamped_swiglu", mask_BT=mask, lora_alpha=1.0)[0] * probe).sum()

    expected = jax.device_get(jax.jit(jax.value_and_grad(loss))(x, p, mask))
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        q = jax.device_put(p, named_shardings(logical_axes(p), mesh, p))
        rows = jax.device_put((x, mask), batch_sharding(mesh))
        found = jax.device_get(jax.jit(jax.value_and_grad(loss))(rows[0], q, rows[1]))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
