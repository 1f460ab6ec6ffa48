"""The folder of a run: made, checked, described."""

import contextlib
import fnmatch
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator

import jax

from postrain.config import Config, resolve, to_dict
from postrain.errors import UserError, shorten
from postrain.files import check_local, check_no_pattern, lock, write_whole
from postrain.report.metrics import read_metrics

REPORTS = ("metrics.jsonl", "samples.jsonl")
# What a run writes into its folder, and what may lie there before its first one: hidden files and the output of a
# launcher or a shell, which opens it before the run begins.
OWN = {"config.json", "checkpoints", "export", "logs", "tensorboard", "wandb", "report.html", "rejected.jsonl"}
OWN.update(REPORTS, {"reference", "calibration.json", "wandb_id"})
HARMLESS = ("*.partial", ".*", "*.log", "*.out", "*.err", "*.txt", "lost+found")
LONGEST_PATH = 3584  # bytes: the system's most, 4,096, less what a checkpoint adds


def make_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """The folder, made where it is missing.

    Raises UserError where it cannot be written, holds something else and no run, is a URL or has a name that
    checkpoints cannot be read under.
    """
    if not os.fspath(workdir):
        raise UserError("--workdir is empty: name a folder for the run")
    check_local(workdir, "--workdir")
    check_no_pattern(workdir, "--workdir")
    if (size := len(os.fsencode(os.path.abspath(workdir)))) > LONGEST_PATH:
        raise UserError(
            f"--workdir has a path of {size:,} bytes: expected at most {LONGEST_PATH:,}, as the files of checkpoints "
            "have longer ones: choose another place"
        )
    workdir = pathlib.Path(workdir)
    try:
        if any(workdir.glob("*.safetensors")):
            raise UserError(
                f"--workdir {workdir} holds the weights of a model, whose config.json the run would replace: "
                "choose another place"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        _check_own(workdir)
        with tempfile.TemporaryFile(
            dir=workdir, prefix=".free-"
        ) as probe:  # a name of its own: other processes probe at the same time
            probe.write(b"1")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror}): choose another place") from error
    return workdir


def _check_own(workdir: pathlib.Path) -> None:
    """Raises UserError where the folder holds files that no run has written, and no run."""
    names = sorted(path.name for path in workdir.iterdir())
    if "config.json" in names and _read_run_values(workdir / "config.json") is not None:
        return
    others = [name for name in names if name not in OWN and not any(fnmatch.fnmatch(name, one) for one in HARMLESS)]
    if "config.json" in names and "checkpoints" not in names:
        others.insert(0, "config.json")
    if others:
        raise UserError(
            f"--workdir {workdir} holds {shorten(others, 3)} and no run: expected an empty or a new folder, or that of "
            f"a run: choose another place, such as {workdir / 'run'}"
        )


def _read_run_values(path: pathlib.Path) -> dict | None:
    """The values of a config.json; None where it is not a run's."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and {"model", "data", "optimizer"} <= set(values) else None


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The folder, made and locked for the run of the block. Where that writes nothing, nothing is left of it.

    Raises UserError as make_workdir, lock_workdir and check_renames do.
    """
    new = [folder for folder in (pathlib.Path(workdir), *pathlib.Path(workdir).parents) if not os.path.exists(folder)]
    try:
        made = make_workdir(workdir)
        with lock_workdir(made):
            if jax.process_index() == 0:
                check_renames(made)
            yield made
    finally:
        for folder in new:
            with contextlib.suppress(OSError):  # not empty, or not made
                folder.rmdir()


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Holds ``workdir`` for one run, by its file .lock, which is removed when the block ends.

    A process that is killed leaves the file, but the system releases it, and the next run takes it over.

    Two runs in one folder would take each other's unfinished checkpoints for leftovers, and mix their metrics. Only
    the first process of a run takes the lock, for all of them. Raises UserError naming the process that holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    path = workdir / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(lock(path, wait=False))
        except BlockingIOError as error:
            holder = ""
            with contextlib.suppress(FileNotFoundError):  # it ends just now
                holder = path.read_text(encoding="utf-8").strip()
            raise UserError(
                f"--workdir {workdir} is in use by another run (process {holder or 'unknown'}): wait for it, stop it, "
                "or use another"
            ) from error
        if not held:  # better to run than to refuse such a file system
            print(f"workdir {workdir}: its file system has no locks: start no second run in it")
        stack.callback(path.unlink, missing_ok=True)
        path.write_text(str(os.getpid()), encoding="utf-8")
        yield


def check_renames(workdir: pathlib.Path) -> None:
    """Raises UserError where folders cannot be renamed, as checkpoints are when they are whole: in a mounted bucket."""
    probe = workdir / ".probe"
    shutil.rmtree(probe, ignore_errors=True)  # of a run that was killed just here
    try:
        (probe / "written").mkdir(parents=True)
        (probe / "written" / "file").write_bytes(b"1")
        (probe / "written").rename(probe / "renamed")
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: folders cannot be made and renamed there ({error.strerror}), as checkpoints "
            "are when they are whole: choose another place"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def save_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes the resolved config."""
    write_whole(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def read_config(workdir: pathlib.Path) -> Config:
    """The resolved config of a run. Raises UserError when ``workdir`` is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no run in it, expected {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: the config of a run, but it cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or not {"model", "data", "optimizer"} <= set(values):
        raise UserError(f"{workdir}: expected the workdir of a run, found a {path.name} of something else")
    return resolve(values)


def report_facts(workdir: pathlib.Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of the files that a run appends to, so that a resume finds what became of them since."""
    contents = {name: (workdir / name).read_bytes() for name in REPORTS if (workdir / name).exists()}
    return {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}


def find_changed_reports(workdir: pathlib.Path, before: dict[str, list[int]]) -> list[str]:
    """A warning for each file that does not begin with what it held at ``report_facts``: training needs none of them.

    Raises UserError where one cannot be read.
    """
    lines = []
    for name, (size, crc) in before.items():
        path = workdir / name
        try:
            found = path.read_bytes()[:size]
        except FileNotFoundError:
            found = b""
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): see to its permissions, or move it") from error
        if zlib.crc32(found) != crc or len(found) != size:
            what = f"expected {size:,} bytes, found {len(found):,}" if len(found) != size else "its content has changed"
            lines.append(
                f"{path}: not as the checkpoint saw it ({what}): what it says of earlier steps is not reliable"
            )
    return lines


def read_last_values(workdir: pathlib.Path) -> tuple[int, dict[str, float]]:
    """The last step of metrics.jsonl, 0 where it has no line, and the last value of every metric."""
    step, values = 0, {}
    for line in read_metrics(workdir):
        step = max(step, line["step"])
        values |= {name: value for name, value in line.items() if name != "step" and value is not None}
    return step, values
