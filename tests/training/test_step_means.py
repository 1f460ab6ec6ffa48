"""Several updates as one line: weighted as the loss is, exact for one update, without what is not finite."""

import json
import math

import numpy as np

from postrain.training.step_means import StepMeans


def metrics(loss, weight, rate=1e-3):
    loss, rate = np.float32(loss), np.float32(rate)
    return {
        "train/loss": loss,
        "train/weight": np.float32(weight),
        "train/grad_norm": loss,
        "train/learning_rate": rate,
    }


def test_losses_count_by_their_tokens_norms_once_and_the_last_rate_stands():
    means = StepMeans()
    means.add(metrics(1.0, 30, 1e-3) | {"usual": True})
    means = StepMeans(json.loads(json.dumps(means.to_json())))  # as in a checkpoint
    means.add(metrics(4.0, 10, 2e-3))
    found = means.values()
    assert found == {
        "train/loss": (30 + 40) / 40,
        "train/weight": 20,
        "train/grad_norm": 2.5,
        "train/learning_rate": float(np.float32(2e-3)),
    }


def test_each_mean_counts_by_its_own_weight_and_one_of_nothing_is_left_out():
    def kto(chosen, number, total):
        return metrics(1.0, total) | {"train/rewards/chosen": chosen, "weight_of/rewards/chosen": np.float32(number)}

    means = StepMeans()
    means.add(kto(0.0, 0, 4))
    assert "train/rewards/chosen" not in means.values() and means.values()["train/loss"] == 1
    means.add(kto(1.0, 3, 4))
    means.add(kto(0.0, 0, 4))
    means = StepMeans(json.loads(json.dumps(means.to_json())))
    means.add(kto(5.0, 1, 4))
    assert means.values()["train/rewards/chosen"] == (3 * 1 + 5) / 4


def test_of_one_update_the_values_are_its_own_to_the_bit():
    means = StepMeans()
    means.add(metrics(0.1, 3))
    assert means.values() == {name: float(value) for name, value in metrics(0.1, 3).items()}


def test_what_is_not_finite_or_trains_nothing_counts_only_while_there_is_no_other():
    means = StepMeans()
    means.add(metrics(np.nan, 5))
    assert math.isnan(means.values()["train/loss"])
    means.add(metrics(0.0, 0))
    for loss, weight in ((2.0, 5), (np.inf, 5), (0.0, 0), (4.0, 5)):
        means.add(metrics(loss, weight))
    assert means.values()["train/loss"] == 3.0
