"""The verifier passes what is right and names where what is wrong goes wrong."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import save_adapter
from postrain.hf.verify import compare as verify_module
from postrain.hf.verify.compare import compare, verify, verify_random
from postrain.models.config import LoraConfig
from postrain.models.lora import init_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("verify") / "model", "qwen3", num_hidden_layers=4)


def test_a_right_model_passes(folder):
    report = verify(folder)
    assert report.passed and report.first_departure == ""
    names = ["random ids", "at the last positions", "text, a row each", "text, packed"]
    assert [c.name for c in report.comparisons] == names
    for c in report.comparisons:
        assert 0 < c.relative < 1e-11 and c.kl_max < 1e-12 and c.top1_agreement == 1.0 and c.num_tokens > 100
        assert 1e-8 < c.float32_error <= 10 * c.reference_float32_error
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True
    assert "PASS" in str(report) and "random ids" in str(report)


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, broken / "model.safetensors")
    report = verify(broken, prompt_texts=[])
    assert not report.passed
    assert report.first_departure == "in layer 1, mlp.up.kernel, which holds numbers that are not finite"


def test_prompts_and_no_random_tokens(folder):
    report = verify(folder, prompt_texts=["one", "two, three"], random_tokens=False)
    assert [c.num_tokens for c in report.comparisons] == [13, 13]
    with pytest.raises(UserError, match="nothing to verify"):
        verify(folder, prompt_texts=[], random_tokens=False)


def scale_kernel(*names):
    """One output channel of one layer: all of them would be lost in a norm."""

    def scale(config, params):
        layers = params["layers"]
        for name in names:
            layers = layers[name]
        layers["kernel"] = layers["kernel"].at[2, ..., 3].multiply(1 + 1e-6)
        return config, params

    return scale


def other_final_norm(config, params):
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].add(1e-6)
    return config, params


def other_eps(config, params):
    return dataclasses.replace(config, norm_eps=config.norm_eps + 1e-6), params


def other_embedding(config, params):
    embedding = params["embed"]["embedding"]
    params["embed"]["embedding"] = embedding.at[:, 0].multiply(1 + 1e-6)
    return config, params


def other_unembedding(config, params):
    rows = params["unembed"]["embedding"]
    params["unembed"]["embedding"] = rows.at[17, 3].multiply(1 + 1e-5)
    return config, params


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (scale_kernel("attention", "v"), "in layer 2, in its attention"),
        (scale_kernel("mlp", "gate"), "in layer 2, in its feed-forward"),
        (other_eps, "in layer 0, in its attention"),
        (other_embedding, "in the embedding"),
        (other_final_norm, "in the final norm"),
        (other_unembedding, "projection onto the vocabulary"),
    ],
)
def test_the_first_departure_is_named(folder, fault, place, monkeypatch):
    monkeypatch.setattr(verify_module, "load_model", lambda found: fault(*load_pretrained(found.base)))
    report = verify(folder)
    assert not report.passed and place in report.first_departure
    assert "FAIL" in str(report) and report.to_dict()["passed"] is False


def test_rounding_that_is_worse_than_the_references_is_found(folder, monkeypatch):
    def in_bfloat16(found):
        config, params = load_pretrained(found.base)
        return dataclasses.replace(config, compute_dtype="bfloat16"), params

    monkeypatch.setattr(verify_module, "load_model", in_bfloat16)
    report = verify(folder)
    assert report.agrees and not report.passed and report.first_departure == ""
    assert "but float32 errors of random ids, at the last positions, text" in str(report)


def test_a_model_that_memory_cannot_hold_is_refused(folder, monkeypatch):
    monkeypatch.setattr(verify_module, "_available_memory", lambda: 1e5)
    with pytest.raises(UserError, match=r"needs .* of memory \(12 bytes each\), found .*: use a larger machine, or"):
        verify(folder)


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


def test_an_adapter_with_magnitudes_is_compared_with_peft(folder, tmp_path):
    config, params = load_pretrained(folder)
    config = dataclasses.replace(config, lora=LoraConfig(rank=3, alpha=5.0, dora=True))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapter = jax.tree.map(noise, init_lora(config, jax.random.key(0), params))
    save_adapter(tmp_path / "adapter", adapter, config, base_folder=folder)
    report = verify(tmp_path / "adapter")
    assert report.passed, str(report)


def test_an_adapter_is_compared_with_peft(folder, tmp_path, monkeypatch):
    adapter = make_adapter_folder(folder, tmp_path / "adapter")
    assert verify(adapter).passed
    monkeypatch.setattr(verify_module, "load_model", lambda found: load_pretrained(found.base))
    without = verify(adapter)
    assert not without.passed and "in layer 0, in its attention" in without.first_departure
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        verify(adapter)


PATTERN = {"max_position_embeddings": 4096, "sliding_window": 20}
QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("family", "odd"),
    [
        ("gemma3", PATTERN),
        ("gemma2", PATTERN),
        ("gpt_oss", PATTERN | {"num_local_experts": 5, "num_experts_per_tok": 2}),
        ("qwen3_moe", QWEN_MOE),
        ("olmo2", {}),
    ],
)
def test_random_weights_of_a_folder_that_has_none(family, odd, tmp_path):
    folder = make_tiny_model(tmp_path / "model", family, num_hidden_layers=6, **odd)
    (folder / "model.safetensors").unlink()
    report = verify_random(folder, num_layers=3)
    assert report.passed, str(report)
    assert report.folder.endswith("(random weights)")
    names = [c.name for c in report.comparisons]
    assert "at the last positions" in names and ("longer than the window" in names) == ("sliding_window" in odd)


@pytest.mark.parametrize(
    ("family", "odd", "feed_forward", "part"),
    [("gemma3", PATTERN, ("mlp", "gate"), "feed-forward"), ("qwen3_moe", QWEN_MOE, ("moe", "up"), "experts")],
)
def test_the_sublayer_is_named_between_other_norms_and_of_experts(
    family, odd, feed_forward, part, tmp_path, monkeypatch
):
    folder = make_tiny_model(tmp_path / "model", family, **odd)
    for place, name in ((feed_forward, part), (("attention", "v"), "attention")):
        wrong = lambda found, place=place: scale_kernel(*place)(*load_pretrained(found.base))
        monkeypatch.setattr(verify_module, "load_model", wrong)
        assert f"in layer 2, in its {name}" in verify(folder, prompt_texts=[]).first_departure


def test_random_weights_are_refused_where_they_make_no_sense(folder, tmp_path):
    adapter = make_adapter_folder(folder, tmp_path / "adapter")
    with pytest.raises(UserError, match="--random makes the weights of a whole model"):
        verify_random(adapter)
    with pytest.raises(UserError, match="--layers 7: .* has 4"):
        verify_random(folder, num_layers=7)


def test_a_tie_excuses_what_follows_it_and_nothing_else():
    rng = np.random.default_rng(0)
    theirs = [rng.standard_normal((20, 50)) for _ in range(2)]
    ours, margins = [rows.copy() for rows in theirs], [np.ones(20), np.ones(20)]
    ours[0][15:] += 1
    assert compare("x", ours, theirs, margins)[0].relative > 0.1
    margins[0][14] = 0  # not where it starts
    assert compare("x", ours, theirs, margins)[0].relative > 0.1
    margins[0][15] = 1e-10
    found, keep = compare("x", ours, theirs, margins)
    assert (found.relative, found.num_undecided, found.num_tokens) == (0, 5, 35)
    assert not keep[15:20].any() and keep.sum() == 35
    ours[0][18, 3] = np.nan
    assert not compare("x", ours, theirs, margins)[0].relative <= 1e-9, "what is no number is no tie"
    ours[0], margins[0][2] = theirs[0] + 1, 0
    assert compare("x", ours, theirs, margins)[0].relative > 0.1
    ours[1], margins[0][0], margins[1][0] = theirs[1] + 1, 0, 0
    with pytest.raises(UserError, match="routers are undecided before most tokens"):
        compare("x", ours, theirs, margins)


def test_a_tie_in_a_model_is_seen(tmp_path, monkeypatch):
    """Experts 0 and 1 of a layer have the same scores: whichever each side takes, it is right."""
    odd = QWEN_MOE | {"num_experts": 64, "num_experts_per_tok": 1}
    folder = make_tiny_model(tmp_path / "model", "qwen3_moe", **odd)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate.weight"][1] = tensors["model.layers.1.mlp.gate.weight"][0]
    save_file(tensors, file, {"format": "pt"})

    def swap(found):
        config, params = load_pretrained(found.base)
        order = np.r_[1, 0, 2:64]
        for name in ("gate", "up", "down"):
            kernel = params["layers"]["moe"][name]["kernel"]
            params["layers"]["moe"][name]["kernel"] = kernel.at[1].set(kernel[1, order])
        return config, params

    reports = [verify(folder, prompt_texts=[])]
    monkeypatch.setattr(verify_module, "load_model", swap)
    reports.append(verify(folder, prompt_texts=[]))
    assert all(report.passed for report in reports), "\n".join(map(str, reports))
    assert sum(c.num_undecided for report in reports for c in report.comparisons) > 0, "torch took one of the two"
    assert "after a router's tie" in "\n".join(map(str, reports))
