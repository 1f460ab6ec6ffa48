"""Preference learning: make the better answer to a prompt more likely, and the worse one less.

    postrain train --config=configs/preference.py --workdir=RUN --config.model.path=DIR --config.data.train=pairs.jsonl

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives, by ``preference.loss``: the
loss of a pair falls with its margin, which is how much more the chosen answer has gained over the reference than the
rejected one. The reference is the model that training starts from. With adapters it is the model without them, which
start without any effect; else its logprobs of all rows are computed before the first update. So no second model is in
memory.

The answers to a prompt are segments of one packed row and share the computation of the prompt, which is a segment
before them (``data.share_prompts``). The loss of an update is the mean over its pairs, divided once
by their number.
"""

import functools
import os

import numpy as np
from jax.sharding import Mesh

from postrain.config import Config, choose_reference
from postrain.data.documents import SHARED_ARRAYS, Layout
from postrain.data.kinds.preference import LAYOUT, check_groups
from postrain.export import export_state
from postrain.models.lora import drop_adapters
from postrain.objectives.preference import make_preference_loss
from postrain.report.page import Chart
from postrain.training.evaluate import make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import Forward, Model, load_model
from postrain.training.program import Program, build_program
from postrain.training.reference import FIELD as REFERENCE
from postrain.training.reference import add_reference_logprobs
from postrain.training.rows import count_steps, open_eval_rows, open_train_rows, prepare_groups, shares_prompts
from postrain.training.session import open_session

CHARTS = (
    Chart("Loss per pair", ("train/loss", "eval/loss")),
    Chart("Share of pairs in the right order", ("train/rewards/accuracies", "eval/rewards/accuracies"), 0.0, 1.0),
    Chart("Reward margin", ("train/rewards/margins", "eval/rewards/margins")),
    Chart("log p of the chosen answer", ("train/logps/chosen", "eval/logps/chosen")),
    Chart("log p of the rejected answer", ("train/logps/rejected", "eval/logps/rejected")),
    Chart("Gradient norm before clipping", ("train/grad_norm",), 0.0),
)


def train(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains ``config.model.path``, or adapters of it, on ``config.data.train``, rows of kind preference.

    Returns the last value of every metric. Resumes, and raises, as ``recipes.sft`` does.
    """
    with open_session(config, workdir) as session:
        check = functools.partial(check_groups, lists=config.preference.loss == "softmax")
        options = {"kind": "preference", "check": check, "preparation": prepare_groups(config, session.mesh)}
        rows = open_train_rows(session, **options)
        held_out = open_eval_rows(session, **options)
        total_steps = count_steps(session, rows)

        model = load_model(config, session.model_folder, session.mesh)
        program = make_program(config, model, session.mesh, total_steps)
        session.print_summary(model, program, rows, held_out)

        add_reference = None
        if choose_reference(config) == "cached":
            forward = Forward(model.config, chunk=config.model.loss_chunk)
            add_reference = functools.partial(add_reference_logprobs, session, model, forward)
            rows.extend = add_reference(rows.example_set)
        evaluators = [] if held_out is None else [make_loss_evaluator(session, program, held_out, add_reference)]
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                loop.finish_step(metrics)

        export_state(session, loop.state, model)
        return session.write_report(rows, held_out, CHARTS)


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract."""
    forward, options = Forward(model.config, chunk=config.model.loss_chunk), config.preference
    arrays, reference = LAYOUT.arrays | (SHARED_ARRAYS if shares_prompts(config, mesh) else {}), None
    match choose_reference(config):
        case "base":
            reference = lambda params, batch: forward.logprobs(drop_adapters(params), batch)[0].logprobs
        case "cached":
            reference = lambda params, batch: batch.fields[REFERENCE]
            arrays = arrays | {REFERENCE: (np.dtype(np.float32), ())}
    make_loss = functools.partial(make_preference_loss, forward.logprobs, reference, options)
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
