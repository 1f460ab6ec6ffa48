"""Supervised fine-tuning: next-token prediction on the answers of conversations.

    postrain train --config=configs/sft.py --workdir=runs/mine --config.model.path=DIR --config.data.train=train.jsonl

Each row is rendered by the tokenizer's chat template, and the model learns the tokens that it would have to produce
when served. Documents are packed into rows without attending to each other. The loss of an update is the sum over
trained tokens of -log p(token | prefix), divided once by their number: it does not depend on how a batch is split into
micro-batches, devices or hosts.

To change the loss, write another objectives/sft.py; to change the loop, copy this file. Left out: dropout, which short
runs on chat data do not need.
"""

import os

from jax.sharding import Mesh

from postrain.config import Config, SftSection
from postrain.export import export_state
from postrain.objectives.sft import make_sft_loss, make_token_loss
from postrain.rollout.answers import make_answer_evaluator
from postrain.training.evaluate import make_loss_evaluator
from postrain.training.loop import open_loop
from postrain.training.model import Forward, Model, load_model
from postrain.training.program import Program, build_program
from postrain.training.rows import count_steps, open_eval_rows, open_train_rows
from postrain.training.session import open_session


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
        rows = open_train_rows(session, kind="sft")
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

        # The loop holds the state, so that a restored one can take its place without a second copy in memory.
        with open_loop(session, program, model, rows, total_steps, evaluators, held_out) as loop:
            for batch in loop:
                loop.state, metrics = program.train_step(loop.state, batch)
                loop.finish_step(metrics)  # checks, logs, evaluates and saves what is due

        export_state(session, loop.state, model)
        return session.write_report(rows, held_out)


def make_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loss, optimizer and jitted update of this recipe; ``model`` may be abstract."""
    forward, options = Forward(model.config, chunk=config.model.loss_chunk), config.sft
    loss_fn = make_sft_loss(forward.nll)
    if (
        options != SftSection()
    ):  # not a weighted likelihood alone, which the former computes in three quarters of the time
        noisy = lambda params, batch, rng: forward.noisy_logprobs(params, batch, rng, options.noise)
        plain = lambda params, batch, rng: forward.logprobs(params, batch)
        loss_fn = make_token_loss(noisy if options.noise else plain, options)
    return build_program(
        config,
        model,
        mesh,
        total_steps,
        loss_fn=loss_fn,
        eval_loss_fn=make_sft_loss(forward.nll, router_losses=False),
    )
