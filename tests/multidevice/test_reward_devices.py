"""The losses of reward models, metrics and gradients do not depend on how rows and positions lie on devices."""

import dataclasses
import functools

import numpy as np
import pytest
from device_steps import check_equal, lay_out, one_device, take_step
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig, RewardSection
from postrain.models.config import LoraConfig
from postrain.models.heads import HeadConfig
from postrain.objectives.reward import make_reward_loss
from postrain.sharding import make_mesh
from postrain.training.model import Forward
from postrain.types import LossSums

CONFIG = dataclasses.replace(ODD_CONFIG, lora=LoraConfig(4), attention_chunk=8, tie_embeddings=True)
HEAD = HeadConfig("score", 1, "every")
FORWARD = Forward(CONFIG, chunk=16)
OPTIONS = {"heads": (HEAD,), "loss_coefs": {"centering": 0.1, "steps": 0.5}}
LENGTH = 40
# Answers of each row, two by two a pair: 15 pairs, an odd number; one row has none.
LENGTHS = ([7, 9, 5, 3], [1, 1, 20, 2], [12, 26], [6, 5, 4, 3, 2, 1], [], [3, 30, 2, 2], [2] * 8, [19, 8])
PAIRS = sum(map(len, LENGTHS)) // 2


def make_arrays() -> dict:
    """Scores below 0 too, and every answer a step, which ends it."""
    arrays = lay_out(LENGTHS, LENGTH, CONFIG.vocab_size)
    segments, scores = arrays["segment_ids"], arrays["scores"]
    ends = (segments > 0) & (np.diff(segments, axis=1, append=0) != 0)
    steps = np.where(ends, 1 + (segments + 1) % 2, 0).astype(np.int32)
    return arrays | {"scores": np.where(segments > 0, scores - 0.5, 0).astype(np.float32), "steps": steps}


def losses_of(params, batch, rng) -> LossSums:
    """Of pairs, with a second loss, and of steps."""
    outputs = functools.partial(FORWARD.outputs, head=HEAD)
    pairs = make_reward_loss(outputs, RewardSection(centering_coef=0.1, margin=0.5, margin_of="scores"), held_out=True)
    steps = make_reward_loss(outputs, RewardSection(loss="stepwise"))
    pairs, steps = pairs(params, batch, rng), steps(params, batch, rng)
    metrics = pairs.metrics | {f"steps/{name}": value for name, value in steps.metrics.items()}
    return LossSums(pairs.losses | {"steps": steps.losses["reward"]}, metrics)


@pytest.fixture(scope="module")
def expected():
    return take_step(one_device(), CONFIG, losses_of, make_arrays(), **OPTIONS)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [(MeshConfig(2, 2, 2), 2), (MeshConfig(8, 1, 1), 1), (MeshConfig(1, 2, 1, 1, 4), 4)],
    ids=str,
)
def test_any_mesh_gives_the_one_device_losses_and_gradients(mesh, micro_batches, expected):
    options = OPTIONS | {"micro_batches": micro_batches}
    metrics, moved = take_step(make_mesh(mesh), CONFIG, losses_of, make_arrays(), **options)
    assert metrics["train/weight/reward"] == PAIRS == 15 and metrics["train/weight/steps"] == 2 * PAIRS
    assert 0 < metrics["train/accuracy"] < 1
    check_equal((metrics, moved), expected)
