"""Supervised fine-tuning: the negative log-likelihood of the trained tokens, and variants of it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from postrain.config import SftSection
from postrain.objectives.logprobs import TokenLogprobs
from postrain.types import Batch, LossSums, RowTerms, WeightedSum


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
        sums = {"accuracy": correct_sum}
        if router_losses and terms is not None:
            sums["nll"] = nll_sum
        return _make_sums(nll_sum, sums, terms if router_losses else None, batch)

    return loss_fn


def divide_by_tokens(loss_fn: Callable, field: str) -> Callable:
    """``loss_fn``, from ``make_sft_loss`` or ``make_token_loss``, with tokens weighted by ``batch.fields[field]`` too.

    Unlike those of ``batch.loss_mask``, these weights [B, T] are not a part of what the loss is divided by: an update
    of small weights is a small update, as importance weights have it.
    """

    def weighted(params, batch: Batch, rng: jax.Array) -> LossSums:
        number = batch.loss_mask.sum()
        batch = dataclasses.replace(batch, loss_mask=batch.loss_mask * batch.fields[field])
        sums = loss_fn(params, batch, rng)
        return LossSums({name: WeightedSum(term.total, number) for name, term in sums.losses.items()}, sums.metrics)

    return weighted


def measure_weights(batch: Batch, field: str = "") -> dict[str, jax.Array]:
    """Metrics of a batch that say how unequal the weights of its trained tokens are; ``field`` as above.

    ``train/weights/mean``; ``train/weights/effective_share``, (sum w)^2 / sum w^2 by the number of tokens: 1 where all
    count the same, 0 where none counts.
    """
    number = (batch.loss_mask != 0).sum()
    weights_BT = batch.loss_mask * batch.fields[field] if field else batch.loss_mask
    total, squares = weights_BT.sum(), jnp.square(weights_BT).sum()
    divide = lambda above, below: above / jnp.where(below > 0, below, 1)
    share = divide(divide(total, number) * total, squares)
    return {"train/weights/mean": divide(total, number), "train/weights/effective_share": share}


def make_token_loss(logprobs: Callable, options: SftSection, *, router_losses: bool = True) -> Callable:
    """As ``make_sft_loss``, of ``compute_token_loss``; metric ``nll`` is the likelihood without the options.

    ``logprobs(params, batch, rng) -> (TokenLogprobs [B, T], RowTerms | None)``
    (``postrain.training.model.Forward.logprobs``, perhaps with noise in its input).
    """

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        found, terms = logprobs(params, batch, rng)
        add = lambda values_BT: (values_BT * batch.loss_mask).sum()
        sums = {"accuracy": add(found.correct), "nll": add(-found.logprobs)}
        return _make_sums(add(compute_token_loss(found, options)), sums, terms if router_losses else None, batch)

    return loss_fn


def _make_sums(loss_sum, metric_sums: dict, terms: RowTerms | None, batch: Batch) -> LossSums:
    weight = batch.loss_mask.sum()
    if terms is not None:
        weights_B = batch.loss_mask.sum(1)
        metric_sums |= {name: (values_B * weights_B).sum() for name, values_B in terms.metrics.items()}
        loss_sum = loss_sum + (terms.loss * weights_B).sum()
    metrics = {name: WeightedSum(total, weight) for name, total in metric_sums.items()}
    return LossSums({"sft": WeightedSum(loss_sum, weight)}, metrics)


def compute_token_loss(found: TokenLogprobs, options: SftSection) -> jax.Array:
    """The loss of every token, float32 [B, T].

        w * ((1 - e) * nll + e * cross entropy with the uniform distribution) + z_loss_coef * logsumexp^2

    with e ``label_smoothing`` (Szegedy et al. 2015, arXiv:1512.00567) and w the product of what is switched on:
    (1 - p)^``focal_gamma`` (Lin et al. 2017, arXiv:1708.02002), and p itself, without a gradient, for
    ``probability_weights`` (dynamic fine-tuning, DFT; Wu et al. 2025, arXiv:2508.05629). Where ``nll_clip`` is above 0,
    a token with a larger nll counts as that much and has no gradient: what the model finds next to impossible is more
    often an error in the data than something to learn. z-loss is PaLM's (arXiv:2204.02311).
    """
    nll, p = -found.logprobs, jnp.exp(found.logprobs)
    loss = nll
    if options.label_smoothing:
        loss = (1 - options.label_smoothing) * nll - options.label_smoothing * found.uniform
    if options.focal_gamma:
        # -expm1, not 1 - p, whose power has no gradient at p = 1.
        unlikely = jnp.maximum(-jnp.expm1(found.logprobs), jnp.finfo(p.dtype).tiny)
        loss = unlikely**options.focal_gamma * loss
    if options.probability_weights:
        loss = jax.lax.stop_gradient(p) * loss
    if options.nll_clip:
        loss = jnp.where(nll > options.nll_clip, options.nll_clip, loss)
    if options.z_loss_coef:
        loss = loss + options.z_loss_coef * jnp.square(found.logsumexp)
    return loss
