"""Hugging Face folders in and out of a mesh: every device holds its own slices, and an export puts them together."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import make_tiny_model

from postrain.config import MeshConfig
from postrain.hf import load
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_adapter, save_adapter
from postrain.hf.save import save_pretrained
from postrain.models.config import LoraConfig
from postrain.models.lora import init_lora, lora_specs
from postrain.models.params import axes_of, frozen_specs, logical_axes
from postrain.sharding import make_mesh, named_shardings

MESHES = [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8), MeshConfig(data=1, fsdp=1, tensor=8)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    odd = {"attention_bias": True, "tie_word_embeddings": request.param}
    return make_tiny_model(tmp_path_factory.mktemp("mesh") / "model", "qwen3", max_shard_size="40KB", **odd)


@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
def test_load_and_save(folder, mesh_config, tmp_path):
    mesh = make_mesh(mesh_config)
    config, whole = load_pretrained(folder)
    _, params = load_pretrained(folder, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    expected = named_shardings(logical_axes(config), mesh, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == expected
    kernel = params["layers"]["mlp"]["up"]["kernel"]  # [3, 40, 88]: 40 over fsdp, 88 over tensor
    share = 40 // mesh.shape["fsdp"], 88 // mesh.shape["tensor"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, *share)}
    save_pretrained(tmp_path / "out", params, config, source_folder=folder)
    before = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)


def test_only_needed_slices_are_read(folder, monkeypatch):
    """No array that is put together for a device is larger than that device's share."""
    made = []
    zeros = np.zeros
    monkeypatch.setattr(np, "zeros", lambda shape, dtype=float: made.append(tuple(shape)) or zeros(shape, dtype))
    _, params = load_pretrained(folder, mesh=make_mesh(MeshConfig(fsdp=8)))
    monkeypatch.undo()
    shares = {shard.data.shape for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards}
    assert made and set(made) == shares


@pytest.mark.parametrize("mesh_config", [None, MESHES[0]], ids=str)
def test_large_parts_are_read_in_pieces(folder, mesh_config, monkeypatch):
    mesh = mesh_config and make_mesh(mesh_config)
    _, whole = load_pretrained(folder, mesh=mesh)
    monkeypatch.setattr(load, "PIECE_BYTES", limit := 12_000)
    made, zeros = [], np.zeros
    monkeypatch.setattr(np, "zeros", lambda shape, dtype=float: made.append(zeros(shape, dtype)) or made[-1])
    _, params = load_pretrained(folder, mesh=mesh)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, whole)
    assert all(piece.nbytes <= limit or piece.shape[0] == 1 for piece in made)
    assert max(leaf.nbytes for leaf in jax.tree.leaves(params)) > 3 * limit


def test_adapters(folder, tmp_path):
    config = dataclasses.replace(load_pretrained(folder)[0], lora=LoraConfig(rank=4))
    adapter = jax.tree.map(lambda x: x + 0.1, init_lora(config, jax.random.key(0)))
    save_adapter(tmp_path / "adapter", adapter, config, base_folder=folder)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, loaded = load_adapter(tmp_path / "adapter", config, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert jax.tree.map(lambda x: x.sharding, loaded) == named_shardings(axes_of(lora_specs(config)), mesh, adapter)
    save_adapter(tmp_path / "again", loaded, config, base_folder=folder)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
def test_quantised_kernels_lie_as_their_shapes_divide(folder, mesh_config, kind, monkeypatch):
    mesh = make_mesh(mesh_config)
    config, whole = load_pretrained(folder, quantization=kind)
    monkeypatch.setattr("postrain.hf.load.PIECE_BYTES", 7 * 4 * config.embed_size)  # seven rows of the embedding
    _, params = load_pretrained(folder, mesh=mesh, quantization=kind)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    specs = frozen_specs(config)
    assert jax.tree.map(lambda x: x.sharding, params) == named_shardings(axes_of(specs), mesh, whole)
    up = params["layers"]["mlp"]["up"]["kernel"][kind]  # [3, 40, 88], of NF4 two rows a byte
    rows = {"nf4": 20, "int8": 40}[kind]
    share = rows if rows % mesh.shape["fsdp"] else rows // mesh.shape["fsdp"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(3, share, 88 // mesh.shape["tensor"])}
