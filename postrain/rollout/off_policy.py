"""Off-policy evaluation: what a policy would have earned, from decisions that another policy made and logged.

Everything here is arithmetic on arrays. A logged decision has the reward r of the action that was taken, the propensity
p with which the logging policy took it, and the probability pi of that action under the policy that is evaluated. With
w = pi / p and, where rewards were estimated for all candidates, q of the logged action and v = sum_a pi(a) q(a):

    logged        mean r: what the logging policy earned
    ips           mean w r                       inverse propensity scoring; unbiased, of large variance
    clipped_ips   mean min(w, clip) r            a bias downwards for less variance
    snips         sum w r / sum w                self-normalised (Swaminathan and Joachims 2015)
    dm            mean v                         direct method: as good as the estimated rewards
    dr            mean (v + w (r - q))           doubly robust (Dudik et al. 2011, arXiv:1103.4601)

Each is a sum over rows by another one, so an interval by the bootstrap draws rows again, or all rows of a member, whose
rewards are not independent.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from postrain.data.reward_weights import effective_size

_FEW = 10  # effective rows, or members, below which no estimate is to be trusted
_MOST = 0.9  # effective share of the rows from which weights are about equal
_FEW_ROWS = 30  # below which the bootstrap's intervals are too narrow
_FAR = 4.0  # standard errors that a mean of 1 may be off
_DRAWS = 1 << 22  # numbers of a block of the bootstrap


@dataclasses.dataclass(frozen=True)
class Decisions:
    """N logged decisions, float64 [N] each.

    Attributes:
      rewards: of the actions that were taken.
      propensities: of these under the logging policy, above 0.
      target_logprobs: log of their probabilities under the policy to evaluate.
      estimates: rewards that a model expects of these actions; None: there are no estimates.
      values: what it expects of the policy to evaluate, the mean of its estimates over that policy's actions.
      members: whose decisions they are; empty: each counts as one of its own.
      candidates: how many actions could have been taken; None: they were not listed.
    """

    rewards: np.ndarray
    propensities: np.ndarray
    target_logprobs: np.ndarray
    estimates: np.ndarray | None = None
    values: np.ndarray | None = None
    members: Sequence[str] = ()
    candidates: np.ndarray | None = None

    @property
    def log_weights(self) -> np.ndarray:
        return self.target_logprobs - np.log(self.propensities)

    @property
    def weights(self) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.exp(self.log_weights)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value of a policy with the bounds of its interval; NaN where the rows do not determine it."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
      estimates: by the names above, those that the decisions allow.
      effective_size: (sum w)^2 / sum w^2 over rows.
      mean_weight: of w; 1 in the mean over all logs of the logging policy.
      warnings: lines about what makes the estimates doubtful.
    """

    rows: int
    members: int
    estimates: Mapping[str, Estimate]
    effective_size: float
    mean_weight: float
    warnings: tuple[str, ...]


def evaluate(
    decisions: Decisions, *, clip: float = 10.0, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Evaluation:
    """The estimators above with bootstrap intervals of ``level``, from ``resamples`` draws of rows or members."""
    parts = _ratios(decisions, clip)
    _, inverse = np.unique(np.asarray(decisions.members), return_inverse=True) if decisions.members else (None, None)
    units = {
        name: [side if inverse is None else np.bincount(inverse, side) for side in sides]
        for name, sides in parts.items()
    }
    draws = _bootstrap(units, resamples, seed)
    number = len(decisions.rewards) if inverse is None else int(inverse.max()) + 1  # of units: one has no interval
    tails = [50 * (1 - level), 50 * (1 + level)]
    estimates = {}
    for name, (above, below) in parts.items():
        found = draws[name][np.isfinite(draws[name])]
        low, high = np.percentile(found, tails) if len(found) and number > 1 else (math.nan, math.nan)
        estimates[name] = Estimate(_divide(above.sum(), below.sum()), float(low), float(high))
    size = compute_effective_size(decisions)
    doubts = _find_doubts(decisions, size)
    least = _FEW_ROWS if inverse is None else _FEW
    if number < least:
        units_of = f"{number} {'row' if inverse is None else 'member'}{'s' * (number != 1)}"
        doubts.append(f"intervals over {units_of}: so few say little of others: expected {least} or more")
    mean = float(decisions.weights.mean())
    return Evaluation(len(decisions.rewards), number, estimates, size, mean, tuple(doubts))


def _ratios(decisions: Decisions, clip: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each estimator the terms [N] whose sum is divided by the sum of the others."""
    rewards, weights = decisions.rewards, decisions.weights
    ones = np.ones_like(rewards)
    # A common factor of the weights cancels in snips: without it those of long texts would all be 0.
    relative = np.exp(decisions.log_weights - decisions.log_weights.max())
    found = {
        "logged": (rewards, ones),
        "ips": (weights * rewards, ones),
        "clipped_ips": (np.minimum(weights, clip) * rewards, ones),
        "snips": (relative * rewards, relative),
    }
    if decisions.estimates is not None and decisions.values is not None:
        found["dm"] = decisions.values, ones
        found["dr"] = decisions.values + weights * (rewards - decisions.estimates), ones
    return found


def _bootstrap(units: Mapping[str, Sequence[np.ndarray]], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Of each estimator its values for ``resamples`` draws of as many units, with replacement; the same draws for all.

    ``units``: of each estimator the two sums of every unit, a row or a member.
    """
    rng, number = np.random.default_rng(seed), len(next(iter(units.values()))[0])
    sides = np.stack([side for pair in units.values() for side in pair], axis=1)  # [units, 2 estimators]
    sums = np.empty((resamples, sides.shape[1]))
    block = max(1, _DRAWS // number)
    for start in range(0, resamples, block):
        picked = rng.integers(0, number, (min(block, resamples - start), number))
        for i, units_drawn in enumerate(picked, start):
            sums[i] = np.bincount(units_drawn, minlength=number) @ sides
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: sums[:, 2 * i] / sums[:, 2 * i + 1] for i, name in enumerate(units)}


def compute_effective_size(decisions: Decisions) -> float:
    """(sum w)^2 / sum w^2, of weights however small."""
    return effective_size(np.exp(decisions.log_weights - decisions.log_weights.max()))


def _divide(above: float, below: float) -> float:
    return float(above / below) if below else math.nan


def _find_doubts(decisions: Decisions, size: float) -> list[str]:
    """Lines about decisions from which this policy can hardly be evaluated."""
    doubts, rows = [], len(decisions.rewards)
    if size < _FEW:
        what = (
            f"effective sample size {size:.1f} of {rows:,} row{'s' * (rows != 1)}: the estimates with weights rest on"
        )
        if size < _MOST * rows:
            doubts.append(f"{what} so few, as the model prefers other answers than those that were logged")
        else:
            doubts.append(f"{what} so few: give more rows")
    if (off := _far_from_one(decisions.weights)) is not None:
        doubts.append(
            f"the mean of the model's probability / propensity is {off[0]:.3g} +- {off[1]:.2g}, expected 1: "
            "propensities that are not those of the logging policy, or answers of the model that were never logged"
        )
    if decisions.candidates is not None:
        uniform = 1 / (decisions.candidates * decisions.propensities)
        if (off := _far_from_one(uniform)) is not None:
            doubts.append(
                f"the mean of 1 / (candidates x propensity) is {off[0]:.3g} +- {off[1]:.2g}, expected 1: the "
                "propensities are not probabilities over these candidates"
            )
    return doubts


def _far_from_one(values: np.ndarray) -> tuple[float, float] | None:
    """Mean and standard error where the mean is further from 1 than chance has it; else None."""
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return (mean, error) if abs(mean - 1) > max(_FAR * error, 0.05) else None
