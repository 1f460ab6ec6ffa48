"""The verifier passes what is right and names where what is wrong goes wrong."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf import verify as verify_module
from postrain.hf.load import load_pretrained
from postrain.hf.peft import save_adapter
from postrain.hf.verify import verify
from postrain.models.config import LoraConfig
from postrain.models.params import init_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("verify") / "model", "qwen3", num_hidden_layers=4)


def test_a_right_model_passes(folder):
    report = verify(folder)
    assert report.passed and report.first_departure == ""
    assert [c.name for c in report.comparisons] == ["random ids", "text, a row each", "text, packed"]
    for c in report.comparisons:
        assert 0 < c.relative < 5e-5 and c.kl_max < 1e-8 and c.top1_agreement == 1.0 and c.num_tokens > 100
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True
    assert "PASS" in str(report) and "random ids" in str(report)


def test_prompts_and_no_random_tokens(folder):
    report = verify(folder, prompt_texts=["one", "two, three"], random_tokens=False)
    assert [c.num_tokens for c in report.comparisons] == [13, 13]
    with pytest.raises(UserError, match="nothing to verify"):
        verify(folder, prompt_texts=[], random_tokens=False)


def scale_kernel(config, params):
    kernel = params["layers"]["attention"]["v"]["kernel"]
    params["layers"]["attention"]["v"]["kernel"] = kernel.at[2].multiply(1.01)
    return config, params


def other_eps(config, params):
    return dataclasses.replace(config, norm_eps=1e-3), params


def other_embedding(config, params):
    embedding = params["embed"]["embedding"]
    params["embed"]["embedding"] = embedding.at[:, 0].add(0.01)
    return config, params


def other_unembedding(config, params):
    rows = params["unembed"]["embedding"]
    params["unembed"]["embedding"] = rows.at[17, 3].add(0.1)
    return config, params


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (scale_kernel, "layer 2 "),
        (other_eps, "in the embedding"),  # through the final norm, everything shows it
        (other_embedding, "in the embedding"),
        (other_unembedding, "projection onto the vocabulary"),
    ],
)
def test_the_first_departure_is_named(folder, fault, place, monkeypatch):
    monkeypatch.setattr(verify_module, "load_model", lambda found: fault(*load_pretrained(found.base)))
    report = verify(folder)
    assert not report.passed and place in report.first_departure
    assert "FAIL" in str(report) and report.to_dict()["passed"] is False


def test_logits_without_spread(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    tensors = {name: np.zeros_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="random ids: the reference's logits are all equal"):
        verify(folder)


def test_without_torch(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        verify(folder)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        verify(tmp_path / "nowhere")


def make_adapter_folder(base, folder):
    config, _ = load_pretrained(base)
    config = dataclasses.replace(config, lora=LoraConfig(rank=3, alpha=5.0))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    save_adapter(folder, jax.tree.map(noise, init_lora(config, jax.random.key(0))), config, base_folder=base)
    return folder


def test_an_adapter_is_compared_with_peft(folder, tmp_path, monkeypatch):
    adapter = make_adapter_folder(folder, tmp_path / "adapter")
    assert verify(adapter).passed
    monkeypatch.setattr(verify_module, "load_model", lambda found: load_pretrained(found.base))
    without = verify(adapter)
    assert not without.passed and "layer 0" in without.first_departure
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        verify(adapter)
