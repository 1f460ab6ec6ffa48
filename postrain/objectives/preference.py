"""Preferences: make the better of several answers to a prompt more likely than the others.

What a loss sees of an answer is log p of its trained tokens, the same of a reference model, and their number:

    ratio  = log p - log p_ref                       (log p where the loss has no reference)
    score  = ratio, or another divergence's f'(p / p_ref); divided by the length where lengths are normalised
    margin = beta * (score(chosen) - score(rejected)) - target_margin

``PAIR_LOSSES`` has a function of two answers for each name of ``preference.loss``, with its paper. The default,
``sigmoid``, is direct preference optimisation (DPO; Rafailov et al. 2023, arXiv:2305.18290, eq. 7). One of them,
``softmax``, takes the best answer of a list against all others; a pair is a list of two.

Answers come packed: those of a group are segments of one row with the same ``group_ids``, each after its own copy of
the prompt, or all after one, which is a segment without a group. So no sum leaves its row.

Legend: B rows, T positions, S segments of a row at most, G groups of a row at most; both are counted from 0 = padding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from postrain.config import PreferenceSection
from postrain.objectives.heads import add_router_loss
from postrain.objectives.segments import logistic_loss, reduce_segments, sum_segments
from postrain.types import Batch, LossSums, WeightedSum


class Answer(NamedTuple):
    """Of one answer of each group, float32 [B, G]; of all answers [B, S]."""

    logp: jax.Array  # sum of log p over the trained tokens
    ratio: jax.Array  # sum of log p - log p_ref, token by token: the two sums have most of their digits in common
    length: jax.Array  # number of trained tokens

    @property
    def reference(self) -> jax.Array:
        return self.logp - self.ratio


class Pair(NamedTuple):
    """The two answers of each group."""

    chosen: Answer
    rejected: Answer
    is_pair_BG: jax.Array  # bool; whether the row has such a group


Options = PreferenceSection
PairLoss = Callable[[Pair, Options], jax.Array]  # float32 [B, G]; anything where there is no pair


# --- what the losses compare ---


def _alpha_divergence(ratio: jax.Array, alpha: float) -> jax.Array:
    if abs(alpha - 1) < 1e-6:
        return ratio
    return jnp.expm1(jnp.minimum((alpha - 1) * ratio, 80.0)) / (alpha - 1)  # exp(80) is finite in float32


# f'(exp(ratio)) up to a constant, of the f-divergence that f makes (Wang et al. 2023, arXiv:2309.16240, table 1).
DIVERGENCES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: -jnp.expm1(jnp.minimum(-ratio, 80.0)),
    "js": lambda ratio, alpha: math.log(2) + log_sigmoid(ratio),
    "alpha": _alpha_divergence,
}


def _score(answer: Answer, options: Options) -> jax.Array:
    scores = DIVERGENCES[options.divergence](answer.ratio, options.divergence_alpha)
    return scores / jnp.maximum(answer.length, 1) if is_per_token(options) else scores


def is_per_token(options: Options) -> bool:
    """Whether scores and rewards are those of the mean token."""
    return options.per_token or options.loss in PER_TOKEN


def _margin(pair: Pair, options: Options) -> jax.Array:
    return options.beta * (_score(pair.chosen, options) - _score(pair.rejected, options)) - options.target_margin


# --- losses of pairs ---


def _logistic(pair: Pair, options: Options) -> jax.Array:
    return logistic_loss(_margin(pair, options), options.label_smoothing)


def _hinge(pair: Pair, options: Options) -> jax.Array:
    return jax.nn.relu(1 - _margin(pair, options))


def _ipo(pair: Pair, options: Options) -> jax.Array:
    return jnp.square((_margin(pair, options) - 0.5) / options.beta)


def _robust(pair: Pair, options: Options) -> jax.Array:
    margin, share = _margin(pair, options), options.label_smoothing
    return (-(1 - share) * log_sigmoid(margin) + share * log_sigmoid(-margin)) / (1 - 2 * share)


def _exo(pair: Pair, options: Options) -> jax.Array:
    """KL from the order that the model gives the two to the labels, of which a share is wrong."""
    margin, share = _margin(pair, options), options.label_smoothing
    right = sigmoid(margin) * (log_sigmoid(margin) - math.log1p(-share))
    return right + sigmoid(-margin) * (log_sigmoid(-margin) - math.log(share))


def _discopop(pair: Pair, options: Options) -> jax.Array:
    margin = _margin(pair, options)
    share = sigmoid(margin / 0.05)  # the temperature of the paper
    return -(1 - share) * log_sigmoid(margin) + share * jnp.exp(jnp.minimum(-margin, 80.0))


def _sppo_hard(pair: Pair, options: Options) -> jax.Array:
    target = 0.5 / options.beta
    return jnp.square(pair.chosen.ratio - target) + jnp.square(pair.rejected.ratio + target)


def _cal_dpo(pair: Pair, options: Options) -> jax.Array:
    """-log sigmoid of the margin, and each ratio near its target, half of 1 / beta above and below 0."""
    return -log_sigmoid(pair.chosen.ratio - pair.rejected.ratio) + _sppo_hard(pair, options)


def _nca(pair: Pair, options: Options) -> jax.Array:
    chosen, rejected = options.beta * pair.chosen.ratio, options.beta * pair.rejected.ratio
    return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


def _bco_pair(pair: Pair, options: Options) -> jax.Array:
    return -log_sigmoid(options.beta * pair.chosen.ratio) - log_sigmoid(-options.beta * pair.rejected.ratio)


def _apo_zero(pair: Pair, options: Options) -> jax.Array:
    return sigmoid(-options.beta * pair.chosen.ratio) + sigmoid(options.beta * pair.rejected.ratio)


def _apo_down(pair: Pair, options: Options) -> jax.Array:
    chosen, rejected = options.beta * pair.chosen.ratio, options.beta * pair.rejected.ratio
    return sigmoid(chosen) + sigmoid(rejected - chosen)


def _orpo(pair: Pair, options: Options) -> jax.Array:
    """-beta log sigmoid(log odds(chosen) - log odds(rejected)); odds = p / (1 - p), p the geometric mean of a token."""

    def log_odds(answer: Answer) -> jax.Array:
        mean = answer.logp / jnp.maximum(answer.length, 1)
        return mean - _log1mexp(mean)

    return -options.beta * log_sigmoid(log_odds(pair.chosen) - log_odds(pair.rejected))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of x < 0, exact near 0 and far from it."""
    x = jnp.minimum(x, -1e-7)  # a certain answer: odds of 1e7
    near = x > -math.log(2)
    of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _aot(pair: Pair, options: Options) -> jax.Array:
    """The sorted leads of the model against the sorted leads of the reference: one distribution above the other."""
    chosen, rejected = pair.chosen, pair.rejected
    leads = _sort(chosen.logp - rejected.logp, pair.is_pair_BG)
    reference = _sort(chosen.reference - rejected.reference, pair.is_pair_BG)
    return logistic_loss(options.beta * (leads - reference), options.label_smoothing)


def _aot_unpaired(pair: Pair, options: Options) -> jax.Array:
    chosen, rejected = (_sort(answer.ratio, pair.is_pair_BG) for answer in (pair.chosen, pair.rejected))
    return logistic_loss(options.beta * (chosen - rejected), options.label_smoothing)


def _sort(values_BG: jax.Array, is_pair_BG: jax.Array) -> jax.Array:
    """The values of all pairs of the batch in rising order, in the places that have a pair; 0 elsewhere."""
    rising = jnp.sort(jnp.where(is_pair_BG, values_BG, jnp.inf).ravel())
    places = jnp.cumsum(is_pair_BG.ravel()).reshape(is_pair_BG.shape) - 1
    return jnp.where(is_pair_BG, rising[places], 0)


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": _logistic,  # DPO; with label_smoothing conservative DPO (Mitchell 2023)
    "hinge": _hinge,  # SLiC (arXiv:2305.10425), as RSO has it (arXiv:2309.06657)
    "ipo": _ipo,  # arXiv:2310.12036, eq. 17, per token as its authors compute it
    "robust": _robust,  # arXiv:2403.00409: label_smoothing as the rate of wrong labels, without bias
    "exo": _exo,  # EXO-pref, arXiv:2402.00856, eq. 16; needs label_smoothing
    "discopop": _discopop,  # arXiv:2406.08414, eq. 5
    "sppo_hard": _sppo_hard,  # arXiv:2405.00675, eq. 4.7 with the chosen answer always winning
    "cal_dpo": _cal_dpo,  # arXiv:2412.14516
    "nca": _nca,  # NCA-pair, arXiv:2402.05369
    "bco_pair": _bco_pair,  # arXiv:2404.04656 without its moving average
    "apo_zero": _apo_zero,  # arXiv:2408.06266, eq. 7: chosen answers are better than the model's own
    "apo_down": _apo_down,  # eq. 8: they are worse
    "aot": _aot,  # AOT paired, arXiv:2406.05882
    "aot_unpaired": _aot_unpaired,
    # Without a reference:
    "cpo": _logistic,  # arXiv:2401.08417, with nll_coef
    "simpo": _logistic,  # arXiv:2405.14734: per token, target_margin is its gamma
    "orpo": _orpo,  # arXiv:2403.07691, with nll_coef
}
PER_TOKEN = ("ipo", "simpo")  # whatever the option says


def make_preference_loss(
    logprobs: Callable, reference_logprobs: Callable | None, options: Options, *, router_losses: bool = True
) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums``; the loss ``preference`` is a mean over groups.

    Args:
      logprobs: ``(params, batch) -> (TokenLogprobs [B, T], RowTerms | None)``, the model that is trained
        (``postrain.training.model.Forward.logprobs``).
      reference_logprobs: ``(params, batch) -> float32 [B, T]``, log p of the model to stay near; it gets ``params`` as
        constants. With LoRA the model without its adapters, or an array of the batch. None: there is no reference.
      options: the config's; its ``nll_coef`` is the factor of the loss ``nll``, applied by the train step.
      router_losses: whether the losses of routers count, which only training adds.

    ``batch.fields`` has ``group_ids`` int32 [B, T] (0 = padding) and ``scores`` float32 [B, T] (kind preference); the
    answer of the highest score is the chosen one. Metrics are those of ``_measure``, means over groups. With
    ``nll_coef`` a second loss ``nll``, the mean of -log p over the tokens of chosen answers. The losses of routers are
    one more loss, ``router``, a mean over trained tokens.
    """

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        found, terms = logprobs(params, batch)
        reference_BT = jnp.zeros_like(found.logprobs)
        if reference_logprobs is not None:
            reference_BT = jax.lax.stop_gradient(reference_logprobs(jax.lax.stop_gradient(params), batch))
        groups = find_groups(batch)
        count = lambda values_BT: sum_segments(values_BT.astype(jnp.float32), batch.segment_ids)
        all_BS = Answer(count(found.logprobs), count(found.logprobs - reference_BT), count(batch.loss_mask != 0))
        chosen = Answer(*(groups.mean(x, groups.chosen_BS) for x in all_BS))
        rejected = Answer(*(groups.mean(x, groups.rejected_BS) for x in all_BS))
        lengths_BS = jnp.maximum(all_BS.length, 1) if is_per_token(options) else 1
        rewards_BS = options.beta * all_BS.ratio / lengths_BS
        if options.loss == "softmax":
            losses_BG = compute_softmax_loss(rewards_BS, groups)
        else:
            losses_BG = PAIR_LOSSES[options.loss](Pair(chosen, rejected, groups.is_group_BG), options)

        values = _measure(groups, rewards_BS) | {"logps/chosen": chosen.logp, "logps/rejected": rejected.logp}
        add = lambda values_BG: jnp.where(groups.is_group_BG, values_BG, 0).sum(dtype=jnp.float32)
        mean = lambda values_BG: WeightedSum(add(values_BG), add(1))
        metrics = {name: mean(values_BG) for name, values_BG in jax.lax.stop_gradient(values).items()}
        losses = {"preference": mean(losses_BG)}
        if options.nll_coef:
            losses["nll"] = WeightedSum(-add(chosen.logp), add(chosen.length))
        sums = LossSums(losses, metrics)
        return add_router_loss(sums, terms, batch.loss_mask.sum(1)) if router_losses else sums

    return loss_fn


def _measure(groups: "Groups", rewards_BS: jax.Array) -> dict[str, jax.Array]:
    """What is told of each group besides ``logps/chosen`` and ``logps/rejected``, log p of its answers; [B, G] each.

    ``rewards/chosen`` and ``rewards/rejected``, beta times the ratio of an answer (by its length where the loss is per
    token), of several rejected ones their mean; ``rewards/margins``, their difference; ``rewards/accuracies``, whether
    the chosen answer's is above all others.
    """
    chosen, rejected = (groups.mean(rewards_BS, of) for of in (groups.chosen_BS, groups.rejected_BS))
    best_rejected = groups.reduce(jax.ops.segment_max, rewards_BS, groups.rejected_BS)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > best_rejected,
    }


def compute_softmax_loss(rewards_BS: jax.Array, groups: "Groups") -> jax.Array:
    """-log sigmoid(-logsumexp over the rejected of (reward - reward of the chosen)), [B, G].

    Softmax-DPO, or S-DPO (Chen et al. 2024, arXiv:2406.09215, eq. 8): -log of the chosen answer's share in the softmax
    of all rewards of its list; with one rejected answer it is DPO.
    """
    highest_BG = jax.lax.stop_gradient(groups.reduce(jax.ops.segment_max, rewards_BS, groups.group_ids_BS > 0))
    peak_BG = jnp.where(groups.is_group_BG, highest_BG, 0)
    peak_BS = jnp.take_along_axis(peak_BG, groups.group_ids_BS, axis=1)
    total_BG = groups.reduce(jax.ops.segment_sum, jnp.exp(rewards_BS - peak_BS), groups.group_ids_BS > 0)
    chosen_BG = groups.reduce(jax.ops.segment_sum, rewards_BS, groups.chosen_BS)
    return peak_BG + jnp.log(jnp.where(groups.is_group_BG, total_BG, 1)) - chosen_BG


# --- the groups of packed rows ---


class Groups(NamedTuple):
    """Which segments of packed rows are answers of which group; group g of a row is the one of ``group_ids`` g."""

    group_ids_BS: jax.Array  # int32; 0: no answer
    chosen_BS: jax.Array  # bool; of the highest score of its group
    rejected_BS: jax.Array  # bool; the others
    is_group_BG: jax.Array  # bool; whether the row has such a group, with two scores or more

    def mean(self, values_BS: jax.Array, of_BS: jax.Array) -> jax.Array:
        """[B, G]: over those answers of each group that are in ``of_BS``; 0 where there is none."""
        total, number = (self.reduce(jax.ops.segment_sum, x, of_BS) for x in (values_BS, jnp.ones_like(values_BS)))
        return total / jnp.maximum(number, 1)

    def reduce(self, reduce: Callable, values_BS: jax.Array, of_BS: jax.Array) -> jax.Array:
        """[B, G] of ``jax.ops.segment_sum`` and the like over those answers of each group that are in ``of_BS``."""
        return reduce_segments(reduce, values_BS, jnp.where(of_BS, self.group_ids_BS, 0), self.is_group_BG.shape[1])


def find_groups(batch: Batch) -> Groups:
    group_ids_BT, scores_BT, length = batch.fields["group_ids"], batch.fields["scores"], batch.segment_ids.shape[1]
    num_segments, num_groups = length + 1, length // 2 + 1  # an answer has a position or more, a group two answers
    of_segment = lambda values_BT: reduce_segments(jax.ops.segment_max, values_BT, batch.segment_ids, num_segments)
    ids_BS, scores_BS = of_segment(group_ids_BT), of_segment(scores_BT)
    ids_BS = jnp.maximum(ids_BS, 0).at[:, 0].set(0)  # of no positions: the lowest number
    best_BG, worst_BG = (
        reduce_segments(of, scores_BS, ids_BS, num_groups) for of in (jax.ops.segment_max, jax.ops.segment_min)
    )
    chosen_BS = (ids_BS > 0) & (scores_BS == jnp.take_along_axis(best_BG, ids_BS, axis=1))
    is_group_BG = (best_BG > worst_BG) & (jnp.arange(num_groups) > 0)  # of no answers: -inf and inf
    return Groups(ids_BS, chosen_BS, (ids_BS > 0) & ~chosen_BS, is_group_BG)
