"""A refactoring must reproduce the losses that are kept here: data order, packing, model, loss, optimizer.

PYTHONPATH=tests python tests/golden/test_golden.py sft         # writes sft.json anew, when a change of it is meant
PYTHONPATH=tests python tests/golden/test_golden.py preference
PYTHONPATH=tests python tests/golden/test_golden.py reward
PYTHONPATH=tests python tests/golden/test_golden.py unpaired
PYTHONPATH=tests python tests/golden/test_golden.py distill
PYTHONPATH=tests python tests/golden/test_golden.py weighted
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from odd_config import ODD_CONFIG

from postrain.config import (
    DataConfig,
    DistillSection,
    OptimizerConfig,
    PreferenceSection,
    RewardSection,
    WeightsSection,
)
from postrain.data.bad_row import RowRef
from postrain.data.batches.in_memory import ExampleSet, MemoryBatches
from postrain.data.batches.row_filter import DataReport
from postrain.data.documents import Field, Group, Rendered
from postrain.data.mismatched import add_mismatched
from postrain.data.reward_weights import compute_weights
from postrain.models.config import LoraConfig
from postrain.models.heads import HeadConfig, head_specs
from postrain.models.lora import drop_adapters, lora_specs
from postrain.models.params import ParamSpec, param_specs
from postrain.objectives.distill import make_distill_loss
from postrain.objectives.preference import make_preference_loss
from postrain.objectives.reward import make_reward_loss
from postrain.objectives.sft import make_sft_loss
from postrain.objectives.unpaired import make_unpaired_loss
from postrain.recipes.distill import make_comparison
from postrain.recipes.reward import read_last
from postrain.training.model import TEACHER, Forward
from postrain.training.optimizer import make_optimizer
from postrain.training.step import init_train_state, make_train_step
from postrain.types import Batch

FOLDER = pathlib.Path(__file__).parent
STEPS = 20
CONFIG = dataclasses.replace(ODD_CONFIG, attention_chunk=32, lora=LoraConfig(rank=4))
FORWARD = Forward(CONFIG, chunk=64)


def draw(specs, seed: int):
    """Numbers from numpy, whose streams do not change from one version to the next."""
    rng = np.random.default_rng(seed)
    is_spec = lambda x: isinstance(x, ParamSpec)
    around = lambda spec: (spec.init == "ones") + 0.1 * rng.standard_normal(spec.shape)
    return jax.tree.map(lambda spec: around(spec).astype(np.float32), specs, is_leaf=is_spec)


def make_examples() -> ExampleSet:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(200):
        length = int(np.clip(np.round(30 * np.exp(0.8 * rng.standard_normal())), 4, 128))
        tokens = np.cumsum(rng.integers(0, 3, length)).astype(np.int32) % CONFIG.vocab_size  # something to learn
        mask = np.arange(length) >= rng.integers(1, length)
        examples.append(Rendered(tokens, mask, RowRef("golden", "golden", i)))
    return ExampleSet(examples, DataReport([]), {})


def make_pairs() -> ExampleSet:
    """Two answers to each prompt; the better one goes on as the prompt did."""
    rng = np.random.default_rng(1)
    groups = []
    for i in range(120):
        prompt, lengths = int(rng.integers(2, 12)), rng.integers(1, 20, 2)
        rising = np.cumsum(rng.integers(0, 3, prompt + lengths[0]))
        other = np.concatenate([rising[:prompt], rng.integers(0, CONFIG.vocab_size, lengths[1])])
        sequences = []
        for tokens, score in ((rising, 1.0), (other, 0.0)):
            tokens = (tokens % CONFIG.vocab_size).astype(np.int32)
            scores = Field("scores", np.full(len(tokens), score, np.float32), "sequence")
            ref = RowRef("golden", "golden", i)
            sequences.append(Rendered(tokens, np.arange(len(tokens)) >= prompt, ref, fields=(scores,)))
        groups.append(Group(tuple(sequences)))
    return ExampleSet(groups, DataReport([]), {})


def make_answers() -> ExampleSet:
    """The answers of the pairs, each with a label, and for KTO with one to another prompt."""
    documents = []
    for sequence in (one for group in make_pairs().examples for one in group.sequences):
        label = sequence.fields[0].values.astype(np.int32)
        documents.append(dataclasses.replace(sequence, fields=(Field("labels", label, "sequence"),)))
    return ExampleSet(add_mismatched(documents, 128, seed=3), DataReport([]), {})


def add_likeliest(examples: ExampleSet, size: int) -> ExampleSet:
    """``examples`` with a teacher of each token, which likes it best and its neighbours next."""
    rng, found = np.random.default_rng(2), []
    for row in examples.examples:
        ids = (row.tokens[:, None] + np.arange(size, dtype=np.int32)) % CONFIG.vocab_size
        p = np.sort(rng.dirichlet(np.ones(size + 1), len(ids)), axis=1)[:, :0:-1]
        fields = Field("teacher_ids", ids, "target"), Field("teacher_logprobs", np.log(p).astype(np.float32), "target")
        found.append(dataclasses.replace(row, fields=fields))
    return dataclasses.replace(examples, examples=found)


def compute_curve(
    loss_fn, examples: ExampleSet, lora: bool, micro_batches: int = 2, trained=None, teacher=None, **options
) -> dict[str, list[float]]:
    """``trained``: the specs of what trains besides. ``teacher``: the parameters of another, frozen model."""
    base = draw(param_specs(CONFIG), 0)
    params, frozen = (draw(lora_specs(CONFIG) | (trained or {}), 1), base) if lora else (base, {})
    frozen = frozen | ({TEACHER: teacher} if teacher else {})
    optimizer, schedule = make_optimizer(OptimizerConfig(learning_rate=6e-3, warmup_steps=3, weight_decay=0.01), STEPS)
    step = make_train_step(
        loss_fn, optimizer, micro_batches=micro_batches, max_grad_norm=1.0, schedule=schedule, **options
    )
    state = init_train_state(params, frozen, optimizer, jax.random.key(0))
    batches = MemoryBatches(examples, DataConfig(sequence_length=128, batch_size=4, seed=3))
    curve = {"loss": [], "grad_norm": [], "weight": []}
    for _ in range(STEPS):
        arrays = next(batches)
        del arrays["row_ids"]
        state, metrics = step(state, Batch.from_arrays(arrays))
        for name, values in curve.items():
            values.append(float(metrics[f"train/{name}"]))
    batches.close()
    return curve


def compute_sft() -> dict:
    loss_fn = make_sft_loss(FORWARD.nll)
    return {kind: compute_curve(loss_fn, make_examples(), kind == "lora") for kind in ("full", "lora")}


def compute_preference() -> dict:
    reference = lambda params, batch: FORWARD.logprobs(drop_adapters(params), batch)[0].logprobs
    dpo = make_preference_loss(FORWARD.logprobs, reference, PreferenceSection(beta=0.3))
    orpo = make_preference_loss(FORWARD.logprobs, None, PreferenceSection(loss="orpo", nll_coef=0.5))
    return {
        "dpo, lora": compute_curve(dpo, make_pairs(), lora=True),
        "orpo, full": compute_curve(orpo, make_pairs(), lora=False, loss_coefs={"nll": 0.5}),
    }


def compute_unpaired() -> dict:
    reference = lambda params, batch: FORWARD.logprobs(drop_adapters(params), batch)[0].logprobs
    curves = {}
    for loss in ("kto", "bco"):  # BCO leaves mismatched answers alone
        loss_fn = make_unpaired_loss(FORWARD.logprobs, reference, PreferenceSection(loss=loss, beta=0.3))
        curves[f"{loss}, lora"] = compute_curve(loss_fn, make_answers(), lora=True, micro_batches=1)
    return curves


def compute_reward() -> dict:
    """Adapters and a head; of pairs and of lists, with a second loss."""
    head = HeadConfig("score", 1, "every")
    outputs = functools.partial(FORWARD.outputs, head=head)
    pairs = ExampleSet([read_last(pair) for pair in make_pairs().examples], DataReport([]), {})
    specs, curves = head_specs([head], CONFIG.embed_size), {}
    for options in (
        RewardSection(centering_coef=0.05, margin=0.5),
        RewardSection(loss="plackett_luce", centering_coef=0.2),
    ):
        coefs, loss_fn = {"centering": options.centering_coef}, make_reward_loss(outputs, options)
        curves[options.loss] = compute_curve(loss_fn, pairs, lora=True, trained=specs, loss_coefs=coefs)
    return curves


def compute_distill() -> dict:
    wider = dataclasses.replace(CONFIG, lora=None, vocab_size=330, embed_size=24, num_layers=2)
    teacher, shared = draw(param_specs(wider), 3), CONFIG.vocab_size - 11
    jsd = DistillSection(loss="jsd", beta=0.4, temperature=1.5)
    live = make_distill_loss(make_comparison(jsd, shared, FORWARD, Forward(wider, chunk=64)))
    stored = make_distill_loss(make_comparison(DistillSection(nll_coef=0.2), shared, FORWARD))
    return {
        "jsd, live, full": compute_curve(live, make_examples(), lora=False, teacher=teacher),
        "forward_kl, stored, lora": compute_curve(stored, add_likeliest(make_examples(), 5), lora=True),
    }


def compute_weighted() -> dict:
    """Rows that count by the exponential of their rewards."""
    rows, rng = make_examples(), np.random.default_rng(4)
    rewards = 1 + 0.5 * rng.standard_normal(len(rows.examples))
    weights, _ = compute_weights(rewards, WeightsSection(mode="exp", temperature=0.4))
    weighted = [dataclasses.replace(row, weight=float(w)) for row, w in zip(rows.examples, weights, strict=True)]
    loss_fn = make_sft_loss(FORWARD.nll)
    return {"exp, full": compute_curve(loss_fn, dataclasses.replace(rows, examples=weighted), lora=False)}


CURVES = {
    "sft": compute_sft,
    "preference": compute_preference,
    "unpaired": compute_unpaired,
    "reward": compute_reward,
    "distill": compute_distill,
    "weighted": compute_weighted,
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_the_ones_kept(name):
    kept, curves = json.loads((FOLDER / f"{name}.json").read_text()), CURVES[name]()
    assert kept.keys() == curves.keys()
    for kind, curve in kept.items():
        assert curves[kind]["weight"] == curve["weight"], f"{kind}: other tokens were trained, or in another order"
        np.testing.assert_allclose(curves[kind]["loss"], curve["loss"], rtol=1e-4, err_msg=kind)
        np.testing.assert_allclose(curves[kind]["grad_norm"], curve["grad_norm"], rtol=1e-3, err_msg=kind)
        assert curve["loss"][-1] < 0.95 * curve["loss"][0], f"{kind}: nothing was learned"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (FOLDER / f"{name}.json").write_text(json.dumps(CURVES[name](), indent=1) + "\n")
