"""A training run between its restore and its end: what every recipe's loop does beside the updates themselves.

    with Run(config, workdir, ...) as run:
        state = run.restore(frozen) or ...
        run.begin(state)
        while run.step < run.total_steps:
            arrays = run.next_batch(state)
            state, metrics = train_step(state, ...)
            if run.must_go_back(metrics):
                frozen, state = state.frozen, None
                state = run.go_back(frozen)
            else:
                run.end_step(state, metrics)
        run.end()

Every process of a run makes these calls in the same order: some of them wait for the others.
"""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.checkpoint.checkpointer import Checkpointer, Restored
from postrain.cluster.processes import gather, stop_all_on_error
from postrain.cluster.signals import Interrupted, catch_stop_signals
from postrain.cluster.watchdog import Watchdog
from postrain.config import Config, to_dict
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.open import Batches
from postrain.data.batches.streamed import join_positions
from postrain.errors import UserError
from postrain.models.config import ModelConfig
from postrain.report.metrics import MetricsWriter, ProgressLine
from postrain.sharding import data_process
from postrain.training.flops import BatchStats, compute_perf, count_batch
from postrain.training.spikes import SpikeGuard
from postrain.training.summary import format_metrics
from postrain.training.workdir import check_reports, describe_changes, describe_reports, save_config
from postrain.types import TrainState

_SECONDS_TO_CLOSE = 1.0  # for the thread that prepares batches


class Fingerprints(NamedTuple):
    """What a run stands on, each JSON-able; a checkpoint of others is refused, but for the held-out rows."""

    data: dict
    base: dict  # the model
    held_out: dict | None  # None: no such rows


class _Unchecked(NamedTuple):
    """A step of which it is not known yet whether its loss and gradient were usual."""

    step: int
    metrics: dict  # on the device
    row_ids: np.ndarray
    position: dict | None  # of the data after it, where the run may have to go on from there


class Run:
    """See above. A context manager: at its end no save, signal handler, thread or file is left behind.

    Attributes:
        step: updates done; in a step of the loop its number, from 1.
        total_steps: updates of the whole run.
    """

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        *,
        model: ModelConfig,
        mesh: Mesh,
        abstract_state: TrainState,
        batches: Batches,
        fingerprints: Fingerprints,
        total_steps: int,
        watch: Watchdog,
        evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    ):
        """``evaluate``: the scores of a state, None where nothing is held out."""
        self.step, self.total_steps = 0, total_steps
        self._config, self._workdir, self._model, self._mesh = config, workdir, model, mesh
        self._abstract_state, self._batches, self._fingerprints = abstract_state, batches, fingerprints
        self._watch, self._evaluate = watch, evaluate
        self._lead = jax.process_index() == 0
        self._stack = contextlib.ExitStack()
        self._undone: _Unchecked | None = None  # the step that is left out by going back
        self._owed: dict | None = {} if config.eval.before else None  # the step's line, without its evaluation
        self._unchecked: list[_Unchecked] = []
        self._stopping, self._line = False, {}  # the line: of the last step that was taken
        self._newest = 0  # step of the newest checkpoint, as all processes know it

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpointer(self._workdir / "checkpoints", self._config.checkpoint)
            self._checkpointer = stack.enter_context(checkpoints)
            stack.enter_context(stop_all_on_error())  # before a save is waited for in which the others take part
            self._stop = stack.enter_context(catch_stop_signals())
            self._progress = stack.enter_context(ProgressLine(self.total_steps))
            self._guard = SpikeGuard(self._config.train.spike, self._progress.print)
            stack.callback(self._close_batches)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def _close_batches(self) -> None:
        """Ends the thread that prepares them, or leaves it to itself where it waits for a storage."""
        closing = threading.Thread(target=self._batches.close, daemon=True)
        closing.start()
        closing.join(_SECONDS_TO_CLOSE)

    def say(self, text: str) -> None:
        """Prints, on the first process."""
        if self._lead:
            self._progress.print(text)

    def restore(self, frozen: Any) -> TrainState | None:
        """The state of the newest checkpoint, and the data's position with it; None where the run is new.

        Raises UserError as ``Checkpointer.restore`` does; until then nothing is written.
        """
        restored = self._read_newest(fingerprint=self._fingerprints.data, accept_change=self._config.data.accept_change)
        if restored is None:
            return None
        self.step, self._owed = restored.step, restored.owed
        self._newest = restored.step
        self._guard.rollbacks = restored.rollbacks
        before, after = restored.fingerprint, self._fingerprints.data
        if changed := compare_fingerprints(before, after):
            self._batches.start_anew(restored.step)
            self.say(f"the data changed, as accepted: {'; '.join(changed)}: they start anew after update {self.step}")
        else:
            self._batches.set_state(restored.data_position)
        for line in check_reports(self._workdir, restored.reports) if self._lead else ():
            self.say(line)
        changes = describe_changes(
            restored.config, to_dict(self._config), restored.eval_fingerprint, self._fingerprints.held_out
        )
        self.say(f"goes on from step {self.step}{changes}")
        return restored.state.replace(frozen=frozen)

    def _read_newest(self, **options) -> Restored | None:
        with self._watch.phase("checkpoint"):
            return self._checkpointer.restore(self._abstract_state, base_fingerprint=self._fingerprints.base, **options)

    def begin(self, state: TrainState) -> None:
        """Writes what is due before the next step: the evaluation of a new run, or one that a signal had stopped."""
        if self._lead:
            save_config(self._workdir, self._config)
        # The line of a step whose evaluation was stopped has not been written yet.
        self._open_writer(self.step - (self._owed is not None) if self.step else None)
        owed, self._owed = self._owed, None
        if owed is not None and self._evaluate:
            scores = self._evaluate_unless_stopped(state)
            if scores is None:
                self.say(f"stopped in the evaluation of step {self.step}; the same command goes on from there")
                raise SystemExit(128 + self._stop.number)
            if self.step:
                self._checkpointer.add_metrics(self.step, owed | scores)
            owed |= scores
            self.say(format_metrics(self.step, scores))
        if owed:
            self._writer.write(self.step, owed)
        self._restart_clock()

    def next_batch(self, state: TrainState) -> dict[str, np.ndarray]:
        """The arrays of the next step's batch, [B_local, T]; counts the step.

        A signal ends the wait for them in a run of one process: ``state``, that of the step before, is saved. Of
        several, others may have begun the step, and have no such state any more: they stop after it.
        """
        asked, position = time.perf_counter(), self._batches.get_state()
        self._watch.step = self.step + 1
        try:
            with self._watch.phase("data"), self._stop.interrupts():
                if self._stop.number:
                    raise Interrupted
                self._arrays = next(self._batches)
        except Interrupted:
            self._stop_before_next(state, position)
        self.step += 1
        self._waited += time.perf_counter() - asked
        self._row_ids = self._arrays.pop("row_ids")
        return self._arrays

    def _stop_before_next(self, state: TrainState, position: dict) -> None:
        """SystemExit, once ``state`` is saved; where it is bad, the newest checkpoint is what to go on from anyway."""
        undone = [self._must_undo(taken) for taken in self._unchecked]
        if not any(undone):
            self._save(state, self._line, None, position)
        self._raise_stopped()

    def _raise_stopped(self) -> None:
        self._say_what_was_drawn()
        with self._watch.phase("checkpoint"):
            self._checkpointer.wait()
        where = f"step {self._newest} of {self.total_steps}"
        self._progress.print(f"stopped at {where}; the same command goes on from there")
        raise SystemExit(128 + self._stop.number)

    def _must_undo(self, taken: _Unchecked) -> bool:
        # Found out by all processes alike, each of which has rows of its own.
        name_rows = lambda: ", ".join(dict.fromkeys(gather(self._batches.describe_rows(taken.row_ids))))
        return self._guard.must_roll_back(taken.metrics, taken.step, name_rows)

    def must_go_back(self, metrics: dict) -> bool:
        """Whether the step that was just taken, or the one before it, has to be undone: then ``go_back`` comes next.

        A bad step changes no parameter, so it may be found out a step late: the device is waited for only where
        something is written. Raises UserError where the run must stop.
        """
        self._stats += count_batch(self._arrays, self._model)
        position = self._batches.get_state() if self._guard.rolls_back else None
        self._unchecked.append(_Unchecked(self.step, metrics, self._row_ids, position))
        intervals = self._config.train.log_every, self._config.eval.every, self._config.checkpoint.every
        with self._watch.phase("step", watches_cpu=False):
            self._stop.agree()
            self._stopping = self._stop.number is not None
            now = self._stopping or any(map(self._is_due, intervals))
            while len(self._unchecked) > (0 if now else 1):
                taken = self._unchecked.pop(0)
                if self._must_undo(taken):
                    self._undone = taken
                    return True
        return False

    def go_back(self, frozen: Any) -> TrainState:
        """The state of the newest checkpoint; the data goes on after the step that is undone.

        Not of one that a signal made: a run that was stopped goes back to where one that was not goes back to.
        """
        self._unchecked, self._line = [], {}
        # The data's position is that of the undone step: of which data the checkpoint was does not matter.
        restored = self._read_newest(fingerprint=None, due_only=True)
        if not restored:
            raise UserError(
                f"step {self._undone.step}: no checkpoint that was due to go back to: lower checkpoint.every"
            )
        self.step = restored.step
        self._newest = gather(self._checkpointer.steps())[0][-1]  # one may have been found damaged
        self._batches.set_state(self._undone.position)
        self.say(f"back at step {self.step}")
        self._writer.close()
        self._open_writer(self.step)
        self._restart_clock()
        return restored.state.replace(frozen=frozen)

    def end_step(self, state: TrainState, metrics: dict) -> None:
        """Evaluates, writes and saves what is due. SystemExit when a signal came, and a checkpoint has been saved.

        A step's line is written before its checkpoint is saved: what is restored has been reported.
        """
        line = self._make_line(metrics) if self._is_due(self._config.train.log_every) else {}
        owed = None
        if self._evaluate and self._is_due(self._config.eval.every):
            scores = self._evaluate_unless_stopped(state)
            if scores is None:
                owed, self._stopping = line, True
            else:
                self._progress.print(format_metrics(self.step, scores))
                line |= scores
        if line and owed is None:
            self._writer.write(self.step, line)
        if self._stopping or self._is_due(self._config.checkpoint.every):
            self._save(state, line, owed, self._batches.get_state())
        if self._stopping and (owed is not None or self.step < self.total_steps):
            self._raise_stopped()
        self._line = line
        if line:
            self._restart_clock()

    def end(self) -> list[str]:
        """Waits for the last save; says, and returns, what was drawn of each source, where that is not all of it."""
        drawn = self._say_what_was_drawn()
        with self._watch.phase("checkpoint"):
            self._checkpointer.wait()
        return drawn

    def _say_what_was_drawn(self) -> list[str]:
        drawn = self._batches.format_consumption(join_positions(gather(self._batches.get_state())))
        for line in drawn:
            self.say(f"drawn       {line}")
        return drawn

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and after the last one, happens after this one."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def _open_writer(self, step: int | None) -> None:
        writer = MetricsWriter(self._workdir, self._config.trackers, step=step, run_config=to_dict(self._config))
        self._writer = self._stack.enter_context(writer)

    def _restart_clock(self) -> None:
        self._clock, self._stats, self._waited = time.perf_counter(), BatchStats(0, 0, 0), 0.0

    def _make_line(self, metrics: dict) -> dict[str, float]:
        seconds = time.perf_counter() - self._clock
        _, row_groups = data_process(self._mesh)
        line = {name: float(value) for name, value in metrics.items() if name.startswith("train/")}
        line |= self._guard.count(metrics)
        line |= compute_perf(self._model, self._stats, seconds, self._mesh.local_devices, row_groups)
        line["perf/input_wait_fraction"] = self._waited / seconds
        self._progress.update(self.step, line)
        return line

    def _evaluate_unless_stopped(self, state: TrainState) -> dict[str, float] | None:
        """The scores, None when a signal to stop the run came before they were there."""
        with self._watch.phase("evaluation"):
            try:
                with self._stop.interrupts():
                    return None if self._stop.number else self._evaluate(state)
            except Interrupted:
                return None

    def _save(self, state: TrainState, line: dict, owed: dict | None, position: dict) -> None:
        """``position``: of the data of this process.

        After going back there may be a newer checkpoint, made for a signal: from it the run comes to the same bad step
        again, and on as this one does, so it stays the newest until training is past it.
        """
        if self.step <= self._newest:
            return
        self._newest = self.step
        position = join_positions(gather(position))
        with self._watch.phase("checkpoint"):
            self._checkpointer.save(
                self.step,
                state,
                data_position=position,
                config=to_dict(self._config),
                fingerprint=self._fingerprints.data,
                base_fingerprint=self._fingerprints.base,
                eval_fingerprint=self._fingerprints.held_out,
                metrics=line,
                rollbacks=self._guard.rollbacks,
                reports=describe_reports(self._workdir) if self._lead else None,
                owed=owed,
            )
