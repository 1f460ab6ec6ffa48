"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from collections.abc import Callable

import jax

from postrain.objectives.logprobs import compute_weighted_nll
from postrain.types import Batch


def make_sft_loss(
    compute_hidden: Callable, get_unembedding: Callable, *, vocab_size: int, softcap: float, chunk: int
) -> Callable:
    """``loss_fn(params, batch, rng) -> (loss_sum, weight_sum, metric_sums)``: sums over trained tokens.

    ``compute_hidden(params, tokens, segment_ids, positions) -> ([B, T, D], RowTerms or None)`` and
    ``get_unembedding(params) -> [V', D]`` are the model. The loss of a step is loss_sum / weight_sum over all
    devices and micro-batches:
    every trained token counts the same, wherever it lies. ``softcap``: of the logits, 0 where the model has none.
    ``chunk``: trained tokens projected at a time.
    """

    def loss_fn(params, batch: Batch, rng: jax.Array):
        del rng
        hidden, terms = compute_hidden(params, batch.tokens, batch.segment_ids, batch.positions)
        loss_sum, correct_sum = compute_weighted_nll(
            hidden,
            get_unembedding(params),
            batch.targets,
            batch.loss_mask,
            vocab_size=vocab_size,
            chunk=chunk,
            softcap=softcap,
        )
        metric_sums = {"accuracy": correct_sum}
        if terms is not None:  # every trained token bears its row's
            weights_B = batch.loss_mask.sum(1)
            metric_sums |= {name: (values_B * weights_B).sum() for name, values_B in terms.metrics.items()}
            metric_sums["nll"], loss_sum = loss_sum, loss_sum + (terms.loss * weights_B).sum()
        return loss_sum, batch.loss_mask.sum(), metric_sums

    return loss_fn
