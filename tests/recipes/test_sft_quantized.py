"""QLoRA: a run over a quantised base learns, goes on, and exports the model that it trained."""

import jax
import numpy as np
import pytest
from sft_runs import make_values

import postrain
from postrain.config import MeshConfig, resolve
from postrain.errors import UserError
from postrain.export import export_workdir
from postrain.hf.load import load_pretrained
from postrain.hf.verify.compare import verify
from postrain.models.quantized import dequantize_params
from postrain.report.workdir import read_metrics
from postrain.sharding import make_mesh
from postrain.training.model import abstract_model, load_model


def values_of(inputs, kind="nf4", **sections):
    sections = {"model": {"quantization": kind, "lora": {"rank": 4, "targets": ["q", "up", "down"]}}} | sections
    sections["model"] = {"path": str(inputs / "model")} | sections["model"]
    return make_values(inputs, **sections)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quantized") / "run"
    postrain.train(values_of(inputs), workdir)
    return workdir


def test_learns_and_exports_the_quantised_base_with_its_adapters(inputs, run):
    losses = [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert verify(run / "export").passed
    _, exported = load_pretrained(run / "export")
    _, source = load_pretrained(inputs / "model")
    base = dequantize_params(load_pretrained(inputs / "model", quantization="nf4")[1], "float32")
    for part, name, trained in (("attention", "v", False), ("mlp", "gate", False), ("attention", "q", True)):
        a, b, c = (tree["layers"][part][name]["kernel"] for tree in (exported, base, source))
        assert np.abs(b - c).max() > 1e-3  # quantising does something
        assert trained != np.array_equal(a, b)
    table, original = exported["embed"]["embedding"], source["embed"]["embedding"]
    np.testing.assert_array_equal(table, base["embed"]["embedding"])
    assert (np.abs(table - original) <= 0.51 / 127 * np.abs(original).max(1, keepdims=True)).all()  # int8, by token


def test_the_adapter_alone_is_exported_and_the_rest_cannot_change(inputs, run, tmp_path):
    export_workdir(run, tmp_path / "adapter", format="adapter")
    assert verify(tmp_path / "adapter").passed
    with pytest.raises(UserError, match="model.quantization: was nf4, is int8"):
        postrain.train(values_of(inputs, "int8", train={"steps": 8}), run)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_plan_knows_the_quantised_base(inputs, kind):
    config, mesh = resolve(values_of(inputs, kind)), make_mesh(MeshConfig())
    planned, loaded = (make(config, inputs / "model", mesh) for make in (abstract_model, load_model))
    describe = lambda x: (x.shape, x.dtype, x.sharding)
    assert planned.config == loaded.config
    for found, expected in ((planned.params, loaded.params), (planned.frozen, loaded.frozen)):
        assert jax.tree.map(describe, found) == jax.tree.map(describe, expected)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"quantization": "nf4", "lora": {"rank": 0}}, "'model.quantization' = 'nf4' is for a frozen base"),
        ({"quantization": "fp4"}, "'model.quantization' must be one of none, nf4, int8"),
        ({"lora": {"rank": 4, "targets": ["q"], "ranks": {"v": 2}}}, "'model.lora.ranks.v' is set, but"),
        ({"lora": {"rank": 0, "ranks": {"v": 2}}}, "'model.lora.ranks.v' is set, but 'model.lora.rank' is 0"),
        ({"lora": {"rank": 0, "dora": True}}, "'model.lora.dora' is set, but 'model.lora.rank' is 0"),
    ],
)
def test_keys_that_do_not_fit(inputs, model, words):
    with pytest.raises(UserError, match=words):
        resolve(make_values(inputs, model=model))
