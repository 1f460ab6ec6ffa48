"""The train step: a pure function ``(state, batch) -> (state, metrics)``.

``loss_fn(params, batch, rng) -> LossSums`` returns named sums over the rows it is given. The loss of an update is

    sum over losses of coef * total / weight

where ``total`` and ``weight`` are added up over all micro-batches (and, by the partitioner, over devices): each loss is
divided once, by its own weight of the whole batch. Then the gradient is clipped by its global norm and the parameters
are updated. So a result does not depend on how a batch is split.

One loss is divided at the end. With several, the gradient of a micro-batch needs the weights of the whole batch. A
first pass over the micro-batches adds them up. It costs nothing where weights do not depend on parameters: the forward
pass is then dead code. Where they do, as those of advantages over a head, it is made twice. No gradient goes through
weights.

A batch without a single trained token (all weights 0), with a loss or gradient that is not finite, or far above what is
usual (``postrain.training.spikes``) changes no parameter and no optimizer state; only ``state.step``, the number of
batches consumed, goes on. The loop hands ``metrics`` to ``check_step``, which does as the config says.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from postrain.errors import UserError
from postrain.models.params import merge_params
from postrain.sharding import batch_sharding, mesh_context, num_row_shards, replicated
from postrain.training.spikes import judge_step, new_history
from postrain.types import LossSums, TrainState, WeightedSum

LossFn = Callable[[Any, Any, jax.Array], LossSums]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    loss_coefs: Mapping[str, float] | None = None,
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

    Args:
      loss_fn: ``(params, batch, rng) -> LossSums``; no gradient may be expected of its weights.
      loss_coefs: factors of losses, by name, 1 by default; ValueError, when traced, for a name that is not a loss.
      micro_batches: parts of a batch that are worked on one after the other.
      state_shardings: ``shardings_of(abstract_train_state(...))``, needed with a mesh: left alone, XLA replicates
        gradients and FSDP silently degrades.
      schedule: of the learning rate, for ``train/learning_rate``.
      count_moved_in: a dtype, for ``train/weights_moved``: the share of the trained weights that the update changes
        when rounded to it; the old parameters then stay in memory beside the new ones.
      spike_threshold: how many times the medians of the last steps a step may be; 0: any.

    ``batch`` is a pytree whose leaves have the rows first, B a multiple of ``micro_batches`` times the row shards of
    ``mesh``. ``metrics`` are float32 scalars: ``train/loss`` (what the update minimises), ``train/grad_norm`` (before
    clipping), ``train/weight`` (of the first loss), ``train/NAME`` of each metric; of several losses also
    ``train/loss/NAME`` (without its factor) and ``train/weight/NAME``; ``weight_of/NAME`` of each of these means, which
    is 0 where it is a mean of nothing; and the facts of ``judge_step``.
    """
    loss_coefs = dict(loss_coefs or {})

    def train_step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with mesh_context(mesh):
            rng = jax.random.fold_in(state.rng, state.step)
            grads, sums = sum_gradients(loss_fn, state, batch, rng, micro_batches, mesh, state_shardings, loss_coefs)
            scales = compute_scales(sums.losses, loss_coefs)
            # The gradient of one loss is not divided yet, that of several is.
            scale = next(iter(scales.values())) if len(scales) == 1 else 1.0
            loss = functools.reduce(jnp.add, (term.total * scales[name] for name, term in sums.losses.items()))
            norm = optax.global_norm(grads) * scale
            clip = jnp.minimum(1, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
            has_weight = functools.reduce(jnp.logical_or, (term.weight > 0 for term in sums.losses.values()))
            is_update, history, facts = judge_step(state.history, loss, norm, has_weight, spike_threshold)
            # A branch, not a `where` over the results: that would cost five times the update itself on a CPU.
            update = functools.partial(_update, optimizer, grads, scale * clip, ema_decay)
            old = state.params, state.opt_state, state.ema
            params, opt_state, ema = jax.lax.cond(is_update, update, lambda *same: same, *old)
            metrics = _divide(sums) | {"train/loss": loss, "train/grad_norm": norm} | facts
            if count_moved_in:
                metrics["train/weights_moved"] = _share_moved(state.params, params, count_moved_in)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, history=history)
        if schedule is not None:
            metrics["train/learning_rate"] = schedule(history["updates"] - is_update)  # skipped steps do not count
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
    """The new parameters, optimizer state and average, which is decay * ema + (1 - decay) * params."""
    updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)
    params = optax.apply_updates(params, updates)
    if ema is not None:  # it starts at the parameters, so nothing has to be unbiased
        ema = jax.tree.map(lambda average, new: average + (1 - ema_decay) * (new - average), ema, params)
    return params, opt_state, ema


def compute_scales(losses: dict[str, WeightedSum], loss_coefs: Mapping[str, float]) -> dict[str, jax.Array]:
    """coef / weight of each loss, float32 []; 0 where the weight is 0. Raises ValueError for a coef without a loss."""
    if unknown := set(loss_coefs) - set(losses):
        raise ValueError(
            f"loss_coefs name {', '.join(sorted(unknown))}; expected names of losses: {', '.join(sorted(losses))}"
        )
    scales = {}
    for name, (_, weight) in losses.items():
        quotient = loss_coefs.get(name, 1.0) / jnp.where(weight > 0, weight, 1)
        scales[name] = jnp.where(weight > 0, quotient, 0)
    return scales


def _divide(sums: LossSums) -> dict[str, jax.Array]:
    """Means as "train/NAME" with "weight_of/NAME", of metrics and, where there are several, of losses, "loss/NAME".

    And "train/weight" of the first loss, "train/weight/NAME" of each of several.
    """
    several = sums.losses if len(sums.losses) > 1 else {}
    means = sums.metrics | {f"loss/{name}": term for name, term in several.items()}
    scales = compute_scales(means, {})
    values = {f"train/{name}": term.total * scales[name] for name, term in means.items()}
    values["train/weight"] = next(iter(sums.losses.values())).weight
    values |= {f"train/weight/{name}": term.weight for name, term in several.items()}
    return values | {f"weight_of/{name}": term.weight for name, term in means.items()}


def sum_gradients(
    loss_fn: LossFn,
    state: TrainState,
    batch,
    rng: jax.Array,
    micro_batches: int,
    mesh: Mesh | None,
    state_shardings: TrainState | None,
    loss_coefs: Mapping[str, float],
) -> tuple[Any, LossSums]:
    """``(gradients, sums)`` of a batch, all float32.

    The gradients are those of the total of the only loss, or of several those of the sum of coef * total / weight.
    """

    def compute_objective(params, rows, rng, scales):
        sums = _as_float32(loss_fn(merge_params(params, state.frozen), rows, rng))
        if len(sums.losses) == 1:
            return next(iter(sums.losses.values())).total, sums
        if scales is None:  # these rows are the whole batch
            scales = compute_scales(jax.lax.stop_gradient(sums.losses), loss_coefs)
        return sum(term.total * scales[name] for name, term in sums.losses.items()), sums

    def compute_one(rows, rng, scales=None):
        grads, sums = jax.grad(compute_objective, has_aux=True)(state.params, rows, rng, scales)
        if state_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), sums

    def add_one(scales, total, indexed_rows):
        index, rows = indexed_rows
        return jax.tree.map(jnp.add, total, compute_one(rows, jax.random.fold_in(rng, index), scales)), None

    def add_weights(total, indexed_rows):
        index, rows = indexed_rows
        sums = _as_float32(loss_fn(merge_params(state.params, state.frozen), rows, jax.random.fold_in(rng, index)))
        return {name: total[name] + term.weight for name, term in sums.losses.items()}, None

    micro = split_rows(batch, micro_batches, mesh)
    first = jax.tree.map(lambda x: x[0], micro)
    if micro_batches == 1:
        return compute_one(first, jax.random.fold_in(rng, 0))
    indexed, scales = (jnp.arange(micro_batches), micro), None
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute_one, first, rng))
    losses = zeros[1].losses
    if len(losses) > 1:
        weights, _ = jax.lax.scan(add_weights, {name: term.weight for name, term in losses.items()}, indexed)
        scales = compute_scales({name: losses[name]._replace(weight=weights[name]) for name in losses}, loss_coefs)
    total, _ = jax.lax.scan(functools.partial(add_one, scales), zeros, indexed)
    return total


def _as_float32(sums: LossSums) -> LossSums:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sums)


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


def _share_moved(old, new, dtype: str) -> jax.Array:
    """Share of the scalars that differ between two trees after rounding to ``dtype``."""
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    moved = functools.reduce(
        jnp.add, (jnp.mean(a.astype(dtype) != b.astype(dtype), dtype=jnp.float32) * float(a.size) for a, b in pairs)
    )
    return moved / float(sum(a.size for a, _ in pairs))


def make_eval_step(loss_fn: LossFn, mesh: Mesh | None = None):
    """Jitted ``eval_step(params, frozen, batch) -> LossSums``, float32.

    Add the sums up over all batches, then divide each by its weight: a mean of means would depend on the batches.
    """

    def eval_step(params, frozen, batch):
        with mesh_context(mesh):
            return _as_float32(loss_fn(merge_params(params, frozen), batch, jax.random.key(0)))

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

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
