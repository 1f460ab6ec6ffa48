"""Single answers with a label, desirable or not: make those more likely than the reference does, and these less.

With the ratio of an answer, log p - log p_ref over its trained tokens, and y = 1 for a desirable one, -1 for another:

    margin = y * (beta * ratio - shift)

The shift is what counts as no change. It is a number of the whole update, without a gradient. ``UNPAIRED`` has, for
each name of ``preference.loss``, the shift and the loss of a margin, with its paper. The loss of an update is the mean
over its answers, each times ``desirable_weight`` or ``undesirable_weight``.

Legend: B rows, T positions, S segments of a row at most, counted from 0 = padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from postrain.config import PreferenceSection
from postrain.objectives.heads import add_router_loss
from postrain.objectives.segments import reduce_segments, sum_segments
from postrain.types import Batch, LossSums, WeightedSum


class Answers(NamedTuple):
    """The answers of packed rows, [B, S]."""

    logp: jax.Array  # float32; sum of log p over the trained tokens
    ratio: jax.Array  # float32; sum of log p - log p_ref, token by token
    length: jax.Array  # float32; number of trained tokens
    desirable: jax.Array  # bool
    undesirable: jax.Array  # bool
    mismatched: jax.Array  # bool; answers to another prompt, which only say how far the model has moved

    @property
    def labelled(self) -> jax.Array:
        return self.desirable | self.undesirable

    def sum(self, values_BS: jax.Array, of_BS: jax.Array) -> WeightedSum:
        """Over those answers that are in ``of_BS``, and their number."""
        add = lambda values: jnp.where(of_BS, values, 0).sum(dtype=jnp.float32)
        return WeightedSum(add(values_BS), add(1.0))


Shift = Callable[[Answers, float], jax.Array]  # of (answers, beta); float32 []


def _drift(answers: Answers, beta: float) -> jax.Array:
    """beta times the estimated KL from the reference: the mean ratio of mismatched answers, at least 0."""
    total, number = answers.sum(answers.ratio, answers.mismatched)
    return beta * jnp.maximum(total / jnp.maximum(number, 1), 0)


def _middle(answers: Answers, beta: float) -> jax.Array:
    """Halfway between the mean rewards of both labels; where the update has only one of them, that one's mean."""
    sums = [answers.sum(beta * answers.ratio, of) for of in (answers.desirable, answers.undesirable)]
    means = [total / jnp.maximum(number, 1) for total, number in sums]
    return sum(means) / jnp.maximum(sum(number > 0 for _, number in sums), 1)


UNPAIRED: dict[str, tuple[Shift, Callable[[jax.Array], jax.Array]]] = {
    "kto": (_drift, lambda margin: sigmoid(-margin)),  # arXiv:2402.01306, eq. 7
    "bco": (_middle, lambda margin: -log_sigmoid(margin)),  # arXiv:2404.04656, its shift over the update
    "apo_zero_unpaired": (lambda answers, beta: jnp.zeros(()), lambda margin: sigmoid(-margin)),  # arXiv:2408.06266
}


def make_unpaired_loss(
    logprobs: Callable, reference_logprobs: Callable, options: PreferenceSection, *, router_losses: bool = True
) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums``; the loss ``preference`` is a mean over labelled answers.

    The arguments are those of ``make_preference_loss``. ``batch.fields`` has ``labels`` int32 [B, T]: 1, 0, and -1 for
    mismatched answers, which only say how far the model has moved. The rows must be the whole update: the shift is a
    mean over them.

    Metrics, all means: ``rewards/chosen``, ``logps/chosen`` over desirable answers, ``rewards/rejected``,
    ``logps/rejected`` over the others, ``rewards/accuracies``, whether the margin is above 0, and ``desirable``, the
    share of desirable ones, over both; with mismatched answers ``kl``, their mean ratio, which may be below 0. With
    ``nll_coef`` a second loss ``nll``, the mean of -log p over the tokens of desirable answers.
    """
    find_shift, loss_of = UNPAIRED[options.loss]

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        tokens, terms = logprobs(params, batch)
        reference_BT = jax.lax.stop_gradient(reference_logprobs(jax.lax.stop_gradient(params), batch))
        answers = find_answers(batch, tokens.logprobs, tokens.logprobs - reference_BT)
        held = jax.tree.map(jax.lax.stop_gradient, answers)
        rewards_BS, sign_BS = options.beta * answers.ratio, jnp.where(answers.desirable, 1, -1)
        margins_BS = sign_BS * (rewards_BS - find_shift(held, options.beta))
        weights_BS = jnp.where(answers.desirable, options.desirable_weight, options.undesirable_weight)
        losses = {"preference": answers.sum(weights_BS * loss_of(margins_BS), answers.labelled)}
        if options.nll_coef:
            total, _ = answers.sum(-answers.logp, answers.desirable)
            losses["nll"] = WeightedSum(total, answers.sum(answers.length, answers.desirable).total)

        metrics = {
            "rewards/chosen": held.sum(rewards_BS, held.desirable),
            "rewards/rejected": held.sum(rewards_BS, held.undesirable),
            "rewards/accuracies": held.sum(margins_BS > 0, held.labelled),
            "logps/chosen": held.sum(held.logp, held.desirable),
            "logps/rejected": held.sum(held.logp, held.undesirable),
            "desirable": held.sum(held.desirable, held.labelled),
        }
        if options.loss == "kto":
            metrics["kl"] = held.sum(held.ratio, held.mismatched)
        sums = LossSums(losses, jax.lax.stop_gradient(metrics))
        return add_router_loss(sums, terms, batch.loss_mask.sum(1)) if router_losses else sums

    return loss_fn


def find_answers(batch: Batch, logprobs_BT: jax.Array, ratios_BT: jax.Array) -> Answers:
    """The answers of a batch: every segment with a trained token."""
    count = lambda values_BT: sum_segments(values_BT.astype(jnp.float32), batch.segment_ids)
    length_BS = count(batch.loss_mask != 0)
    num_segments = batch.segment_ids.shape[1] + 1
    labels_BS = reduce_segments(jax.ops.segment_max, batch.fields["labels"], batch.segment_ids, num_segments)
    of_label = [(labels_BS == label) & (length_BS > 0) for label in (1, 0, -1)]
    return Answers(count(logprobs_BT), count(ratios_BT), length_BS, *of_label)
