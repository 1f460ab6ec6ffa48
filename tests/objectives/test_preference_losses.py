"""DPO on packed pairs has the loss, gradients and metrics of TRL on padded ones, however they are packed and split."""

import dataclasses
import math

import datasets
import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
import trl
from safetensors.numpy import load_file
from tiny_models import make_tiny_model

from postrain.config import REFERENCE_FREE, PreferenceSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Group, layout_of
from postrain.data.kinds.preference import check_groups
from postrain.data.rendering.render import Rendered
from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import save_adapter
from postrain.models.config import LoraConfig
from postrain.models.lora import drop_adapters, init_lora
from postrain.models.params import merge_params
from postrain.objectives.preference import PAIR_LOSSES, make_preference_loss
from postrain.training.model import Forward
from postrain.training.step import init_train_state, make_train_step
from postrain.types import Batch

BETA, LENGTH, PAIRS = 0.3, 67, 11
TENSORS = "adapter_model.safetensors"
LORAS = {
    "lora": LoraConfig(5, 7.5),
    "some": LoraConfig(2, 4.0, targets=("q", "down")),
    "dora": LoraConfig(3, 4.0, dora=True),
}


def make_group(answers, scores, prompt, index=0) -> Group:
    sequences = []
    for answer, score in zip(answers, scores, strict=True):
        tokens = np.array([*prompt, *answer], np.int32)
        field = Field("scores", np.full(len(tokens), score, np.float32), "sequence")
        sequences.append(
            Rendered(tokens, np.arange(len(tokens)) >= len(prompt), RowRef("test", "test", index), fields=(field,))
        )
    return Group(tuple(sequences))


def make_groups(count=PAIRS, seed=0) -> list[Group]:
    """Pairs of all lengths, from a single token; in half of them the worse answer comes first."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(count):
        prompt, *answers = (rng.integers(4, 301, rng.integers(1, most)).tolist() for most in (9, 18, 18))
        groups.append(make_group(answers, (1.0, 0.0) if i % 2 else (-0.5, 2.5), prompt, i))
    return groups


def make_batch(groups, rows, length=LENGTH, packed=True, lists=False) -> Batch:
    lengths = np.array([group.slots for group in groups])
    bins = pack(lengths, length, method="best_fit" if packed else "none")
    assert len(bins) <= rows and (max(map(len, bins)) > 2) == packed
    documents = [[groups[i] for i in indices] for indices in bins] + [[]] * (rows - len(bins))
    arrays = assemble_batch(documents, length, layout_of(groups[0]))
    check_groups(arrays, lists=lists)
    return Batch(fields={name: arrays.pop(name) for name in ("scores", "group_ids")}, **arrays)


class Model:
    """A tiny model with adapters that change it, its folder and that of the adapters."""

    def __init__(self, folder, family="qwen3", lora=LORAS["lora"]):
        self.base = make_tiny_model(folder / "base", family)
        config, self.frozen = load_pretrained(self.base)
        self.config = dataclasses.replace(config, lora=lora)
        self.new = init_lora(self.config, jax.random.key(0), self.frozen)
        self.params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), self.new)
        self.adapter = self.save(folder / "adapter", self.params)

    def save(self, folder, params):
        save_adapter(folder, params, self.config, base_folder=self.base)
        return folder

    def loss_fn(self, **options):
        forward = Forward(self.config, chunk=16)
        options = PreferenceSection(**{"beta": BETA} | options)
        reference = lambda params, batch: forward.logprobs(drop_adapters(params), batch)[0].logprobs
        reference = None if options.loss in REFERENCE_FREE else reference
        return make_preference_loss(forward.logprobs, reference, options)

    def compute(self, batch, params=None, **options):
        """(loss, metrics, gradients of the adapters)."""
        loss_fn = self.loss_fn(**options)

        def mean(params):
            sums = loss_fn(merge_params(params, self.frozen), batch, None)
            means = {name: loss.total / loss.weight for name, loss in sums.losses.items()}
            return means["preference"] + options.get("nll_coef", 0) * means.get("nll", 0), sums

        params = self.params if params is None else params
        (loss, sums), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
        return float(loss), {name: float(term.total / term.weight) for name, term in sums.metrics.items()}, grads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("model"))


def compute_in_trl(model: Model, groups, folder, swapped=False, **options):
    """(loss, metrics, gradients by PEFT's names) of DPOTrainer on padded pairs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.base)
    adapter = peft.PeftConfig.from_pretrained(model.adapter)
    adapter.inference_mode = False
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model.base, attn_implementation="eager"),
        args=trl.DPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            **{"beta": BETA} | options,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    weights = {name: torch.from_numpy(array) for name, array in load_file(model.adapter / TENSORS).items()}
    missing = peft.set_peft_model_state_dict(trainer.model, weights)
    assert not missing.unexpected_keys
    rows = []
    for group in groups:
        worse, better = sorted(group.sequences, key=lambda one: one.fields[0].values[0], reverse=swapped)
        prompt = int(better.loss_mask.argmax())
        ids = lambda sequence, prompt=prompt: sequence.tokens[prompt:].tolist()
        rows.append(
            {"prompt_ids": better.tokens[:prompt].tolist(), "chosen_ids": ids(better), "rejected_ids": ids(worse)}
        )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    grads = {
        name.replace(".default", "").replace("_vector.weight", "_vector"): parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), {name: values[-1] for name, values in trainer._metrics["train"].items()}, grads


def assert_near(found, expected, tolerance=1e-5):
    """Each array to ``tolerance`` of its norm."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        error = np.linalg.norm((found[name] - array).astype(np.float64))
        assert error <= tolerance * np.linalg.norm(array.astype(np.float64)), (name, error, np.linalg.norm(array))


def by_name(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(("family", "lora"), [("qwen3", "lora"), ("llama", "some"), ("qwen3", "dora")])
def test_loss_gradients_and_metrics_are_those_of_trl(tmp_path, family, lora):
    model, groups = Model(tmp_path, family, LORAS[lora]), make_groups()
    loss, metrics, grads = model.compute(make_batch(groups, 5))
    expected, expected_metrics, expected_grads = compute_in_trl(model, groups, tmp_path / "trl")
    assert loss == pytest.approx(expected, rel=1e-5) and abs(loss - math.log(2)) > 0.02
    saved = load_file(model.save(tmp_path / "grads", grads) / TENSORS)
    assert_near(saved, expected_grads)
    for name, value in metrics.items():
        assert value == pytest.approx(expected_metrics[name], rel=1e-4), name
    assert set(metrics) == {
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        *(f"logps/{name}" for name in ("chosen", "rejected")),
    }
    assert 0 < metrics["rewards/accuracies"] < 1


def test_label_smoothing_is_a_share_of_swapped_labels(model, tmp_path):
    groups, share = make_groups(), 0.2
    loss, _, grads = model.compute(make_batch(groups, 5), label_smoothing=share)
    right, _, right_grads = compute_in_trl(model, groups, tmp_path / "right")
    wrong, _, wrong_grads = compute_in_trl(model, groups, tmp_path / "wrong", swapped=True)
    assert loss == pytest.approx((1 - share) * right + share * wrong, rel=1e-5)
    expected = {name: (1 - share) * grad + share * wrong_grads[name] for name, grad in right_grads.items()}
    assert_near(load_file(model.save(tmp_path / "grads", grads) / TENSORS), expected)


def test_new_adapters_are_their_reference(model):
    batch = make_batch(make_groups(), 6)
    loss, metrics, grads = model.compute(batch, model.new)
    assert loss == pytest.approx(math.log(2), rel=1e-7) and metrics["rewards/accuracies"] == 0
    assert metrics["rewards/chosen"] == metrics["rewards/margins"] == 0
    assert max(np.abs(grad).max() for grad in by_name(grads).values()) > 1e-3


def test_packed_pairs_are_single_ones(model):
    groups = make_groups()
    loss, metrics, grads = model.compute(make_batch(groups, 5))
    for length in (LENGTH, 40):
        alone, alone_metrics, alone_grads = model.compute(make_batch(groups, PAIRS, length, packed=False))
        assert loss == pytest.approx(alone, rel=1e-5)
        assert metrics == pytest.approx(alone_metrics, rel=1e-5)
        assert_near(by_name(grads), by_name(alone_grads))


def test_a_pair_cannot_touch_another(model):
    groups = make_groups()
    single = [model.compute(make_batch([group], 1, packed=False))[0] for group in groups[:3]]
    assert len(set(single)) == 3
    loss, _, _ = model.compute(make_batch(groups[:3], 1, 120))
    assert loss == pytest.approx(np.mean(single), rel=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_micro_batches_change_nothing(model, micro_batches):
    batch = make_batch(make_groups(), 8)
    loss, metrics, grads = model.compute(batch)
    optimizer = optax.sgd(1.0)
    state = init_train_state(
        jax.tree.map(np.array, model.params), jax.tree.map(np.array, model.frozen), optimizer, jax.random.key(0)
    )
    state, found = make_train_step(model.loss_fn(), optimizer, micro_batches=micro_batches)(state, batch)
    assert float(found["train/loss"]) == pytest.approx(loss, rel=1e-5) and found["train/weight"] == PAIRS
    for name, value in metrics.items():
        assert float(found[f"train/{name}"]) == pytest.approx(value, rel=1e-5), name
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), model.params, state.params)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(model.params))  # what the subtraction rounds
    for name, grad in by_name(grads).items():
        np.testing.assert_allclose(by_name(moved)[name], grad, rtol=0, atol=1e-6 * scale + 1e-5 * np.abs(grad).max())


def test_routers_are_a_loss_of_their_own(tmp_path):
    model = Model(tmp_path, "qwen3_moe", LoraConfig(3, targets=("q", "o")))
    moe = dataclasses.replace(model.config.moe, load_balance_coef=0.3, z_coef=0.1)
    model.config = dataclasses.replace(model.config, moe=moe)
    batch, optimizer = make_batch(make_groups(), 6), optax.sgd(1.0)
    state = init_train_state(model.params, model.frozen, optimizer, jax.random.key(0))
    step = make_train_step(model.loss_fn(), optimizer, loss_coefs={"router": 0.5}, micro_batches=2)
    _, metrics = step(state, batch)
    router = 0.3 * metrics["train/router_load_balance"] + 0.1 * metrics["train/router_z"]
    assert float(metrics["train/loss/router"]) == pytest.approx(float(router), rel=1e-6)
    total = metrics["train/loss/preference"] + 0.5 * metrics["train/loss/router"]
    assert float(metrics["train/loss"]) == pytest.approx(float(total), rel=1e-6)
    assert metrics["train/weight/preference"] == PAIRS and metrics["train/weight/router"] == batch.loss_mask.sum()


@pytest.mark.parametrize("lora", LORAS)
def test_the_tree_without_adapters_is_the_model_that_training_began_with(tmp_path, lora):
    model, batch = Model(tmp_path, lora=LORAS[lora]), make_batch(make_groups(), 6)
    dropped = drop_adapters(merge_params(model.params, model.frozen))
    assert jax.tree.structure(dropped) == jax.tree.structure(model.frozen)
    assert all(a is b for a, b in zip(jax.tree.leaves(dropped), jax.tree.leaves(model.frozen), strict=True))
    forward = Forward(model.config, chunk=16)
    before = forward.logprobs(merge_params(model.new, model.frozen), batch)[0].logprobs
    after = forward.logprobs(merge_params(model.params, model.frozen), batch)[0].logprobs
    found = forward.logprobs(dropped, batch)[0].logprobs
    np.testing.assert_allclose(found, before, atol=2e-5)
    assert np.abs(after - before).max() > 0.1


def test_what_is_not_a_pair_is_refused():
    three = make_group([[5], [6], [7, 8]], (0.1, 0.2, 0.3), [9, 9])
    arrays = assemble_batch([[make_groups()[0], three]], LENGTH, layout_of(three))
    with pytest.raises(UserError, match="a row of preferences has 3 answers; expected 2, a chosen and a rejected one"):
        check_groups(arrays, lists=False)
    check_groups(arrays, lists=True)
    ties = make_group([[5], [6], [7, 8]], (0.1, 0.3, 0.3), [9, 9])
    with pytest.raises(UserError, match="several answers of the highest score; expected one that is the best"):
        check_groups(assemble_batch([[three], [ties]], LENGTH, layout_of(three)), lists=True)


# --- the relatives of DPO ---

# Of postrain, and the same of trl's DPOTrainer; each with a beta at which nothing is saturated.
IN_TRL = {
    "hinge": ({}, {"loss_type": "hinge"}),
    "ipo": ({"beta": 0.5}, {"beta": 0.5, "loss_type": "ipo"}),
    "robust": ({"label_smoothing": 0.15}, {"loss_type": "robust", "label_smoothing": 0.15}),
    "exo": ({"label_smoothing": 0.1}, {"loss_type": "exo_pair", "label_smoothing": 0.1}),
    "sppo_hard": ({}, {"loss_type": "sppo_hard"}),
    "nca": ({}, {"loss_type": "nca_pair"}),
    "bco_pair": ({}, {"loss_type": "bco_pair"}),
    "apo_zero": ({}, {"loss_type": "apo_zero"}),
    "apo_down": ({}, {"loss_type": "apo_down"}),
    "discopop": ({"beta": 0.01}, {"beta": 0.01, "loss_type": "discopop"}),
    "aot": ({"label_smoothing": 0.1}, {"loss_type": "aot", "label_smoothing": 0.1}),
    "aot_unpaired": ({}, {"loss_type": "aot_unpaired"}),
    "sigmoid, per token": ({"per_token": True, "beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}),
    "sigmoid, forward KL": ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "sigmoid, JS": ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "sigmoid, alpha": (
        {"divergence": "alpha", "divergence_alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "sigmoid and nll": ({"nll_coef": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
}


@pytest.mark.parametrize("name", IN_TRL)
def test_every_loss_and_its_gradients_are_those_of_trl(model, tmp_path, name):
    own, theirs = IN_TRL[name]
    own, groups = {"loss": name.split(",")[0].split()[0]} | own, make_groups()
    loss, _, grads = model.compute(make_batch(groups, 5), **own)
    expected, _, expected_grads = compute_in_trl(model, groups, tmp_path / "trl", **theirs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_near(load_file(model.save(tmp_path / "grads", grads) / TENSORS), expected_grads)


def sums_in_torch(model: Model, groups):
    """``sums_of`` the model with its adapters in torch, and that model."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model.base, attn_implementation="eager")
    network = peft.PeftModel.from_pretrained(base, model.adapter, is_trainable=True)
    return sums_of(network, groups), network


def sums_of(network, groups):
    """(log p, length) of every answer, those of a group from the best on."""
    values = []
    for group in groups:
        for one in sorted(group.sequences, key=lambda one: one.fields[0].values[0], reverse=True):
            tokens = torch.from_numpy(one.tokens).long()
            log_p = network(tokens[None]).logits[0, :-1].log_softmax(-1)
            trained = torch.from_numpy(one.loss_mask[1:])
            values.append((log_p.gather(1, tokens[1:, None])[:, 0][trained].sum(), int(trained.sum())))
    return values


def cpo(chosen, rejected):
    (c, _), (r, _) = chosen, rejected
    return -torch.nn.functional.logsigmoid(BETA * (c - r))


def simpo(chosen, rejected):
    (c, c_length), (r, r_length) = chosen, rejected
    return -torch.nn.functional.logsigmoid(2.0 * (c / c_length - r / r_length) - 0.4)


def orpo(chosen, rejected):
    log_odds = [x / length - torch.log1p(-torch.exp(x / length)) for x, length in (chosen, rejected)]
    return -BETA * torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1])


IN_TORCH = {
    "cpo": (cpo, {"nll_coef": 1.0}),
    "simpo": (simpo, {"beta": 2.0, "target_margin": 0.4}),
    "orpo": (orpo, {"nll_coef": 1.0}),
}


@pytest.mark.parametrize("name", IN_TORCH)
def test_losses_without_a_reference_are_their_formulas_in_torch(model, tmp_path, name):
    function, options = IN_TORCH[name]
    groups = make_groups()
    loss, metrics, grads = model.compute(make_batch(groups, 5), loss=name, **options)
    values, network = sums_in_torch(model, groups)
    pairs = list(zip(values[::2], values[1::2], strict=True))
    expected = sum(function(*pair) for pair in pairs) / len(pairs)
    if "nll_coef" in options:
        expected = expected - sum(chosen for (chosen, _), _ in pairs) / sum(length for (_, length), _ in pairs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(np.mean([float(c) for (c, _), _ in pairs]), rel=1e-5)
    expected_grads = {
        parameter.replace(".default", ""): value.grad.numpy()
        for parameter, value in network.named_parameters()
        if value.grad is not None
    }
    assert_near(load_file(model.save(tmp_path / "grads", grads) / TENSORS), expected_grads)


def test_the_target_of_cal_dpo_is_reached_from_both_sides(model):
    """Its value by the formula, from the logged means of single pairs."""
    for group in make_groups(3):
        loss, metrics, _ = model.compute(make_batch([group], 1, packed=False), loss="cal_dpo")
        chosen, rejected = (metrics[f"rewards/{name}"] / BETA for name in ("chosen", "rejected"))
        target = 1 / (2 * BETA)
        expected = np.log1p(np.exp(rejected - chosen)) + (chosen - target) ** 2 + (rejected + target) ** 2
        assert loss == pytest.approx(expected, rel=1e-4)


def test_softmax_of_two_answers_is_dpo(model):
    batch = make_batch(make_groups(), 5)
    loss, metrics, grads = model.compute(batch, loss="softmax")
    expected, expected_metrics, expected_grads = model.compute(batch)
    assert loss == pytest.approx(expected, rel=1e-6) and metrics == expected_metrics
    assert_near(by_name(grads), by_name(expected_grads))


def test_softmax_of_lists_is_the_share_of_the_best(model, tmp_path):
    rng = np.random.default_rng(3)
    groups, ids = [], lambda most: rng.integers(4, 301, rng.integers(1, most)).tolist()
    for i, count in enumerate((2, 5, 3, 4, 2)):
        scores = rng.permutation(count) - 1.5
        groups.append(make_group([ids(9) for _ in range(count)], scores.tolist(), ids(6), i))
    loss, metrics, grads = model.compute(make_batch(groups, 4, 60, lists=True), loss="softmax")
    values, network = sums_in_torch(model, groups)
    with torch.no_grad(), network.disable_adapter():
        base = [value for value, _ in sums_of(network, groups)]
    losses, start, right = [], 0, []
    for group in groups:  # the best comes first
        count = len(group.sequences)
        rewards = torch.stack([values[i][0] - base[i] for i in range(start, start + count)]) * BETA
        losses.append(-rewards.log_softmax(0)[0])
        right.append(float(rewards[0] > rewards[1:].max()))
        start += count
    expected = sum(losses) / len(losses)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    expected_grads = {
        parameter.replace(".default", ""): value.grad.numpy()
        for parameter, value in network.named_parameters()
        if value.grad is not None
    }
    assert_near(load_file(model.save(tmp_path / "grads", grads) / TENSORS), expected_grads)


@pytest.mark.parametrize("loss", [*PAIR_LOSSES, "softmax"])
def test_every_loss_is_finite_far_away_and_packing_does_not_change_it(model, loss):
    """Answers of 40 tokens that the model would never give, and of one; not a NaN in the gradients."""
    options = {"label_smoothing": 0.1} if loss in ("exo", "robust") else {}
    far = jax.tree.map(lambda x: 8 * x, model.params)
    groups = [*make_groups(4), make_group([[7] * 40, [9]], (0.0, 1.0), [5], 4), make_group([[8], [9]], (0, 1), [5], 5)]
    packed = model.compute(make_batch(groups, 4, 90), far, loss=loss, **options)
    single = model.compute(make_batch(groups, 7, 90, packed=False), far, loss=loss, **options)
    assert math.isfinite(packed[0]) and packed[0] == pytest.approx(single[0], rel=1e-4)
    for name, grad in by_name(packed[2]).items():
        assert np.isfinite(grad).all(), name
