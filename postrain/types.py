"""The pytrees that travel between the parts, every field with its shape.

Legend: B rows of a batch, T positions of a row, L layers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Batch:
    """Packed rows. Shifted once, by the data pipeline: ``targets[b, t]`` is what follows ``tokens[b, t]``.

    A pipeline yields the same arrays in one flat dict; ``Batch.from_arrays`` sorts them into the fields.
    """

    tokens: jax.Array | None  # int32 [B, T]; None where ``fields`` are the input
    targets: jax.Array | None  # int32 [B, T]; any valid id where loss_mask is 0, never -100
    loss_mask: jax.Array  # float32 [B, T]; weight of the prediction of targets[b, t], 0 where not trained
    segment_ids: jax.Array  # int32 [B, T]; 0 = padding, 1, 2, ... = documents of the row, in order
    positions: jax.Array  # int32 [B, T]; restart at 0 with each document, and after a shared prefix go on from its end
    # What else a model or a loss reads, by name: the ``scores`` of answers [B, T], targets of heads [B, S] or [B, T].
    fields: dict[str, jax.Array] = flax.struct.field(default_factory=dict)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "Batch":
        """The five arrays that all batches have by their names; every other one becomes an entry of ``fields``."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "fields"]
        further = {name: array for name, array in arrays.items() if name not in names}
        known: dict[str, Any] = {name: arrays.get(name) for name in names}
        return cls(**known, fields=further)

    @property
    def prefix(self) -> "Prefix | None":
        """What documents see of the row before themselves; None: nothing, as in most data sets."""
        if "prefix_starts" not in self.fields:
            return None
        return Prefix(self.fields["prefix_starts"], self.fields["prefix_ends"])


class Prefix(NamedTuple):
    """A part of the row that several documents begin with: the prompt of a group of answers.

    Each position sees the positions starts..ends-1 of its row besides those of its own document; none where both are
    equal. They end before the document begins, are one document, and their ``positions`` count from 0.
    """

    starts: jax.Array  # int32 [B, T]
    ends: jax.Array  # int32 [B, T]


class WeightedSum(NamedTuple):
    """A weighted sum of values and the sum of their weights; the mean is ``total / weight``, 0 for weight 0."""

    total: jax.Array  # float32 []
    weight: jax.Array  # float32 []


class LossSums(NamedTuple):
    """What a loss function returns for the rows it is given: named losses, which train, and metrics, which do not.

    Sums add up over micro-batches and devices; each is divided once, by its own weight over the whole batch. The
    weights of losses have no gradient.
    """

    losses: dict[str, WeightedSum]
    metrics: dict[str, WeightedSum]


@flax.struct.dataclass
class RowTerms:
    """What a model adds to the loss of every trained token of a row, such as the losses of its routers."""

    loss: jax.Array  # float32 [B]
    metrics: dict[str, jax.Array]  # float32 [B] each; averaged over trained tokens


class TrainState(flax.struct.PyTreeNode):
    """All that a train step reads and replaces. ``params`` trains, ``frozen`` does not.

    With LoRA the adapters are in ``params`` and the base model in ``frozen``: two nested dicts with
    disjoint leaves that ``postrain.models.params.merge_params`` puts together.
    """

    step: jax.Array  # int32 []; calls of the train step, those whose update was skipped included
    params: Any  # nested dict of float32 arrays
    frozen: Any  # nested dict of arrays, {} when everything trains
    opt_state: Any  # optax state over params
    rng: jax.Array  # PRNG key []; folded with the step, never split and replaced
    ema: Any = None  # like params, or None when the moving average is off
    history: Any = None  # of losses and gradient norms, see postrain.training.spikes


class BatchFacts(NamedTuple):
    """What the loop says of an item of a source, and counts of it."""

    name_rows: Callable[[], str]  # "file:line, file:line, ...": where its documents come from, for errors
    arrays: Mapping[str, np.ndarray]  # on the host, this process's rows


Item = TypeVar("Item", covariant=True)


class Source(Protocol[Item]):
    """What a loop trains on: an endless iterator with a position. Of several processes each has its own."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of what decides the items and their order, JSON: a checkpoint of another one is refused."""

    def __next__(self) -> Item: ...

    def get_state(self) -> dict[str, Any]:
        """The position of this process after the last item, JSON."""

    def join_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The position of the run out of those of its processes, in their order."""

    def set_state(self, state: dict[str, Any] | None, step: int) -> None:
        """Continues after the item of ``step`` from the run's ``state``; None: begins anew there."""

    def describe_last(self) -> BatchFacts: ...

    def format_consumption(self, state: dict[str, Any]) -> list[str]:
        """A line for each part of the data that says how much of it was consumed up to the run's ``state``."""

    def close(self) -> None: ...
