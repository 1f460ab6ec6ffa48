"""Preference learning: make the better answer to a prompt more likely, and the worse one less.

    postrain train --config=configs/preference.py --workdir=RUN --config.model.path=DIR --config.data.train=pairs.jsonl

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives, by ``preference.loss``: the
loss of a pair falls with its margin, which is how much more the chosen answer has gained over the reference than the
rejected one. The reference is the model that training starts from. With adapters it is the model without them, which
start without any effect; else its logprobs of all rows are computed before the first update. So no second model is in
memory, unless ``preference.reference`` is "live".

The answers to a prompt are segments of one packed row and share the computation of the prompt, which is a segment
before them (``data.share_prompts``). The loss of an update is the mean over its pairs, divided once by their number.
Losses of single answers (KTO, BCO) read rows with a label in place of pairs.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from postrain.config import UNPAIRED_LOSSES, Config, choose_reference, find_row_kind
from postrain.data.documents import AS_RENDERED, SHARED_ARRAYS, Document, Layout, Preparation
from postrain.data.kinds import labelled
from postrain.data.kinds.preference import LAYOUT, check_groups, format_distances
from postrain.data.mismatched import add_mismatched, check_mismatched
from postrain.export import export_state
from postrain.models.lora import drop_adapters
from postrain.objectives.preference import make_preference_loss
from postrain.objectives.unpaired import make_unpaired_loss
from postrain.report.page import Chart
from postrain.training.evaluate import Evaluator, make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import Forward, Model, load_model
from postrain.training.program import Program, build_program
from postrain.training.reference import FIELD as REFERENCE
from postrain.training.reference import add_reference_logprobs, hold_reference, take_reference
from postrain.training.rows import (
    count_steps,
    format_plain_text,
    open_eval_rows,
    open_train_rows,
    prepare_groups,
    shares_prompts,
)
from postrain.training.session import ShownRow, open_session

CHARTS = (
    Chart("Loss per pair or answer", ("train/loss", "eval/loss")),
    Chart("Share in the right order", ("train/rewards/accuracies", "eval/rewards/accuracies"), 0.0, 1.0),
    Chart("Reward margin", ("train/rewards/margins", "eval/rewards/margins")),
    Chart("log p of the chosen answer", ("train/logps/chosen", "eval/logps/chosen")),
    Chart("log p of the rejected answer", ("train/logps/rejected", "eval/logps/rejected")),
    Chart("Mean ratio of answers to other prompts", ("train/kl", "eval/kl")),
    Chart("Gradient norm before clipping", ("train/grad_norm",), 0.0),
)


def train(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains ``config.model.path``, or adapters of it, on ``config.data.train``, rows of kind preference or labelled.

    Returns the last value of every metric. Resumes, and raises, as ``recipes.sft`` does.
    """
    with open_session(config, workdir) as session:
        unpaired = config.preference.loss in UNPAIRED_LOSSES
        own = {"kind": find_row_kind(config), "check": make_check(config)}
        preparation = prepare(config, session.mesh)
        rows = open_train_rows(session, **own, preparation=preparation)
        held_out = open_eval_rows(session, **own, preparation=preparation)
        total_steps = count_steps(session, rows)
        rows.add_note(format_plain_text(rows))
        if rows.documents:
            rows.add_note(describe_rows(config, rows.documents))

        model, reference = load_model(config, session.model_folder, session.mesh), choose_reference(config)
        model = hold_reference(model) if reference == "live" else model
        program = make_program(config, model, session.mesh, total_steps)
        session.print_summary(model, program, rows, held_out)

        add_reference = None
        if reference == "cached":
            forward = Forward(model.config, chunk=config.model.loss_chunk)
            add_reference = functools.partial(add_reference_logprobs, session, model, forward)
            rows.extend = add_reference(rows.example_set)
        evaluators = [] if held_out is None else [make_loss_evaluator(session, program, held_out, add_reference)]
        evaluators = [measure_margin(evaluate) for evaluate in evaluators] if unpaired else evaluators
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                loop.finish_step(metrics)

        export_state(session, loop.state, model)
        return session.write_report(rows, held_out, CHARTS, shown=show_answers(rows.sample) if unpaired else None)


def prepare(config: Config, mesh: Mesh | None = None) -> Preparation:
    """What is made of the rendered documents: pairs share their prompt, KTO needs answers to other prompts."""
    if config.preference.loss not in UNPAIRED_LOSSES:
        return prepare_groups(config, mesh)
    if config.preference.loss != "kto":
        return AS_RENDERED
    together = functools.partial(add_mismatched, slots=config.data.sequence_length, seed=config.data.seed)
    return Preparation("with mismatched answers", together=together)


def make_check(config: Config) -> Callable[[Mapping[str, np.ndarray]], None]:
    """What a numpy batch must be for the loss of ``config``."""
    if config.preference.loss in UNPAIRED_LOSSES:
        return labelled.check_two_labels
    return functools.partial(check_groups, lists=config.preference.loss == "softmax")


def describe_rows(config: Config, documents: Sequence[Document]) -> str:
    """Lines about all rows together, "" where nothing is to be said. Raises UserError where they teach nothing."""
    if config.preference.loss in UNPAIRED_LOSSES:
        return format_labels(config, documents)
    return format_distances(documents)


def format_labels(config: Config, documents: Sequence[Document]) -> str:
    """Lines about the labels of the rows. Raises UserError where all have the same, or none has a mismatched answer."""
    options, counts = config.preference, labelled.count_labels(documents)
    text = f"labels      {counts[1]:,} true, {counts[0]:,} false"
    if options.loss != "kto":
        return text
    check_mismatched(documents)
    weighted = counts[1] * options.desirable_weight, counts[0] * options.undesirable_weight
    if not 1 <= weighted[0] / weighted[1] <= 4 / 3:
        key, value = "desirable_weight", weighted[1] / counts[1]
        if weighted[0] > weighted[1]:
            key, value = "undesirable_weight", weighted[0] / counts[0]
        text += (
            f": {weighted[0] / weighted[1]:.2f} to 1 by their weights, where 1 to 1.33 is advised (arXiv:2402.01306): "
            f"set 'preference.{key}' to {value:.3g}"
        )
    pairs = [group.sequences[1] for group in documents if len(group.sequences) == 2]
    alone, cut = len(documents) - len(pairs), sum(one.truncated for one in pairs)
    return text + (
        f"\nmismatched  {len(pairs):,} answers to other prompts, {cut:,} of them cut to fit beside the row's own; "
        f"{alone:,} rows without one"
    )


def show_answers(document: Document) -> ShownRow:
    """A labelled answer, and of KTO the mismatched one beside it, which is not trained."""
    own, *mismatched = document.sequences
    label = "true" if next(values for name, values, _ in own.fields if name == labelled.FIELD)[0] else "false"
    others = [dataclasses.replace(one, loss_mask=np.zeros_like(one.loss_mask)) for one in mismatched]
    line = "its prompt with an answer to another one: mismatched, not trained"
    return ShownRow(((f"label {label}", own), *((line, other) for other in others)))


def measure_margin(evaluate: Evaluator) -> Evaluator:
    """``evaluate``, and how far the mean rewards of both labels are apart, where it has both."""

    def measure(state, step: int) -> dict[str, float]:
        metrics = evaluate(state, step)
        if not 0 < metrics["eval/desirable"] < 1:
            return metrics
        margin = metrics["eval/rewards/chosen"] - metrics["eval/rewards/rejected"]
        return metrics | {"eval/rewards/margins": margin}

    return measure


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract."""
    forward, options = Forward(model.config, chunk=config.model.loss_chunk), config.preference
    unpaired, reference = options.loss in UNPAIRED_LOSSES, None
    arrays = dict(labelled.LAYOUT.arrays if unpaired else LAYOUT.arrays)
    if options.loss == "kto":  # its documents are groups
        arrays["group_ids"] = LAYOUT.arrays["group_ids"]
    if not unpaired and shares_prompts(config, mesh):
        arrays |= SHARED_ARRAYS
    match choose_reference(config):
        case "base":
            reference = lambda params, batch: forward.logprobs(drop_adapters(params), batch)[0].logprobs
        case "cached":
            reference = lambda params, batch: batch.fields[REFERENCE]
            arrays[REFERENCE] = np.dtype(np.float32), ()
        case "live":
            model = hold_reference(model)  # that of a plan has none yet
            reference = lambda params, batch: forward.logprobs(take_reference(params), batch)[0].logprobs
    make = make_unpaired_loss if unpaired else make_preference_loss
    make_loss = functools.partial(make, forward.logprobs, reference, options)
    return build_program(
        config,
        model,
        mesh,
        total_steps,
        loss_fn=make_loss(),
        eval_loss_fn=make_loss(router_losses=False),
        loss_coefs={"nll": options.nll_coef} if options.nll_coef else None,
        layout=Layout(arrays),
    )
