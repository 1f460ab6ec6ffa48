"""Weights of logged rows by their rewards, for supervised fine-tuning that prefers what was received well.

A row brings ``reward``, and by ``sft.weights`` the ``propensity`` with which the logging policy chose its answer, or
what the reward is compared with: the mean reward of its ``member`` or ``item``, or the ``value`` that was expected.
From these comes one number a row, by which each of its trained tokens counts. ``docs/weighted_sft.md`` has the formulas
and what the loss of an update is divided by.

Weights of linear, ips and snips are known of each row alone. Those of exp and advantage are divided by the largest of
all, which changes nothing in a loss that is divided by their sum and keeps them finite; rows that are then left with
less than LEAST_WEIGHT, which nothing would be learned from, are left out. A stream, whose largest is unknown, has them
as they are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from postrain.config import Config, WeightsSection
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.documents import AS_RENDERED, Document, Field, Preparation, Rendered
from postrain.data.other_tools import LEAST_WEIGHT, MOST_WEIGHT, to_number
from postrain.data.row_keys import is_empty
from postrain.errors import UserError

FIELD = "reward_weights"  # of batches in mode ips, float32 [B, T]; elsewhere weights are in ``loss_mask``
REWARDS = "rewards"  # of batches with baseline head, float32 [B, T]: of the row, less the mean of all rows
_GROUPS = ("member", "item")  # keys of rows whose mean reward can be a baseline
MEANS = {key: f"the mean of the other rows of the same {key}" for key in _GROUPS}
_FARTHEST = 1e6  # of rewards from their mean, where a head learns them: sums of squares in float32 stay finite
_LARGEST = 1e30  # of rewards, whose sums and quotients stay finite
_FEW = 0.05  # the share of rows that the weights leave, below which a warning says so


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What a row says of its answer, checked.

    ``groups``: the member or item whose mean is the baseline, by its key; beside a head, those that the row has.
    ``value``: the row's own baseline, else 0.
    """

    reward: float
    propensity: float = 1.0
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    value: float = 0.0


def compute_weights(
    rewards: np.ndarray,
    options: WeightsSection,
    *,
    propensities: np.ndarray | float = 1.0,
    baselines: np.ndarray | float = 0.0,
    divide_by_largest: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of rows, float64 [N], and which of them ``options.clip`` has lowered, bool [N].

    Args:
      rewards: float64 [N].
      propensities: of the logged answers under the logging policy; read by ips and snips.
      baselines: float64 [N], subtracted from the rewards in mode advantage.
      divide_by_largest: of exp and advantage; the maximum is subtracted before the exponential.
    """
    if options.mode in ("exp", "advantage"):
        exponents = (np.asarray(rewards, np.float64) - baselines) / options.temperature
        limit = math.log(options.clip) if options.clip else math.inf
        is_clipped = exponents > limit
        exponents = np.minimum(exponents, limit)
        with np.errstate(over="ignore"):  # infinite weights are refused by the caller that does not divide
            return np.exp(exponents - (exponents.max() if divide_by_largest else 0.0)), is_clipped
    weights = np.asarray(rewards, np.float64) / propensities
    limit = options.clip or math.inf
    return np.minimum(weights, limit), weights > limit


def effective_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: how many rows of equal weight would vary as much; 0 where all weights are 0."""
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def group_means(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Of each entry the mean over its group, float64 [N]; exactly the value where a group has one value only."""
    _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    reference = values[first][inverse]  # differences to it are exactly 0 in a group of equal values
    return reference + (np.bincount(inverse, values - reference) / np.bincount(inverse))[inverse]


def explain_by_others(values: np.ndarray, groups: Sequence[str]) -> float:
    """The share of the variance of ``values`` that the mean of the other entries of the same group explains.

    Below 0 where the mean of all would be nearer. An entry that is alone in its group is held to that mean.
    """
    _, inverse, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    size = sizes[inverse]
    without_self = (values - group_means(values, groups)) * size / np.maximum(size - 1, 1)
    errors = np.where(size > 1, without_self, values - values.mean())
    return 1 - float(np.square(errors).mean() / max(values.var(), 1e-300))


class RewardWeights:
    """The weights of ``config.sft.weights`` for one reading of ``data.train``.

    Attributes:
      preparation: for ``open_train_rows``; raises BadRow for a row without the mode's keys, or with values that give
        no weight, and UserError where all rewards are equal.
      summary: about the weights, once rows in memory have been read; else "".
      variance: of the rewards, with baseline head, once rows have been read.
      explained: with baseline head, "member" and "item", where all rows have them -> the share of that variance that
        the mean of the other rows of the same member or item explains.
    """

    def __init__(self, config: Config):
        self._options, self._streaming, self.summary = config.sft.weights, config.data.streaming, ""
        self.variance, self.explained = 0.0, dict[str, float]()
        self._least, self._greatest = math.inf, -math.inf  # of all rewards, those of rows that are left out too
        mode, baseline = self._options.mode, self._options.baseline
        self.preparation = AS_RENDERED
        if mode != "none":
            keys = ["reward"] + (["propensity"] if mode in ("ips", "snips") else [])
            keys += {"none": [], "head": list(_GROUPS)}.get(baseline, [baseline])
            together = None if self._streaming else self._weigh_all
            self.preparation = Preparation(self._name(), self._read_one, together, tuple(keys))

    def _name(self) -> str:
        options, default = self._options, WeightsSection()
        keys = ("temperature", "baseline", "clip")
        changed = [f", {key} {getattr(options, key)}" for key in keys if getattr(options, key) != getattr(default, key)]
        return f"with weights of mode {options.mode}{''.join(changed)}"

    def _read_one(self, document: Document) -> Document:
        """The document with its ``Feedback`` as metadata; with its weight where that depends on no other row."""
        assert isinstance(document, Rendered) and document.metadata is not None  # kind sft, with the keys
        row = document.metadata  # one object, of all documents of a row
        found = read_feedback(row, self._options, document.ref)
        self._least, self._greatest = min(self._least, found.reward), max(self._greatest, found.reward)
        document = dataclasses.replace(document, metadata=None if self._streaming else {"feedback": found, "row": row})
        if self._options.mode in ("exp", "advantage") and not self._streaming:
            return document
        weights, _ = compute_weights(
            np.array([found.reward]),
            self._options,
            propensities=found.propensity,
            baselines=found.value,
            divide_by_largest=False,
        )
        weight = float(weights[0])
        if not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT):
            raise BadRow(
                document.ref,
                f"'reward' = {found.reward:g} gives the weight {weight:g}, expected 0 or {LEAST_WEIGHT:g} to "
                f"{MOST_WEIGHT:g}: "
                + (
                    "raise 'sft.weights.temperature'"
                    if self._options.mode in ("exp", "advantage")
                    else "scale the rewards"
                )
                + ", or set 'sft.weights.clip'",
            )
        return self._apply(document, weight)

    def _weigh_all(self, documents: list[Document]) -> list[Document]:
        """The documents with the weights that need all rows, without their metadata; writes ``summary``."""
        options, sequences = self._options, [one for document in documents for one in document.sequences]
        # Not by their places in files: the same file may be listed twice, and its rows then count twice.
        numbers: dict[int, int] = {}
        row_of = [numbers.setdefault(id(one.metadata["row"]), len(numbers)) for one in sequences if one.metadata]
        rows = [one.metadata["feedback"] for one, i in zip(sequences, row_of, strict=True) if one.metadata]
        rows = [rows[first] for first in np.unique(row_of, return_index=True)[1]]
        rewards = np.array([row.reward for row in rows])
        is_same = self._least == self._greatest or (options.baseline == "head" and rewards.min() == rewards.max())
        if is_same and options.mode not in ("ips", "snips"):
            raise UserError(
                f"{sequences[0].ref}: 'reward' is {rewards[0]:g}, as in all other rows: a reward without variance "
                "prefers nothing: set 'sft.weights.mode' to 'none', or give rows with different rewards"
            )
        if options.baseline == "head":
            return self._center(sequences, rows, row_of)
        baselines, groups = np.array([row.value for row in rows]), []
        if options.baseline in _GROUPS:
            groups = [row.groups[options.baseline] for row in rows]
            baselines = group_means(rewards, groups)
        propensities = np.array([row.propensity for row in rows])
        weights, is_clipped = compute_weights(rewards, options, propensities=propensities, baselines=baselines)
        if options.mode in ("exp", "advantage"):
            weights[weights < LEAST_WEIGHT] = 0
            sequences = [self._apply(one, float(weights[i])) for one, i in zip(sequences, row_of, strict=True)]
        final = np.zeros(len(rows))
        final[row_of] = [one.weight for one in sequences]
        self.summary = self._format(final * (weights if options.mode == "ips" else 1.0), int(is_clipped.sum()))
        if options.baseline != "none":
            self.summary += self._format_baseline(rewards, baselines, groups)
        return [dataclasses.replace(one, metadata=None) for one in sequences if one.weight]

    def _center(self, sequences: list[Rendered], rows: list[Feedback], row_of: list[int]) -> list[Document]:
        """The documents with their rewards less the mean of all rows, which is what a head of zeros expects.

        ``row_of``: of each sequence its row.
        """
        rewards = np.array([row.reward for row in rows])
        mean, self.variance = float(rewards.mean()), float(rewards.var())
        for one, row in zip(sequences, (rows[i] for i in row_of), strict=True):
            if abs(row.reward - mean) > _FARTHEST:
                raise UserError(
                    f"{one.ref}: 'reward' is {row.reward:g}, {abs(row.reward - mean):g} from the mean of all rows, and "
                    f"a head learns numbers up to {_FARTHEST:g}: scale the rewards and 'sft.weights.temperature' down"
                )
        for key in _GROUPS:
            groups = [row.groups[key] for row in rows if key in row.groups]
            if len(groups) == len(rows):
                self.explained[key] = explain_by_others(rewards, groups)
        weights, is_clipped = compute_weights(rewards, self._options, baselines=mean)
        self.summary = self._format(weights, int(is_clipped.sum())) + (
            f"\nbaseline    head, which starts at the mean reward, {mean:.4g}: the line above is of the weights then"
        )
        if self.explained:
            shares = [f"{share:.1%}, by {MEANS[key]}" for key, share in self.explained.items()]
            self.summary += f"\nbaseline    of the variance of rewards is explained: {'; '.join(shares)}"

        def center(one: Rendered, row: Feedback) -> Rendered:
            values = np.full(len(one.tokens), row.reward - mean, np.float32)
            fields = (*one.fields, Field(REWARDS, values, of="sequence"))
            return dataclasses.replace(one, fields=fields, metadata=None)

        return [center(one, rows[i]) for one, i in zip(sequences, row_of, strict=True)]

    def _format(self, weights: np.ndarray, clipped: int) -> str:
        options, size = self._options, effective_size(weights)
        share = size / len(weights)
        line = (
            f"weights     {self._name().removeprefix('with weights of ')}: {weights.min():.3g} to {weights.max():.3g}; "
            f"effective sample size {size:,.1f} of {len(weights):,} rows ({share:.1%})"
        )
        if options.clip:
            line += f"; {clipped:,} clipped ({clipped / len(weights):.1%})"
        if options.baseline != "head" and (left_out := int((weights == 0).sum())):
            line += f"; {left_out:,} left out, of less than {LEAST_WEIGHT:g} of the largest weight"
        if share < _FEW:
            line += (
                f"\nweights     less than {_FEW:.0%} of the rows decide: "
                + ("raise sft.weights.temperature, or " if options.mode in ("exp", "advantage") else "")
                + "set sft.weights.clip"
            )
        return line

    def _format_baseline(self, rewards: np.ndarray, baselines: np.ndarray, groups: list[str]) -> str:
        """A line that says how much of the rewards the baseline explains, and of whom it knows nothing else."""
        explained = 1 - float(np.square(rewards - baselines).mean() / max(rewards.var(), 1e-300))
        line = f"\nbaseline    {self._options.baseline} explains {explained:.1%} of the variance of rewards"
        if self._options.baseline == "value":
            worse = ": the mean of all rewards would be nearer to them, so its advantages are mostly its own errors"
            return line + worse * (explained < 0)
        sizes = np.unique(np.asarray(groups), return_counts=True)[1]
        alone = int((sizes == 1).sum())
        line += f"; {len(sizes):,} {self._options.baseline}s"
        if alone == len(sizes):
            return line + (
                f", each with one row, which is its own baseline: all advantages are 0, and all rows count the same: "
                f"give several rows of a {self._options.baseline}, or set another 'sft.weights.baseline'"
            )
        return line + (f", {alone:,} of them with one row, which is its own baseline" if alone else "")

    def _apply(self, document: Rendered, weight: float) -> Rendered:
        if self._options.mode != "ips":
            return dataclasses.replace(document, weight=document.weight * weight)
        values = np.full(len(document.tokens), weight, np.float32)
        return dataclasses.replace(document, fields=(*document.fields, Field(FIELD, values, of="sequence")))


# --- the keys of a row ---


def read_feedback(row: dict, options: WeightsSection, ref: RowRef) -> Feedback:
    """What ``options`` reads of the keys of a row. Raises BadRow for one that is missing or cannot be used."""
    where = f"'sft.weights.mode' = {options.mode!r}"
    reward = read_number(row, "reward", where, ref)
    if reward < 0 and options.mode not in ("exp", "advantage"):
        raise BadRow(ref, f"'reward' is {reward:g}, and {where} makes it a weight, which cannot be negative: use 'exp'")
    propensity, groups, value = 1.0, dict[str, str](), 0.0
    if options.mode in ("ips", "snips"):
        propensity = read_propensity(row, where, ref)
    where = f"'sft.weights.baseline' = {options.baseline!r}"
    if options.baseline == "value":
        value = read_number(row, "value", where, ref)
    elif options.baseline in _GROUPS:
        groups[options.baseline] = read_name(row, options.baseline, where, ref)
    elif options.baseline == "head":  # which is only compared with their means
        groups = {key: str(row[key]) for key in _GROUPS if isinstance(row.get(key), str | int)}
    return Feedback(reward, propensity, groups, value)


def read_propensity(row: dict, where: str, ref: RowRef) -> float:
    """The probability with which the logging policy chose a row's answer. Raises BadRow."""
    propensity = read_number(row, "propensity", where, ref)
    if not 0 < propensity <= 1:
        raise BadRow(ref, f"'propensity' must be a probability above 0, at most 1; found {propensity:g}")
    return propensity


def read_number(row: dict, key: str, where: str, ref: RowRef) -> float:
    """A finite number, in CSV as text. ``where``: what reads it. Raises BadRow."""
    value = _read_value(row, key, where, ref)
    number = to_number(value)
    if isinstance(value, bool):
        raise BadRow(ref, f"{key!r} must be a number; found {str(value).lower()}: write 1 and 0 for true and false")
    if not abs(number) <= _LARGEST:
        raise BadRow(ref, f"{key!r} must be a finite number, of size {_LARGEST:g} at most; found {value!r:.40}")
    return number


def read_name(row: dict, key: str, where: str, ref: RowRef) -> str:
    """The id of whom or what a row is about, text or a whole number, as text. Raises BadRow."""
    value = _read_value(row, key, where, ref)
    if isinstance(value, float) and value.is_integer():  # of a table, in whose column something is null
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(ref, f"{key!r} must be text or a whole number; found {value!r:.40}")
    return str(value)


def _read_value(row: dict, key: str, where: str, ref: RowRef) -> Any:
    value = row.get(key)
    if is_empty(value):
        raise BadRow(ref, f"{key!r} is missing or null, and {where} reads it")
    return value
