"""Direct preference optimisation: make the better of two answers more likely than the worse, relative to a reference.

    loss of a pair = -log sigmoid(beta * margin)
    margin = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

(Rafailov et al. 2023, arXiv:2305.18290, eq. 7.) With ``label_smoothing`` e a label is taken to be wrong with
probability e: (1 - e) * loss(margin) + e * loss(-margin), which is conservative DPO (Mitchell 2023, "A note on DPO with
noisy preferences & relationship to IPO").

Pairs come packed: the two answers are segments of one row with the same ``group_ids``, each after its own copy of the
prompt. So no sum leaves its row. Left out: lists of more than two answers (``check_pairs`` refuses them).

Legend: B rows, T positions, G groups of a row at most.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from postrain.errors import UserError
from postrain.objectives.heads import add_router_loss
from postrain.types import Batch, LossSums, WeightedSum


def make_dpo_loss(
    logprobs: Callable, reference_logprobs: Callable, *, beta: float, label_smoothing: float = 0.0
) -> Callable:
    """``loss_fn(params, batch, rng) -> LossSums``; the loss ``dpo`` is a mean over pairs.

    Args:
      logprobs: ``(params, batch) -> (TokenLogprobs [B, T], RowTerms | None)``, the model that is trained
        (``postrain.training.model.Forward.logprobs``).
      reference_logprobs: likewise, the model to stay near; it gets ``params`` as constants. With LoRA the model without
        its adapters: ``lambda params, batch: forward.logprobs(drop_adapters(params), batch)``.
      beta: of the margin; above 0. The larger, the nearer to the reference.
      label_smoothing: e, from 0 to below 1/2.

    ``batch.fields`` has ``group_ids`` int32 [B, T] (0 = padding) and ``scores`` float32 [B, T] (kind preference); the
    answer of the higher score is the chosen one. Metrics, means over pairs: ``rewards/chosen`` and
    ``rewards/rejected``, beta times log p - log p_ref of an answer; ``rewards/margins``, their difference;
    ``rewards/accuracies``, whether it is above 0; ``logps/chosen`` and ``logps/rejected``, log p of an answer. The
    losses of routers are one more loss, ``router``, a mean over trained tokens.
    """
    if not (beta > 0 and 0 <= label_smoothing < 0.5):
        raise ValueError(
            f"make_dpo_loss: expected beta above 0 and label_smoothing in [0, 0.5); found {beta} and {label_smoothing}"
        )

    def loss_fn(params, batch: Batch, rng: jax.Array) -> LossSums:
        del rng
        found, terms = logprobs(params, batch)
        reference, _ = reference_logprobs(jax.lax.stop_gradient(params), batch)
        ratios_BT = found.logprobs - jax.lax.stop_gradient(reference.logprobs)
        pairs = find_pairs(batch.fields["group_ids"], batch.fields["scores"])
        chosen_BG, rejected_BG = (beta * pairs.sum(ratios_BT, of) for of in (pairs.chosen_BT, pairs.rejected_BT))
        margins_BG = chosen_BG - rejected_BG
        losses_BG = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins_BG)
        if label_smoothing:
            losses_BG -= label_smoothing * jax.nn.log_sigmoid(-margins_BG)
        values = {
            "rewards/chosen": chosen_BG,
            "rewards/rejected": rejected_BG,
            "rewards/margins": margins_BG,
            "rewards/accuracies": margins_BG > 0,
            "logps/chosen": pairs.sum(found.logprobs, pairs.chosen_BT),
            "logps/rejected": pairs.sum(found.logprobs, pairs.rejected_BT),
        }
        add = lambda values_BG: jnp.where(pairs.is_pair_BG, values_BG, 0).sum(dtype=jnp.float32)
        mean = lambda values_BG: WeightedSum(add(values_BG), add(1))
        metrics = {name: mean(values_BG) for name, values_BG in jax.lax.stop_gradient(values).items()}
        return add_router_loss(LossSums({"dpo": mean(losses_BG)}, metrics), terms, batch.loss_mask.sum(1))

    return loss_fn


class Pairs(NamedTuple):
    """The groups of packed rows as pairs; group g of a row is the one of ``group_ids`` g, from 0 = padding."""

    group_ids_BT: jax.Array
    chosen_BT: jax.Array  # bool; positions of the answer with the higher score, its prompt included
    rejected_BT: jax.Array
    is_pair_BG: jax.Array  # bool; whether the row has such a group, with two different scores

    def sum(self, values_BT: jax.Array, of_BT: jax.Array) -> jax.Array:
        """The sums over each group's positions that are in ``of_BT``, [B, G]."""
        return _reduce(jax.ops.segment_sum, jnp.where(of_BT, values_BT, 0), self.group_ids_BT)


def find_pairs(group_ids_BT: jax.Array, scores_BT: jax.Array) -> Pairs:
    """Which positions are of the answer with the higher score of their group, and which of the lower."""
    best_BG, worst_BG = (_reduce(of, scores_BT, group_ids_BT) for of in (jax.ops.segment_max, jax.ops.segment_min))
    at = lambda values_BG: jnp.take_along_axis(values_BG, group_ids_BT, axis=1)
    inside_BT = group_ids_BT > 0
    chosen_BT = inside_BT & (scores_BT == at(best_BG))
    is_pair_BG = (best_BG > worst_BG) & (jnp.arange(best_BG.shape[1]) > 0)  # of no positions: -inf and inf
    return Pairs(group_ids_BT, chosen_BT, inside_BT & ~chosen_BT, is_pair_BG)


def _reduce(reduce: Callable, values_BT: jax.Array, group_ids_BT: jax.Array) -> jax.Array:
    """[B, G] of ``jax.ops.segment_sum`` and the like over each row; a pair has two positions or more: G = T/2 + 1."""
    size = group_ids_BT.shape[1] // 2 + 1
    return jax.vmap(lambda values, ids: reduce(values, ids, num_segments=size))(values_BT, group_ids_BT)


def check_pairs(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where a group of a numpy batch is not a pair; ``make_dpo_loss`` could not tell.

    ``arrays``: ``group_ids`` and ``segment_ids``, int32 [B, T].
    """
    groups = np.asarray(arrays["group_ids"])
    rows = np.broadcast_to(np.arange(groups.shape[0])[:, None], groups.shape)
    sequences = np.unique(np.stack([rows, groups, arrays["segment_ids"]])[:, groups > 0], axis=1)
    _, sizes = np.unique(sequences[:2], axis=1, return_counts=True)
    if (sizes != 2).any():
        raise UserError(
            f"a row of preferences has {sizes[sizes != 2][0]} answers; expected 2, a chosen and a rejected one; make "
            "rows of two out of longer lists"
        )
