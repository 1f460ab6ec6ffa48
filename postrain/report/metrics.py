"""metrics.jsonl: one JSON line per logged step, and the same for every tracker.

Names are slash-grouped (``train/loss``, ``eval/loss``, ``perf/mfu``). A run that was killed and started again
leaves the same file as one that was not, apart from ``perf/``: lines past the checkpoint are cut off at the start,
and the loop writes a step's metrics before it saves that step's checkpoint.
"""

import importlib
import json
import math
import os
import pathlib
import secrets
from typing import Any, Protocol

import jax
import numpy as np

from postrain.config import TrackersConfig
from postrain.errors import UserError
from postrain.files import read_jsonl, write_whole
from postrain.sharding import to_host


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
        self._trackers = open_trackers(workdir, config, run_config=run_config, step=step or 0)
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

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()


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


class Tracker(Protocol):
    """Takes the metrics of a step as plain floats."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    workdir: str | os.PathLike, config: TrackersConfig, *, run_config: dict | None = None, step: int = 0
) -> list[Tracker]:
    """The trackers that ``config`` switches on; ``step``: of the restored checkpoint, else 0.

    Raises UserError for a package that is not installed, or W&B without a login.
    """
    workdir, trackers = pathlib.Path(workdir).absolute(), []
    if config.tensorboard:
        trackers.append(TensorBoard(workdir, step))
    if config.wandb != "off":
        trackers.append(WeightsAndBiases(workdir, config, run_config or {}))
    return trackers


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


def _import(package: str, key: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        advice = "pip install 'postrain[log]', or switch the tracker off"
        raise UserError(f"trackers.{key}: needs the package {package}, which is not installed: {advice}") from error
