"""The loop that every recipe trains in: resume, evaluate, log, save, and stop when a signal asks for it.

    with open_loop(session, program, model, source, total_steps, evaluators) as loop:
        for batch in loop:
            loop.state, metrics = program.train_step(loop.state, batch)
            loop.finish_step(metrics)

A step of the loop is one item of the source; ``state.step`` counts calls of the train step, of which a recipe may make
several in a step. Every process of a run makes these calls in the same order: some of them wait for the others.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from postrain.checkpoint.checkpointer import Checkpointer
from postrain.checkpoint.record import RunRecord
from postrain.cluster.processes import gather, stop_all_on_error
from postrain.cluster.stopping import Interrupted, StopRequest, catch_stop_signals
from postrain.config import to_dict
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import ExampleSet
from postrain.errors import UserError
from postrain.models.flops import BatchStats, count_batch
from postrain.report.metrics import MetricsWriter, ProgressLine
from postrain.report.workdir import find_changed_reports, report_facts, save_config
from postrain.sharding import data_process, to_host
from postrain.training.compatibility import check_record, format_config_changes, format_rate_jump
from postrain.training.evaluate import Evaluator
from postrain.training.model import Model
from postrain.training.program import Program
from postrain.training.session import Session, format_metrics
from postrain.training.spikes import check_step
from postrain.training.step import init_train_state
from postrain.training.step_means import StepMeans
from postrain.training.throughput import compute_perf
from postrain.types import Source, TrainState

_SECONDS_TO_CLOSE = 1.0  # for the thread that prepares batches
Metrics = Mapping[str, Any]  # name -> scalar, on the device or the host


@contextlib.contextmanager
def open_loop(
    session: Session,
    program: Program,
    model: Model,
    source: Source,
    total_steps: int,
    evaluators: Sequence[Evaluator] = (),
    held_out: ExampleSet | None = None,
) -> Iterator["Loop"]:
    """A loop that begins where the newest checkpoint of the workdir left it, or with ``model`` at step 0.

    Args:
      model: its ``params`` pass to the loop's state.
      source: of the items that the loop yields; closed with the loop.
      evaluators: what is measured every ``eval.every`` steps and at the end.
      held_out: the rows that they measure, to say when a resume has others.

    Raises UserError where the checkpoint is of another model, data pipeline or optimizer; nothing is written then.
    SystemExit after a signal, once a checkpoint is on disk. When the block ends, no save, signal handler, thread or
    file of the loop is left open.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpointer(session.workdir / "checkpoints", session.config.checkpoint)
        checkpointer = stack.enter_context(checkpoints)
        stack.enter_context(stop_all_on_error())  # before a save is waited for in which the others take part
        stop = stack.enter_context(catch_stop_signals())
        progress = ProgressLine(total_steps, session.config.eval.every)
        stack.callback(progress.close)
        stack.callback(_close, source)
        loop = Loop(session, program, model, source, total_steps, evaluators, held_out, checkpointer, stop, progress)
        loop._restore()
        stack.callback(loop._writer.close)
        loop._evaluate_at_start()
        yield loop
        loop._print_consumption()
        with session.watchdog.phase("checkpoint"):
            checkpointer.wait()


class Loop:
    """See ``open_loop``.

    Attributes:
      state: the train state; whoever makes an update puts the new one here.
      step: finished steps; inside a step its number, from 1.
      total_steps: of the whole run.
    """

    state: TrainState

    def __init__(
        self,
        session: Session,
        program: Program,
        model: Model,
        source: Source,
        total_steps: int,
        evaluators: Sequence[Evaluator],
        held_out: ExampleSet | None,
        checkpointer: Checkpointer,
        stop: StopRequest,
        progress: ProgressLine,
    ):
        self.step, self.total_steps = 0, total_steps
        self._session, self._config, self._watchdog = session, session.config, session.watchdog
        self._program, self._model, self._source = program, model, source
        self._evaluators = evaluators
        self._held_out = None if held_out is None else held_out.fingerprint
        self._checkpointer, self._stop, self._progress = checkpointer, stop, progress
        self._saved_step = 0  # of the newest checkpoint
        self._line: dict[str, float] = {}  # of the last step
        self._means = StepMeans()  # of the steps since the last line
        # The line of `step` where its evaluation is still to come: that of step 0, or one that a signal interrupted.
        self._pending: dict[str, float] | None = {} if self._config.eval.before else None
        # Steps whose loss and gradient are still to be checked: number, updates, what names their rows.
        self._unchecked: list[tuple[int, list[Metrics], Callable[[], str]]] = []

    def __iter__(self) -> Iterator[Any]:
        """The items of the remaining steps; after each the caller makes its updates and calls ``finish_step``.

        A signal ends the wait for an item in a run of one process, and the state of the step before is saved. Of
        several, others may have begun the step, and have no such state any more: they stop after it.
        """
        self._restart_clock()
        while self.step < self.total_steps:
            started, position = time.perf_counter(), self._source.get_state()
            self._watchdog.step = self.step + 1
            try:
                with self._watchdog.phase("data"), self._stop.interrupts():
                    if self._stop.number:
                        raise Interrupted
                    item = next(self._source)
            except Interrupted:
                self._check_steps(leave=0)
                self._save(self._line, None, position)
                self._exit_stopped()
            self.step += 1
            self._waited += time.perf_counter() - started
            self._facts = self._source.describe_last()
            with self._watchdog.phase("step", watches_cpu=False):
                yield item

    def finish_step(self, metrics: Metrics | Sequence[Metrics], **further: float) -> None:
        """Checks the step, then logs, evaluates and saves what is due.

        Args:
          metrics: of the step's update; a list of them where it made several. A line has the means of all updates
            since the line before (``StepMeans``).
          further: numbers for the step's line besides those of its updates.

        Raises UserError where a loss or gradient is not finite, or not usual and ``train.spike`` has that stop the run;
        SystemExit when a signal came, once a checkpoint is saved. A step's line is written before its checkpoint: what
        is restored has been reported.
        """
        updates = [metrics] if isinstance(metrics, Mapping) else list(metrics)
        config = self._config
        stats = count_batch(self._facts.arrays, self._model.config)
        if not self._model.projects:
            stats = dataclasses.replace(stats, trained_tokens=0)
        self._stats += stats
        self._unchecked.append((self.step, updates, self._facts.name_rows))
        logs, evaluates, saves = (
            self._is_due(every) for every in (config.train.log_every, config.eval.every, config.checkpoint.every)
        )
        self._stop.agree()
        stopping = self._stop.number is not None
        # A bad step changes no parameter, so it may be found a step late: the device is waited for only where something
        # is written.
        self._check_steps(leave=0 if stopping or logs or evaluates or saves else 1)
        with self._watchdog.phase("run"):
            line, pending = self._make_line(updates) | further if logs else {}, None
            if logs:
                self._check_best_metric("train/", [*line, *(updates[-1] if updates else ())])
            if evaluates and self._evaluators:
                scores = self._evaluate()
                if scores is None:
                    pending, stopping = line, True
                else:
                    line |= scores
            if line and pending is None:
                self._writer.write(self.step, line)
            if stopping or saves:
                self._save(line, pending, self._source.get_state())
            if stopping and (pending is not None or self.step < self.total_steps):
                self._exit_stopped()
            self._line = line
            if line:
                self._restart_clock()

    # --- the start: the state of the newest checkpoint, or a new one ---

    def _restore(self) -> None:
        """The state of the newest checkpoint, or a new one, and metrics.jsonl as far as that state has come."""
        model, source, program, session = self._model, self._source, self._program, self._session

        def check(where, record: RunRecord) -> None:
            check_record(where, record, self._config, source.fingerprint, model.fingerprint)

        if gather(self._checkpointer.steps())[0]:
            model.params = None  # makes room for those of the checkpoint
        with self._watchdog.phase("checkpoint"):
            restored = self._checkpointer.restore(program.abstract_state, check)
        if restored is None:
            rng, average = jax.random.key(self._config.train.seed), program.abstract_state.ema is not None
            optimizer, mesh = program.optimizer, session.mesh
            self.state = init_train_state(model.params, model.frozen, optimizer, rng, mesh=mesh, ema=average)
            model.params = None
            if session.is_lead:
                save_config(session.workdir, self._config)
        else:
            record, state = restored
            self.state = state.replace(frozen=model.frozen)
            self.step = self._saved_step = record.step
            self._pending, self._means = record.pending_metrics, StepMeans(record.unlogged)
            if changes := compare_fingerprints(record.data_fingerprint, source.fingerprint):
                source.set_state(None, self.step)
                now, before = model.fingerprint or {}, record.model_fingerprint or {}
                if now.get("trained_on") != before.get("trained_on"):  # a reward model's, of rows of both forms
                    now["trained_on"] = ""
                self._say(f"the data changed, as accepted ({'; '.join(changes)}): it begins anew at this step")
            else:
                source.set_state(record.data_position, self.step)
            if session.is_lead:
                for line in find_changed_reports(session.workdir, record.reports):
                    self._say(line)
                save_config(session.workdir, self._config)
            self._say(f"goes on from step {self.step}{format_config_changes(record, self._config, self._held_out)}")
            updates = int(to_host(self.state.history["updates"]))
            jump = format_rate_jump(record, self._config.optimizer, program.updates, updates)
            if jump and self.step < self.total_steps:
                self._say(jump)
        # A line whose evaluation is pending has not been written yet.
        step = self.step - (self._pending is not None) if self.step else None
        run_config = to_dict(self._config)
        self._writer = MetricsWriter(session.workdir, self._config.trackers, step=step, run_config=run_config)

    def _evaluate_at_start(self) -> None:
        """The evaluation of a new run, or one that a signal interrupted."""
        line, self._pending = self._pending, None
        if line is not None and self._evaluators:
            scores = self._evaluate()
            if scores is None:
                self._say(f"stopped in the evaluation of step {self.step}; the same command goes on from there")
                raise SystemExit(128 + (self._stop.number or 0))
            line |= scores
            if self.step:
                self._checkpointer.add_metrics(self.step, line)
        if line:
            self._writer.write(self.step, line)

    # --- a step ---

    def _check_steps(self, leave: int) -> None:
        """Raises UserError where the run must stop because of a step, of all but the last ``leave``."""
        while len(self._unchecked) > leave:
            step, updates, name_own = self._unchecked.pop(0)
            # Found by all processes alike, each of which has rows of its own.
            name_rows = lambda name_own=name_own: ", ".join(dict.fromkeys(gather(name_own())))
            for metrics in updates:
                check_step(self._config.train.spike, step, metrics, name_rows, self._progress.print)
                self._means.add(metrics)

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and after the last one, happens after this one."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def _restart_clock(self) -> None:
        self._clock, self._stats, self._waited = time.perf_counter(), BatchStats(0, 0, 0), 0.0

    def _make_line(self, updates: Sequence[Metrics]) -> dict[str, float]:
        seconds = time.perf_counter() - self._clock
        _, row_groups = data_process(self._session.mesh)
        line, self._means = self._means.values(), StepMeans()
        if updates and self._config.train.spike.policy == "skip":
            line["train/skipped"] = float(to_host(updates[-1]["skipped"]))
        if len(updates) != 1:
            line["train/updates"] = float(to_host(self.state.step))
        devices = self._session.mesh.local_devices
        line |= compute_perf(self._model.config, self._stats, seconds, devices, row_groups)
        line["perf/input_wait_fraction"] = self._waited / seconds
        self._progress.update(self.step, line)
        return line

    def _evaluate(self) -> dict[str, float] | None:
        """The scores of the state, printed; None when a signal to stop the run came before they were there."""
        scores: dict[str, float] = {}
        started = time.perf_counter()
        with self._watchdog.phase("evaluation"):
            try:
                with self._stop.interrupts():
                    if self._stop.number:
                        return None
                    for evaluate in self._evaluators:
                        scores |= evaluate(self.state, self.step)
            except Interrupted:
                return None
        if scores:
            self._progress.add_evaluation(time.perf_counter() - started)
            self._say(format_metrics(self.step, scores))
        self._check_best_metric("eval/", scores)
        return scores

    def _check_best_metric(self, group: str, found: Iterable[str]) -> None:
        """Raises UserError where the best checkpoints are chosen by a metric of ``group`` that is not in ``found``.

        A line without any of the group is of steps that made no update.
        """
        config, names = self._config.checkpoint, sorted(name for name in found if name.startswith(group))
        if config.keep_best and config.metric.startswith(group) and names and config.metric not in names:
            raise UserError(
                f"config key 'checkpoint.metric' = {config.metric!r} is not measured; found {', '.join(names)}"
            )

    # --- saving and stopping ---

    def _save(self, line: dict, pending: dict | None, position: dict) -> None:
        """``position``: of this process's data."""
        if self.step <= self._saved_step:
            return
        self._saved_step = self.step
        record = RunRecord(
            step=self.step,
            data_position=self._source.join_states(gather(position)),
            config=to_dict(self._config),
            data_fingerprint=self._source.fingerprint,
            model_fingerprint=self._model.fingerprint,
            held_out_fingerprint=self._held_out,
            metrics=line,
            pending_metrics=pending,
            reports=report_facts(self._session.workdir) if self._session.is_lead else {},
            total_updates=self._program.updates,
            unlogged=self._means.to_json(),
        )
        with self._watchdog.phase("checkpoint"):
            self._checkpointer.save(record, self.state)

    def _exit_stopped(self) -> None:
        self._print_consumption()
        with self._watchdog.phase("checkpoint"):
            self._checkpointer.wait()
        where = f"step {self._saved_step} of {self.total_steps}"
        self._progress.print(f"stopped at {where}; the same command goes on from there")
        raise SystemExit(128 + (self._stop.number or 0))

    def _print_consumption(self) -> None:
        for line in self._source.format_consumption(self._source.join_states(gather(self._source.get_state()))):
            self._say(f"consumed    {line}")

    def _say(self, text: str) -> None:
        if self._session.is_lead:
            self._progress.print(text)


def _close(source: Source) -> None:
    """Ends the thread that prepares items, or leaves it to itself where it waits for a storage."""
    closing = threading.Thread(target=source.close, daemon=True)
    closing.start()
    closing.join(_SECONDS_TO_CLOSE)
