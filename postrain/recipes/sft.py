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
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from postrain.config import Config, SftSection, WeightsSection
from postrain.data.documents import NO_LAYOUT, Layout
from postrain.data.reward_weights import FIELD, MEANS, REWARDS, RewardWeights
from postrain.export import export_state
from postrain.objectives.sft import (
    divide_by_tokens,
    make_advantage_loss,
    make_sft_loss,
    make_token_loss,
    measure_weights,
)
from postrain.report.metrics import read_metrics
from postrain.report.page import CHARTS, Chart, Table
from postrain.rollout.answers import make_answer_evaluator
from postrain.sharding import replicated
from postrain.training.evaluate import make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import VALUE_NAME, Forward, Model, load_model
from postrain.training.program import Program, build_program
from postrain.training.rows import count_steps, open_eval_rows, open_train_rows
from postrain.training.session import Session, open_session
from postrain.types import Batch

EXPLAINED = "train/value/explained_variance"
SFT_CHARTS = (
    *CHARTS,
    Chart("Effective share of the tokens of an update", ("train/weights/effective_share",), 0.0, 1.0),
    Chart("Share of the variance of rewards that the head explains", (EXPLAINED,)),
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

        measure = make_weight_meter(config, session.mesh, weights.variance)  # of sft.weights; None without them

        # The loop holds the state, so that a restored one can take its place without a second copy in memory.
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                if measure is not None:
                    metrics = measure(metrics, batch)
                loop.finish_step(metrics)  # checks, logs, evaluates and saves what is due

        export_state(session, loop.state, model)
        return session.write_report(rows, held_out, SFT_CHARTS, judge_head(session, weights))


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract."""
    forward, options = Forward(model.config, chunk=config.model.loss_chunk), config.sft
    loss_fn, layout, coefs = make_sft_loss(forward.nll), NO_LAYOUT, None
    # Not a weighted likelihood alone, which the former computes in three quarters of the time.
    if dataclasses.replace(options, weights=WeightsSection()) != SftSection():
        noisy = lambda params, batch, rng: forward.noisy_logprobs(params, batch, rng, options.noise)
        plain = lambda params, batch, rng: forward.logprobs(params, batch)
        loss_fn = make_token_loss(noisy if options.noise else plain, options)
    if config.sft.weights.mode == "ips":
        loss_fn, layout = divide_by_tokens(loss_fn, FIELD), Layout({FIELD: (np.dtype(np.float32), ())})
    if options.weights.baseline == "head":
        [head] = model.heads
        compute = functools.partial(forward.logprobs_and_outputs, head=head, alpha=options.noise)
        loss_fn, layout = make_advantage_loss(compute, options, REWARDS), Layout({REWARDS: (np.dtype(np.float32), ())})
        coefs = {VALUE_NAME: options.weights.head_coef}
    return build_program(
        config,
        model,
        mesh,
        total_steps,
        loss_fn=loss_fn,
        eval_loss_fn=make_sft_loss(forward.nll, router_losses=False),
        loss_coefs=coefs,
        layout=layout,
    )


def make_weight_meter(
    config: Config, mesh: Mesh, variance: float
) -> Callable[[dict[str, jax.Array], Batch], dict[str, jax.Array]] | None:
    """The metrics of an update with those of its weights: a program of its own, so that equal weights train bit for bit
    as none do.

    ``variance``: of all rewards; of it a head explains 1 - its squared error / variance.
    """
    mode, baseline = config.sft.weights.mode, config.sft.weights.baseline
    if mode == "none":
        return None
    field = FIELD if mode == "ips" else ""

    def measure(metrics, batch):
        if baseline != "head":
            return metrics | measure_weights(batch, field)
        square = metrics.pop("train/weights/square")
        share = metrics["train/weights/mean"] ** 2 / jnp.where(square > 0, square, 1)
        explained = 1 - metrics[f"train/loss/{VALUE_NAME}"] / variance
        weight = {EXPLAINED.replace("train/", "weight_of/"): metrics[f"weight_of/loss/{VALUE_NAME}"]}
        return metrics | weight | {"train/weights/effective_share": share, EXPLAINED: explained}

    return jax.jit(measure, out_shardings=replicated(mesh))


def judge_head(session: Session, weights: RewardWeights) -> tuple[Table, ...]:
    """A table of what a head and plain means explain of the rewards, and a warning where a mean explains more.

    Of the head the lines of the last quarter of the run; each row was judged before the update that it was part of. ()
    without a head.
    """
    found = [line[EXPLAINED] for line in read_metrics(session.workdir) if line.get(EXPLAINED) is not None]
    if session.config.sft.weights.baseline != "head" or not found:
        return ()
    head = statistics.fmean(found[-max(len(found) // 4, 1) :])
    better = [key for key, share in weights.explained.items() if share > head]
    if better:
        best = max(better, key=lambda key: weights.explained[key])
        session.say(
            f"warning     the head explains {head:.1%} of the variance of rewards, {MEANS[best]} "
            f"{weights.explained[best]:.1%}: set sft.weights.baseline to {best!r}, or train the head longer or faster "
            "(optimizer.head_learning_rate)"
        )
    lines = [("the head, last quarter of the run", f"{head:.1%}")]
    lines += [(MEANS[key], f"{share:.1%}") for key, share in weights.explained.items()]
    return (Table("Baselines of rewards", ("Baseline", "Share of the variance of rewards explained"), tuple(lines)),)
