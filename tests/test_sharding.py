"""The table from logical axes to devices, read at its edges. Eight devices live in a process of their own."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from postrain.config import MeshConfig
from postrain.errors import UserError
from postrain.models.config import ModelConfig
from postrain.models.params import abstract_params, logical_axes
from postrain.sharding import (
    ACTIVATION_RULES,
    MESH_AXES,
    PARAM_RULES,
    batch_sharding,
    constrain,
    data_process,
    format_mesh,
    make_global_batch,
    make_mesh,
    named_shardings,
    num_row_shards,
    undivided_dimensions,
)

MODEL = ModelConfig(100, 24, 40, 2, 4, 1, 6, tie_embeddings=False, qk_norm="head", qkv_bias=True)
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


def test_one_device_needs_no_thought():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == MESH_AXES and mesh.size == 1 and data_process(mesh) == (0, 1)
    assert format_mesh(mesh) == "1 device (cpu): one device"
    x = jax.numpy.ones((2, 3))
    assert constrain(x, ("batch", "mlp")) is x
    with jax.set_mesh(mesh):
        assert constrain(x, ("batch", "mlp")) is x


def test_tables_know_every_axis_of_the_config_and_the_model():
    assert tuple(field.name for field in dataclasses.fields(MeshConfig)) == MESH_AXES
    assert set(jax.tree.leaves(logical_axes(MODEL))) <= set(PARAM_RULES)
    for rule in [*PARAM_RULES.values(), *ACTIVATION_RULES.values()]:
        assert set((rule,) if isinstance(rule, str) else rule or ()) <= set(MESH_AXES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "mesh: data=3 does not divide into 1 devices: set one axis to -1"),
        ((2, -1, 1), "mesh: data=2 does not divide into 1 devices: set sizes whose"),
        ((-1, -1, 1), "one at most may be -1, found data=-1 x fsdp=-1"),
        ((0, 1, 1), "every axis must be at least 1"),
        ((1, -2, 1), "every axis must be at least 1"),
    ],
)
def test_mesh_that_does_not_fit_is_refused_with_the_numbers(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(*sizes))


def check_meshes():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1, "expert": 1, "sequence": 1}
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert format_mesh(mesh) == "8 devices (cpu): data=2 x fsdp=2 x tensor=2"
    assert format_mesh(make_mesh(MeshConfig(1, 1, expert=2, sequence=-1))) == "8 devices (cpu): expert=2 x sequence=4"
    assert make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2]).size == 2
    with pytest.raises(UserError, match="data=1 does not divide into 8 devices"):
        make_mesh(MeshConfig(1, 1, 1))


def check_params():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shapes = abstract_params(MODEL)
    shardings = named_shardings(logical_axes(MODEL), mesh, shapes)
    attention = shardings["layers"]["attention"]
    assert attention["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert attention["o"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert attention["q"]["bias"].spec == P(None, "tensor")
    assert attention["q_norm"]["scale"].spec == shardings["final_norm"]["scale"].spec == P()
    assert shardings["embed"]["embedding"].spec == P("tensor", "fsdp")
    assert undivided_dimensions(logical_axes(MODEL), mesh, shapes) == []
    wide = make_mesh(MeshConfig(1, 1, 8))
    shardings = named_shardings(logical_axes(MODEL), wide, shapes)
    assert shardings["layers"]["attention"]["k"]["kernel"].spec == P(None, "fsdp"), "6 columns over 8"
    assert shardings["layers"]["attention"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    lines = undivided_dimensions(logical_axes(MODEL), wide, shapes)
    assert "layers.attention.k.kernel: kv_heads=6 is not a multiple of tensor=8, whole" in lines
    assert len(lines) == 4 and all(".k." in line or ".v." in line for line in lines), lines
    jax.tree.map(lambda a, s: jax.device_put(np.zeros(a.shape), s), shapes, shardings)


def check_batches():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "weights": np.ones(8, np.float32)}
    batch = make_global_batch(rows, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, rows[name])
        assert array.sharding == batch_sharding(mesh)
        for shard in array.addressable_shards:
            d, f, _ = (int(i[0]) for i in np.where(mesh.devices == shard.device)[:3])
            np.testing.assert_array_equal(shard.data, rows[name][2 * (2 * d + f) : 2 * (2 * d + f) + 2])
    with pytest.raises(UserError, match="data.batch_size must be a multiple of data x fsdp x expert = 4: found 6"):
        make_global_batch({"tokens": np.zeros((6, 3))}, mesh)
    assert data_process(mesh) == (0, 1)
    mesh = make_mesh(MeshConfig(1, 2, expert=2, sequence=2))
    assert num_row_shards(mesh) == 4, "experts' devices have rows of their own"
    [shard, *_] = make_global_batch(rows, mesh)["tokens"].addressable_shards
    assert shard.data.shape == (2, 3), "positions are whole"


def check_activations():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    pin = jax.jit(lambda x: constrain(x * 2, ("batch", "sequence", "mlp")))
    with jax.set_mesh(mesh):
        assert pin(np.ones((8, 3, 4))).sharding.spec == P(("data", "fsdp"), None, "tensor")
        assert pin(np.ones((8, 3, 5))).sharding.spec[0] == ("data", "fsdp"), "5 columns stay whole, rows do not"
        with pytest.raises(ValueError, match=r"1 names .* shape \(8, 8\)"):
            constrain(np.ones((8, 8)), ("batch",))


CHECKS = {"meshes": check_meshes, "params": check_params, "batches": check_batches, "activations": check_activations}


@pytest.mark.parametrize("check", CHECKS)
def test_eight_devices(check):
    command = [sys.executable, pathlib.Path(__file__), check]
    result = subprocess.run(command, env=os.environ | EIGHT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr


if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print("ok")
