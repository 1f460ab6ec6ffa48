"""Distillation: the student's distribution of each trained token is brought to the teacher's.

With p the teacher's and q the student's distribution, each softmax(logits / temperature) over the ids that both have:

    forward_kl       KL(p | q), which covers every mode of the teacher (Hinton et al. 2015, arXiv:1503.02531)
    reverse_kl       KL(q | p), which seeks some of its modes; on the student's own answers MiniLLM's (arXiv:2306.08543)
    jsd              b KL(p | m) + (1 - b) KL(q | m), m = b p + (1 - b) q, b = ``beta``: the generalised Jensen-Shannon
                     divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649, eq. 1)
    skew_forward_kl  KL(p | a p + (1 - a) q), a = ``skew``, and
    skew_reverse_kl  KL(q | a q + (1 - a) p), of DistiLLM (Ko et al. 2024, arXiv:2402.03898)

There is no factor of the squared temperature: divergence and gradient are those of the softened distributions. With
``nll_coef`` the student's own -log p of the token, over its whole vocabulary and at temperature 1, is added.

Of a teacher of which only the K likeliest ids are known, all other ids are one outcome, for the teacher and for the
student: the divergence of K + 1 outcomes. It is never above that of the whole distributions, it is that one where K is
the vocabulary, and it still tells the student how much of its mass belongs outside of the K. What is known must be at
the temperature of the loss: that of the rest cannot be computed from its mass at another one.

Legend: B rows, T positions, C positions of a chunk, K ids, V' padded vocabulary, D embed_size.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from postrain.config import DistillSection
from postrain.objectives.heads import add_router_loss
from postrain.objectives.logprobs import project
from postrain.types import Batch, LossSums, WeightedSum

Options = DistillSection
_NEVER = -1e30  # the logit of an id that is left out: its probability is 0, and no difference of two is NaN
LEAST_REST = 1e-6  # the teacher's mass outside of the K ids at least: less is lost in float32 where 1 - a sum tells it


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _mix(log_a: jax.Array, log_b: jax.Array, share: float) -> jax.Array:
    """log(share a + (1 - share) b)."""
    return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _jsd(log_p: jax.Array, log_q: jax.Array, options: Options) -> jax.Array:
    mixture = _mix(log_p, log_q, options.beta)
    return options.beta * _kl(log_p, mixture) + (1 - options.beta) * _kl(log_q, mixture)


# Of log p of the teacher and log q of the student [..., V], by the name of the loss: float32 [...].
DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array, Options], jax.Array]] = {
    "forward_kl": lambda log_p, log_q, options: _kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, options: _kl(log_q, log_p),
    "jsd": _jsd,
    "skew_forward_kl": lambda log_p, log_q, options: _kl(log_p, _mix(log_p, log_q, options.skew)),
    "skew_reverse_kl": lambda log_p, log_q, options: _kl(log_q, _mix(log_q, log_p, options.skew)),
}


def compare_with_logits(options: Options, shared_ids: int, softcap: float = 0.0) -> Callable:
    """For ``map_logits``: the student's logits against the teacher's whole distribution.

    ``rows`` are the targets int32 [C] and the teacher's hidden states [C, D]; ``shared`` is the teacher's projection
    onto the vocabulary [V', D] as ``match_rows`` makes it, with as many rows as the student's. Its logits are capped at
    ``softcap``. Ids from ``shared_ids`` on are left out of both distributions. Returns what ``_measure`` does.
    """

    def values(logits, rows, teacher_table) -> dict[str, jax.Array]:
        targets, teacher_hidden = rows
        teacher_logits = project(teacher_hidden, teacher_table, teacher_table.shape[0], softcap)
        log_p, log_q = (
            jax.nn.log_softmax(keep_ids(found, shared_ids) / options.temperature) for found in (teacher_logits, logits)
        )
        return _measure(logits, targets, log_p, log_q, log_p.argmax(-1), options)

    return values


def match_rows(table_VD: jax.Array, count: int) -> jax.Array:
    """The first ``count`` rows of a projection; of one with fewer all, and zeros.

    Vocabularies are padded differently. Once for all chunks: cutting their logits, split over devices, would have these
    exchange parts in a loop that is not of the same length for all.
    """
    return jnp.pad(table_VD[:count], ((0, max(count - table_VD.shape[0], 0)), (0, 0)))


def compare_with_top(options: Options, shared_ids: int) -> Callable:
    """For ``map_logits``: the student's logits against the K likeliest ids of a teacher, and the rest.

    ``rows`` are the targets int32 [C], and the ids int32 [C, K], all different, and their log-probabilities float32
    [C, K] at the temperature of the options. Ids must be below ``shared_ids``: those of padding have no probability.
    Besides what ``_measure`` returns ``teacher_top``, the sum of the K probabilities.
    """

    def values(logits, rows, _) -> dict[str, jax.Array]:
        targets, ids, log_p = rows
        tempered = keep_ids(logits, shared_ids) / options.temperature
        logsumexp = jax.nn.logsumexp(tempered, axis=-1, keepdims=True)
        log_q, top = jnp.take_along_axis(tempered, ids, axis=1) - logsumexp, jnp.exp(log_p).sum(-1)
        if ids.shape[1] < shared_ids:  # else there is no rest
            others = tempered.at[jnp.arange(len(ids))[:, None], ids].set(_NEVER)
            rest_q = jax.nn.logsumexp(others, axis=-1, keepdims=True) - logsumexp
            rest_p = jnp.log(jnp.maximum(1 - top, LEAST_REST))[:, None]
            log_p, log_q = jnp.concatenate([log_p, rest_p], 1), jnp.concatenate([log_q, rest_q], 1)
        best = jnp.take_along_axis(ids, log_p[:, : ids.shape[1]].argmax(-1)[:, None], axis=1)[:, 0]
        return _measure(logits, targets, log_p, log_q, best, options) | {"teacher_top": top}

    return values


def keep_ids(logits: jax.Array, count: int) -> jax.Array:
    """Logits [C, V'], those after the first ``count`` ids so low that their probability is 0."""
    return jnp.where(jnp.arange(logits.shape[1]) < count, logits, _NEVER)


def _measure(logits, targets, log_p, log_q, teacher_best, options: Options) -> dict[str, jax.Array]:
    """Of each token, float32 [C]; all but ``loss`` without a gradient:

    ``loss``; its parts ``divergence`` and ``nll``, the student's -log p of the target; ``accuracy``: the target is the
    student's likeliest id; ``agreement``: the student's likeliest id is the teacher's.
    """
    divergence, best = DIVERGENCES[options.loss](log_p, log_q, options), logits.argmax(-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    metrics = {"divergence": divergence, "nll": nll, "accuracy": best == targets, "agreement": best == teacher_best}
    metrics = {name: jax.lax.stop_gradient(value.astype(nll.dtype)) for name, value in metrics.items()}
    return metrics | {"loss": divergence + options.nll_coef * nll if options.nll_coef else divergence}


def make_distill_loss(compare: Callable[..., Any], *, router_losses: bool = True) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums``; the loss ``distill`` is a mean over trained tokens.

    ``compare(params, batch) -> (values, RowTerms | None)``: ``loss`` and metrics of every position, float32 [B, T] by
    name, as ``map_logits`` has them of ``compare_with_logits`` or ``compare_with_top``. Tokens count by
    ``batch.loss_mask``. ``router_losses``: add those of a mixture of experts, as one more loss, ``router``.
    """

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        found, terms = compare(params, batch)
        weight = batch.loss_mask.sum()
        means = {name: WeightedSum((value * batch.loss_mask).sum(), weight) for name, value in found.items()}
        sums = LossSums({"distill": means.pop("loss")}, means)
        return add_router_loss(sums, terms, batch.loss_mask.sum(1)) if router_losses else sums

    return loss_fn
