"""The loss of distillation and its gradient do not depend on devices, packing or micro-batches."""

import dataclasses

import jax
import numpy as np
import pytest
from device_steps import OPTIMIZER, check_equal, one_device
from odd_config import ODD_CONFIG

from postrain.config import DistillSection, MeshConfig
from postrain.data.bad_row import RowRef
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Rendered, layout_of
from postrain.models.params import init_params, logical_axes
from postrain.objectives.distill import make_distill_loss
from postrain.recipes.distill import make_comparison
from postrain.sharding import make_mesh, named_shardings
from postrain.training.model import TEACHER, Forward
from postrain.training.rows import place_batch
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of

STUDENT = dataclasses.replace(ODD_CONFIG, attention_chunk=8)
WIDER = dataclasses.replace(ODD_CONFIG, attention_chunk=8, vocab_size=330, embed_size=48, num_layers=2, init_std=0.2)
SHARED, TOP = 290, 5


def make_documents():
    rng = np.random.default_rng(0)
    documents = []
    for i in range(21):
        length = int(rng.integers(2, 30))
        tokens = rng.integers(0, SHARED, length).astype(np.int32)
        ids = np.argsort(rng.random((length, SHARED)), 1)[:, :TOP].astype(np.int32)
        logprobs = np.log(rng.dirichlet(np.ones(TOP + 1), length)[:, :TOP]).astype(np.float32)
        fields = Field("teacher_ids", ids, "target"), Field("teacher_logprobs", logprobs, "target")
        mask = np.arange(length) >= rng.integers(1, length)
        documents.append(Rendered(tokens, mask, RowRef("test", "test", i), fields=fields, weight=1 + i % 2))
    return documents


def take_step(mesh, *, live, micro_batches=1, packed=True, rows=8):
    """(metrics, what the step subtracts from the student: its gradient)."""
    forwards = Forward(STUDENT, chunk=16), *([Forward(WIDER, chunk=16)] if live else [])
    options = DistillSection(loss="jsd", beta=0.3, temperature=1.5, nll_coef=0.2)
    loss_fn = make_distill_loss(make_comparison(options, SHARED, *forwards))
    place = lambda tree, config: jax.device_put(tree, named_shardings(logical_axes(config), mesh, tree))
    params = place(init_params(STUDENT, jax.random.key(0)), STUDENT)
    frozen = {TEACHER: place(init_params(WIDER, jax.random.key(1)), WIDER)} if live else {}
    shardings = shardings_of(abstract_train_state(params, frozen, OPTIMIZER, mesh=mesh))
    before = jax.device_get(params)
    state = init_train_state(params, frozen, OPTIMIZER, jax.random.key(0), mesh=mesh)
    step = make_train_step(loss_fn, OPTIMIZER, micro_batches=micro_batches, mesh=mesh, state_shardings=shardings)
    documents = make_documents()
    bins = pack(np.array([one.slots for one in documents]), 64, method="best_fit" if packed else "none")
    placed = [[documents[i] for i in indices] for indices in bins]
    assert len(placed) <= rows
    arrays = assemble_batch(placed + [[]] * (rows - len(placed)), 64, layout_of(documents[0]))
    state, metrics = step(state, place_batch(arrays, mesh))
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)


@pytest.mark.parametrize(
    ("live", "cases"),
    [
        (True, [(MeshConfig(2, 2, 2), {"micro_batches": 2}), (MeshConfig(8, 1, 1), {"packed": False, "rows": 24})]),
        (False, [(MeshConfig(1, 2, 2, 1, 2), {"micro_batches": 4})]),
    ],
    ids=["live", "stored"],
)
def test_any_mesh_gives_the_one_device_loss_and_gradients(live, cases):
    expected = take_step(one_device(), live=live)
    assert 0 < expected[0]["train/divergence"] < expected[0]["train/loss"]
    for mesh, options in cases:
        check_equal(take_step(make_mesh(mesh), live=live, **options), expected)
