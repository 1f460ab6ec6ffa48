"""Supervised fine-tuning: next-token prediction on the answers of conversations.

Each row is rendered by the tokenizer's chat template, and the model learns the tokens that it would have to produce
when served. Documents are packed into rows without seeing each other, and every trained token of a batch counts the
same: loss = sum over trained tokens of -log p(token | what stands before it), divided once by their number.

The order of this file is its documentation: data, model, state (new or where the newest checkpoint left it), evaluate,
loop, export, report. To change the loop, copy it. Left out: dropout and noise on embeddings (NEFTune), which short
runs on chat data do not need.
"""

import functools
import os
import time

import jax
from jax.sharding import Mesh

from postrain.cluster.processes import meet
from postrain.cluster.watchdog import Watchdog
from postrain.config import Config
from postrain.data.batches.in_memory import load_examples
from postrain.data.batches.open import open_train_rows
from postrain.data.documents import check_token_ids
from postrain.data.preview import render_tokens_html
from postrain.data.rendering.tokenizer import load_run_tokenizer
from postrain.export.export import export_state, fingerprint_base
from postrain.hf.folders import check_replaceable, clear_leftovers
from postrain.hf.hub import locate_model
from postrain.hf.peft.adapter import check_base
from postrain.models.attention.check import check_backend
from postrain.models.transformer import compute_hidden, compute_hidden_and_terms, unembedding
from postrain.objectives.sft import make_sft_loss
from postrain.report.page import write_report
from postrain.rollout.answers import Evaluator
from postrain.sharding import data_process, make_global_batch, make_mesh
from postrain.training.agreement import check_rows
from postrain.training.compatibility import check_length, check_resume
from postrain.training.loop import Fingerprints, Run
from postrain.training.model import Model, Step, abstract_batch, load_model
from postrain.training.optimizer import describe_cut, make_optimizer
from postrain.training.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.training.summary import (
    describe_environment,
    describe_overlong,
    format_memory,
    format_metrics,
    format_summary,
)
from postrain.training.workdir import last_values, make_workdir
from postrain.types import Batch


def train(config: Config, workdir: str | os.PathLike, watch: Watchdog) -> dict[str, float]:
    """Fine-tunes ``config.model.path`` on ``config.data.train``; returns the last value of every metric.

    Goes on from the newest checkpoint in ``workdir``, to the same bytes as a run that was never stopped. Raises
    UserError for what the user can put right, and when loss or gradient stop being finite; SystemExit after
    SIGTERM or ^C, when a checkpoint has been saved. ``watch`` stops a run that hangs in one of the phases told to it.
    """
    started = time.monotonic()
    workdir, mesh = make_workdir(workdir), make_mesh(config.mesh)
    folder = locate_model(config.model.path)
    clear_leftovers(workdir / "export")  # of a run that was killed while it exported
    if config.export.format != "none":
        check_replaceable(workdir / "export")  # what cannot be written at the end is said at the start
    if config.export.format == "adapter":
        check_base(folder)
    lead = jax.process_index() == 0
    say = print if lead else lambda *_, **__: None

    # Data: unless it is streamed, every row is rendered, checked and counted before anything else happens.
    tokenizer = load_run_tokenizer(config, folder)
    check_resume(workdir / "checkpoints", config, tokenizer, folder)
    rejected, eval_set = workdir / "rejected.jsonl", None
    process, processes = data_process(mesh)
    mine = {"process_index": process, "process_count": processes}
    with watch.phase("data"):
        train_rows = open_train_rows(tokenizer, config.data, rejected, kind="sft", **mine)
        if config.data.eval:
            eval_set = load_examples(config.data.eval, tokenizer, config.data, rejected if lead else None, kind="sft")
    held_out = eval_set.fingerprint if eval_set else None
    check_rows({"data.train": train_rows.fingerprint, "data.eval": held_out})
    batches = train_rows.batches
    total_steps = config.train.steps or batches.num_steps(config.train.epochs)
    check_length(workdir / "checkpoints", total_steps)

    # Model, optimizer, step. With adapters the base model is frozen.
    model = load_model(config, folder, mesh)
    batches.check_token_ids(model.config.vocab_size)
    check_token_ids(eval_set.examples if eval_set else [], model.config.vocab_size)
    program = make_step(config, model, mesh, total_steps)
    say(format_summary(config, mesh, model, total_steps))
    if checked := check_backend(model.config):
        say(f"attention   {checked}")
    say(train_rows.summary + (f"\nheld out\n{eval_set.report}" if eval_set else ""))
    for warning in (describe_overlong(train_rows.lengths, model.config), describe_cut(config.optimizer, total_steps)):
        if warning:
            say(warning)
    train_step = program.train_step.lower(program.state, program.batch).compile()
    say(format_memory(train_step), flush=True)
    meet()

    # The state: where the newest checkpoint left it, or new.
    evaluate = None
    if eval_set:
        samples = workdir / "samples.jsonl"
        evaluate = Evaluator(config, model.config, tokenizer, eval_set, program.eval_loss_fn, mesh, samples)
    fingerprints = Fingerprints(train_rows.fingerprint, fingerprint_base(model, folder, config), held_out)
    with Run(
        config,
        workdir,
        model=model.config,
        mesh=mesh,
        abstract_state=program.state,
        batches=batches,
        fingerprints=fingerprints,
        total_steps=total_steps,
        watch=watch,
        evaluate=evaluate,
    ) as run:
        state = run.restore(model.frozen)
        if state is None:
            rng, average = jax.random.key(config.train.seed), program.state.ema is not None
            state = init_train_state(model.params, model.frozen, program.optimizer, rng, mesh=mesh, ema=average)
        model = model._replace(params=None)  # the state has taken them over
        run.begin(state)

        # The loop.
        while run.step < total_steps:
            arrays = run.next_batch(state)
            with watch.phase("step", watches_cpu=False):
                state, metrics = train_step(state, Batch(**make_global_batch(arrays, mesh)))
            if run.must_go_back(metrics):
                frozen, state = state.frozen, None  # makes room
                state = run.go_back(frozen)
            else:
                run.end_step(state, metrics)
        drawn = run.end()

    form = config.export.format
    if form != "none":
        place = workdir / "export"
        with watch.phase("export"):
            note = export_state(place, state, model, config, mesh=mesh, source_folder=folder, tokenizer=tokenizer)
        if note:
            say(note)
    metrics = last_values(workdir)
    if lead:
        row = render_tokens_html(train_rows.sample, tokenizer)
        write_report(workdir, conversation_html=row, drawn=drawn, environment=describe_environment(mesh))
    minutes = (time.monotonic() - started) / 60
    say(f"done after {minutes:.1f} min: {format_metrics(total_steps, metrics)}")
    say(f"{workdir / 'report.html'} shows the run" + ("" if form == "none" else f", {workdir / 'export'} is the model"))
    return metrics


def make_step(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Step:
    """The loss, the optimizer and the jitted update of this recipe; ``model`` may be abstract (`postrain plan`)."""
    optimizer, schedule = make_optimizer(config.optimizer, total_steps)
    average = config.optimizer.ema_decay > 0
    abstract = abstract_train_state(model.params, model.frozen, optimizer, mesh=mesh, ema=average)
    make_loss = functools.partial(
        make_sft_loss,
        get_unembedding=lambda params: unembedding(params, model.config),
        vocab_size=model.config.vocab_size,
        softcap=model.config.logits_softcap,
        chunk=config.model.loss_chunk,
    )
    loss_fn = make_loss(lambda params, *rows: compute_hidden_and_terms(params, model.config, *rows))
    eval_loss_fn = make_loss(lambda params, *rows: (compute_hidden(params, model.config, *rows), None))
    train_step = make_train_step(
        loss_fn,
        optimizer,
        micro_batches=config.train.micro_batches,
        mesh=mesh,
        state_shardings=shardings_of(abstract),
        max_grad_norm=config.optimizer.max_grad_norm,
        ema_decay=config.optimizer.ema_decay,
        schedule=schedule,
        spike_threshold=config.train.spike.threshold if config.train.spike.policy != "none" else 0.0,
        count_moved_in=model.config.compute_dtype if config.train.count_moved else "",
    )
    return Step(optimizer, loss_fn, eval_loss_fn, abstract, abstract_batch(config.data, mesh), train_step)
