"""Supervised fine-tuning: next-token prediction on the answers of conversations.

Each row is rendered by the tokenizer's chat template, and the model learns the tokens that it would have to produce
when served. Documents are packed into rows without seeing each other, and every trained token of a batch counts the
same: loss = sum over trained tokens of -log p(token | what stands before it), divided once by their number.

The order of this file is its documentation: data, model, state (new or where the newest checkpoint left it), evaluate,
loop, export, report. To change the loop, copy it. Left out: dropout and noise on embeddings (NEFTune), which short
runs on chat data do not need.
"""

import contextlib
import functools
import os
import time

import jax
from jax.sharding import Mesh

from postrain.compute.build import Model, Step, abstract_batch, load_model
from postrain.compute.checkpoint import Checkpointer
from postrain.compute.distributed import gather, meet, stop_all_on_error
from postrain.compute.export import export_state, fingerprint_base
from postrain.compute.flops import BatchStats, compute_perf, count_batch
from postrain.compute.metrics import MetricsWriter, ProgressLine
from postrain.compute.optimizer import describe_cut, make_optimizer
from postrain.compute.report import write_report
from postrain.compute.resume import check_length, check_resume
from postrain.compute.signals import Interrupted, StopRequest, catch_stop_signals
from postrain.compute.spikes import SpikeGuard
from postrain.compute.step import abstract_train_state, init_train_state, make_train_step, shardings_of
from postrain.compute.summary import (
    describe_environment,
    describe_overlong,
    format_memory,
    format_metrics,
    format_summary,
)
from postrain.compute.watchdog import Watchdog
from postrain.compute.workdir import describe_changes, last_values, make_workdir, save_config
from postrain.config import Config, to_dict
from postrain.data.documents import check_token_ids
from postrain.data.loading import load_examples
from postrain.data.preview import render_tokens_html
from postrain.data.stream import join_positions
from postrain.data.tokenizer import load_run_tokenizer
from postrain.data.train_rows import open_train_rows
from postrain.errors import UserError
from postrain.hf.fetch import locate_model
from postrain.hf.folders import check_replaceable, clear_leftovers
from postrain.hf.peft import check_base
from postrain.models.attention_check import check_backend
from postrain.models.transformer import compute_hidden, compute_hidden_and_terms, unembedding
from postrain.objectives.sft import make_sft_loss
from postrain.rollout.evaluation import Evaluator
from postrain.sharding import data_process, make_global_batch, make_mesh
from postrain.types import Batch, TrainState


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
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(workdir / "checkpoints", config.checkpoint))
        stack.enter_context(stop_all_on_error())  # before a save is waited for in which the others take part
        stop = stack.enter_context(catch_stop_signals())
        progress = stack.enter_context(ProgressLine(total_steps))
        prints = {"fingerprint": train_rows.fingerprint, "base_fingerprint": fingerprint_base(model, folder, config)}
        held_out = eval_set.fingerprint if eval_set else None
        with watch.phase("checkpoint"):
            restored = checkpointer.restore(program.state, **prints)
        first_step = restored.step if restored else 0
        if restored:
            state = restored.state.replace(frozen=model.frozen)
            batches.set_state(restored.data_position)
            changes = describe_changes(restored.config, to_dict(config), restored.eval_fingerprint, held_out)
            say(f"goes on from step {first_step}{changes}")
        else:
            rng = jax.random.key(config.train.seed)
            state = init_train_state(
                model.params, model.frozen, program.optimizer, rng, mesh=mesh, ema=program.state.ema is not None
            )
        model = model._replace(params=None)  # the state has taken them over
        if lead:
            save_config(workdir, config)
        open_writer = lambda step: stack.enter_context(
            MetricsWriter(workdir, config.trackers, step=step, run_config=to_dict(config))
        )
        # The line of a step whose evaluation was stopped has not been written yet.
        writer = open_writer(first_step - (restored.owed is not None) if restored else None)

        if eval_set:
            evaluate = Evaluator(
                config, model.config, tokenizer, eval_set, program.eval_loss_fn, mesh, workdir / "samples.jsonl"
            )
        owed = restored.owed if restored else {} if config.eval.before else None
        if eval_set and owed is not None:
            with watch.phase("evaluation"):
                scores = evaluate_unless(stop, evaluate, state)
            if scores is None:
                say(f"stopped in the evaluation of step {first_step}; the same command goes on from there")
                raise SystemExit(128 + stop.number)
            writer.write(first_step, owed | scores)
            say(format_metrics(first_step, scores), flush=True)
        elif owed:
            writer.write(first_step, owed)

        # The loop. A step's line is written before its checkpoint is saved: what is restored has been reported.
        guard = SpikeGuard(config.train.spike, progress.print, restored.rollbacks if restored else 0)
        intervals = config.train.log_every, config.eval.every, config.checkpoint.every
        unchecked, clock, stats, waited = [], time.perf_counter(), BatchStats(0, 0, 0), 0.0
        step = first_step
        while step < total_steps:
            step = watch.step = step + 1
            asked = time.perf_counter()
            with watch.phase("data"):
                arrays = next(batches)
            waited += time.perf_counter() - asked
            row_ids, after = arrays.pop("row_ids"), batches.get_state() if guard.rolls_back else None
            with watch.phase("step", watches_cpu=False):
                state, metrics = train_step(state, Batch(**make_global_batch(arrays, mesh)))
            stats += count_batch(arrays, model.config)

            line, owed, last = {}, None, step == total_steps
            # A bad step changes no parameter, so it may be found out a step late: the device is waited for only
            # where something is written.
            unchecked.append((metrics, step, row_ids, after))
            now, undone = last or any(is_due(step, every) for every in intervals), None
            with watch.phase("step", watches_cpu=False):
                stop.agree()
                stopping = stop.number is not None
                while not undone and len(unchecked) > (0 if now or stopping else 1):
                    finished, number, rows, after = unchecked.pop(0)
                    if guard.must_roll_back(finished, number, lambda rows=rows: batches.describe_rows(rows)):
                        undone = after
            if undone:
                unchecked, frozen, state = [], state.frozen, None  # makes room
                with watch.phase("checkpoint"):
                    restored = checkpointer.restore(program.state, **prints)
                if not restored:
                    raise UserError(f"step {number}: no checkpoint yet to go back to: lower checkpoint.every")
                step, state = restored.step, restored.state.replace(frozen=frozen)
                batches.set_state(undone)
                writer.close()
                writer, clock, stats, waited = open_writer(step), time.perf_counter(), BatchStats(0, 0, 0), 0.0
                continue
            if last or is_due(step, config.train.log_every):
                seconds = time.perf_counter() - clock
                perf = compute_perf(model.config, stats, seconds, mesh.local_devices, processes)
                perf["perf/input_wait_fraction"] = waited / seconds
                line = {name: float(value) for name, value in metrics.items() if name.startswith("train/")}
                line |= guard.count(metrics) | perf
                progress.update(step, line)
            if eval_set and (last or is_due(step, config.eval.every)):
                with watch.phase("evaluation"):
                    scores = evaluate_unless(stop, evaluate, state)
                if scores is None:
                    owed = line
                else:
                    progress.print(format_metrics(step, scores))
                    line |= scores
            if line and owed is None:
                writer.write(step, line)
            stopping |= owed is not None
            if last or stopping or is_due(step, config.checkpoint.every):
                told = {"config": to_dict(config), "metrics": line, "eval_fingerprint": held_out, "owed": owed}
                told |= {"data_position": join_positions(gather(batches.get_state())), "rollbacks": guard.rollbacks}
                with watch.phase("checkpoint"):
                    checkpointer.save(step, state, **prints, **told)
            if stopping and (owed is not None or not last):
                with watch.phase("checkpoint"):
                    checkpointer.wait()
                progress.print(f"stopped at step {step} of {total_steps}; the same command goes on from there")
                raise SystemExit(128 + stop.number)
            if line:
                clock, stats, waited = time.perf_counter(), BatchStats(0, 0, 0), 0.0
        for line in batches.describe_drawn(join_positions(gather(batches.get_state()))):
            say(f"drawn       {line}")
        batches.close()
        with watch.phase("checkpoint"):
            checkpointer.wait()

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
        write_report(workdir, conversation_html=row, environment=describe_environment(mesh))
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


def evaluate_unless(stop: StopRequest, evaluate: Evaluator, state: TrainState) -> dict[str, float] | None:
    """The scores, None when a signal to stop the run came before they were there."""
    try:
        with stop.interrupts():
            return None if stop.number else evaluate(state)
    except Interrupted:
        return None


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; 0 is never."""
    return every > 0 and step % every == 0
