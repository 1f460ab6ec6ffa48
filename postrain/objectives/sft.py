"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from collections.abc import Callable

import jax

from postrain.types import Batch, LossSums, WeightedSum


def make_sft_loss(compute_nll: Callable, *, router_losses: bool = True) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums``, sums over trained tokens.

    ``compute_nll(params, batch) -> (nll_sum, correct_sum, RowTerms | None)`` is the model: float32 [], weighted by
    ``batch.loss_mask`` (``postrain.training.model.Forward.nll``). The loss of an update is its total over all devices
    and micro-batches by the number of trained tokens: each counts the same (or by its row's weight), wherever it
    lies. ``router_losses``: add those of a mixture of experts, each row's counted once for each of its trained tokens;
    metric ``nll`` is then the loss without them.
    """

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        nll_sum, correct_sum, terms = compute_nll(params, batch)
        weight = batch.loss_mask.sum()
        loss_sum, metric_sums = nll_sum, {"accuracy": correct_sum}
        if router_losses and terms is not None:
            weights_B = batch.loss_mask.sum(1)
            metric_sums |= {name: (values_B * weights_B).sum() for name, values_B in terms.metrics.items()}
            metric_sums["nll"], loss_sum = nll_sum, nll_sum + (terms.loss * weights_B).sum()
        metrics = {name: WeightedSum(total, weight) for name, total in metric_sums.items()}
        return LossSums({"sft": WeightedSum(loss_sum, weight)}, metrics)

    return loss_fn
