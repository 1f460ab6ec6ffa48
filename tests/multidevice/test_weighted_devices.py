"""A loss whose weights are not in what it is divided by does not depend on how rows are laid out over devices."""

import functools

import jax
import numpy as np
from device_steps import check_equal, one_device
from device_steps import take_step as take_step_of
from test_preference_devices import CONFIG, FORWARD, LENGTHS, make_arrays

from postrain.config import MeshConfig, SftSection, WeightsSection
from postrain.models.heads import HeadConfig
from postrain.objectives.sft import divide_by_tokens, make_advantage_loss, make_sft_loss, measure_weights
from postrain.sharding import make_global_batch, make_mesh, replicated
from postrain.types import Batch


def take_step(mesh, micro_batches):
    """(metrics of the step and of its weights, what it subtracts from the adapters); ``scores`` are the weights."""
    loss_fn, arrays = divide_by_tokens(make_sft_loss(FORWARD.nll), "scores"), make_arrays()
    batch = Batch.from_arrays(make_global_batch(arrays, mesh))
    measured = jax.jit(lambda batch: measure_weights(batch, "scores"), out_shardings=replicated(mesh))(batch)
    metrics, moved = take_step_of(mesh, CONFIG, loss_fn, arrays, micro_batches=micro_batches)
    return metrics | jax.device_get(measured), moved


def test_one_device_and_eight_take_the_same_step():
    metrics, gradient = take_step(one_device(), 1)
    found, other = take_step(make_mesh(MeshConfig(2, 2, 2)), 2)
    assert metrics["train/weight"] > 100 and 0 < metrics["train/weights/effective_share"] < 1
    for name in (
        "train/loss",
        "train/weight",
        "train/grad_norm",
        "train/weights/mean",
        "train/weights/effective_share",
    ):
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_advantages_over_a_head_are_the_same_on_one_device_and_on_eight():
    """Their weights, and so what the loss is divided by, depend on the head and on all micro-batches."""
    head = HeadConfig("value", position="every", bias=True)
    compute = functools.partial(FORWARD.logprobs_and_outputs, head=head)
    section = WeightsSection(mode="advantage", baseline="head", temperature=0.3, clip=5.0)
    loss_fn = make_advantage_loss(compute, SftSection(weights=section), "scores")
    step, options = (CONFIG, loss_fn, make_arrays()), {"heads": (head,), "loss_coefs": {"value": 0.3}}
    expected, expected_moved = take_step_of(one_device(), *step, **options)
    assert expected["train/weight/value"] == sum(map(len, LENGTHS)) and expected["train/weights/limited"] > 0
    assert np.abs(expected_moved["heads"]["value"]["kernel"]).max() > 0
    # Where positions are split, the head is read on another device than most of its document lies on.
    found = take_step_of(make_mesh(MeshConfig(1, 2, 1, 1, 4)), *step, micro_batches=4, **options)
    check_equal(found, (expected, expected_moved))
