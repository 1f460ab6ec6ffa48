"""Loss and gradients of the real transformer do not depend on how a batch is split."""

import jax
import numpy as np
import optax
import pytest
from tiny_models import make_tiny_model

from postrain.data.bad_row import RowRef
from postrain.data.batches.token_shift import assemble_row
from postrain.data.rendering.render import Rendered
from postrain.hf.load import load_pretrained
from postrain.objectives.sft import make_sft_loss
from postrain.training.model import Forward
from postrain.training.step import init_train_state, make_train_step, sum_gradients
from postrain.types import Batch

ROWS, LENGTH = 8, 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_pretrained(make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3"))


def make_batch():
    """Packed rows with anything from no to all tokens trained: a mean of the means of parts would be another."""
    rng, rows = np.random.default_rng(0), []
    for share in np.linspace(0, 1, ROWS):
        documents = []
        for length in (17, 5, 20) if share else ():  # the first row is empty
            mask = rng.random(length) < share
            documents.append(Rendered(rng.integers(0, 301, length).astype(np.int32), mask, RowRef("a", "a", 0)))
        rows.append(assemble_row(documents, LENGTH))
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def make_loss(config):
    return make_sft_loss(Forward(config, chunk=32).nll)


def compute(model, micro_batches):
    """(loss, loss of the step, gradients, update of the step): all divided by the weight."""
    config, params = model
    loss_fn, batch = make_loss(config), make_batch()
    optimizer = optax.sgd(1.0)
    state = init_train_state(jax.tree.map(np.array, params), {}, optimizer, jax.random.key(0))
    grads, sums = jax.jit(
        lambda state, batch: sum_gradients(loss_fn, state, batch, state.rng, micro_batches, None, None, {})
    )(state, batch)
    loss, weight = sums.losses["sft"]
    # The step itself: with this optimizer the parameters move by the gradient.
    new, metrics = make_train_step(loss_fn, optimizer, micro_batches=micro_batches)(state, batch)
    moved = jax.tree.map(lambda before, after: before - after, params, new.params)
    return float(loss / weight), float(metrics["train/loss"]), jax.tree.map(lambda g: g / weight, grads), moved


def norm(tree):
    return np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(tree)))


@pytest.fixture(scope="module")
def whole(model):
    return compute(model, 1)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_neither_loss_nor_gradient(model, whole, micro_batches):
    loss, step_loss, grads, moved = compute(model, micro_batches)
    assert loss == pytest.approx(whole[0], rel=1e-5) and step_loss == pytest.approx(whole[1], rel=1e-5)
    assert step_loss == pytest.approx(loss, rel=1e-6) and loss > 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        expected = whole[2]
        for key in path:
            expected = expected[key.key]
        assert norm(leaf - expected) <= 1e-5 * norm(expected), path
    difference = jax.tree.map(lambda a, b: a - b, moved, whole[3])
    assert norm(difference) <= 1e-5 * norm(whole[3]) and norm(whole[3]) > 0.1
