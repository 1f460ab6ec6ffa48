"""Losses of heads: classification and regression, of one head or several."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from postrain.types import Batch, LossSums, RowTerms, WeightedSum


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) of classes: float32 [...] from logits [..., K] and int32 [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """(output - target)^2 of scalars: float32 [...] from [..., 1] and float [...]."""
    return jnp.square(outputs[..., 0].astype(jnp.float32) - targets)


def make_head_loss(compute_outputs: Callable, losses: dict[str, Callable]) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums`` with one loss for each head, by its name.

    Args:
      compute_outputs: ``(params, batch) -> (outputs, present, RowTerms | None)``, the first two by head: [..., K] and
        bool [...] (``postrain.training.model.Forward.heads``, or a function around
        ``postrain.models.heads.apply_heads``).
      losses: head -> ``cross_entropy`` or ``squared_error``, of its outputs and ``batch.fields[head]`` [...].

    Each head's loss is a mean over the places where it is present; they may differ from head to head. All places count
    the same, or as ``batch.fields["NAME_weights"]`` [...] of the head says, or ``batch.fields["weights"]`` of all: a
    place of weight 0 has no target, and what stands there does not matter. Metrics: "NAME_accuracy" of classes. Where
    the routers of a mixture of experts have losses, those are one more, ``router``, a mean over the positions that are
    not padding.
    """

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        outputs, present, terms = compute_outputs(params, batch)
        sums = LossSums({}, {})
        for name, loss in losses.items():
            targets = batch.fields[name]
            weights = present[name] * batch.fields.get(f"{name}_weights", batch.fields.get("weights", jnp.ones(())))
            count = lambda values, weights=weights: WeightedSum(
                jnp.where(weights > 0, values * weights, 0).sum(), weights.sum()
            )
            sums.losses[name] = count(loss(outputs[name], targets))
            if loss is cross_entropy:
                sums.metrics[f"{name}_accuracy"] = count(outputs[name].argmax(-1) == targets)
        return add_router_loss(sums, terms, (batch.segment_ids > 0).sum(1))

    return loss_fn


def add_router_loss(sums: LossSums, terms: RowTerms | None, weights_B: jax.Array) -> LossSums:
    """``sums`` with the loss ``router`` and the routers' metrics, rows weighted by ``weights_B``; None: as they are."""
    if terms is None:
        return sums
    mean = lambda values_B: WeightedSum((values_B * weights_B).sum(), weights_B.sum())
    metrics = {name: mean(values_B) for name, values_B in terms.metrics.items()}
    return LossSums(sums.losses | {"router": mean(terms.loss)}, sums.metrics | metrics)
