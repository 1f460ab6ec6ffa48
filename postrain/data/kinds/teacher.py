"""Kind kd: token ids with the teacher's most probable next tokens, for knowledge distillation.

Rows are ``{"tokens": [L ids], "loss_mask": [L of 0 and 1], "top_ids": [L][K], "top_logprobs": [L][K]}``, perhaps with
a ``weight`` of the row, and with ``weights``, factors of it for each token. Entry t of the tables holds the K most
probable ids of the teacher's distribution of token t, given the tokens before it, and their log-probabilities. It is
read where ``loss_mask`` is 1; without a mask, everywhere but at the first token. The arrays of a batch are
``teacher_ids`` and ``teacher_logprobs``.
"""

from typing import Any

import numpy as np

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.documents import Field, Rendered
from postrain.data.kinds.ids import MAX_ID, parse_ids, parse_numbers, parse_table
from postrain.data.messages import check_keys
from postrain.data.other_tools import LEAST_WEIGHT, MOST_WEIGHT, read_weight
from postrain.data.row_keys import LOSS_KEYS, WEIGHT_KEYS, Keys

FORMS = {"kd": ("tokens", "top_ids", "top_logprobs")}
_KEYS = Keys(("tokens", "loss_mask", "top_ids", "top_logprobs", "weights", *WEIGHT_KEYS), LOSS_KEYS)
_ROUNDING = 1e-3  # by which a rounded logprob may exceed 0, and the sum of the probabilities 1


def parse_teacher_row(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Rendered:
    """One row of kind kd, checked, as a document. Raises BadRow."""
    check_keys(raw, _KEYS, ref, unread)
    tokens = parse_ids(raw.get("tokens"), "tokens", ref, least=2)
    mask = np.ones(len(tokens), bool)
    if raw.get("loss_mask") is not None:
        mask = parse_ids(raw["loss_mask"], "loss_mask", ref, length=len(tokens), largest=1).astype(bool)
    mask[0] = False  # nothing predicts it
    if not mask.any():
        raise BadRow(ref, "it has no token to train on: 'loss_mask' is 0 after the first")
    ids = parse_table(raw.get("top_ids"), "top_ids", len(tokens), ref)
    logprobs = parse_table(raw.get("top_logprobs"), "top_logprobs", len(tokens), ref).astype(np.float32)
    if ids.shape != logprobs.shape:
        raise BadRow(ref, f"top_ids has {ids.shape[1]} entries a token and top_logprobs {logprobs.shape[1]}")
    if ids.dtype.kind not in "iu" or ids[mask].min() < 0 or ids[mask].max() > MAX_ID:
        raise BadRow(ref, "top_ids must be ids of the vocabulary, whole numbers from 0")
    logprobs[~mask], ids[~mask] = 0, 0
    _check_logprobs(logprobs, mask, ref)
    repeated = mask & (np.diff(np.sort(ids, 1), axis=1) == 0).any(1)
    if repeated.any():
        at = int(repeated.argmax())
        raise BadRow(ref, f"top_ids[{at}] must be K different ids; found {ids[at].tolist()}")
    logprobs[logprobs > 0] = 0  # above 0 by rounding only
    fields = Field("teacher_ids", ids.astype(np.int32), "target"), Field("teacher_logprobs", logprobs, "target")
    weights = _read_weights(raw.get("weights"), mask, ref)
    return Rendered(tokens, mask, ref, fields=fields, weight=read_weight(raw, ref), weights=weights)


def _read_weights(values: Any, mask: np.ndarray, ref: RowRef) -> np.ndarray | None:
    """float32 [L], 1 where nothing is trained; None: the row has none, or all are 1. Raises BadRow."""
    if values is None:
        return None
    weights = parse_numbers(values, "weights", len(mask), ref)
    least, most = np.float32(LEAST_WEIGHT), np.float32(MOST_WEIGHT)  # as a column of float32 has them
    wrong = np.flatnonzero(mask & ~((weights >= least) & (weights <= most)))
    if len(wrong):
        raise BadRow(ref, f"weights[{wrong[0]}] must be a number from 1e-6 to 1e6; found {weights[wrong[0]]:g}")
    weights = np.where(mask, weights, 1).astype(np.float32)
    return weights if (weights != 1).any() else None


def _check_logprobs(logprobs: np.ndarray, mask: np.ndarray, ref: RowRef) -> None:
    wrong = np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= _ROUNDING)).all(1))
    if len(wrong):
        raise BadRow(ref, f"top_logprobs[{wrong[0]}] must be finite and at most 0; found {logprobs[wrong[0]].tolist()}")
    total = np.where(mask, np.exp(logprobs.astype(np.float64)).sum(1), 0)
    if total.max() > 1 + _ROUNDING:
        at = int(total.argmax())
        raise BadRow(ref, f"top_logprobs[{at}]: the probabilities of the K ids sum to {total[at]:.4f}, above 1")
