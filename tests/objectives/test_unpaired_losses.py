"""Losses of single answers: those of TRL's KTOTrainer, and their papers' formulas, however they are packed."""

import functools
import math

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from safetensors.numpy import load_file
from test_preference_losses import BETA, TENSORS, Model, assert_near, by_name

from postrain.config import UNPAIRED_LOSSES, PreferenceSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Group, Rendered, layout_of
from postrain.data.mismatched import MISMATCHED, add_mismatched, check_mismatched
from postrain.errors import UserError
from postrain.models.lora import drop_adapters
from postrain.models.params import merge_params
from postrain.objectives.unpaired import make_unpaired_loss
from postrain.training.model import Forward
from postrain.types import Batch

ANSWERS, ROWS, LENGTH, SEED = 11, 12, 80, 2
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}


def make_answer(i, rng, label, prompt=None, length=None):
    prompt = rng.integers(4, 301, rng.integers(1, 9)).tolist() if prompt is None else prompt
    tokens = np.array([*prompt, *rng.integers(4, 301, length or rng.integers(1, 18))], np.int32)
    field = Field("labels", np.full(len(tokens), label, np.int32), of="sequence")
    mask = np.arange(len(tokens)) >= len(prompt)
    return Rendered(tokens, mask, RowRef("test", "test", i), fields=(field,))


def make_answers(count=ANSWERS, seed=0):
    rng = np.random.default_rng(seed)
    return [make_answer(i, rng, int(i % 3 > 0)) for i in range(count)]


def make_batch(documents, packed=True) -> Batch:
    lengths = np.array([document.slots for document in documents])
    bins = pack(lengths, LENGTH, method="best_fit" if packed else "none")
    assert (max(map(len, bins)) > 1) == packed
    rows = [[documents[i] for i in indices] for indices in bins] + [[]] * (ROWS - len(bins))
    return Batch.from_arrays(assemble_batch(rows, LENGTH, layout_of(documents[0])))


@functools.cache
def compile_loss(config, options: PreferenceSection):
    forward = Forward(config, chunk=16)
    reference = lambda params, batch: forward.logprobs(drop_adapters(params), batch)[0].logprobs
    loss_fn = make_unpaired_loss(forward.logprobs, reference, options)

    def mean(params, frozen, batch):
        sums = loss_fn(merge_params(params, frozen), batch, None)
        means = {name: loss.total / jnp.maximum(loss.weight, 1) for name, loss in sums.losses.items()}
        return means["preference"] + options.nll_coef * means.get("nll", 0), sums

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def compute(model, batch, params=None, **options):
    """(loss, metrics, gradients of the adapters)."""
    run = compile_loss(model.config, PreferenceSection(**{"beta": BETA} | options))
    (loss, sums), grads = run(model.params if params is None else params, model.frozen, batch)
    means = {name: float(term.total / max(term.weight, 1)) for name, term in sums.metrics.items()}
    return float(loss), means, grads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("model"))


def to_lists(sequence):
    start = int(sequence.loss_mask.argmax())
    return sequence.tokens[:start].tolist(), sequence.tokens[start:].tolist()


def compute_in_trl(model, groups, folder, **options):
    """(loss, metrics, gradients by PEFT's names) of KTOTrainer on padded answers, with these mismatched ones."""
    adapter = peft.PeftConfig.from_pretrained(model.adapter)
    adapter.inference_mode = False
    args = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "beta": BETA}
    trainer = trl.KTOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model.base, attn_implementation="eager"),
        args=trl.KTOConfig(gradient_checkpointing=False, **args | options),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "label": i > 0} for i in (0, 1)]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model.base),
        peft_config=adapter,
    )
    weights = {name: torch.from_numpy(array) for name, array in load_file(model.adapter / TENSORS).items()}
    assert not peft.set_peft_model_state_dict(trainer.model, weights).unexpected_keys
    rows = []
    for group in groups:
        own, *other = group.sequences
        prompt, answer = to_lists(own)
        row = {"prompt_ids": prompt, "completion_ids": answer, "label": bool(own.fields[0].values[0])}
        rows.append(row | ({"KL_completion_ids": to_lists(other[0])[1]} if other else {}))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    grads = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), {name: values[-1] for name, values in trainer._metrics["train"].items()}, grads


# Options, and a seed of answers: with the first the mean ratio of mismatched answers is below 0, with the other above.
IN_TRL = {
    "kto": ({}, 0),
    "kto, moved away": ({}, SEED),
    "kto, weights": (WEIGHTS, SEED),
    "apo_zero_unpaired": (WEIGHTS, 0),
}


@pytest.mark.parametrize("name", IN_TRL)
def test_every_loss_its_gradients_and_metrics_are_those_of_trl(model, tmp_path, name):
    loss_type, (options, seed) = name.split(",")[0], IN_TRL[name]
    documents = make_answers(seed=seed)
    groups = add_mismatched(documents, LENGTH, seed=5) if loss_type == "kto" else documents
    loss, metrics, grads = compute(model, make_batch(groups), loss=loss_type, **options)
    expected, found, expected_grads = compute_in_trl(model, groups, tmp_path / "trl", loss_type=loss_type, **options)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_near(load_file(model.save(tmp_path / "grads", grads) / TENSORS), expected_grads)
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert metrics[key] == pytest.approx(found[key], rel=1e-4), key
    assert metrics["desirable"] == pytest.approx(np.mean([i % 3 > 0 for i in range(ANSWERS)]))
    if loss_type == "kto":
        assert max(metrics["kl"], 0) == pytest.approx(found["kl"], rel=1e-4)
        assert (metrics["kl"] > 0.05) == bool(seed) and abs(metrics["kl"]) > 0.05, "the clamp is met from both sides"


def sums_in_torch(network, documents):
    """log p of every answer."""
    values = []
    for one in documents:
        tokens = torch.from_numpy(one.tokens).long()
        log_p = network(tokens[None]).logits[0, :-1].log_softmax(-1)
        values.append(log_p.gather(1, tokens[1:, None])[:, 0][torch.from_numpy(one.loss_mask[1:])].sum())
    return torch.stack(values)


@pytest.mark.parametrize("options", [{}, WEIGHTS, {"nll_coef": 0.7}], ids=str)
def test_bco_is_its_formula_in_torch(model, tmp_path, options):
    documents = make_answers()
    loss, metrics, grads = compute(model, make_batch(documents), loss="bco", **options)
    base = transformers.AutoModelForCausalLM.from_pretrained(model.base, attn_implementation="eager")
    network = peft.PeftModel.from_pretrained(base, model.adapter, is_trainable=True)
    with torch.no_grad(), network.disable_adapter():
        reference = sums_in_torch(network, documents)
    log_p = sums_in_torch(network, documents)
    rewards, label = BETA * (log_p - reference), torch.tensor([i % 3 > 0 for i in range(ANSWERS)])
    shift = (rewards[label].mean() + rewards[~label].mean()).detach() / 2
    losses = torch.nn.functional.binary_cross_entropy_with_logits(rewards - shift, label.float(), reduction="none")
    weights = torch.where(label, *(options.get(f"{name}_weight", 1.0) for name in ("desirable", "undesirable")))
    expected = (weights * losses).mean()
    tokens = sum(one.loss_mask.sum() for one, good in zip(documents, label, strict=True) if good)
    expected = expected - options.get("nll_coef", 0) * log_p[label].sum() / int(tokens)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and abs(shift) > 0.1
    right = (rewards - shift > 0) == label
    assert metrics["rewards/accuracies"] == pytest.approx(right.float().mean().item()) and 0 < right.sum() < ANSWERS
    expected_grads = {
        name.replace(".default", ""): value.grad.numpy()
        for name, value in network.named_parameters()
        if value.grad is not None
    }
    assert_near(load_file(model.save(tmp_path / "grads", grads) / TENSORS), expected_grads)


def make_documents(loss, seed=SEED):
    documents = make_answers(seed=seed)
    return add_mismatched(documents, LENGTH, seed=5) if loss == "kto" else documents


@pytest.mark.parametrize("loss", UNPAIRED_LOSSES)
def test_packed_answers_are_single_ones_and_far_ones_finite(model, loss):
    documents = make_documents(loss)
    far = jax.tree.map(lambda x: 8 * x, model.params)
    for params in (model.params, far):
        packed = compute(model, make_batch(documents), params, loss=loss)
        single = compute(model, make_batch(documents, packed=False), params, loss=loss)
        assert math.isfinite(packed[0]) and packed[0] == pytest.approx(single[0], rel=1e-4)
        assert packed[1] == pytest.approx(single[1], rel=1e-4)
        for name, grad in by_name(packed[2]).items():
            assert np.isfinite(grad).all(), name
        if params is model.params:
            assert_near(by_name(packed[2]), by_name(single[2]))


def test_mismatched_answers_and_the_shift_have_no_gradient(model):
    """Without labelled answers there is nothing to train; an update of one label has a shift of its own."""
    groups = make_documents("kto")
    alone = [Group((group.sequences[1],)) for group in groups]
    loss, metrics, grads = compute(model, make_batch(alone), loss="kto")
    assert loss == 0 < metrics["kl"] and not any(np.asarray(grad).any() for grad in jax.tree.leaves(grads))
    desirable = [one for one in make_answers() if one.fields[0].values[0]]
    loss, metrics, _ = compute(model, make_batch(desirable), loss="bco")
    assert math.isfinite(loss) and metrics["desirable"] == 1 and metrics["rewards/chosen"] != 0


@pytest.mark.parametrize("loss", UNPAIRED_LOSSES)
def test_new_adapters_have_moved_nothing(model, loss):
    at_start = {"kto": 0.5, "apo_zero_unpaired": 0.5, "bco": math.log(2)}
    value, metrics, grads = compute(model, make_batch(make_documents(loss)), model.new, loss=loss)
    assert value == pytest.approx(at_start[loss], rel=1e-6)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == metrics.get("kl", 0) == 0
    assert max(np.abs(grad).max() for grad in by_name(grads).values()) > 1e-4


# --- mismatched answers ---


def test_every_answer_is_given_once_and_to_another_prompt():
    """Also where a prompt has several answers: the 40 documents have 15 prompts, one of them 9 times."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 301, 1 + i % 7).tolist() for i in range(15)]
    documents = [make_answer(i, rng, i % 2, prompts[max(i % 20 - 5, 0)], length=5 + i % 9) for i in range(40)]
    groups, again, other = (add_mismatched(documents, LENGTH, seed=seed) for seed in (1, 1, 2))
    answers, given = [to_lists(document)[1] for document in documents], []
    for document, group, same in zip(documents, groups, again, strict=True):
        own, mismatched = group.sequences
        assert own is document and mismatched.ref == document.ref
        prompt, answer = to_lists(mismatched)
        assert prompt == to_lists(own)[0]
        assert mismatched.fields[0].values.tolist() == [MISMATCHED] * len(mismatched.tokens)
        giver = answers.index(answer)
        assert to_lists(documents[giver])[0] != prompt
        given.append(giver)
        np.testing.assert_array_equal(same.sequences[1].tokens, mismatched.tokens)
    assert sorted(given) == list(range(40))
    tokens = [[group.sequences[1].tokens.tolist() for group in some] for some in (groups, other)]
    assert tokens[0] != tokens[1], "the seed decides"


def test_groups_fit_into_a_row():
    rng = np.random.default_rng(0)
    documents = [make_answer(i, rng, i % 2, length=length) for i, length in enumerate((5, 30, 34, 12, 39))]
    slots = 40
    groups = add_mismatched(documents, slots, seed=0)
    alone, cut = 0, 0
    for document, group in zip(documents, groups, strict=True):
        assert group.slots <= slots and group.sequences[0] is document
        for one in group.sequences[1:]:
            assert one.num_trained >= 1 and len(one.tokens) == len(one.loss_mask) == len(one.fields[0].values)
            cut += one.truncated
        alone += len(group.sequences) == 1
        assert (len(group.sequences) == 1) == (slots - document.slots < len(to_lists(document)[0]))
    assert alone and cut
    with pytest.raises(UserError, match="none of 3 rows can be paired with the answer to another prompt"):
        check_mismatched(add_mismatched([make_answer(i, rng, 1, [5, 6]) for i in range(3)], 40, seed=0))
    # One prompt of most rows: what cannot be paired stays alone.
    most = [make_answer(i, rng, 1, [5, 6] if i else [7]) for i in range(4)]
    assert [len(group.sequences) for group in add_mismatched(most, 40, seed=0)].count(2) == 2
