"""A recipe's loss, optimizer and jitted update for one model: what a run executes and ``postrain plan`` compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from postrain.config import Config, DataConfig
from postrain.data.documents import NO_LAYOUT, Layout
from postrain.errors import UserError
from postrain.sharding import BATCH_AXES, batch_sharding, num_row_shards
from postrain.training.model import Model
from postrain.training.optimizer import make_optimizer
from postrain.training.step import abstract_train_state, make_train_step, shardings_of
from postrain.types import Batch, TrainState


@dataclasses.dataclass
class Program:
    """What ``build_program`` makes of a config and a model, which may be abstract.

    Attributes:
      loss_fn: of training, see ``postrain.training.step``.
      eval_loss_fn: of held-out rows, without the terms that only training adds.
      abstract_state, abstract_batch: ``jax.ShapeDtypeStruct`` with shardings.
      loss_coefs: factors of the named losses, 1 for the others.
      updates: of the whole run.
      train_step: ``(state, batch) -> (state, metrics)``: jitted, and after ``compile`` the executable.
      model: what it is for, with a teacher or reference where the recipe holds one beside it.
    """

    loss_fn: Callable
    eval_loss_fn: Callable
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    abstract_batch: Batch
    loss_coefs: Mapping[str, float]
    updates: int
    train_step: Any
    model: Model

    def compile(self) -> jax.stages.Compiled:
        """Compiles the train step for the abstract state and batch, on the devices of this process."""
        self.train_step = self.train_step.lower(self.abstract_state, self.abstract_batch).compile()
        return self.train_step


def build_program(
    config: Config,
    model: Model,
    mesh: Mesh,
    updates: int,
    *,
    loss_fn: Callable,
    eval_loss_fn: Callable | None = None,
    loss_coefs: Mapping[str, float] | None = None,
    layout: Layout = NO_LAYOUT,
) -> Program:
    """The program of a recipe with this loss.

    Args:
      updates: of the whole run, for the learning-rate schedule.
      eval_loss_fn: None: the same as ``loss_fn``.
      loss_coefs: of losses that do not count 1, by name.
      layout: of the rows' further arrays; all batches have the five of ``Batch``.
    """
    optimizer, schedule = make_optimizer(config.optimizer, updates)
    average = config.optimizer.ema_decay > 0
    abstract = abstract_train_state(model.params, model.frozen, optimizer, mesh=mesh, ema=average)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        loss_coefs=loss_coefs,
        micro_batches=config.train.micro_batches,
        mesh=mesh,
        state_shardings=shardings_of(abstract),
        max_grad_norm=config.optimizer.max_grad_norm,
        ema_decay=config.optimizer.ema_decay,
        schedule=schedule,
        spike_threshold=config.train.spike.threshold if config.train.spike.policy != "none" else 0.0,
        count_moved_in=model.config.compute_dtype if config.train.count_moved else "",
    )
    batch = abstract_batch(config.data, mesh, layout)
    coefs = loss_coefs or {}
    return Program(loss_fn, eval_loss_fn or loss_fn, optimizer, abstract, batch, coefs, updates, train_step, model)


def abstract_batch(config: DataConfig, mesh: Mesh, layout: Layout = NO_LAYOUT) -> Batch:
    """The shapes of a training batch, laid out over ``mesh``: what the train step is compiled for.

    Raises UserError when rows or positions do not divide over the devices.
    """
    shards = num_row_shards(mesh)
    if config.batch_size % shards:
        raise UserError(
            f"config key 'data.batch_size' = {config.batch_size} must be a multiple of mesh.data x mesh.fsdp x "
            f"mesh.expert = {' x '.join(str(mesh.shape[axis]) for axis in BATCH_AXES)} = {shards}: change one of them "
            "(mesh.fsdp takes all devices that are left unless it is set)"
        )
    if config.sequence_length % mesh.shape["sequence"]:
        raise UserError(
            f"config key 'data.sequence_length' = {config.sequence_length} must be a multiple of mesh.sequence = "
            f"{mesh.shape['sequence']}"
        )
    shape, sharding = (config.batch_size, config.sequence_length), batch_sharding(mesh)
    entries: dict[str, tuple[Any, tuple[int, ...]]] = {
        name: (np.int32, ()) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    entries |= {"loss_mask": (np.float32, ())} | dict(layout.arrays)
    return Batch.from_arrays(
        {
            name: jax.ShapeDtypeStruct(shape + tuple(entry), jnp.dtype(dtype), sharding=sharding)
            for name, (dtype, entry) in entries.items()
        }
    )
