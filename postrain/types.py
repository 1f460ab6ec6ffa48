"""The pytrees that travel between the parts, every field with its shape.

Legend: B rows of a batch, T positions of a row, L layers.
"""

from typing import Any, NamedTuple

import flax.struct
import jax


@flax.struct.dataclass
class Batch:
    """Packed rows. Shifted once, by the data pipeline: ``targets[b, t]`` is what follows ``tokens[b, t]``.

    A pipeline yields the same fields as a dict of numpy arrays; ``Batch(**arrays)`` on the device side.
    """

    tokens: jax.Array | None  # int32 [B, T]; None where ``fields`` are the input
    targets: jax.Array | None  # int32 [B, T]; any valid id where loss_mask is 0, never -100
    loss_mask: jax.Array  # float32 [B, T]; weight of the prediction of targets[b, t], 0 where not trained
    segment_ids: jax.Array  # int32 [B, T]; 0 = padding, 1, 2, ... = documents of the row, in order
    positions: jax.Array  # int32 [B, T]; restart at 0 with each document
    # What else a model or a loss reads, by name: fields of events [B, T], targets of heads [B, S] or [B, T].
    fields: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


class WeightedSum(NamedTuple):
    """A weighted sum of values and the sum of their weights; the mean is ``total / weight``, 0 for weight 0."""

    total: jax.Array  # float32 []
    weight: jax.Array  # float32 []


class LossSums(NamedTuple):
    """What a loss function returns for the rows it is given: named losses, which train, and metrics, which do not.

    Sums add up over micro-batches and devices; each is divided once, by its own weight over the whole batch. The
    weights of losses must not depend on parameters.
    """

    losses: dict[str, WeightedSum]
    metrics: dict[str, WeightedSum]


@flax.struct.dataclass
class RowTerms:
    """What a model adds to the loss of every trained token of a row, such as the losses of its routers."""

    loss: jax.Array  # float32 [B]
    metrics: dict[str, jax.Array]  # float32 [B] each; averaged over trained tokens


@flax.struct.dataclass
class TrainState:
    """All that a train step reads and replaces. ``params`` trains, ``frozen`` does not.

    With LoRA the adapters are in ``params`` and the base model in ``frozen``: two nested dicts with
    disjoint leaves that ``postrain.models.params.merge_params`` puts together.
    """

    step: jax.Array  # int32 []; number of finished updates
    params: Any  # nested dict of float32 arrays
    frozen: Any  # nested dict of arrays, {} when everything trains
    opt_state: Any  # optax state over params
    rng: jax.Array  # PRNG key []; folded with the step, never split and replaced
    ema: Any = None  # like params, or None when the moving average is off
    history: Any = None  # of losses and gradient norms, see postrain.training.spikes
