"""The train step against torch, against itself split otherwise, and on batches that must change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from toy_network import compute_loss, make_batch, make_params, scale_loss, torch_loss, total_of

from postrain.config import OptimizerConfig, SpikeSection
from postrain.errors import UserError
from postrain.training.optimizer import decay_mask, make_optimizer
from postrain.training.spikes import check_step
from postrain.training.step import count_compilations, init_train_state, make_eval_step, make_train_step
from postrain.types import LossSums, WeightedSum

CONFIG = OptimizerConfig(
    learning_rate=1e-2, schedule="linear", warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5, final_fraction=0.1
)


def run(config, batches, *, micro_batches=1, loss_fn=compute_loss, params=None):
    optimizer, schedule = make_optimizer(config, total_steps=10)
    state = init_train_state(
        make_params() if params is None else params, {}, optimizer, jax.random.key(0), ema=config.ema_decay > 0
    )
    step = make_train_step(
        loss_fn,
        optimizer,
        micro_batches=micro_batches,
        max_grad_norm=config.max_grad_norm,
        ema_decay=config.ema_decay,
        schedule=schedule,
    )
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def torch_reference(config, batches):
    """torch.optim.AdamW, clip_grad_norm_ and LambdaLR over the same batches."""
    leaves, treedef = jax.tree.flatten(make_params())
    tensors = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in leaves]
    decays = jax.tree.leaves(decay_mask(make_params(), config))
    groups = [
        {"params": [t for t, d in zip(tensors, decays, strict=True) if d], "weight_decay": config.weight_decay},
        {"params": [t for t, d in zip(tensors, decays, strict=True) if not d], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps)

    def factor(step):
        line = 1 - max(step - config.warmup_steps, 0) / (10 - config.warmup_steps)
        return min((step + 1) / config.warmup_steps, 1) * (config.final_fraction + (1 - config.final_fraction) * line)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history = []
    for batch in batches:
        loss = torch_loss(jax.tree.unflatten(treedef, tensors), batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tensors, config.max_grad_norm)
        rate = scheduler.get_last_lr()[0]
        history.append({"train/loss": loss.item(), "train/grad_norm": norm.item(), "train/learning_rate": rate})
        optimizer.step()
        scheduler.step()
    return [t.detach().numpy() for t in tensors], history


def test_ten_adamw_steps_follow_torch():
    # optax forms 1 - b2**t in float32, where torch has float64: 2e-5 of each of the first updates.
    config = dataclasses.replace(CONFIG, learning_rate=1e-3)
    batches = [make_batch(seed) for seed in range(10)]
    state, ours = run(config, batches)
    expected, theirs = torch_reference(config, batches)
    assert [m["train/grad_norm"] > CONFIG.max_grad_norm for m in ours].count(True) >= 5, "clipping must be exercised"
    for name, tolerance in {"train/loss": 1e-6, "train/learning_rate": 1e-6, "train/grad_norm": 1e-5}.items():
        np.testing.assert_allclose([m[name] for m in ours], [m[name] for m in theirs], rtol=tolerance, err_msg=name)
    for got, want in zip(jax.tree.leaves(state.params), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_result_does_not_depend_on_micro_batches():
    batches = [make_batch(seed) for seed in range(3)]
    weights = [m.sum() for m in np.split(batches[0]["loss_mask"], 4)]
    assert len(set(weights)) == 4, "equal weights would hide a mean of means"
    whole, history = run(CONFIG, batches)
    for micro_batches in (2, 4, 16):
        split, split_history = run(CONFIG, batches, micro_batches=micro_batches)
        for one, other in zip(history, split_history, strict=True):
            np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, split.params)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"data.batch_size=16 .* train.micro_batches=3"):
        run(CONFIG, [make_batch()], micro_batches=3)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_every_optimizer_learns_one_batch(name):
    rate = {"sgd": 1.0, "lion": 3e-3}.get(name, 2e-2)
    config = dataclasses.replace(CONFIG, name=name, learning_rate=rate, schedule="constant", warmup_steps=0)
    _, history = run(config, [make_batch()] * 10)
    assert history[-1]["train/loss"] < 0.8 * history[0]["train/loss"]


def test_batch_without_trained_tokens_changes_nothing_but_the_step():
    empty = make_batch() | {"loss_mask": np.zeros((16, 6), np.float32)}
    once, _ = run(CONFIG, [make_batch()])
    then_empty, history = run(CONFIG, [make_batch(), empty])
    assert history[-1]["train/loss"] == history[-1]["train/grad_norm"] == history[-1]["train/weight"] == 0
    assert history[-1]["finite"] and int(then_empty.step) == 2
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(once, part), getattr(then_empty, part))


def test_nan_stops_naming_step_and_rows_and_keeps_the_state():
    def poisoned(params, batch, rng):
        return scale_loss(compute_loss(params, batch, rng), jnp.where(batch["tokens"][0, 0] == 7, jnp.nan, 1.0))

    bad = make_batch()
    bad["tokens"][0, 0] = 7
    good = make_batch(1)
    good["tokens"][0, 0] = 8
    before, _ = run(CONFIG, [good], loss_fn=poisoned)
    after, history = run(CONFIG, [good, bad], loss_fn=poisoned)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    check_step(SpikeSection(), 1, history[0], lambda: pytest.fail("rows of a usual step"), print)
    with pytest.raises(UserError, match=r"step 2: loss nan .* rows chat.jsonl:3:"):
        check_step(SpikeSection(), 2, history[1], lambda: "chat.jsonl:3", print)


def test_moving_average_is_the_average_of_the_weights():
    config = dataclasses.replace(CONFIG, ema_decay=0.75)
    batches = [make_batch(seed) for seed in range(3)]
    expected = jax.tree.map(np.asarray, make_params())
    for count in range(1, 4):
        params = run(config, batches[:count])[0].params
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), expected, params)
    state, _ = run(config, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_share_of_weights_moved_is_that_of_the_dtype_that_computes(dtype):
    optimizer, _ = make_optimizer(dataclasses.replace(CONFIG, learning_rate=2e-4), total_steps=10)
    state = init_train_state(make_params(), {}, optimizer, jax.random.key(0))
    step = make_train_step(compute_loss, optimizer, count_moved_in=dtype)
    for seed in range(2):
        seen = lambda state: np.concatenate(
            [np.asarray(x).astype(dtype).ravel() for x in jax.tree.leaves(state.params)]
        )
        before = seen(state)
        state, metrics = step(state, make_batch(seed))
        expected = np.mean(seen(state) != before)
        np.testing.assert_allclose(metrics["train/weights_moved"], expected, rtol=1e-6)
        assert 0.9 < expected if dtype == "float32" else 0 < expected < 0.5
    still = make_batch(2)
    state, metrics = step(state, still | {"loss_mask": np.zeros_like(still["loss_mask"])})
    assert metrics["train/weights_moved"] == 0


def test_only_params_train():
    params = make_params()
    frozen = {"embed": params.pop("embed")}
    optimizer, _ = make_optimizer(CONFIG, 10)
    before = jax.tree.map(np.asarray, frozen)
    state = init_train_state(params, frozen, optimizer, jax.random.key(0))
    state, metrics = make_train_step(compute_loss, optimizer)(state, make_batch())
    jax.tree.map(np.testing.assert_array_equal, before, state.frozen)
    grads = jax.grad(lambda p: total_of(compute_loss(p | frozen_of(before), make_batch(), None)))(make_trained())
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads))) / float(metrics["train/weight"])
    np.testing.assert_allclose(float(metrics["train/grad_norm"]), norm, rtol=1e-5)


def frozen_of(tree):
    return jax.tree.map(jnp.asarray, tree)


def make_trained():
    params = make_params()
    del params["embed"]
    return params


def test_rng_differs_by_step_and_micro_batch_and_repeats_with_the_seed():
    def noise(params, batch, rng):
        losses, _ = compute_loss(params, batch, rng)
        weight = losses["nll"].weight
        return LossSums(losses, {"noise": WeightedSum(jax.random.uniform(rng) * weight, weight)})

    _, one = run(CONFIG, [make_batch()] * 2, loss_fn=noise)
    _, again = run(CONFIG, [make_batch()] * 2, loss_fn=noise)
    _, split = run(CONFIG, [make_batch()] * 2, loss_fn=noise, micro_batches=2)
    assert one == again
    assert len({m["train/noise"] for m in one + split}) == 4


def test_nothing_compiles_after_the_first_step():
    optimizer, schedule = make_optimizer(CONFIG, 10)
    state = init_train_state(make_params(), {}, optimizer, jax.random.key(0))
    step = make_train_step(compute_loss, optimizer, schedule=schedule, micro_batches=2)
    with count_compilations() as compiled:
        state, _ = step(state, make_batch(0))
    assert compiled
    with count_compilations() as compiled:
        for seed in range(1, 4):
            state, _ = step(state, make_batch(seed))
    assert not compiled


def test_eval_sums_do_not_depend_on_the_batches():
    step, params, batch = make_eval_step(compute_loss), make_params(), make_batch()
    whole = step(params, {}, batch)
    halves = [step(params, {}, jax.tree.map(lambda x, s=s: x[s], batch)) for s in (slice(0, 8), slice(8, 16))]
    assert float(halves[0].losses["nll"].weight) != float(halves[1].losses["nll"].weight)
    jax.tree.map(lambda all, one, other: np.testing.assert_allclose(all, one + other, rtol=1e-6), whole, *halves)
