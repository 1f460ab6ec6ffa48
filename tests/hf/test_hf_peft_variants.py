"""Adapters of experts, DoRA and own ranks: `peft` computes and trains what is computed and trained here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from hf_compare import our_logits, random_ids, relative_difference, torch_logits
from tiny_models import make_tiny_model

from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_adapter, save_adapter
from postrain.models.config import LoraConfig
from postrain.models.lora import init_lora
from postrain.models.params import merge_params
from postrain.models.transformer import compute_hidden, compute_logits

EXPERTS = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module", params=EXPERTS)
def base(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp(request.param) / "base", request.param, **EXPERTS[request.param])


def load_in_torch(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 2, "ranks": (("gate", 3), ("down", 4), ("v", 5))},
        {"rank": 2, "targets": ("q", "up")},
        {"rank": 2, "targets": ("down",)},
    ],
    ids=str,
)
def test_adapters_of_experts_in_peft_give_our_logits(base, lora, tmp_path):
    config, params = load_pretrained(base)
    config = dataclasses.replace(config, lora=LoraConfig(alpha=5.0, **lora))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapter = jax.tree.map(noise, init_lora(config, jax.random.key(0)))
    save_adapter(tmp_path / "adapter", adapter, config, base_folder=base)
    ids = random_ids(301)
    ours = our_logits(merge_params(adapter, params), config, ids)
    model = peft.PeftModel.from_pretrained(load_in_torch(base), tmp_path / "adapter")
    assert relative_difference(ours, torch_logits(model, ids)) <= 1e-4
    assert relative_difference(ours, torch_logits(base, ids)) > 0.1
    again, loaded = load_adapter(tmp_path / "adapter", config, base_folder=base)
    assert relative_difference(our_logits(merge_params(loaded, params), again, ids), ours) <= 1e-5


def randomize_adapters(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_experts_that_peft_made_load_here(base, use_rslora, tmp_path):
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "o_proj"],
        target_parameters=PARAMETERS,
        rank_pattern={"experts.gate_up_proj": 4, "o_proj": 2},
        alpha_pattern={"experts.down_proj": 2, "self_attn.q_proj": 9},
        use_rslora=use_rslora,
    )
    model = randomize_adapters(peft.get_peft_model(load_in_torch(base), settings))
    model.save_pretrained(tmp_path / "adapter")
    config, params = load_pretrained(base)
    config, adapter = load_adapter(tmp_path / "adapter", config, base_folder=base)
    assert dict(config.lora.ranks) == {"o": 2, "gate": 4, "up": 4}
    ids = random_ids(301)
    ours = our_logits(merge_params(adapter, params), config, ids)
    assert relative_difference(ours, torch_logits(model, ids)) <= 1e-4


def test_dora_trains_as_in_peft(tmp_path):
    """The same logits, the same first gradients, and after ten steps the same adapters."""
    base = make_tiny_model(tmp_path / "base", "llama", attention_bias=True, num_hidden_layers=2)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True)
    model = randomize_adapters(peft.get_peft_model(load_in_torch(base), settings))
    model.save_pretrained(tmp_path / "start")
    config, params = load_pretrained(base)
    config, adapter = load_adapter(tmp_path / "start", config)
    assert config.lora.dora
    ids = random_ids(301)
    assert relative_difference(our_logits(merge_params(adapter, params), config, ids), torch_logits(model, ids)) <= 1e-4
    probe = np.random.default_rng(1).standard_normal((*ids.shape, config.vocab_size)).astype(np.float32)

    def loss(adapter):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        tree = merge_params(adapter, params)
        hidden = compute_hidden(tree, config, ids, jnp.ones_like(ids), positions)
        return jnp.mean(jnp.tanh(compute_logits(tree, config, hidden)[..., : config.vocab_size]) * probe)

    rate = 30.0
    step = jax.jit(lambda adapter: jax.tree.map(lambda p, g: p - rate * g, adapter, jax.grad(loss)(adapter)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    start = adapter
    for i in range(1, 11):
        optimizer.zero_grad()
        (torch.tanh(model(torch.from_numpy(ids).long()).logits) * torch.from_numpy(probe)).mean().backward()
        optimizer.step()
        adapter = step(adapter)
        if i in (1, 10):
            model.save_pretrained(tmp_path / f"step{i}")
            _, theirs = load_adapter(tmp_path / f"step{i}", config)
            for (path, ours), other, first in zip(
                jax.tree.leaves_with_path(adapter), jax.tree.leaves(theirs), jax.tree.leaves(start), strict=True
            ):
                moved = np.abs(other - first).max()
                assert moved > 1e-4, path
                np.testing.assert_allclose(ours, other, rtol=0, atol=1e-3 * moved, err_msg=str((i, path)))
