"""Reward models: what a head says of whole answers, or of their steps, against what people or programs have said.

A head is a linear map of the hidden states (``models/heads.py``). An answer's score is its output at the answer's last
token, a step's at the step's last token. The losses:

    bradley_terry   -log sigmoid(score(chosen) - score(rejected) - margin): Bradley & Terry 1952, as Ouyang et al. 2022
                    (arXiv:2203.02155, eq. 1) train it; the margin of Llama 2 (arXiv:2307.09288, eq. 2)
    plackett_luce   sum over the answers i of a list of log(1 + sum over all worse j of exp(score(j) - score(i))):
                    Plackett 1975; of two answers it is bradley_terry. Answers with the same score in the data are not
                    compared with each other
    stepwise        -log sigmoid(+-score) of each step, + of a right one: process rewards (arXiv:2305.20050)
    cross_entropy   -log softmax(outputs)[class]
    squared_error   (score - label)^2

Differences of scores alone leave their mean free. ``centering_coef`` is the factor of a second loss, ``centering``,
(score(chosen) + score(rejected))^2 (Eisenstein et al. 2023, arXiv:2312.09244); of a list it is (2 x mean score)^2.

Legend: B rows, T positions, K outputs of the head, S segments of a row, G groups of a row (both from 0 = padding).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from postrain.config import RewardSection
from postrain.objectives.heads import add_router_loss, cross_entropy, squared_error
from postrain.objectives.preference import Groups, find_groups
from postrain.objectives.segments import logistic_loss, reduce_segments, sum_segments
from postrain.types import Batch, LossSums, RowTerms, WeightedSum

Options = RewardSection
Outputs = Callable[[dict, Batch], tuple[jax.Array, RowTerms | None]]
STEPS, RIGHT = "steps", 2  # the array of kind stepwise: 0 where no step ends, 1 a wrong one
BINS = 20  # of a probability, for calibration


def make_reward_loss(compute_outputs: Outputs, options: Options, *, held_out: bool = False) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums``; the loss ``reward`` is a mean over groups, steps or answers.

    Args:
      compute_outputs: ``(params, batch) -> (float32 [B, T, K], RowTerms | None)``, the head at every position.
      options: the config's; its ``centering_coef`` is the factor of the loss ``centering``, applied by the train step.
      held_out: without the losses of routers, which only training adds, and with the sums of ``count_bins``.

    ``batch.fields`` has what the kind of rows brings: ``group_ids`` and ``scores`` (preference), ``steps``
    (stepwise), or ``labels`` (labelled). Metrics are ``accuracy`` where there is a right and a wrong; of one output
    ``score_mean``, over answers or steps, and of held-out rows ``score_square``; of compared answers ``margin``.
    """
    measure = {"stepwise": _judge_steps, "cross_entropy": _classify, "squared_error": _regress}.get(
        options.loss, _compare
    )

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        outputs_BTK, terms = compute_outputs(params, batch)
        sums, confidence = measure(outputs_BTK, batch, options)
        if not held_out:
            sums.metrics.pop("score_square", None)
            return add_router_loss(sums, terms, (batch.segment_ids > 0).sum(1))
        return LossSums(sums.losses, sums.metrics | (count_bins(*confidence) if confidence else {}))

    return loss_fn


# --- the four kinds of rows: the sums of each, and what ``count_bins`` counts or None ---


def _compare(outputs_BTK: jax.Array, batch: Batch, options: Options) -> tuple[LossSums, tuple]:
    """Answers to the same prompt with each other."""
    groups = find_groups(batch)
    scores_BS = read_ends(outputs_BTK[..., 0], batch.segment_ids)
    labels_BS = reduce_segments(
        jax.ops.segment_max, batch.fields["scores"], batch.segment_ids, batch.segment_ids.shape[1] + 1
    )
    labels_BS = jnp.where(groups.group_ids_BS > 0, labels_BS, 0)  # of no answer: the lowest number
    chosen, rejected = (groups.mean(scores_BS, of) for of in (groups.chosen_BS, groups.rejected_BS))
    if options.loss == "plackett_luce":
        losses_BG = compute_list_loss(scores_BS, labels_BS, groups)
    else:
        difference = chosen - rejected - (options.margin if options.margin_of == "constant" else 0)
        if options.margin_of == "scores":
            best, other = (groups.mean(labels_BS, of) for of in (groups.chosen_BS, groups.rejected_BS))
            difference -= options.margin * (best - other)
        losses_BG = logistic_loss(difference, options.label_smoothing)
    is_group, is_answer = groups.is_group_BG, groups.group_ids_BS > 0
    sums = LossSums({"reward": mean(losses_BG, is_group)}, {})
    if options.centering_coef:
        sums.losses["centering"] = mean(jnp.square(2 * groups.mean(scores_BS, is_answer)), is_group)
    best_rejected = groups.reduce(jax.ops.segment_max, scores_BS, groups.rejected_BS)
    is_right = chosen > best_rejected
    sums.metrics.update(accuracy=mean(is_right, is_group), margin=mean(chosen - rejected, is_group))
    sums.metrics.update(describe_scores(scores_BS, is_answer))
    lead_BG = jnp.where(is_group, chosen - best_rejected, 0)
    return sums, (jax.nn.sigmoid(jnp.abs(lead_BG)), is_right, is_group)


def _judge_steps(outputs_BTK: jax.Array, batch: Batch, options: Options) -> tuple[LossSums, tuple]:
    """The steps of answers, each by itself."""
    scores_BT, steps_BT = outputs_BTK[..., 0], batch.fields[STEPS]
    is_step = steps_BT > 0
    signed = jnp.where(steps_BT == RIGHT, scores_BT, -scores_BT)
    sums = LossSums({"reward": mean(logistic_loss(signed, options.label_smoothing), is_step)}, {})
    sums.metrics.update(accuracy=mean(signed > 0, is_step), **describe_scores(scores_BT, is_step))
    return sums, (jax.nn.sigmoid(jnp.abs(scores_BT)), signed > 0, is_step)


def _classify(outputs_BTK: jax.Array, batch: Batch, options: Options) -> tuple[LossSums, tuple]:
    labels_BT, is_end = batch.fields["labels"], find_ends(batch.segment_ids)
    losses_BT = cross_entropy(outputs_BTK, labels_BT)
    is_right = outputs_BTK.argmax(-1) == labels_BT
    sums = LossSums({"reward": mean(losses_BT, is_end)}, {"accuracy": mean(is_right, is_end)})
    return sums, (jax.nn.softmax(outputs_BTK).max(-1), is_right, is_end)


def _regress(outputs_BTK: jax.Array, batch: Batch, options: Options) -> tuple[LossSums, None]:
    labels_BT, is_end = batch.fields["labels"].astype(jnp.float32), find_ends(batch.segment_ids)
    sums = LossSums({"reward": mean(squared_error(outputs_BTK, labels_BT), is_end)}, {})
    sums.metrics.update(describe_scores(outputs_BTK[..., 0], is_end))
    return sums, None


# --- their parts ---


def find_ends(segment_ids_BT: jax.Array) -> jax.Array:
    """bool [B, T]: the last position of each segment."""
    following = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    return (segment_ids_BT > 0) & (segment_ids_BT != following)


def read_ends(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Of every segment its value at the last position, [B, T + 1]; entry 0 is that of the padding."""
    return sum_segments(jnp.where(find_ends(segment_ids_BT), values_BT, 0), segment_ids_BT)


def mean(values: jax.Array, where: jax.Array) -> WeightedSum:
    return WeightedSum(jnp.where(where, values, 0).sum(dtype=jnp.float32), where.sum(dtype=jnp.float32))


def compute_list_loss(scores_BS: jax.Array, labels_BS: jax.Array, groups: Groups) -> jax.Array:
    """Of every list, [B, G]: the sum over its answers of log(1 + sum over all worse ones of exp(score(j) - score(i))).

    ``labels_BS``: the scores of the data, by which one answer is worse than another. The answers of a row are sorted by
    list and label; log-sum-exp over those before one in its list comes from a scan.
    """

    def of_row(scores_S, labels_S, ids_S):
        order = jnp.lexsort((labels_S, ids_S))
        scores, labels, ids = scores_S[order], labels_S[order], ids_S[order]
        starts_list = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
        starts_tie = starts_list | jnp.concatenate([jnp.ones(1, bool), labels[1:] != labels[:-1]])

        def join(first, second):  # log-sum-exp that begins anew with every list
            (one, _), (two, anew) = first, second
            return jnp.where(anew, two, jnp.logaddexp(one, two)), first[1] | anew

        up_to, _ = jax.lax.associative_scan(join, (scores, starts_list))
        # The answers before the first one of the same label are worse.
        places = jnp.arange(len(ids))
        first = jax.lax.cummax(jnp.where(starts_tie, places, 0))
        has_worse = ~starts_list[first]
        lead = scores - up_to[jnp.maximum(first - 1, 0)]
        terms = jnp.where(has_worse & (ids > 0), -log_sigmoid(lead), 0)
        return jax.ops.segment_sum(terms, ids, num_segments=groups.is_group_BG.shape[1])

    return jax.vmap(of_row)(scores_BS, labels_BS, groups.group_ids_BS)


def describe_scores(scores: jax.Array, where: jax.Array) -> dict[str, WeightedSum]:
    scores = jax.lax.stop_gradient(scores)
    return {"score_mean": mean(scores, where), "score_square": mean(jnp.square(scores), where)}


# --- calibration: is what the model calls 80% right in 80% of the cases? ---


def count_bins(confidence: jax.Array, is_right: jax.Array, where: jax.Array) -> dict[str, WeightedSum]:
    """For ``read_bins``: means over all cases, of which each bin has its part.

    ``confidence``: the probability that the model gives to its own answer, sigmoid of the distance between the scores
    of a pair, for one; ``is_right``: whether that answer is right; both where ``where``.
    """
    bins = jnp.where(where, jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1), BINS).ravel()
    totals = {}
    for name, values in (("share", jnp.ones_like(confidence)), ("confidence", confidence), ("right", is_right)):
        values = values.astype(jnp.float32).ravel()
        totals[name] = jax.ops.segment_sum(values, bins, num_segments=BINS + 1)
    number = where.sum(dtype=jnp.float32)
    return {f"bins/{i:02}/{name}": WeightedSum(total[i], number) for i in range(BINS) for name, total in totals.items()}


def read_bins(means: Mapping[str, float], prefix: str = "") -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3), and its bins that have cases.

    A bin is ``{"from", "to", "share", "confidence", "accuracy"}``: ends of the bin, its share of all cases, and of them
    the mean confidence and the share that was right. ``means``: of ``count_bins``, the names after ``prefix``.
    """
    error, rows = 0.0, []
    for i in range(BINS):
        share, confidence, right = (means[f"{prefix}bins/{i:02}/{key}"] for key in ("share", "confidence", "right"))
        if share > 0:
            error += abs(right - confidence)
            ends = {"from": i / BINS, "to": (i + 1) / BINS}
            rows.append(ends | {"share": share, "confidence": confidence / share, "accuracy": right / share})
    return error, rows
