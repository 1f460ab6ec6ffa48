"""Reward models: a head in place of the projection onto the vocabulary learns what answers are worth.

    postrain train --config=configs/reward.py --workdir=RUN --config.model.path=DIR --config.data.train=pairs.jsonl

The score of an answer is the head's output at the answer's last token, which is its end token: every document is read
to its end. ``reward.loss`` says what scores are held to, and so which rows are read: pairs and scored lists (kind
preference), which share the computation of their prompt, steps (kind stepwise), classes or numbers (kind labelled). The
trunk trains, or adapters of it, and the head in any case. What comes out is a classifier's folder
(``hf/classifier.py``).

How far the model's own certainty can be trusted is measured on held-out rows: its calibration error, and a table of it
in the report.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from postrain.config import Config, find_row_kind
from postrain.data.batches.in_memory import ExampleSet
from postrain.data.documents import SHARED_ARRAYS, Document, Group, Layout, Preparation
from postrain.data.kinds import labelled, preference, stepwise
from postrain.errors import UserError
from postrain.export import export_state
from postrain.files import write_whole
from postrain.objectives.reward import make_reward_loss, read_bins
from postrain.report.page import Chart, Table
from postrain.training.evaluate import Evaluator, make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import Forward, Model, load_model, make_heads
from postrain.training.program import Program, build_program
from postrain.training.rows import (
    count_steps,
    find_form,
    format_plain_text,
    open_eval_rows,
    open_train_rows,
    prepare_groups,
    shares_prompts,
)
from postrain.training.session import Session, ShownRow, open_session
from postrain.types import TrainState

CHARTS = (
    Chart("Loss", ("train/loss", "eval/loss")),
    Chart("Share of right judgements", ("train/accuracy", "eval/accuracy"), 0.0, 1.0),
    Chart("Lead of the better answer", ("train/margin", "eval/margin")),
    Chart("Scores: mean and standard deviation", ("eval/score_mean", "eval/score_std")),
    Chart("Calibration error", ("eval/calibration_error",), 0.0),
    Chart("Gradient norm before clipping", ("train/grad_norm",), 0.0),
)
CALIBRATION = "calibration.json"  # in the workdir: the table of the last evaluation
LAYOUTS = {
    "bradley_terry": preference.LAYOUT,
    "plackett_luce": preference.LAYOUT,
    "stepwise": stepwise.LAYOUT,
    "cross_entropy": labelled.LAYOUT,
    "squared_error": labelled.NUMBERS,
}


def train(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains a head on ``config.model.path``, with it or adapters of it, on ``config.data.train``.

    Returns the last value of every metric. Resumes, and raises, as ``recipes.sft`` does.
    """
    with open_session(config, workdir) as session:
        kind, check, preparation = find_row_kind(config), make_check(config), prepare(config, session.mesh)
        rows = open_train_rows(session, kind=kind, check=check, preparation=preparation)
        rows.add_note(describe_rows(config, rows.documents))
        rows.add_note(format_plain_text(rows))
        held_out = open_eval_rows(session, kind=kind, check=check, preparation=preparation)
        total_steps = count_steps(session, rows)

        model = load_model(config, session.model_folder, session.mesh)
        model.fingerprint |= {"trained_on": find_form(rows)}  # for whoever scores with it
        program = make_program(config, model, session.mesh, total_steps)
        session.print_summary(model, program, rows, held_out)

        evaluators = [] if held_out is None else [make_evaluator(session, program, held_out)]
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                loop.finish_step(metrics)

        export_state(session, loop.state, model)
        return session.write_report(rows, held_out, CHARTS, read_tables(session), show_scores(config, rows.sample))


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract."""
    forward, options = Forward(model.config, chunk=config.model.loss_chunk), config.reward
    layout = LAYOUTS[options.loss]
    if layout is preference.LAYOUT and shares_prompts(config, mesh):
        layout = Layout(layout.arrays | SHARED_ARRAYS)
    outputs = functools.partial(forward.outputs, head=model.heads[0])
    return build_program(
        config,
        model,
        mesh,
        total_steps,
        loss_fn=make_reward_loss(outputs, options),
        eval_loss_fn=make_reward_loss(outputs, options, held_out=True),
        loss_coefs={"centering": options.centering_coef} if options.centering_coef else None,
        layout=layout,
    )


# --- the rows ---


def prepare(config: Config, mesh: Mesh | None = None) -> Preparation:
    """What is made of the rendered documents: their last tokens are read, and answers that are compared share their
    prompt.
    """
    preparation = Preparation("with their last token read", each=read_last)
    if find_row_kind(config) != "preference":
        return preparation
    return prepare_groups(config, mesh, preparation)


def read_last(document: Document) -> Document:
    """The document with the last token of every sequence read, where its score is."""
    if isinstance(document, Group):
        return Group(tuple(dataclasses.replace(one, reads_last=True) for one in document.sequences))
    return dataclasses.replace(document, reads_last=True)


def show_scores(config: Config, document: Document) -> ShownRow:
    """The row's sequences with the tokens coloured at which a score is learned, and what it is held to."""
    shown = []
    for sequence in document.sequences:
        mask, label = np.arange(sequence.num_tokens) == sequence.num_tokens - 1, ""
        for name, values, _ in sequence.fields:
            if name == stepwise.FIELD:
                mask = values > 0
                label = "steps " + ", ".join("right" if one == stepwise.RIGHT else "wrong" for one in values[mask])
            elif name == labelled.FIELD:
                names = config.data.label_names
                label = f"label {names[int(values[0])] if names else f'{values[0]:g}'}"
        shown.append((label, dataclasses.replace(sequence, loss_mask=mask)))
    return ShownRow(tuple(shown), "A training row: the score at the coloured token is trained")


def make_check(config: Config) -> Callable[[Mapping[str, np.ndarray]], None] | None:
    """What a numpy batch must be for the loss of ``config``."""
    if config.reward.loss == "bradley_terry":
        advice = "set 'reward.loss' to 'plackett_luce'"
        return functools.partial(preference.check_groups, lists=False, advice=advice)
    if config.reward.loss == "cross_entropy":
        return functools.partial(check_classes, count=make_heads(config)[0].outputs)
    return None


def describe_rows(config: Config, documents: Sequence[Document]) -> str:
    """A line about all rows together, "" where nothing is to be said. Raises UserError where they teach nothing."""
    check_variance(documents, config.data.label_names)
    reads_order = find_row_kind(config) == "preference" and config.reward.margin_of != "scores"
    return preference.format_distances(documents) if reads_order else ""


def check_classes(arrays: Mapping[str, np.ndarray], count: int) -> None:
    """Raises UserError where a label of a numpy batch is not the number of a class."""
    if (largest := arrays[labelled.FIELD].max()) >= count:
        raise UserError(
            f"label {largest} is not one of the {count} classes, which are counted from 0: list the names of all "
            "classes as 'data.label_names'"
        )


def check_variance(documents: Iterable[Document], names: Sequence[str] = ()) -> None:
    """Raises UserError where all labels of documents are the same: there is nothing to learn.

    Pairs and lists have two scores at least. ``names``: of the labels, where they have any.
    """
    found = {label for document in documents for label in list_labels(document)}
    if len(found) == 1:
        label = found.pop()
        shown = repr(names[int(label)]) if names else label
        raise UserError(f"data.train: all labels are {shown}: there is nothing to tell apart: add rows of others")


def list_labels(document: Document) -> list[float]:
    """The label of a document, or those of its steps; [] of answers that are compared."""
    for name, values, _ in document.sequences[0].fields:
        if name == labelled.FIELD:
            return values[:1].tolist()
        if name == stepwise.FIELD:
            return (values[values > 0] == stepwise.RIGHT).astype(int).tolist()
    return []


# --- what held-out rows say ---


def make_evaluator(session: Session, program: Program, held_out: ExampleSet) -> Evaluator:
    """The loss and metrics of held-out rows, ``eval/score_std`` and ``eval/calibration_error``, its table in a file."""
    evaluate_loss = make_loss_evaluator(session, program, held_out)

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        metrics = evaluate_loss(state, step)
        if "eval/score_square" in metrics:
            variance = metrics.pop("eval/score_square") - metrics["eval/score_mean"] ** 2
            metrics["eval/score_std"] = math.sqrt(max(variance, 0.0))
        if bins := [name for name in metrics if name.startswith("eval/bins/")]:
            metrics["eval/calibration_error"], table = read_bins(metrics, "eval/")
            if session.is_lead:
                write_whole(session.workdir / CALIBRATION, json.dumps({"step": step, "bins": table}) + "\n")
        return {name: value for name, value in metrics.items() if name not in bins}

    return evaluate


def read_tables(session: Session) -> tuple[Table, ...]:
    """The last evaluation's table of calibration for the report; () without one."""
    path = session.workdir / CALIBRATION
    if not path.is_file():
        return ()
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        (f"{one['from']:.0%} to {one['to']:.0%}", *(f"{one[key]:.1%}" for key in ("share", "confidence", "accuracy")))
        for one in found["bins"]
    ]
    header = ("Probability that the model gives to its judgement", "Share of all", "Mean of it", "Judged rightly")
    return (Table(f"Calibration on held-out rows at step {found['step']}", header, tuple(lines)),)
