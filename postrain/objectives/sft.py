"""Supervised fine-tuning: the negative log-likelihood of the trained tokens, and variants of it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from postrain.config import SftSection
from postrain.objectives.logprobs import TokenLogprobs
from postrain.objectives.segments import reduce_segments
from postrain.types import Batch, LossSums, RowTerms, WeightedSum

_STEEPEST = 30.0  # of exponents: weights up to e^30, whose squares float32 can add up


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


def make_advantage_loss(compute: Callable, options: SftSection, field: str, *, router_losses: bool = True) -> Callable:
    """As ``make_token_loss``, each document's tokens weighted by how far its reward is above what a head expected.

    With V the head's output at the position that predicts the document's first trained token, which has read what comes
    before any answer that is trained, and r its reward, the weight is

        exp((r - V) / temperature), at most ``clip``

    without a gradient, its exponent kept within -30 and 30. The loss ``value``, (r - V)^2, trains the head; a document
    counts in it as its first trained token does in the batch.

    Args:
      compute: ``(params, batch, rng) -> (TokenLogprobs [B, T], outputs [B, T, 1], RowTerms | None)``
        (``postrain.training.model.Forward.logprobs_and_outputs``).
      field: of the batch, float32 [B, T]: at every trained position the reward of the document.

    Metrics besides: ``weights/mean`` and ``weights/square``, over trained tokens; ``weights/limited``, the share of
    documents whose weight was lowered or raised to a limit.
    """
    section = options.weights
    highest = min(math.log(section.clip), _STEEPEST) if section.clip else _STEEPEST

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        found, outputs, terms = compute(params, batch, rng)
        rewards_BT = batch.fields[field]
        values_BT, is_first_BT = read_before_answers(outputs[..., 0], batch)
        exponents_BT = (rewards_BT - jax.lax.stop_gradient(values_BT)) / section.temperature
        weights_BT = batch.loss_mask * jnp.exp(jnp.clip(exponents_BT, -_STEEPEST, highest))
        weighted = make_token_loss(lambda *_: (found, terms), options, router_losses=router_losses)
        sums = weighted(params, dataclasses.replace(batch, loss_mask=weights_BT), rng)

        counts_BT = jnp.where(is_first_BT, batch.loss_mask, 0)
        errors_BT = jnp.where(is_first_BT, jnp.square(rewards_BT - values_BT), 0)
        value = WeightedSum((errors_BT * counts_BT).sum(), counts_BT.sum())
        is_limited_BT = is_first_BT & ((exponents_BT > highest) | (exponents_BT < -_STEEPEST))
        tokens = (batch.loss_mask != 0).sum()
        metrics = {
            "weights/mean": WeightedSum(weights_BT.sum(), tokens),
            "weights/square": WeightedSum(jnp.square(weights_BT).sum(), tokens),
            "weights/limited": WeightedSum(is_limited_BT.sum(), is_first_BT.sum()),
        }
        return LossSums(sums.losses | {"value": value}, sums.metrics | metrics)

    return loss_fn


def read_before_answers(outputs_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What a head says of each document before its first trained token, at all its positions; and where that is.

    Float32 [B, T], and bool [B, T], true at one position of each document that trains a token. Without one, and in
    padding, the number stands for nothing.
    """
    length = batch.loss_mask.shape[1]
    places_BT = jnp.broadcast_to(jnp.arange(length), batch.loss_mask.shape)
    is_trained_BT = (batch.loss_mask != 0) & (batch.segment_ids > 0)
    trained_BT = jnp.where(is_trained_BT, places_BT, length - 1)
    first_BS = reduce_segments(jax.ops.segment_min, trained_BT, batch.segment_ids, length + 1)
    first_BT = jnp.take_along_axis(first_BS, batch.segment_ids, axis=1)
    return jnp.take_along_axis(outputs_BT, first_BT, axis=1), is_trained_BT & (places_BT == first_BT)


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
