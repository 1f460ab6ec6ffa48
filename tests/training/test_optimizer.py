"""Schedules at known points, which parameters decay, refusals, optimizers against their papers' update rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_configs import PUBLISHED

from postrain.config import OptimizerConfig
from postrain.errors import UserError
from postrain.hf.config import parse_config
from postrain.hf.families import FAMILIES
from postrain.models.config import LoraConfig, ModelConfig
from postrain.models.lora import adapter_specs
from postrain.models.params import abstract_params, merge_params, shapes_of
from postrain.training.optimizer import (
    decay_mask,
    format_schedule_warning,
    make_optimizer,
    make_schedule,
    state_structure,
)
from postrain.training.step import abstract_train_state

CONFIG = OptimizerConfig(learning_rate=1.0, schedule="constant")


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({"schedule": "constant"}, {0: 1, 50: 1, 99: 1}),
        ({"schedule": "linear"}, {0: 1, 25: 0.75, 100: 0, 120: 0}),
        ({"schedule": "linear", "warmup_steps": 20}, {0: 0.05, 9: 0.5, 19: 1, 20: 1, 60: 0.5}),
        ({"schedule": "cosine"}, {0: 1, 50: 0.5, 100: 0}),
        ({"schedule": "cosine", "final_fraction": 0.2}, {0: 1, 50: 0.6, 100: 0.2}),
        ({"schedule": "wsd"}, {0: 1, 90: 1, 95: 0.5, 100: 0}),
        ({"schedule": "wsd", "decay_steps": 40, "warmup_steps": 10}, {4: 0.5, 60: 1, 80: 0.5}),
    ],
)
def test_schedule_points(changes, points):
    schedule = make_schedule(dataclasses.replace(CONFIG, **changes), 100)
    for step, rate in points.items():
        np.testing.assert_allclose(schedule(step), rate, atol=1e-6, err_msg=f"step {step}")


def test_decay_is_for_matrices_that_are_not_excluded():
    model = ModelConfig(100, 8, 16, 2, 2, 1, 4, tie_embeddings=False, qk_norm="head", qkv_bias=True)
    mask = decay_mask(abstract_params(model), CONFIG)
    names = {path for path, decays in zip(paths(mask), jax.tree.leaves(mask), strict=True) if decays}
    kernels = {f"layers.attention.{name}.kernel" for name in "qkvo"} | {
        f"layers.mlp.{name}.kernel" for name in ("gate", "up", "down")
    }
    assert names == kernels | {"unembed.embedding"}
    everything = decay_mask(abstract_params(model), dataclasses.replace(CONFIG, weight_decay_exclude=()))
    assert everything["embed"]["embedding"] and not everything["layers"]["attention_norm"]["scale"]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("exclude", [(), ("norm",)])
def test_only_matrices_decay_in_every_family_whatever_is_excluded(architecture, exclude):
    """Biases of experts are stacked over layers and experts, [L, E, out], and magnitudes of DoRA over layers."""
    model = parse_config(next(raw for raw in PUBLISHED.values() if raw["architectures"] == [architecture]), "a file")
    model = dataclasses.replace(model, lora=LoraConfig(rank=2, dora=True))
    tree = merge_params(shapes_of(adapter_specs(model)), abstract_params(model))
    matrices = {path for path in paths(tree) if path.endswith(("kernel", "lora_a", "lora_b", "embedding"))}
    for names, left in ((CONFIG.weight_decay_exclude, {"embed.embedding"}), (exclude, set())):
        mask = decay_mask(tree, dataclasses.replace(CONFIG, weight_decay_exclude=names))
        decaying = {path for path, decays in zip(paths(tree), jax.tree.leaves(mask), strict=True) if decays}
        assert decaying == matrices - left
    state = jax.eval_shape(make_optimizer(dataclasses.replace(CONFIG, name="muon"), 1)[0].init, tree)
    orthogonal = {path.partition(".mu.")[2] for path in paths(state) if "muon" in path and ".mu." in path}
    assert orthogonal == {path for path in matrices if path.startswith("layers.")}


def paths(tree):
    return [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def first_update(config, params, grads):
    optimizer, _ = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return jax.tree.map(np.asarray, updates)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "layers": {"q": {"kernel": jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)}},
        "final_norm": {"scale": jnp.asarray(rng.normal(size=4), jnp.float32)},
    }


def test_lion_is_the_sign_and_decay_is_decoupled():
    params, grads = tree(0), tree(1)
    config = dataclasses.replace(CONFIG, name="lion", learning_rate=0.1, weight_decay=0.5)
    updates = first_update(config, params, grads)
    kernel, grad = params["layers"]["q"]["kernel"], grads["layers"]["q"]["kernel"]
    np.testing.assert_allclose(updates["layers"]["q"]["kernel"], -0.1 * (np.sign(grad) + 0.5 * kernel), rtol=1e-6)
    np.testing.assert_allclose(updates["final_norm"]["scale"], -0.1 * np.sign(grads["final_norm"]["scale"]), rtol=1e-6)


def test_sgd_has_momentum_only_when_asked():
    params, grads = tree(0), tree(1)
    for momentum, factor in ((0.0, 1.0), (0.9, 1.9)):
        optimizer, _ = make_optimizer(dataclasses.replace(CONFIG, name="sgd", momentum=momentum), 10)
        state = optimizer.init(params)
        _, state = optimizer.update(grads, state, params)
        updates, _ = optimizer.update(grads, state, params)
        jax.tree.map(lambda u, g, f=factor: np.testing.assert_allclose(u, -f * g, rtol=1e-6), updates, grads)


def test_muon_makes_each_layers_matrix_near_orthogonal_at_adams_size():
    params, grads = tree(0), tree(1)
    updates = first_update(dataclasses.replace(CONFIG, name="muon"), params, grads)
    for layer in range(2):
        update = updates["layers"]["q"]["kernel"][layer] / (0.2 * np.sqrt(6))
        u, _, v = np.linalg.svd(np.asarray(grads["layers"]["q"]["kernel"][layer]), full_matrices=False)
        values = np.linalg.svd(update, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.4, "Newton-Schulz brings singular values near 1"
        assert np.trace(-update @ (u @ v).T) > 0.8 * 4, "towards the gradient's polar factor"
    adam = first_update(CONFIG, params, grads)
    np.testing.assert_allclose(updates["final_norm"]["scale"], adam["final_norm"]["scale"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_heads_have_a_learning_rate_of_their_own(name):
    """Of the same schedule; nothing else moves in another way, and the state is the same."""
    kernel = jnp.linspace(-1, 2, 12).reshape(1, 4, 3)
    params = {"layers": {"q": {"kernel": kernel}}, "heads": {"score": {"kernel": kernel[0]}}}
    config = dataclasses.replace(CONFIG, name=name, schedule="linear", weight_decay=0.1)
    plain, _ = make_optimizer(config, 10)
    own, _ = make_optimizer(dataclasses.replace(config, head_learning_rate=0.25), 10)
    states, grads = [one.init(params) for one in (plain, own)], jax.tree.map(jnp.cos, params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(2):
        first, states[0] = plain.update(grads, states[0], params)
        second, states[1] = own.update(grads, states[1], params)
        np.testing.assert_array_equal(second["layers"]["q"]["kernel"], first["layers"]["q"]["kernel"])
        np.testing.assert_allclose(second["heads"]["score"]["kernel"], 0.25 * first["heads"]["score"]["kernel"])


def test_a_warm_up_or_decay_longer_than_the_run_is_cut_to_it_and_reported():
    for schedule in ("constant", "wsd"):
        asked = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=50, decay_steps=0)
        used = dataclasses.replace(asked, warmup_steps=10)
        assert rates(asked, 10) == rates(used, 10) and format_schedule_warning(used, 10) == ""
    assert rates(asked, 10)[0] == pytest.approx(asked.learning_rate / 10)
    line = format_schedule_warning(asked, 10)
    assert line == "warning     optimizer.warmup_steps = 50: longer than the run, cut to its 10 steps"
    decay = dataclasses.replace(CONFIG, schedule="wsd", warmup_steps=0, decay_steps=11)
    assert rates(decay, 10) == rates(dataclasses.replace(decay, decay_steps=10), 10)
    assert "optimizer.decay_steps = 11: longer" in format_schedule_warning(decay, 10)
    assert format_schedule_warning(dataclasses.replace(decay, schedule="linear"), 10) == "", "it is of wsd alone"


@pytest.mark.parametrize(
    ("total", "warmup", "decay", "left"), [(20, 10, 20, 10), (20, 19, 20, 1), (20, 20, 5, 0), (100, 95, 0, 5)]
)
def test_wsd_reaches_its_peak_whatever_is_asked_of_a_short_run(total, warmup, decay, left):
    """The default decay of a tenth takes what there is; one that is asked for tells."""
    config = dataclasses.replace(CONFIG, schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    found = rates(config, total)
    assert max(found) == found[warmup - 1] == pytest.approx(config.learning_rate)
    assert found[warmup:] == pytest.approx([config.learning_rate * (1 - i / left) for i in range(left)], abs=1e-6)
    line = format_schedule_warning(config, total)
    asked = f"warning     optimizer.decay_steps = {decay}: longer than the rest of the run after the warm-up, "
    assert line == (f"{asked}cut to its {left} step{'s' * (left != 1)}" if decay else "")


def rates(config, total_steps):
    _, schedule = make_optimizer(config, total_steps)
    return [float(schedule(step)) for step in range(total_steps)]


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"learning_rate": 1.0, "b1": 0.5, "warmup_steps": 9, "schedule": "wsd", "max_grad_norm": 0.0}, True),
        ({"name": "sgd"}, False),
        ({"name": "muon"}, False),
        ({"weight_decay": 0.1}, False),
        ({"ema_decay": 0.1}, False),
    ],
)
def test_what_changes_the_arrays_of_the_state_is_known_without_a_model(changes, alike):
    """Against the state itself, of a tree that is not the one that the answer is found with."""
    states = []
    for config in (CONFIG, dataclasses.replace(CONFIG, **changes)):
        params = tree(0)
        ema = config.ema_decay > 0
        states.append(abstract_train_state(params, {}, make_optimizer(config, 3)[0], ema=ema))
    assert (jax.tree.structure(states[0]) == jax.tree.structure(states[1])) == alike
    assert (state_structure(CONFIG) == state_structure(dataclasses.replace(CONFIG, **changes))) == alike


def test_run_without_updates_is_refused():
    with pytest.raises(UserError, match="train.steps"):
        make_optimizer(CONFIG, 0)
