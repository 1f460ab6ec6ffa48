"""metrics.jsonl: one JSON line per logged step, and the same to every tracker.

Names are slash-grouped (``train/loss``, ``eval/loss``, ``perf/mfu``). A run that was killed and started again
leaves the same file as one that was not, apart from ``perf/``: lines past the checkpoint are cut off at the start,
and the loop writes a step's metrics before it saves that step's checkpoint.
"""

import json
import math
import pathlib

import jax
import numpy as np

from postrain.config import TrackersConfig
from postrain.errors import UserError
from postrain.files import read_jsonl, write_whole
from postrain.report.progress import ProgressLine
from postrain.report.trackers import make_trackers
from postrain.sharding import to_host

__all__ = ["MetricsWriter", "ProgressLine", "read_metrics"]


class MetricsWriter:
    """Appends to ``workdir/metrics.jsonl``; on hosts other than the first it does nothing."""

    def __init__(self, workdir, config: TrackersConfig, *, step: int | None = None, run_config: dict | None = None):
        """``step``: that of the restored checkpoint, whose lines and those before it stay; None: start anew.

        ``run_config``: the resolved config, for trackers that show it. Raises UserError when a line of the
        file is no JSON (a torn last line is cut off) or a tracker cannot start.
        """
        self._file, self._trackers = None, []
        if jax.process_index() != 0:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        lines = [] if step is None else [line for line in read_metrics(workdir) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._trackers = make_trackers(workdir, config, run_config=run_config, step=step or 0)
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


def read_metrics(workdir) -> list[dict]:
    """The lines of ``workdir/metrics.jsonl`` as dicts; a torn last line is left out."""
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
