"""A model of events: several id and float fields a position, embedded by the user's own function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from odd_config import ODD_CONFIG

from postrain.config import OptimizerConfig
from postrain.models.heads import HeadConfig, apply_heads, init_heads, init_trunk
from postrain.models.transformer import compute_hidden
from postrain.objectives.heads import cross_entropy, make_head_loss, squared_error
from postrain.training.optimizer import make_optimizer
from postrain.training.step import init_train_state, make_train_step
from postrain.types import Batch

CONFIG = dataclasses.replace(ODD_CONFIG, num_layers=2, init_std=0.1)
ITEMS, ACTIONS = 6, 3
HEADS = (HeadConfig("next_action", ACTIONS, position="every", bias=True), HeadConfig("next_dwell", position="every"))
LENGTHS = ([7, 5], [12], [3, 4, 5], [8, 2])


def embed_events(params, fields):
    """[B, T, D]: an item and an action, ids, and seconds on the page, a number."""
    p = params["events"]
    dwell = jnp.log1p(fields["dwell"])[..., None] * p["dwell"]["direction"]
    return p["item"]["embedding"][fields["item"]] + p["action"]["embedding"][fields["action"]] + dwell


def init_model(rng):
    keys = jax.random.split(rng, 5)
    draw = lambda key, *shape: 0.3 * jax.random.normal(key, shape)
    events = {
        "item": {"embedding": draw(keys[0], ITEMS, CONFIG.embed_size)},
        "action": {"embedding": draw(keys[1], ACTIONS, CONFIG.embed_size)},
        "dwell": {"direction": draw(keys[2], CONFIG.embed_size)},
    }
    return {"events": events} | init_trunk(CONFIG, keys[3]) | init_heads(HEADS, CONFIG, keys[4])


def make_document(length, rng):
    """The next action is a sum over the present and the last item, more for a long look; the next dwell follows too."""
    item = rng.integers(0, ITEMS, length)
    dwell = rng.choice([1.0, 20.0], length).astype(np.float32)
    before = np.append(0, item[:-1])
    action = np.append(0, (item + before + (dwell > 5))[:-1] % ACTIONS)
    following = (item + before + (dwell > 5)) % ACTIONS
    return {"item": item, "dwell": dwell, "action": action}, {"next_action": following, "next_dwell": np.log1p(dwell)}


def make_batch(rows, length):
    """``rows``: of documents."""
    shape = len(rows), length
    kinds = {"dwell": np.float32, "next_dwell": np.float32}
    names = ("item", "dwell", "action", "next_action", "next_dwell")
    fields = {name: np.zeros(shape, kinds.get(name, np.int32)) for name in names}
    segments, positions = np.zeros((2, *shape), np.int32)
    for b, row in enumerate(rows):
        start = 0
        for i, document in enumerate(row):
            inputs, targets = document
            span = slice(start, start + len(inputs["item"]))
            for name, values in (inputs | targets).items():
                fields[name][b, span] = values
            segments[b, span], positions[b, span] = i + 1, np.arange(span.stop - span.start)
            start = span.stop
    return Batch(None, None, (segments > 0).astype(np.float32), segments, positions, fields)


def compute_outputs(params, batch):
    hidden = compute_hidden(
        params, CONFIG, None, batch.segment_ids, batch.positions, embedded_BTD=embed_events(params, batch.fields)
    )
    return *apply_heads(params, HEADS, hidden, batch.segment_ids, 1), None


LOSS = make_head_loss(compute_outputs, {"next_action": cross_entropy, "next_dwell": squared_error})


def test_packed_events_have_the_loss_and_gradients_of_single_documents():
    rng = np.random.default_rng(0)
    rows = [[make_document(n, rng) for n in lengths] for lengths in LENGTHS]
    single = [[document] for row in rows for document in row]
    params = init_model(jax.random.key(0))

    def mean(params, batch):
        return sum(term.total / term.weight for term in LOSS(params, batch, jax.random.key(0)).losses.values())

    packed, alone = (jax.jit(jax.value_and_grad(mean))(params, make_batch(r, n)) for r, n in ((rows, 16), (single, 12)))
    assert abs(packed[0] - alone[0]) <= 1e-6 * alone[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), packed[1], alone[1])
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(packed[1]))


def test_the_train_step_learns_a_rule_of_two_fields():
    rng = np.random.default_rng(1)
    optimizer, schedule = make_optimizer(OptimizerConfig(learning_rate=3e-3, schedule="constant"), 150)
    step = make_train_step(LOSS, optimizer, micro_batches=2, max_grad_norm=1.0, schedule=schedule)
    state = init_train_state(init_model(jax.random.key(2)), {}, optimizer, jax.random.key(0))
    for _ in range(150):
        rows = [[make_document(10, rng), make_document(14, rng)] for _ in range(16)]
        state, metrics = step(state, make_batch(rows, 24))
    held_out = make_batch([[make_document(24, rng)] for _ in range(8)], 24)
    outputs, masks, _ = compute_outputs(state.params, held_out)
    right = outputs["next_action"].argmax(-1) == held_out.fields["next_action"]
    assert right[masks["next_action"]].mean() > 0.95, metrics
    # The length of the look matters: without it a third of the answers must change.
    blind = held_out.replace(fields=held_out.fields | {"dwell": np.ones_like(held_out.fields["dwell"])})
    changed = compute_outputs(state.params, blind)[0]["next_action"].argmax(-1) != outputs["next_action"].argmax(-1)
    assert changed.mean() > 1 / 3
