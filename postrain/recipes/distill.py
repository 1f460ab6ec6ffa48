"""Distillation: a student learns a teacher's whole distribution of each trained token, not the token alone.

    postrain teach --config=configs/distill.py --output=ROWS --config.model.path=STUDENT \
        --config.distill.teacher=TEACHER --config.data.train=train.jsonl
    postrain train --config=configs/distill.py --workdir=RUN --config.model.path=STUDENT --config.data.train=ROWS

Rows of kind kd hold the teacher's likeliest ids, written once by `postrain teach`. With ``distill.teacher`` the teacher
runs beside the student instead, frozen, on the same devices, and rows are of kind sft: it takes memory and time, but no
disk, and no part of its distribution is left out.

The loss of an update is the sum over trained tokens of a divergence between the two distributions
(``objectives/distill.py``), divided once by their number. With ``distill.tokens=all`` those of prompts are trained too.
"""

import os
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from postrain.config import Config, DistillSection, find_row_kind
from postrain.data.documents import NO_LAYOUT, Layout
from postrain.data.rendering.tokenizer import load_run_tokenizer
from postrain.export import export_state
from postrain.hf.find_model import locate_model
from postrain.objectives.distill import compare_with_logits, compare_with_top, make_distill_loss, match_rows
from postrain.report.page import Chart
from postrain.rollout.answers import make_answer_evaluator
from postrain.training.evaluate import Evaluator, make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import TEACHER, Forward, Model, load_model
from postrain.training.program import Program, build_program
from postrain.training.rows import count_steps, open_eval_rows, open_train_rows
from postrain.training.session import Session, open_session
from postrain.training.teaching.manifest import check_teacher_rows, format_low_mass
from postrain.training.teaching.teacher import (
    abstract_teacher,
    add_teacher,
    count_shared_ids,
    open_teacher,
    without_teacher,
)
from postrain.types import TrainState

CHARTS = (
    Chart("Loss per token", ("train/loss", "eval/loss")),
    Chart("-log p of the token", ("train/nll", "eval/nll")),
    Chart("Share of tokens with the teacher's likeliest", ("train/agreement", "eval/agreement"), 0.0, 1.0),
    Chart("The teacher's probability of the ids in the rows", ("train/teacher_top", "eval/teacher_top"), 0.0, 1.0),
    Chart("Gradient norm before clipping", ("train/grad_norm",), 0.0),
)


def train(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains ``config.model.path``, the student, or adapters of it, on ``config.data.train``.

    Returns the last value of every metric. Resumes, and raises, as ``recipes.sft`` does.
    """
    with open_session(config, workdir) as session:
        # What the teacher has written is checked before it is read; a teacher that runs is loaded before its rows.
        teacher = open_teacher(session) if config.distill.teacher else None
        if teacher:
            options, teacher_ids = teacher.row_options(config.distill.tokens), None
            of_held_out = teacher.row_options()  # whose loss is of answers, whatever is learned
            named = [f"teacher     {config.distill.teacher}, {teacher.checksum}"]
        else:
            options, teacher_ids, named = check_teacher_rows(session)
            of_held_out = options
        kind = find_row_kind(config)
        rows = open_train_rows(session, kind=kind, **options)
        held_out = open_eval_rows(session, kind=kind, **of_held_out)
        total_steps = count_steps(session, rows)
        rows.notes = [*named, *rows.notes]

        model = load_model(config, session.model_folder, session.mesh)
        if teacher is not None:
            model = add_teacher(model, teacher.config, teacher.params)
        shared_ids = count_shared_ids(session.tokenizer, model.config, model.teacher)
        shared_ids = min(shared_ids, teacher_ids or shared_ids)
        program = make_program(config, model, session.mesh, total_steps, shared_ids)
        session.print_summary(model, program, rows, held_out)

        evaluators = []
        if held_out is not None:
            evaluators.append(warn_of_low_mass(session, make_loss_evaluator(session, program, held_out)))
            answer = make_answer_evaluator(session, model.config, held_out)
            evaluators.append(lambda state, step: answer(without_teacher(state), step))
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                loop.finish_step(metrics)

        export_state(session, without_teacher(loop.state), model)
        return session.write_report(rows, held_out, CHARTS)


def warn_of_low_mass(session: Session, evaluate: Evaluator) -> Evaluator:
    """``evaluate``, which says once where the ids in the held-out rows have little of the teacher's probability."""
    said: set[str] = set()

    def measure(state: TrainState, step: int) -> dict[str, float]:
        metrics = evaluate(state, step)
        mass = metrics.get("eval/teacher_top", 1.0)  # a teacher that runs gives all ids
        if (warning := format_low_mass(mass, session.config.distill.top_k)) and not said:
            said.add(warning)
            session.say(warning)
        return metrics

    return measure


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int, shared_ids: int | None = None) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract: its teacher is made so, too.

    ``shared_ids``: ids that tokenizer, student and teacher have; None: found in their folders.
    """
    options, arrays = config.distill, {}
    if options.teacher and model.teacher is None:
        model = add_teacher(model, *abstract_teacher(config, mesh))
    if not options.teacher:
        arrays["teacher_ids"] = np.dtype(np.int32), (options.top_k,)
        arrays["teacher_logprobs"] = np.dtype(np.float32), (options.top_k,)
    if shared_ids is None:
        tokenizer = load_run_tokenizer(config, locate_model(config.model.path, weights=False))
        shared_ids = count_shared_ids(tokenizer, model.config, model.teacher)
    models = [Forward(one, chunk=config.model.loss_chunk) for one in (model.config, model.teacher) if one]
    compare = make_comparison(options, shared_ids, *models)
    return build_program(
        config,
        model,
        mesh,
        total_steps,
        loss_fn=make_distill_loss(compare),
        eval_loss_fn=make_distill_loss(compare, router_losses=False),
        layout=Layout(arrays) if arrays else NO_LAYOUT,
    )


def make_comparison(
    options: DistillSection, shared_ids: int, student: Forward, teacher: Forward | None = None
) -> Callable:
    """``compare`` of ``make_distill_loss``: with a teacher in ``params[TEACHER]``, or with what it has written."""
    if teacher is None:
        of_top = compare_with_top(options, shared_ids)

        def compare_stored(params, batch):
            rows = batch.targets, batch.fields["teacher_ids"], batch.fields["teacher_logprobs"]
            return student.map_logits(params, batch, of_top, rows)

        return compare_stored
    of_whole = compare_with_logits(options, shared_ids, teacher.model_config.logits_softcap)

    def compare_live(params, batch):
        hidden, table = teacher.project_inputs(params[TEACHER], batch)
        table = match_rows(table, student.model_config.padded_vocab_size)
        own = {name: tree for name, tree in params.items() if name != TEACHER}
        return student.map_logits(own, batch, of_whole, (batch.targets, hidden), table)

    return compare_live
