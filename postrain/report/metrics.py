"""metrics.jsonl: one JSON line per logged step, and the same for every tracker.

Names are slash-grouped (``train/loss``, ``eval/loss``, ``perf/mfu``). A run that was killed and started again
leaves the same file as one that was not, apart from ``perf/``: lines past the checkpoint are cut off at the start,
and the loop writes a step's metrics before it saves that step's checkpoint.

And the live line of progress on a terminal.
"""

import importlib
import json
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from postrain.config import TrackersConfig
from postrain.errors import UserError
from postrain.files import read_jsonl, write_whole
from postrain.sharding import to_host

CLEAR = "\r\x1b[K"  # to the start of the line, erase it


class MetricsWriter:
    """Appends to ``workdir/metrics.jsonl``; in processes other than the first it does nothing."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: TrackersConfig,
        *,
        step: int | None = None,
        run_config: dict | None = None,
    ):
        """Opens the file and the trackers.

        Args:
          workdir: of the run.
          config: which trackers.
          step: of the restored checkpoint: later lines are removed. None: the file starts empty.
          run_config: the resolved config, for trackers that show it.

        Raises:
          UserError: a line of the file is not JSON (a torn last line is cut off), or a tracker cannot start.
        """
        self._file, self._trackers = None, []
        if jax.process_index() != 0:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        lines = [] if step is None else [line for line in read_metrics(workdir) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        workdir = pathlib.Path(workdir).absolute()
        if config.tensorboard:
            self._trackers.append(TensorBoard(workdir, step or 0))
        if config.wandb != "off":
            self._trackers.append(WeightsAndBiases(workdir, config, run_config or {}))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict) -> None:
        """One line: ``step``, then the names in order. Values: scalars, on host or device; NaN becomes null."""
        if self._file is None:
            return
        values = {name: _to_number(metrics[name]) for name in sorted(metrics)}
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": int(step), **plain}) + "\n")
            self._file.flush()  # a killed process loses nothing that was written
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot write ({error}): free some space, and start again") from error
        for tracker in self._trackers:
            tracker.write(int(step), values)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()
        self._file, self._trackers = None, []


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """The lines of ``workdir/metrics.jsonl``, without a torn last line. Raises UserError for one without ``step``."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = read_jsonl(path, drop_torn=True) if path.exists() else []
    for number, line in lines:
        if type(line.get("step")) is not int:
            raise UserError(f"{path}:{number}: expected a JSON object with `step`: remove the line")
    return [line for _, line in lines]


def _to_number(value) -> float | int:
    """A Python number that prints short: float32 0.1 as 0.1, not as 0.10000000149011612."""
    array = to_host(value)
    if array.shape:
        raise ValueError(f"a metric is a scalar, found shape {array.shape}")
    if array.dtype == np.float32:
        return float(str(array))
    return array.item() if array.dtype != bool else int(array)


# Trackers


class TensorBoard:
    """Event files in ``workdir/tensorboard``; after a resume the steps past the checkpoint are hidden."""

    def __init__(self, workdir: pathlib.Path, step: int):
        writer = _import("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(logdir=str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; its id is kept in ``workdir/wandb_id``, so that a resumed run continues the same one."""

    def __init__(self, workdir: pathlib.Path, config: TrackersConfig, run_config: dict[str, Any]):
        wandb = _import("wandb", "wandb")
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            write_whole(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=workdir.name,
                id=id_file.read_text(),
                resume="allow" if config.wandb == "online" else None,
                dir=str(workdir),
                mode=config.wandb,
                config=run_config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            advice = "run `wandb login`, or set trackers.wandb='offline'"
            raise UserError(f"trackers.wandb: cannot start a run ({reason}): {advice}") from error

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: TrackersConfig) -> None:
    """Raises UserError where the package of a tracker is not installed."""
    wanted = {"tensorboardX": ("tensorboard", config.tensorboard), "wandb": ("wandb", config.wandb != "off")}
    for package, (key, is_on) in wanted.items():
        if is_on:
            _import(package, key)


def _import(package: str, key: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        advice = "pip install -e '.[log]', or switch the tracker off"
        raise UserError(f"trackers.{key}: needs the package {package}, which is not installed: {advice}") from error


# The live line


class ProgressLine:
    """``step 120/600  loss 1.2345  1,034 tokens/s  MFU 41.2%  3m12s left``.

    The time left is estimated from the steps after the first update, which compiles, and from the newest evaluation;
    once a few steps were timed, a line says what a run of more than a minute has before it.
    """

    def __init__(
        self, total_steps: int, eval_every: int = 0, *, stream=None, plain_every: float = 15.0, clock=time.monotonic
    ):
        """``eval_every``: steps between evaluations, 0: after the last step alone. ``plain_every``: seconds between
        lines where ``stream`` (default: stdout) is not a terminal."""
        self._total, self._stream, self._clock = total_steps, stream or sys.stdout, clock
        self._eval_every, self._plain_every = eval_every, plain_every
        self._evaluation = self._evaluating = 0.0  # seconds: of the newest evaluation, of all since the first line
        self._has_forecast = False
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._first: tuple[int, float] | None = None
        self._printed_at, self._line = float("-inf"), ""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows ``train/loss``, ``perf/tokens_per_second``, ``perf/mfu`` as far as they are in ``metrics``."""
        now = self._clock()
        if self._first is None:
            self._first = step, now
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        if "perf/tokens_per_second" in metrics:
            parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
        if "perf/mfu" in metrics:
            parts.append(f"MFU {metrics['perf/mfu']:.1%}")
        first_step, first_time = self._first
        if step > first_step:
            seconds, evaluations = (now - first_time - self._evaluating) / (step - first_step), self._count_left(step)
            left = seconds * (self._total - step) + evaluations * self._evaluation
            parts.append(f"{format_seconds(left)} left")
            if step - first_step >= 3 and not self._has_forecast:
                self._has_forecast = True
                if left >= 60:
                    self.print(self._forecast(step, seconds, evaluations, left))
        if self._live:
            self._line = cut_to_width(parts, _columns(self._stream))
            self._stream.write(CLEAR + self._line)
        elif now - self._printed_at >= self._plain_every or step >= self._total:
            self._printed_at = now
            self._stream.write("  ".join(parts) + "\n")
        self._stream.flush()

    def add_evaluation(self, seconds: float) -> None:
        """An evaluation took so long, and is no part of a step's time."""
        self._evaluation = seconds
        if self._first is not None:
            self._evaluating += seconds

    def _count_left(self, step: int) -> int:
        """Evaluations that the line of ``step`` has before it: its own, those that are due later, and the last."""
        if step >= self._total:
            return 1
        return 1 + ((self._total - 1) // self._eval_every - (step - 1) // self._eval_every if self._eval_every else 0)

    def _forecast(self, step: int, seconds: float, evaluations: int, left: float) -> str:
        parts = f"{self._total - step:,} steps of {seconds:.2g} s"
        if self._evaluation:
            parts += f", {evaluations} evaluation{'s' * (evaluations > 1)} of {format_seconds(self._evaluation)}"
        return f"forecast: {format_seconds(left)} more ({parts}), then the export"

    def print(self, text: str) -> None:
        """A line of its own above the live one."""
        if self._live and self._line:
            self._stream.write(f"{CLEAR}{text}\n{self._line}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line, which stays on the screen."""
        if self._live and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line = ""


def cut_to_width(parts: list[str], columns: int) -> str:
    """As many of ``parts`` as fit a line: a longer one would take two, of which CLEAR erases the second alone."""
    while len(parts) > 1 and len("  ".join(parts)) >= columns:
        parts = parts[:-1]
    return "  ".join(parts)[: columns - 1]


def _columns(stream) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # a stream of a test or a notebook
        return 80


def format_seconds(seconds: float) -> str:
    """``42s``, ``3m12s``, ``5h04m``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
