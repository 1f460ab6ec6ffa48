"""The folder of a run: made, checked, described."""

import json
import os
import pathlib

from postrain.compute.metrics import read_metrics
from postrain.config import Config, resolve, to_dict
from postrain.errors import UserError

# Keys that may change between a checkpoint and the run that goes on from it without a word: they decide how
# the work is done or what is shown of it, not its result.
HARMLESS = ("mesh.", "trackers.", "checkpoint.", "eval.", "export.", "train.log_every", "train.micro_batches")


def make_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """The folder, made where it is missing. Raises UserError where it cannot be written."""
    workdir = pathlib.Path(workdir)
    probe = workdir / ".writable"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror}): choose another place") from error
    return workdir


def save_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes the resolved config."""
    write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file, or leaves what was there, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_config(workdir: pathlib.Path) -> Config:
    """The resolved config of a run. Raises UserError when ``workdir`` is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no run in it, expected {path}")
    return resolve(json.loads(path.read_text(encoding="utf-8")))


def describe_changes(old: dict, new: dict) -> str:
    """What of the config is another than in the checkpoint and changes the run's result, to be printed."""
    before, after = flatten(old), flatten(new)
    changed = [
        f"{key} {before.get(key)!r} -> {after.get(key)!r}"
        for key in after
        if before.get(key) != after.get(key) and not key.startswith(HARMLESS)
    ]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def last_values(workdir: pathlib.Path) -> dict[str, float]:
    """The last value of every metric in metrics.jsonl."""
    values: dict[str, float] = {}
    for line in read_metrics(workdir):
        values |= {name: value for name, value in line.items() if name != "step" and value is not None}
    return values
