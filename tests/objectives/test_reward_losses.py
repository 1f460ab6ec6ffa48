"""Losses of reward models and their gradients are those of trl and of plain torch, however rows are packed."""

import dataclasses
import functools

import datasets
import jax
import numpy as np
import pytest
import torch
import transformers
import trl
from safetensors.numpy import load_file
from tiny_models import make_tiny_model
from torch.nn.functional import cross_entropy, logsigmoid, mse_loss

from postrain.config import RewardSection
from postrain.data.bad_row import RowRef
from postrain.data.batches.packing import pack
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import Field, Group, Rendered, layout_of
from postrain.hf.classifier import load_trunk, save_classifier
from postrain.models.heads import HeadConfig, init_heads
from postrain.objectives.reward import BINS, make_reward_loss, read_bins
from postrain.recipes.reward import read_last
from postrain.training.model import Forward
from postrain.types import Batch

LENGTH, CLASSES = 61, 3
REF = RowRef("test", "test", 1)


class Classifier:
    """A tiny classifier of ``outputs``, its folder, and the same in torch."""

    def __init__(self, folder, outputs):
        base = make_tiny_model(folder / "base", "qwen3")
        self.config, self.params = load_trunk(base)
        self.head = HeadConfig("score", outputs, "every")
        self.params |= init_heads([self.head], self.config, jax.random.key(1))
        self.params["heads"]["score"]["kernel"] *= 10
        self.base = base
        self.folder = self.save(folder / "classifier", self.params)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.torch = load(self.folder, attn_implementation="eager")

    def save(self, folder, params):
        head = dataclasses.replace(self.head, position="last")
        save_classifier(folder, params, self.config, head, source_folder=self.base, dtype="float32")
        return folder

    def compute(self, batch, options, held_out=False):
        """(losses by name, metrics, gradients of the losses with their factors)."""
        forward = Forward(self.config, chunk=16)
        outputs = functools.partial(forward.outputs, head=self.head)
        loss_fn = make_reward_loss(outputs, options, held_out=held_out)

        def loss(params, batch):
            sums = loss_fn(params, batch, None)
            means = {name: term.total / term.weight for name, term in sums.losses.items()}
            return means["reward"] + options.centering_coef * means.get("centering", 0), sums

        (total, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params, batch)
        return float(total), {name: float(term.total / term.weight) for name, term in sums.metrics.items()}, grads

    def torch_scores(self, tokens):
        """Of one text at every position, [L, K]."""
        hidden = self.torch.model(torch.tensor([tokens.tolist()])).last_hidden_state
        return self.torch.score(hidden)[0]

    def torch_grads(self, loss):
        self.torch.zero_grad()
        loss.backward()
        return {name: one.grad.numpy() for name, one in self.torch.named_parameters()}

    def check(self, folder, batch, options, expected: torch.Tensor):
        loss, metrics, grads = self.compute(batch, options)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        found, wanted = load_file(self.save(folder, grads) / "model.safetensors"), self.torch_grads(expected)
        assert set(found) == set(wanted)
        for name, array in wanted.items():
            error = np.linalg.norm((found[name] - array).astype(np.float64))
            assert error <= 1e-5 * np.linalg.norm(array.astype(np.float64)), (name, error)
        return metrics


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return Classifier(tmp_path_factory.mktemp("scorer"), 1)


def draw(rng, most=17):
    return rng.integers(4, 301, rng.integers(1, most)).astype(np.int32)


def make_text(tokens, *fields):
    return Rendered(tokens, np.arange(len(tokens)) > 0, REF, fields=fields)


def make_group(scores, rng) -> Group:
    """Answers of these scores, also of a single token; the scores are not in order."""
    texts = [draw(rng) for _ in scores]
    of = lambda text, score: Field("scores", np.full(len(text), score, np.float32), "sequence")
    return Group(tuple(make_text(text, of(text, score)) for text, score in zip(texts, scores, strict=True)))


def make_pairs(count=11):
    rng = np.random.default_rng(0)
    return [make_group((1.5, 0.0) if i % 2 else (-0.5, 0.25 * i), rng) for i in range(count)]


def make_batch(documents, packed=True) -> Batch:
    documents = [read_last(document) for document in documents]
    lengths = np.array([document.slots for document in documents])
    bins = pack(lengths, LENGTH, method="best_fit" if packed else "none")
    assert len(bins) < len(documents) if packed else len(bins) == len(documents)
    rows = [[documents[i] for i in indices] for indices in bins] + [[]]  # and a row of padding
    return Batch.from_arrays(assemble_batch(rows, LENGTH, layout_of(documents[0])))


def best_first(group):
    return sorted(group.sequences, key=lambda one: -one.fields[0].values[0])


def scores_of(scorer, group):
    """(scores of the model, scores of the data) of the answers, the best first."""
    ranked = best_first(group)
    scores = [scorer.torch_scores(one.tokens)[-1, 0] for one in ranked]
    return torch.stack(scores), [float(one.fields[0].values[0]) for one in ranked]


PAIR_OPTIONS = {
    "bradley_terry": {},
    "centering": {"centering_coef": 0.3},
    "margin": {"margin": 0.7},
    "margin of scores": {"margin": 0.5, "margin_of": "scores"},
    "label smoothing": {"label_smoothing": 0.2, "margin": 0.3},
    "a list of two": {"loss": "plackett_luce", "centering_coef": 0.1},
}


@pytest.fixture(scope="module")
def trainer(scorer, tmp_path_factory):
    """trl's, whose padding is a token that no text has."""
    args = trl.RewardConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    scorer.torch.config.pad_token_id = 3
    return trl.RewardTrainer(
        model=scorer.torch,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(scorer.base),
    )


@pytest.mark.parametrize("variant", PAIR_OPTIONS)
def test_losses_of_pairs_are_those_of_trl(scorer, trainer, tmp_path, variant):
    options, pairs = RewardSection(**PAIR_OPTIONS[variant]), make_pairs()
    rows = []
    for pair in pairs:
        better, worse = best_first(pair)
        lead = float(better.fields[0].values[0] - worse.fields[0].values[0]) if options.margin_of == "scores" else 1.0
        ids = {"chosen_ids": better.tokens.tolist(), "rejected_ids": worse.tokens.tolist()}
        rows.append(ids | ({"margin": options.margin * lead} if options.margin else {}))
    trainer.args.center_rewards_coefficient = options.centering_coef or None
    trainer._metrics["train"].clear()
    trainer.model.train()
    if options.label_smoothing:  # which trl lacks: a share of the pairs the wrong way round
        margins = []
        for row, pair in zip(rows, pairs, strict=True):
            chosen, rejected = scores_of(scorer, pair)[0]
            margins.append(chosen - rejected - row["margin"])
        margins, share = torch.stack(margins), options.label_smoothing
        expected = -((1 - share) * logsigmoid(margins) + share * logsigmoid(-margins)).mean()
    else:
        expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    metrics = scorer.check(tmp_path / "grads", make_batch(pairs), options, expected)
    assert set(metrics) == {"accuracy", "margin", "score_mean"} and 0 < metrics["accuracy"] < 1
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    if theirs:
        for name, other in (("accuracy", "accuracy"), ("margin", "margin"), ("score_mean", "mean_reward")):
            assert metrics[name] == pytest.approx(theirs[other], rel=1e-4, abs=1e-6)


def test_lists_have_the_likelihood_of_their_order(scorer, tmp_path):
    """Plackett's model: the best answer is chosen among all, then the next one among the rest, and so on."""
    rng = np.random.default_rng(1)
    lists = [make_group(rng.permutation(n).astype(float), rng) for n in (2, 3, 5, 4, 3)]
    losses, means = [], []
    for one in lists:
        scores, _ = scores_of(scorer, one)
        losses.append(sum(torch.logsumexp(scores[i:], 0) - scores[i] for i in range(len(scores))))
        means.append((2 * scores.mean()) ** 2)
    options = RewardSection(loss="plackett_luce", centering_coef=0.2)
    expected = torch.stack(losses).mean() + 0.2 * torch.stack(means).mean()
    scorer.check(tmp_path / "grads", make_batch(lists), options, expected)


def test_answers_of_one_score_are_not_compared_with_each_other(scorer, tmp_path):
    rng = np.random.default_rng(2)
    lists = [make_group(scores, rng) for scores in ((1, 0, 1), (0, 2, 0, 2, 1), (3, 0, 0, 0), (0.5, -0.5))]
    losses = []
    for one in lists:
        scores, labels = scores_of(scorer, one)
        terms = []
        for score, label in zip(scores, labels, strict=True):
            worse = [other for other, own in zip(scores, labels, strict=True) if own < label]
            terms.append(torch.log1p(sum((torch.exp(other - score) for other in worse), torch.zeros(()))))
        losses.append(sum(terms))
    options = RewardSection(loss="plackett_luce")
    scorer.check(tmp_path / "grads", make_batch(lists), options, torch.stack(losses).mean())


def make_step_texts(count=7):
    rng, texts = np.random.default_rng(3), []
    for i in range(count):
        tokens = draw(rng, 30)
        steps = np.where(rng.random(len(tokens)) < 0.3, rng.integers(1, 3, len(tokens)), 0).astype(np.int32)
        steps[-1] = 1 + i % 2
        texts.append(make_text(tokens, Field("steps", steps, "token")))
    return texts


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_steps_are_judged_at_their_last_tokens(scorer, tmp_path, share):
    """As by cross entropy of two classes, wrong and right, of which wrong has the logit 0."""
    texts = make_step_texts()
    logits, labels = [], []
    for text in texts:
        scores, steps = scorer.torch_scores(text.tokens)[:, 0], text.fields[0].values
        logits += [torch.stack([torch.zeros(()), scores[i]]) for i in np.flatnonzero(steps)]
        labels += (steps[steps > 0] - 1).tolist()
    logits, labels = torch.stack(logits), torch.tensor(labels)
    expected = (1 - share) * cross_entropy(logits, labels) + share * cross_entropy(logits, 1 - labels)
    options = RewardSection(loss="stepwise", label_smoothing=share)
    metrics = scorer.check(tmp_path / "grads", make_batch(texts), options, expected)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def make_labelled_texts(count=9):
    rng = np.random.default_rng(4)
    texts = [draw(rng) for _ in range(count)]
    return [
        make_text(text, Field("labels", np.full(len(text), i % CLASSES, np.int32), "sequence"))
        for i, text in enumerate(texts)
    ]


def test_numbers_are_met_in_the_mean_square(scorer, tmp_path):
    texts = make_labelled_texts()
    scores = torch.stack([scorer.torch_scores(text.tokens)[-1, 0] for text in texts])
    labels = torch.tensor([float(text.fields[0].values[0]) for text in texts])
    scorer.check(tmp_path / "grads", make_batch(texts), RewardSection(loss="squared_error"), mse_loss(scores, labels))


def test_classes_are_those_of_cross_entropy(tmp_path):
    model, texts = Classifier(tmp_path, CLASSES), make_labelled_texts()
    logits = torch.stack([model.torch_scores(text.tokens)[-1] for text in texts])
    labels = torch.tensor([int(text.fields[0].values[0]) for text in texts])
    expected = cross_entropy(logits, labels)
    metrics = model.check(tmp_path / "grads", make_batch(texts), RewardSection(loss="cross_entropy"), expected)
    assert metrics == {"accuracy": pytest.approx((logits.argmax(1) == labels).float().mean().item())}


@pytest.mark.parametrize("options", [{"centering_coef": 0.3}, {"loss": "stepwise"}], ids=str)
def test_packed_rows_are_single_ones(scorer, options):
    documents = make_step_texts() if "loss" in options else make_pairs()
    results = [scorer.compute(make_batch(documents, packed), RewardSection(**options)) for packed in (True, False)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for found, expected in zip(*(jax.tree.leaves(grads) for _, _, grads in results), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_calibration_error_is_that_of_the_pairs(scorer):
    pairs = make_pairs()
    _, metrics, _ = scorer.compute(make_batch(pairs), RewardSection(), held_out=True)
    error, table = read_bins(metrics)
    with torch.no_grad():
        leads = np.array([(scores[0] - scores[1]).item() for scores, _ in (scores_of(scorer, pair) for pair in pairs)])
        every = np.array([score.item() for pair in pairs for score in scores_of(scorer, pair)[0]])
    confidence, right = 1 / (1 + np.exp(-np.abs(leads))), leads > 0
    bins = (confidence * BINS).astype(int)
    by_bin = [np.flatnonzero(bins == i) for i in sorted(set(bins.tolist()))]
    gaps = [len(of) / len(leads) * abs(confidence[of].mean() - right[of].mean()) for of in by_bin]
    assert error == pytest.approx(sum(gaps), rel=1e-4) and error > 0.01
    assert [row["accuracy"] for row in table] == pytest.approx([right[of].mean() for of in by_bin])
    assert [row["share"] for row in table] == pytest.approx([len(of) / len(leads) for of in by_bin])
    assert all(row["from"] <= row["confidence"] <= row["to"] for row in table) and len(table) > 2
    assert metrics["score_square"] - metrics["score_mean"] ** 2 == pytest.approx(every.var(), rel=1e-3)
