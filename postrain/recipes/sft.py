"""Supervised fine-tuning: next-token prediction on the answers of conversations.

    postrain train --config=configs/sft.py --workdir=runs/mine --config.model.path=DIR --config.data.train=train.jsonl

Each row is rendered by the tokenizer's chat template, and the model learns the tokens that it would have to produce
when served. Documents are packed into rows without attending to each other. The loss of an update is the sum over
trained tokens of -log p(token | prefix), divided once by their number: it does not depend on how a batch is split into
micro-batches, devices or hosts.

With ``sft.weights`` tokens count by the reward of their row (docs/weighted_sft.md).

To change the loss, write another objectives/sft.py; to change the loop, copy this file. Left out: dropout, which short
runs on chat data do not need.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.config import Config, SftSection, WeightsSection
from postrain.data.documents import NO_LAYOUT, Layout
from postrain.data.reward_weights import FIELD, RewardWeights
from postrain.export import export_state
from postrain.objectives.sft import divide_by_tokens, make_sft_loss, make_token_loss, measure_weights
from postrain.report.page import CHARTS, Chart
from postrain.rollout.answers import make_answer_evaluator
from postrain.sharding import replicated
from postrain.training.evaluate import make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import Forward, Model, load_model
from postrain.training.program import Program, build_program
from postrain.training.rows import count_steps, open_eval_rows, open_train_rows
from postrain.training.session import open_session
from postrain.types import Batch

SFT_CHARTS = (
    *CHARTS,
    Chart("Effective share of the tokens of an update", ("train/weights/effective_share",), 0.0, 1.0),
)


def train(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Fine-tunes ``config.model.path`` on ``config.data.train``; returns the last value of every metric.

    Resumes from the newest checkpoint in ``workdir``, to the same bytes as a run that was never stopped.

    Raises:
      UserError: what the user can put right. All that can be known before rows are rendered and weights are loaded is
        refused by ``open_session``; a loss that is not finite by ``loop.finish_step``.
      SystemExit: after SIGTERM or ^C, once a checkpoint is on disk.
    """
    with open_session(config, workdir) as session:
        # Data. In memory every row is rendered, checked and counted here; streamed rows are checked as they are read.
        weights = RewardWeights(config)  # of sft.weights; held-out rows count the same
        rows = open_train_rows(session, kind="sft", preparation=weights.preparation)
        rows.add_note(weights.summary)
        held_out = open_eval_rows(session, kind="sft")  # None without data.eval
        total_steps = count_steps(session, rows)

        # Model and train step. With adapters the base is frozen. `postrain plan` compiles this same program.
        model = load_model(config, session.model_folder, session.mesh)
        program = make_program(config, model, session.mesh, total_steps)
        session.print_summary(model, program, rows, held_out)

        # What is measured of a state, every eval.every steps.
        evaluators = []
        if held_out is not None:
            evaluators.append(make_loss_evaluator(session, program, held_out))
            evaluators.append(make_answer_evaluator(session, model.config, held_out))

        measure = make_weight_meter(config, session.mesh)  # how unequal sft.weights are; None without them

        # The loop holds the state, so that a restored one can take its place without a second copy in memory.
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                if measure is not None:
                    metrics = metrics | measure(batch)
                loop.finish_step(metrics)  # checks, logs, evaluates and saves what is due

        export_state(session, loop.state, model)
        return session.write_report(rows, held_out, SFT_CHARTS)


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract."""
    forward, options = Forward(model.config, chunk=config.model.loss_chunk), config.sft
    loss_fn, layout = make_sft_loss(forward.nll), NO_LAYOUT
    # Not a weighted likelihood alone, which the former computes in three quarters of the time.
    if dataclasses.replace(options, weights=WeightsSection()) != SftSection():
        noisy = lambda params, batch, rng: forward.noisy_logprobs(params, batch, rng, options.noise)
        plain = lambda params, batch, rng: forward.logprobs(params, batch)
        loss_fn = make_token_loss(noisy if options.noise else plain, options)
    if config.sft.weights.mode == "ips":
        loss_fn, layout = divide_by_tokens(loss_fn, FIELD), Layout({FIELD: (np.dtype(np.float32), ())})
    return build_program(
        config,
        model,
        mesh,
        total_steps,
        loss_fn=loss_fn,
        eval_loss_fn=make_sft_loss(forward.nll, router_losses=False),
        layout=layout,
    )


def make_weight_meter(config: Config, mesh: Mesh) -> Callable[[Batch], dict[str, jax.Array]] | None:
    """Metrics of the weights of a batch: a program of its own, so that equal weights train bit for bit as none do."""
    mode = config.sft.weights.mode
    if mode == "none":
        return None
    measure = functools.partial(measure_weights, field=FIELD if mode == "ips" else "")
    return jax.jit(measure, out_shardings=replicated(mesh))
