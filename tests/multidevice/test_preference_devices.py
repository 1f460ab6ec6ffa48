"""The loss of preferences, metrics and gradients do not depend on how rows and positions are laid out over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig, PreferenceSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Group, Rendered, layout_of, share_prompts
from postrain.models.config import LoraConfig
from postrain.models.heads import head_specs, init_heads
from postrain.models.lora import drop_adapters, init_lora, lora_specs
from postrain.models.params import axes_of, init_params, logical_axes, shapes_of
from postrain.objectives.preference import make_preference_loss
from postrain.objectives.sft import make_sft_loss
from postrain.objectives.unpaired import make_unpaired_loss
from postrain.sharding import make_global_batch, make_mesh, named_shardings
from postrain.training.model import Forward
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.types import Batch, LossSums

CONFIG = dataclasses.replace(ODD_CONFIG, lora=LoraConfig(4), attention_chunk=8)
FORWARD, OPTIMIZER = Forward(CONFIG, chunk=16), optax.sgd(1.0)
UNPAIRED_OPTIONS = PreferenceSection(loss="kto", beta=0.3, undesirable_weight=0.7)
ROWS, LENGTH = 8, 40
LENGTHS = (
    [7, 9, 5, 3],
    [1, 1, 20, 2, 4, 4],
    [12, 26],
    [6, 5, 4, 3, 2, 1],
    [],
    [3, 30],
    [2, 2, 2, 2, 2, 2, 2, 2],
    [19, 8],
)


def make_arrays() -> dict:
    """Pairs of answers of these lengths, from none to four in a row."""
    rng = np.random.default_rng(0)
    names = ("tokens", "targets", "segment_ids", "positions", "group_ids")
    arrays = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    arrays |= {name: np.zeros((ROWS, LENGTH), np.float32) for name in ("loss_mask", "scores")}
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for i, length in enumerate(lengths):
            at = row, slice(start, start + length)
            arrays["tokens"][at], arrays["targets"][at] = rng.integers(0, CONFIG.vocab_size, (2, length))
            arrays["segment_ids"][at], arrays["group_ids"][at] = i + 1, i // 2 + 1
            arrays["positions"][at] = np.arange(length)
            arrays["loss_mask"][at] = np.arange(length) >= length // 2
            arrays["scores"][at] = (i + row) % 2
            start += length
    return arrays


def make_groups(share: bool) -> dict:
    """Groups of pairs with prompts of up to 12 tokens, two in a row; with them shared, or one for each answer."""
    rng, rows = np.random.default_rng(5), []
    prepare = share_prompts().each if share else lambda group: group
    for row in range(ROWS):
        groups = []
        for prompt in (int(rng.integers(1, 13)), int(rng.integers(1, 4))) if row else ():
            tokens = rng.integers(0, CONFIG.vocab_size, prompt)
            sequences = []
            for score in (1.0, 0.0):
                ids = np.concatenate([tokens, rng.integers(0, CONFIG.vocab_size, rng.integers(1, 5))]).astype(np.int32)
                scores = Field("scores", np.full(len(ids), score, np.float32), True)
                sequences.append(Rendered(ids, np.arange(len(ids)) >= prompt, RowRef("t", "t", row), fields=(scores,)))
            groups.append(prepare(Group(tuple(sequences))))
        rows.append(groups)
    return assemble_batch(rows, LENGTH, layout_of(rows[-1][0]))


def losses_of(params, batch, rng) -> LossSums:
    """DPO beside the likelihood of all answers: two losses, with weights of their own."""
    reference = lambda params, batch: FORWARD.logprobs(drop_adapters(params), batch)[0].logprobs
    dpo = make_preference_loss(FORWARD.logprobs, reference, PreferenceSection(beta=0.3))(params, batch, rng)
    sft = make_sft_loss(FORWARD.nll)(params, batch, rng)
    return LossSums(dpo.losses | sft.losses, dpo.metrics | sft.metrics)


def make_labelled_arrays() -> dict:
    """The same answers with labels in place of groups; the sixth of a row is a mismatched one."""
    arrays = make_arrays()
    for name in ("scores", "group_ids"):
        del arrays[name]
    segments = arrays["segment_ids"]
    arrays["labels"] = np.where((segments > 0) & (segments % 6 == 0), -1, segments % 2).astype(np.int32)
    return arrays


def kto(params, batch, rng) -> LossSums:
    reference = lambda params, batch: FORWARD.logprobs(drop_adapters(params), batch)[0].logprobs
    return make_unpaired_loss(FORWARD.logprobs, reference, UNPAIRED_OPTIONS)(params, batch, rng)


def make_step(mesh, loss_fn=losses_of, micro_batches=1, make_arrays=make_arrays, loss_coefs=None, heads=()):
    base = init_params(CONFIG, jax.random.key(0))
    specs = lora_specs(CONFIG) | head_specs(heads, CONFIG.embed_size)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapters = init_lora(CONFIG, jax.random.key(1)) | init_heads(heads, CONFIG, jax.random.key(2))
    adapters = jax.tree.map(noise, adapters)
    params = jax.device_put(adapters, named_shardings(axes_of(specs), mesh, shapes_of(specs)))
    frozen = jax.device_put(base, named_shardings(logical_axes(CONFIG), mesh, base))
    shardings = shardings_of(abstract_train_state(params, frozen, OPTIMIZER, mesh=mesh))
    state = init_train_state(params, frozen, OPTIMIZER, jax.random.key(0), mesh=mesh)
    step = make_train_step(
        loss_fn, OPTIMIZER, loss_coefs=loss_coefs, micro_batches=micro_batches, mesh=mesh, state_shardings=shardings
    )
    return step, state, Batch.from_arrays(make_global_batch(make_arrays(), mesh))


def take_step(mesh, micro_batches, arrays=None, **options):
    """(metrics, what the step subtracts from the adapters: their gradient)."""
    options = options or {"loss_coefs": {"sft": 0.2}}
    if arrays is not None:
        options["make_arrays"] = lambda: arrays
    step, state, batch = make_step(mesh, micro_batches=micro_batches, **options)
    before = jax.device_get(state.params)
    state, metrics = step(state, batch)
    return jax.device_get(metrics), jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)


@pytest.fixture(scope="module")
def one_device():
    return take_step(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 1)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [(MeshConfig(2, 2, 2), 2), (MeshConfig(8, 1, 1), 1), (MeshConfig(1, 2, 1, 1, 4), 4)],
    ids=str,
)
def test_any_mesh_gives_the_one_device_losses_and_gradients(mesh, micro_batches, one_device):
    metrics, moved = take_step(make_mesh(mesh), micro_batches)
    expected, expected_moved = one_device
    assert (
        metrics["train/weight/preference"] == sum(map(len, LENGTHS)) // 2
        and 0 < metrics["train/rewards/accuracies"] < 1
    )
    check_equal(metrics, moved, expected, expected_moved)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(8, 1, 1)], ids=str)
def test_any_mesh_gives_the_one_device_shift_of_single_answers(mesh):
    """KTO's shift is a mean over all rows of the update, of which a device may have none with a mismatched answer."""
    options = {"loss_fn": kto, "make_arrays": make_labelled_arrays}
    expected, expected_moved = take_step(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 1, **options)
    metrics, moved = take_step(make_mesh(mesh), 1, **options)
    assert metrics["train/weight"] == sum(len(lengths) - (len(lengths) >= 6) for lengths in LENGTHS) == 27
    assert metrics["train/kl"] > 0.1, "the shift is not 0"
    check_equal(metrics, moved, expected, expected_moved)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 2, 1, 2)], ids=str)
def test_shared_prompts_on_any_mesh_give_the_losses_and_gradients_of_unshared_ones(mesh, one_device_unshared):
    """Where positions are split, the prompt is on other devices than the answers that see it."""
    metrics, moved = take_step(make_mesh(mesh), 2, make_groups(share=True))
    assert metrics["train/weight/preference"] == 2 * (ROWS - 1)
    check_equal(metrics, moved, *one_device_unshared)


@pytest.fixture(scope="module")
def one_device_unshared():
    arrays = make_groups(share=False)
    assert "prefix_starts" not in arrays and make_groups(share=True)["prefix_ends"].any(1).sum() == ROWS - 1
    return take_step(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), 1, arrays)


def check_equal(metrics, moved, expected, expected_moved):
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    for (path, found), leaf in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(expected_moved), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-5 * np.abs(leaf).max(), err_msg=jax.tree_util.keystr(path))


def test_the_pass_that_adds_up_weights_runs_no_model():
    """Two losses of one forward pass: as many matrix products and loops as of one loss."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    sft = make_sft_loss(FORWARD.nll)

    def one(params, batch, rng):
        sums = sft(params, batch, rng)
        return LossSums({"sft": sums.losses["sft"]}, {})

    def two(params, batch, rng):
        losses, _ = sft(params, batch, rng)
        rows = jnp.zeros(()), (batch.segment_ids[:, 0] > 0).sum()
        return LossSums(losses | {"none": type(losses["sft"])(*rows)}, {})

    texts = []
    for loss_fn in (one, two):
        step, state, batch = make_step(mesh, loss_fn, micro_batches=2)
        texts.append(step.lower(state, batch).as_text())
    for operation in ("dot_general", "all_reduce", "sdy.manual_computation", "shard_map"):
        assert texts[0].count(operation) == texts[1].count(operation), operation
    loops = [text.count("stablehlo.while") for text in texts]
    assert texts[0].count("dot_general") > 10 and loops[1] == loops[0] + 1, loops
