"""Several losses: each is divided once by its own weight of the whole batch, at no further cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_network import (
    COEFS,
    ROW_WEIGHTS,
    compute_logits,
    compute_loss,
    compute_losses,
    compute_mean_loss,
    make_batch,
    make_params,
    scale_loss,
)

from postrain.training.evaluate import compute_eval_loss
from postrain.training.step import init_train_state, make_eval_step, make_train_step, split_rows
from postrain.types import LossSums, WeightedSum

OPTIMIZER = optax.sgd(1.0)  # the parameters move by the gradient


def make_rows(seed=0, row_weights=ROW_WEIGHTS):
    return make_batch(seed) | {"row_weights": row_weights}


def make_state():
    return init_train_state(make_params(), {}, OPTIMIZER, jax.random.key(0))


def take_step(loss_fn, batch, coefs=None, micro_batches=1):
    """(what the step subtracts from the parameters, its metrics)."""
    step = make_train_step(loss_fn, OPTIMIZER, loss_coefs=coefs, micro_batches=micro_batches)
    state, metrics = step(make_state(), batch)
    return jax.tree.map(lambda a, b: a - b, make_params(), state.params), jax.device_get(metrics)


def assert_near(found, expected):
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        tolerance = 2e-6 * float(np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("row_weights", [ROW_WEIGHTS, 0 * ROW_WEIGHTS], ids=["some", "none"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16])
def test_several_losses_are_those_of_one_batch(micro_batches, row_weights):
    batch = make_rows(row_weights=row_weights)
    weights = split_rows(jnp.asarray(row_weights), 4).sum(1)
    assert list(weights > 0) == [False, row_weights.any(), False, False], "one micro-batch of four has all of a loss"
    (loss, means), grads = jax.value_and_grad(compute_mean_loss, has_aux=True)(make_params(), batch)
    moved, metrics = take_step(compute_losses, batch, COEFS, micro_batches)
    assert_near(moved, grads)
    np.testing.assert_allclose(metrics["train/loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["train/grad_norm"], optax.global_norm(grads), rtol=2e-6)
    for name in ("nll", "z", "none"):
        np.testing.assert_allclose(metrics[f"train/loss/{name}"], means[name], rtol=2e-6)
    assert metrics["train/weight"] == metrics["train/weight/nll"] == batch["loss_mask"].sum()
    assert metrics["train/weight/z"] == row_weights.sum() and metrics["train/weight/none"] == 0
    sums = compute_losses(make_params(), batch, None)
    for name, term in sums.metrics.items():
        np.testing.assert_allclose(metrics[f"train/{name}"], term.total / term.weight, rtol=2e-6, err_msg=name)
    assert sums.metrics["rows"].weight != sums.metrics["accuracy"].weight


def test_a_batch_without_any_weight_changes_nothing():
    batch = make_rows(row_weights=0 * ROW_WEIGHTS)
    batch["loss_mask"] = 0 * batch["loss_mask"]
    for micro_batches in (1, 4):
        moved, metrics = take_step(compute_losses, batch, COEFS, micro_batches)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(moved))
        assert metrics["finite"] and metrics["train/loss"] == metrics["train/loss/z"] == metrics["train/rows"] == 0


def test_a_factor_of_one_loss_scales_loss_and_gradient():
    batch = make_rows()
    moved, metrics = take_step(compute_loss, batch)
    scaled, scaled_metrics = take_step(compute_loss, batch, {"nll": 0.25}, 2)
    assert_near(scaled, jax.tree.map(lambda x: x / 4, moved))
    np.testing.assert_allclose(scaled_metrics["train/loss"], metrics["train/loss"] / 4, rtol=2e-6)
    assert "train/loss/nll" not in metrics and "train/weight/nll" not in metrics
    with pytest.raises(ValueError, match="loss_coefs name nnl; expected names of losses: nll"):
        take_step(compute_loss, batch, {"nnl": 1.0})


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_further_losses_cost_their_own_operations_alone(micro_batches):
    """The pass that adds up the weights computes no logits: a second loss without any maths is free."""

    def with_constant(params, batch, rng):
        losses, metrics = compute_loss(params, batch, rng)
        weights_B = batch["row_weights"]
        return LossSums(losses | {"constant": WeightedSum(2 * weights_B.sum(), weights_B.sum())}, metrics)

    def compile_step(loss_fn):
        step = make_train_step(loss_fn, OPTIMIZER, micro_batches=micro_batches)
        return step.lower(make_state(), make_rows())

    one, two = (compile_step(loss_fn) for loss_fn in (compute_loss, with_constant))
    assert one.as_text().count("dot_general") == two.as_text().count("dot_general") > 0
    flops = [lowered.compile().cost_analysis()["flops"] for lowered in (one, two)]
    params = jax.eval_shape(make_params)
    logits = jax.jit(compute_logits).lower(params, make_rows()["tokens"][: 16 // micro_batches]).compile()
    assert abs(flops[1] - flops[0]) < 0.1 * logits.cost_analysis()["flops"]


def test_eval_loss_is_divided_once_with_the_factors():
    step, params, batch = make_eval_step(compute_losses), make_params(), make_rows()
    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 1), slice(1, 6), slice(6, 16))]
    found = compute_eval_loss(step, params, {}, parts, COEFS)
    loss, means = compute_mean_loss(params, batch)
    np.testing.assert_allclose(found.pop("eval/loss"), loss, rtol=1e-6)
    for name in ("nll", "z", "none"):
        np.testing.assert_allclose(found.pop(f"eval/loss/{name}"), means[name], rtol=1e-6)
    assert set(found) == {"eval/accuracy", "eval/rows"}
    only = compute_eval_loss(make_eval_step(compute_loss), params, {}, parts)
    assert set(only) == {"eval/loss", "eval/accuracy"}


def test_a_loss_that_is_not_finite_is_skipped_among_others():
    def broken(params, batch, rng):
        losses, metrics = compute_losses(params, batch, rng)
        z = scale_loss(LossSums({"z": losses["z"]}, {}), jnp.nan).losses
        return LossSums(losses | z, metrics)

    moved, metrics = take_step(broken, make_rows(), COEFS, 2)
    assert not metrics["finite"] and not any(np.any(leaf) for leaf in jax.tree.leaves(moved))
