"""The train step: a pure function ``(state, batch) -> (state, metrics)``.

``loss_fn(params, batch, rng) -> (loss_sum, weight_sum, metric_sums)`` returns sums over the rows it is given.
The step adds the sums up over micro-batches (and, by the partitioner, over devices), divides once by the weight
of the whole batch, clips by the global norm, updates. So a result does not depend on how a batch is split.

A batch without a single trained token (weight 0), with a loss or gradient that is not finite, or far above what is
usual (``postrain.training.spikes``) changes no parameter and no optimizer state; only ``state.step``, the number of
batches consumed, goes on. The loop hands ``metrics`` to a ``SpikeGuard``, which does as the config says.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from postrain.errors import UserError
from postrain.models.params import merge_params
from postrain.sharding import batch_sharding, mesh_context, num_row_shards, replicated
from postrain.training.spikes import compute_limits, new_history, update_history
from postrain.types import TrainState

LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    mesh: Mesh | None = None,
    state_shardings: TrainState | None = None,
    max_grad_norm: float = 0.0,
    ema_decay: float = 0.0,
    schedule: Callable | None = None,
    count_moved_in: str = "",
    spike_threshold: float = 0.0,
):
    """Jitted ``train_step(state, batch) -> (state, metrics)``; ``state`` is donated.

    ``batch``: a pytree whose leaves have the rows first, B a multiple of ``micro_batches`` times the row
    shards of ``mesh``. ``state_shardings``: ``shardings_of(abstract_train_state(...))``, needed with a mesh:
    left alone, XLA replicates gradients and FSDP silently degrades. ``metrics``: float32 scalars
    ``train/loss``, ``train/grad_norm`` (before clipping), ``train/weight``, ``train/learning_rate`` (with a
    ``schedule``), ``train/NAME`` for each of ``metric_sums`` divided by the weight; and for ``SpikeGuard``
    ``finite``, ``usual``, ``loss_limit``, ``grad_norm_limit``, ``skipped``, ``in_a_row``. ``spike_threshold``: how many
    times the medians of the last steps a step may be, 0: any. With
    ``count_moved_in``, a dtype, also ``train/weights_moved``: the share of the trained weights that the update changes,
    seen in that dtype; the old parameters then stay in memory beside the new ones.
    """

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with mesh_context(mesh):
            rng = jax.random.fold_in(state.rng, state.step)
            grads, loss_sum, weight, sums = sum_gradients(
                loss_fn, state, batch, rng, micro_batches, mesh, state_shardings
            )
            per_token = 1 / jnp.where(weight > 0, weight, 1)
            loss, norm = loss_sum * per_token, optax.global_norm(grads) * per_token
            clip = jnp.minimum(1, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            loss_limit, norm_limit = compute_limits(state.history, spike_threshold)
            usual = finite & (loss <= loss_limit) & (norm <= norm_limit)
            taken = usual & (weight > 0)

            update = functools.partial(_update, optimizer, grads, per_token * clip, ema_decay)
            # A branch, not a `where` over the results: that would cost five times the update itself on a CPU.
            params, opt_state, ema = jax.lax.cond(
                taken, update, lambda *same: same, state.params, state.opt_state, state.ema
            )
            history = update_history(state.history, loss, norm, taken, ~usual)
            moved = _share_moved(state.params, params, count_moved_in) if count_moved_in else None
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, history=history)
        metrics = {f"train/{name}": value * per_token for name, value in sums.items()}
        metrics |= {"train/loss": loss, "train/grad_norm": norm, "train/weight": weight}
        metrics |= {"finite": finite, "usual": usual, "loss_limit": loss_limit, "grad_norm_limit": norm_limit}
        metrics |= {name: history[name] for name in ("skipped", "in_a_row")}
        if count_moved_in:
            metrics["train/weights_moved"] = moved
        if schedule is not None:
            metrics["train/learning_rate"] = schedule(history["taken"] - taken)  # of the steps that were taken
        return state, metrics

    return _jit_step(train_step, mesh, state_shardings)


def _jit_step(train_step: Callable, mesh: Mesh | None, state_shardings: TrainState | None):
    if mesh is None:
        return jax.jit(train_step, donate_argnums=0)
    if state_shardings is None:
        raise ValueError("make_train_step: a mesh needs state_shardings")
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
    )


def _update(optimizer, grads, scale, ema_decay: float, params, opt_state, ema):
    """The new parameters, optimizer state and average, by ``scale * grads``."""
    updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, _average(ema, params, ema_decay)


def sum_gradients(loss_fn: LossFn, state: TrainState, batch, rng, micro_batches: int, mesh, state_shardings):
    """``(gradients of the loss sum, loss_sum, weight_sum, metric_sums)`` of a batch, all float32 and not divided."""

    def compute_sums(params, rows, rng):
        loss_sum, weight_sum, metric_sums = loss_fn(merge_params(params, state.frozen), rows, rng)
        return loss_sum, (weight_sum, metric_sums)

    def compute_one(rows, rng):
        (loss, (weight, sums)), grads = jax.value_and_grad(compute_sums, has_aux=True)(state.params, rows, rng)
        if state_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (grads, loss, weight, sums))

    def add_one(total, indexed_rows):
        index, rows = indexed_rows
        return jax.tree.map(jnp.add, total, compute_one(rows, jax.random.fold_in(rng, index))), None

    micro = split_rows(batch, micro_batches, mesh)
    first = jax.tree.map(lambda x: x[0], micro)
    if micro_batches == 1:
        return compute_one(first, jax.random.fold_in(rng, 0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute_one, first, rng))
    total, _ = jax.lax.scan(add_one, zeros, (jnp.arange(micro_batches), micro))
    return total


def split_rows(batch, micro_batches: int, mesh: Mesh | None = None):
    """Leaves ``[B, ...]`` -> ``[M, B/M, ...]``, micro-batch m taking rows m, m + M, m + 2M, ...

    Every device's block of rows gives each micro-batch its even share, so no row changes its device.
    Raises UserError when B is not a multiple of ``micro_batches`` times the row shards of ``mesh``.
    """
    row_shards = 1 if mesh is None else num_row_shards(mesh)

    def split(x):
        if x.shape[0] % (micro_batches * row_shards):
            raise UserError(
                f"data.batch_size={x.shape[0]} is not a multiple of train.micro_batches={micro_batches} times "
                f"{row_shards} (mesh.data x mesh.fsdp x mesh.expert): change one of them"
            )
        x = jnp.moveaxis(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 1, 0)
        return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh, leading=1))

    return jax.tree.map(split, batch)


def _average(ema, params, decay: float):
    """ema <- decay * ema + (1 - decay) * params. It starts at the parameters, so nothing has to be unbiased."""
    if ema is None:
        return None
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, params)


def _share_moved(old, new, dtype: str) -> jax.Array:
    """Share of the scalars that differ between two trees after rounding to ``dtype``."""
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    moved = sum(jnp.mean(a.astype(dtype) != b.astype(dtype), dtype=jnp.float32) * float(a.size) for a, b in pairs)
    return moved / float(sum(a.size for a, _ in pairs))


def make_eval_step(loss_fn: LossFn, mesh: Mesh | None = None):
    """Jitted ``eval_step(params, frozen, batch) -> {"loss", "weight", NAME: ...}``: float32 sums, not divided.

    Add the sums up over all batches, then divide by the weight: a mean of means would depend on the batches.
    """

    def eval_step(params, frozen, batch):
        with mesh_context(mesh):
            loss, weight, sums = loss_fn(merge_params(params, frozen), batch, jax.random.key(0))
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**sums, "loss": loss, "weight": weight})

    if mesh is None:
        return jax.jit(eval_step)
    return jax.jit(eval_step, in_shardings=(None, None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def abstract_train_state(
    params, frozen, optimizer: optax.GradientTransformation, *, mesh: Mesh | None = None, ema: bool = False
) -> TrainState:
    """The TrainState as ``jax.ShapeDtypeStruct``, with shardings when there is a mesh; nothing is allocated.

    ``params`` and ``frozen``: arrays or ``jax.ShapeDtypeStruct`` that carry their ``sharding``. A leaf of the
    optimizer state (or of the average) that has the path and shape of a parameter is laid out like it; the
    rest, counters and factored moments, is replicated.
    """

    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if mesh is not None else None)

    params, frozen = jax.tree.map(describe, params), jax.tree.map(describe, frozen)
    by_path = {_dict_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def lay_out(path, leaf):
        keys = _dict_keys(path)
        like = next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), None)
        same = like is not None and like.shape == leaf.shape
        sharding = None if mesh is None else like.sharding if same else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(lambda p: _new_state(p, {}, optimizer, jax.random.key(0), ema), params)
    state = jax.tree_util.tree_map_with_path(lay_out, state)
    return state.replace(params=params, frozen=frozen)


def _dict_keys(path) -> tuple:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def shardings_of(tree):
    """The ``sharding`` of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_train_state(
    params,
    frozen,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    *,
    mesh: Mesh | None = None,
    ema: bool = False,
) -> TrainState:
    """A TrainState at step 0, every array created where it belongs. ``rng``: a typed key, ``jax.random.key``.

    The state takes ``params`` and ``frozen`` over: the first train step donates them.
    """

    def create(params, rng):
        return _new_state(params, {}, optimizer, rng, ema).replace(params={})

    abstract = abstract_train_state(params, {}, optimizer, mesh=mesh, ema=ema).replace(params={})
    shardings = shardings_of(abstract) if mesh is not None else None
    return jax.jit(create, out_shardings=shardings)(params, rng).replace(params=params, frozen=frozen)


def _new_state(params, frozen, optimizer, rng, ema: bool) -> TrainState:
    # The average is a copy: a buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params), rng, average, new_history())


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that gets an entry for every program that XLA compiles (or fetches from its cache) inside the block."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
