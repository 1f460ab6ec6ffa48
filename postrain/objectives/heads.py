"""Losses of heads: classification and regression, of one head or several."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from postrain.types import Batch


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) of classes: float32 [...] from logits [..., K] and int32 [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """(output - target)^2 of scalars: float32 [...] from [..., 1] and float [...]."""
    return jnp.square(outputs[..., 0].astype(jnp.float32) - targets)


def make_head_loss(compute_outputs: Callable, losses: dict[str, Callable]) -> Callable:
    """``loss_fn(params, batch, rng) -> (loss_sum, weight_sum, metric_sums)``: sums over what the masks mark.

    ``compute_outputs(params, batch) -> (outputs, masks)``, by head: [..., K] and bool [...] (see
    ``postrain.models.heads.apply_heads``). ``losses``: head -> ``cross_entropy`` or ``squared_error``, of its outputs
    and ``batch.fields[head]``. Several heads are added up and must stand at the same places: at each each counts the
    same, or as much as ``batch.fields["weights"]`` says where that is given: 0 where there is no target, whose content
    then does not matter. ``metric_sums`` has every head's loss, and "NAME_accuracy" of classes.
    """

    def loss_fn(params, batch: Batch, rng: jax.Array):
        del rng
        outputs, masks = compute_outputs(params, batch)
        loss_sum, metric_sums = 0.0, {}
        places = masks[next(iter(losses))]
        weights = places * batch.fields.get("weights", jnp.ones(()))
        count = lambda values: jnp.where(weights > 0, values * weights, 0).sum()
        for name, loss in losses.items():
            if masks[name] is not places:
                raise ValueError(f"heads {', '.join(losses)} of one loss stand at different places: train them apart")
            targets = batch.fields[name]
            metric_sums[name] = count(loss(outputs[name], targets))
            loss_sum += metric_sums[name]
            if loss is cross_entropy:
                metric_sums[f"{name}_accuracy"] = count(outputs[name].argmax(-1) == targets)
        return loss_sum, weights.sum(), metric_sums

    return loss_fn
