"""Where metrics go besides metrics.jsonl: one function makes the list, every tracker has ``write`` and ``close``."""

import importlib
import pathlib
import secrets
from typing import Any, Protocol

from postrain.config import TrackersConfig
from postrain.errors import UserError
from postrain.files import write_whole


class Tracker(Protocol):
    """Takes the metrics of a step as plain floats."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def make_trackers(workdir, config: TrackersConfig, *, run_config: dict | None = None, step: int = 0) -> list[Tracker]:
    """The trackers that ``config`` asks for. ``step``: that of the checkpoint a run goes on from, else 0.

    Raises UserError for an unknown value, a package that is not installed, or W&B without a login.
    """
    if config.wandb not in ("off", "online", "offline"):
        raise UserError(f"trackers.wandb: expected 'off', 'online' or 'offline', found {config.wandb!r}")
    workdir, trackers = pathlib.Path(workdir).absolute(), []
    if config.tensorboard:
        trackers.append(TensorBoard(workdir, step))
    if config.wandb != "off":
        trackers.append(WeightsAndBiases(workdir, config, run_config or {}))
    return trackers


def _import(package: str, key: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        advice = "pip install 'postrain[log]', or switch the tracker off"
        raise UserError(f"trackers.{key}: needs the package {package}, which is not installed: {advice}") from error


class TensorBoard:
    """Event files in ``workdir/tensorboard``; after a resume the steps past the checkpoint are hidden."""

    def __init__(self, workdir: pathlib.Path, step: int):
        purge_step = step + 1 if step else None
        writer = _import("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(logdir=str(workdir / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; its id is kept in ``workdir/wandb_id``, so that a resumed run goes on in the same one."""

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
