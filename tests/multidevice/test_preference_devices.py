"""The loss of preferences, metrics and gradients do not depend on how rows and positions are laid out over devices."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from device_steps import check_equal, lay_out, make_step, one_device, take_step
from odd_config import ODD_CONFIG

from postrain.config import MeshConfig, PreferenceSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Group, Rendered, layout_of, share_prompts
from postrain.models.config import LoraConfig
from postrain.models.lora import drop_adapters
from postrain.objectives.preference import make_preference_loss
from postrain.objectives.sft import make_sft_loss
from postrain.objectives.unpaired import make_unpaired_loss
from postrain.sharding import make_mesh
from postrain.training.model import Forward
from postrain.types import LossSums

CONFIG = dataclasses.replace(ODD_CONFIG, lora=LoraConfig(4), attention_chunk=8)
FORWARD, COEFS = Forward(CONFIG, chunk=16), {"sft": 0.2}
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
    return lay_out(LENGTHS, LENGTH, CONFIG.vocab_size)


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
                scores = Field("scores", np.full(len(ids), score, np.float32), "sequence")
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


@pytest.fixture(scope="module")
def expected():
    return take_step(one_device(), CONFIG, losses_of, make_arrays(), loss_coefs=COEFS)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [(MeshConfig(2, 2, 2), 2), (MeshConfig(8, 1, 1), 1), (MeshConfig(1, 2, 1, 1, 4), 4)],
    ids=str,
)
def test_any_mesh_gives_the_one_device_losses_and_gradients(mesh, micro_batches, expected):
    options = {"micro_batches": micro_batches, "loss_coefs": COEFS}
    metrics, moved = take_step(make_mesh(mesh), CONFIG, losses_of, make_arrays(), **options)
    assert (
        metrics["train/weight/preference"] == sum(map(len, LENGTHS)) // 2
        and 0 < metrics["train/rewards/accuracies"] < 1
    )
    check_equal((metrics, moved), expected)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(8, 1, 1)], ids=str)
def test_any_mesh_gives_the_one_device_shift_of_single_answers(mesh):
    """KTO's shift is a mean over all rows of the update, of which a device may have none with a mismatched answer."""
    expected = take_step(one_device(), CONFIG, kto, make_labelled_arrays())
    metrics, moved = take_step(make_mesh(mesh), CONFIG, kto, make_labelled_arrays())
    assert metrics["train/weight"] == sum(len(lengths) - (len(lengths) >= 6) for lengths in LENGTHS) == 27
    assert metrics["train/kl"] > 0.1, "the shift is not 0"
    check_equal((metrics, moved), expected)


def test_shared_prompts_on_any_mesh_give_the_losses_and_gradients_of_unshared_ones():
    """Where positions are split, the prompt is on other devices than the answers that see it."""
    shared, whole = make_groups(share=True), make_groups(share=False)
    assert "prefix_starts" not in whole and shared["prefix_ends"].any(1).sum() == ROWS - 1
    expected = take_step(one_device(), CONFIG, losses_of, whole, loss_coefs=COEFS)
    mesh, options = make_mesh(MeshConfig(2, 1, 2, 1, 2)), {"micro_batches": 2, "loss_coefs": COEFS}
    metrics, moved = take_step(mesh, CONFIG, losses_of, shared, **options)
    assert metrics["train/weight/preference"] == 2 * (ROWS - 1)
    check_equal((metrics, moved), expected)


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
        step, state, batch = make_step(mesh, CONFIG, loss_fn, make_arrays(), micro_batches=2)
        texts.append(step.lower(state, batch).as_text())
    for operation in ("dot_general", "all_reduce", "sdy.manual_computation", "shard_map"):
        assert texts[0].count(operation) == texts[1].count(operation), operation
    loops = [text.count("stablehlo.while") for text in texts]
    assert texts[0].count("dot_general") > 10 and loops[1] == loops[0] + 1, loops
