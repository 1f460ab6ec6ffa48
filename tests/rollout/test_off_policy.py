"""Estimates of what a policy would earn from logs of another: held to obp on its own logs, and to bandits whose truth
is known.

The figures of OBP are those of obp 0.4.1's own estimators (InverseProbabilityWeighting and its self-normalised form,
DirectMethod, DoublyRobust, and estimate_interval with 2,000 samples) on the logs in its wheel, for the policy and the
estimated rewards of ``make_policy``. Its estimators ran in an environment of their own, as obp asks for seaborn and
scikit-learn and its reader for an old pandas; the logs are read here.
"""

import csv
import io
import math
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest

from postrain.rollout.off_policy import Decisions, compute_effective_size, evaluate

ASSET = pathlib.Path(__file__).resolve().parents[2] / "build" / "assets" / "obp-0.4.1-py3-none-any.whl"
ITEMS = 80
OBP = {
    "random": {
        "ips": 0.003627843329696087,
        "snips": 0.003622103580807917,
        "dm": 0.0048986613896929865,
        "dr": 0.003598615972300897,
    },
    "bts": {
        "ips": 0.0013446262883047959,
        "snips": 0.0013283756043054019,
        "dm": 0.0048986613896929865,
        "dr": 0.0012384605407155472,
    },
}
OBP_INTERVALS = {
    "random": {"ips": (0.0023784150, 0.0050248289), "dr": (0.0023411782, 0.0049895891)},
    "bts": {"ips": (0.0006150708, 0.0023485306), "dr": (0.0001789635, 0.0023710623)},
}


def make_policy():
    """Probabilities of the 80 items and estimated rewards, the same in every context."""
    items = np.arange(ITEMS)
    p = np.exp(np.sin(0.7 * items))
    return p / p.sum(), 0.005 + 0.004 * np.cos(0.3 * items)


@pytest.fixture(scope="module")
def logs():
    """Of each logging policy the arrays of Open Bandit data, 10,000 rows."""
    if not ASSET.exists():
        ASSET.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ASSET.parent) as work:
            words = ["-m", "pip", "download", "-q", "--no-deps", "-d", work, "obp==0.4.1"]
            subprocess.run([sys.executable, *words], check=True)
            (pathlib.Path(work) / ASSET.name).replace(ASSET)
    found = {}
    with zipfile.ZipFile(ASSET) as wheel:
        for policy in OBP:
            text = wheel.read(f"obp/dataset/obd/{policy}/all/all.csv").decode()
            rows = list(csv.DictReader(io.StringIO(text)))
            column = lambda key, rows=rows: np.array([float(row[key]) for row in rows])
            found[policy] = column("item_id").astype(int), column("click"), column("propensity_score")
    return found


def decide(items, rewards, propensities):
    p, q = make_policy()
    return Decisions(
        rewards,
        propensities,
        np.log(p[items]),
        estimates=q[items],
        values=np.full(len(items), p @ q),
        candidates=np.full(len(items), ITEMS),
    )


@pytest.mark.parametrize("policy", OBP)
def test_estimates_and_intervals_are_those_of_obp_on_its_logs(logs, policy):
    decisions = decide(*logs[policy])
    found = evaluate(decisions, resamples=2000, seed=1)
    assert found.rows == 10_000 and found.estimates["logged"].value == logs[policy][1].mean()
    for name, value in OBP[policy].items():
        assert found.estimates[name].value == pytest.approx(value, rel=1e-12), name
    for name, (low, high) in OBP_INTERVALS[policy].items():  # two bootstraps of other random numbers
        width = high - low
        assert abs(found.estimates[name].low - low) < 0.06 * width, name
        assert abs(found.estimates[name].high - high) < 0.06 * width, name
    weights = decisions.weights
    clipped = (np.minimum(weights, 10.0) * decisions.rewards).mean()
    assert found.estimates["clipped_ips"].value == pytest.approx(clipped, rel=1e-12)
    assert found.effective_size == pytest.approx(weights.sum() ** 2 / np.square(weights).sum(), rel=1e-12)


def test_nothing_is_doubted_of_the_random_policy_and_wrong_propensities_are(logs):
    items, rewards, propensities = logs["random"]
    assert evaluate(decide(items, rewards, propensities), resamples=10).warnings == ()
    wrong = evaluate(decide(items, rewards, propensities * 3), resamples=10).warnings
    assert len(wrong) == 2
    assert wrong[0].startswith("the mean of the model's probability / propensity is 0.33")
    assert wrong[1].startswith("the mean of 1 / (candidates x propensity) is 0.333 +- ")


def make_bandit(rows, seed=0):
    """Decisions of a bandit of 5 actions in 3 contexts, with what the target policy really earns."""
    rng = np.random.default_rng(seed)
    means = rng.random((3, 5))
    logging, target = (rng.dirichlet(np.full(5, 2.0), 3) for _ in range(2))
    contexts = rng.integers(0, 3, rows)
    actions = (rng.random(rows)[:, None] > logging[contexts].cumsum(1)).sum(1).clip(max=4)
    rewards = means[contexts, actions] + rng.normal(0, 0.3, rows)
    return contexts, actions, rewards, means, logging, target, float((target * means).sum(1).mean())


def test_doubly_robust_holds_where_either_the_rewards_or_the_propensities_are_right():
    contexts, actions, rewards, means, logging, target, truth = make_bandit(200_000)
    places = contexts, actions
    log_target = np.log(target[places])
    estimate = lambda q, p: (
        evaluate(
            Decisions(rewards, p, log_target, estimates=q[places], values=(target * q).sum(1)[contexts]), resamples=1
        ).estimates
    )
    wrong_q, wrong_p = 1.5 - means, np.full(len(rewards), 0.2)
    both = estimate(means, logging[places])
    assert all(abs(both[name].value - truth) < 0.01 for name in ("ips", "snips", "dm", "dr"))
    assert abs(both["logged"].value - truth) > 0.02, "the logging policy earns something else"
    only_p, only_q = estimate(wrong_q, logging[places]), estimate(means, wrong_p)
    assert abs(only_p["dr"].value - truth) < 0.02 < abs(only_p["dm"].value - truth)
    assert abs(only_q["dr"].value - truth) < 0.02 < abs(only_q["ips"].value - truth)


def test_intervals_cover_the_truth_as_often_as_they_say_and_members_widen_them():
    covered = []
    for seed in range(120):
        contexts, actions, rewards, means, logging, target, _ = make_bandit(400, seed)
        truth = float((target * means).sum(1)[contexts].mean())  # of these contexts
        places = contexts, actions
        decisions = Decisions(rewards, logging[places], np.log(target[places]))
        found = evaluate(decisions, resamples=200, level=0.9, seed=seed).estimates["snips"]
        covered.append(found.low <= truth <= found.high)
    assert 0.8 < np.mean(covered) < 0.98
    # Twenty members whose rewards are their own: 400 rows tell no more than 20.
    rng = np.random.default_rng(0)
    members = [str(i % 20) for i in range(400)]
    decisions = Decisions(
        rng.normal(size=20)[np.arange(400) % 20], np.full(400, 0.5), np.log(np.full(400, 0.5)), members=members
    )
    alone = Decisions(decisions.rewards, decisions.propensities, decisions.target_logprobs)
    width = lambda found: found.estimates["ips"].high - found.estimates["ips"].low
    by_member, by_row = evaluate(decisions), evaluate(alone)
    assert by_member.members == 20 and by_row.members == 400
    assert width(by_member) == pytest.approx(width(by_row) * math.sqrt(20), rel=0.25)
    assert evaluate(decisions, seed=3) == evaluate(decisions, seed=3) != evaluate(decisions, seed=4)


def test_a_single_row_has_no_interval_and_few_rows_are_told():
    one = evaluate(Decisions(np.array([1.0]), np.array([0.5]), np.log([0.5])))
    assert one.estimates["ips"].value == 1 and math.isnan(one.estimates["ips"].low)
    assert one.warnings == (
        "effective sample size 1.0 of 1 row: the estimates with weights rest on so few: give more rows",
        "intervals over 1 row: so few say little of others: expected 30 or more",
    )
    many = np.full(30, 0.5)
    assert not evaluate(Decisions(np.arange(30.0), many, np.log(many))).warnings


def test_long_texts_whose_probabilities_no_float_holds_are_estimated_by_their_ratios():
    decisions = Decisions(
        np.array([1.0, 0.0, 1.0]), np.array([0.5, 0.5, 0.25]), np.log([0.5, 0.5, 0.25]) + np.array([-900, -900, -901.0])
    )
    found = evaluate(decisions)
    assert found.estimates["ips"].value == 0 and found.mean_weight == 0
    weights = np.array([1, 1, math.exp(-1)])
    assert found.estimates["snips"].value == pytest.approx(weights[[0, 2]].sum() / weights.sum(), rel=1e-12)
    assert compute_effective_size(decisions) == pytest.approx(weights.sum() ** 2 / np.square(weights).sum(), rel=1e-12)
    assert found.warnings[0].startswith("effective sample size 2.6 of 3 rows")
    assert found.warnings[1].startswith("the mean of the model's probability / propensity is 0 +- 0, expected 1")
