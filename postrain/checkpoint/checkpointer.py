"""Checkpoints: saved atomically, verified when read, and complete enough to resume a run bit by bit.

A checkpoint ``checkpoints/STEP/`` holds ``state`` (the TrainState without ``frozen``, by Orbax), ``run/data.json`` (a
RunRecord: data position, resolved config, fingerprints, metrics) and ``checksums.txt``, by which a file that is torn,
missing or has a flipped bit is found and named. Orbax writes it as ``STEP.saving``; when it is whole, its record and
the list of its arrays are read back, its checksums are written, all of it is on disk, and then it gets its name: a run
killed at any instant finds its previous checkpoint. ``frozen`` is not saved: it is read again from the model folder,
and a folder that has changed since is refused.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from postrain.checkpoint.integrity import (
    format_cause,
    is_damaged,
    is_out_of_memory,
    sync_folder,
    verify_checksums,
    write_checksums,
)
from postrain.checkpoint.record import RunRecord, parse_record
from postrain.cluster.processes import gather
from postrain.config import CheckpointConfig
from postrain.errors import UserError, shorten
from postrain.files import check_no_pattern, write_whole
from postrain.types import TrainState

UNFINISHED_SUFFIX = ".saving"  # and what Orbax adds to it
DELETED_SUFFIX = ".deleting"
UNREADABLE_SUFFIX = ".unreadable"
LATER_METRICS = "metrics.json"  # of an evaluation after the save; not part of the checkpoint's checksums
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


class Restored(NamedTuple):
    """A checkpoint, read back."""

    record: RunRecord
    state: TrainState  # with ``frozen`` empty: put the base in with ``state.replace(frozen=...)``


class Checkpointer:
    """Saves and restores the checkpoints of one run; a context manager, so that no save is left unfinished.

    Keeps the ``config.keep`` newest and the ``config.keep_best`` best by ``config.metric``. A save
    runs in the background (unless ``config.asynchronous`` is off). If it fails, the next call of any method
    raises, and ``close`` at the latest; older checkpoints are deleted only after a newer one is whole.
    ``report`` gets a line for everything found broken and moved aside.

    ``read_only``: changes nothing in the folder, so that another process may be saving there. Without it, unfinished
    saves are removed: only for the one run that holds the workdir (``lock_workdir``).
    """

    def __init__(
        self, folder, config: CheckpointConfig, *, read_only: bool = False, report: Callable[[str], None] = print
    ):
        check_no_pattern(folder, "folder")
        self._folder, self._config, self._report = pathlib.Path(folder).absolute(), config, report
        self._read_only = read_only
        if read_only and not self._folder.is_dir():
            raise UserError(f"{self._folder}: no finished checkpoint in it, expected the checkpoints of a run")
        self._lead = jax.process_index() == 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None  # the save under way
        self._failure: UserError | None = None
        # Orbax logs the traceback of a failed save from five threads; the exception itself reaches the caller.
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="run")
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        # Float32 weights shrink by 8% and saving takes ten times as long: not worth a pause in training.
        self._context.array.saving.use_compression = False
        try:
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
            cleans = self._lead and not read_only
            for suffix, what in ((UNFINISHED_SUFFIX, "save"), (DELETED_SUFFIX, "deletion")) if cleans else ():
                for part in sorted(self._folder.glob(f"*{suffix}*")):
                    report(f"checkpoint {part}: an unfinished {what}, removed")
                    shutil.rmtree(part)
            for place in self._places() if cleans else ():
                if not place.is_dir():
                    raise UserError(f"{place}: a file in the place of a checkpoint's folder: move it away")
                if not any(place.iterdir()):
                    report(f"checkpoint {place}: an empty folder, removed")
                    place.rmdir()
        except OSError as error:
            raise UserError(f"checkpoints: cannot use folder {self._folder} ({error}): use another workdir") from error

    def save(self, record: RunRecord, state: TrainState) -> None:
        """Start to save ``state`` after ``record.step``; returns once the arrays may be donated.

        The best checkpoints are chosen by ``config.metric`` among ``record.metrics``. All metrics are saved: a resumed
        run may choose by another. Raises UserError when the previous save failed.
        """
        if self._read_only:
            raise ValueError(f"{self._folder} was opened read-only")
        self.wait()
        values = json.loads(json.dumps(dataclasses.asdict(record)))
        items = {"state": state.replace(frozen={}), "run": values}
        unfinished = self._folder / f"{record.step}{UNFINISHED_SUFFIX}"
        try:
            with self._context:
                written = ocp.save_checkpointables_async(unfinished, items)
        except (OSError, ValueError) as error:
            self._fail(error)
        expected = json.dumps(values, sort_keys=True), _shapes(items["state"])
        self._pending = self._thread.submit(self._finish, record.step, unfinished, written, expected)
        if not self._config.asynchronous:
            self.wait()

    def add_metrics(self, step: int, metrics: dict) -> None:
        """Rank the checkpoint of ``step`` by these metrics, of an evaluation after it was saved."""
        if self._lead:
            write_whole(self._folder / str(step) / LATER_METRICS, json.dumps(metrics) + "\n")

    def _finish(
        self, step: int, unfinished: pathlib.Path, written: ocp.AsyncResponse, expected: tuple[str, dict[str, str]]
    ) -> None:
        """Turn the folder that Orbax writes into a checkpoint, then delete those it replaces. Runs in a thread.

        ``expected``: its record as JSON and the shapes of its arrays, which must be read back from it.
        """
        written.result()
        if not self._lead:
            return
        values = json.loads((unfinished / "run" / "data.json").read_text(encoding="utf-8"))
        if (json.dumps(values, sort_keys=True), self._read_shapes(unfinished)) != expected:
            raise OSError("what was written cannot be read back")
        write_checksums(unfinished)
        unfinished.rename(self._folder / str(step))
        sync_folder(self._folder)
        self._delete_old()

    def _delete_old(self) -> None:
        """Deletes all but the newest and the best checkpoints; of equally good ones the newer stays."""
        steps, sign = self.steps(), 1 if self._config.mode == "max" else -1

        def rank(step: int) -> float:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged, perhaps
                folder = self._folder / str(step)
                metrics = json.loads((folder / "run" / "data.json").read_text(encoding="utf-8"))["metrics"]
                if (folder / LATER_METRICS).exists():
                    metrics = json.loads((folder / LATER_METRICS).read_text(encoding="utf-8"))
                value = metrics.get(self._config.metric)
                if value is not None and math.isfinite(value):
                    return sign * value
            return -math.inf  # a checkpoint saved without the metric

        best = sorted(steps, key=rank)[len(steps) - self._config.keep_best :] if self._config.keep_best else []
        kept = {*steps[-self._config.keep :], *best}
        for old in [old for old in steps if old not in kept]:
            try:  # renamed first: a half-deleted folder must not look like a damaged checkpoint
                deleted = (self._folder / str(old)).rename(self._folder / f"{old}{DELETED_SUFFIX}")
                shutil.rmtree(deleted)
            except OSError as error:
                self._report(f"checkpoint {self._folder / str(old)}: cannot be deleted ({error.strerror or error})")

    def wait(self) -> None:
        """Wait until the save under way is on disk. Raises UserError if it, or any save before it, failed.

        With several processes every one must call it, and all raise when the save of one failed.
        """
        if self._failure is not None:
            raise self._failure
        pending, self._pending = self._pending, None
        if pending is not None:
            error = pending.exception()
            others = gather(format_cause(error) if error else "")
            if error is not None or any(others):
                self._fail(error or OSError(next(filter(None, others))))  # of another process

    def _fail(self, error: BaseException) -> None:
        if self._lead:
            for part in self._folder.glob(f"*{UNFINISHED_SUFFIX}*"):
                shutil.rmtree(part, ignore_errors=True)  # room for the log of what happened; never a finished one
        steps = self.steps()
        remaining = f"the checkpoint of step {steps[-1]} is whole" if steps else "there is no earlier one"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "check the folder's disk and permissions"
        if any(text in str(error) for text in DISK_FULL):
            advice = "free some space or lower checkpoint.keep, and start again"
        message = f"checkpoint in {self._folder} was not saved ({reason}); {remaining}: {advice}"
        self._failure = UserError(message)
        raise self._failure from error

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending; one that is still being written is not among them."""
        return sorted(int(place.name) for place in self._places() if place.is_dir())

    def _places(self) -> list[pathlib.Path]:
        """Whatever has the name of a finished checkpoint. Others, such as a user's notes, are left alone."""
        return [path for path in self._folder.iterdir() if path.name.isdigit()]

    def find_step(self, step: int) -> int:
        """``step``; raises UserError, naming the finished checkpoints, when it is not among them."""
        self.wait()
        if step not in self.steps():
            raise UserError(f"checkpoints in {self._folder}: no step {step}, found {self.steps() or 'none'}")
        return step

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None when there is none. Waits for a save under way."""
        self.wait()
        return max(self.steps(), default=None)

    def restore(
        self,
        abstract_state: TrainState,
        check: Callable[[pathlib.Path, RunRecord], None] | None = None,
        *,
        step: int | None = None,
    ) -> Restored | None:
        """The newest readable checkpoint (or that of ``step``); None when the folder has none.

        ``abstract_state``: ``abstract_train_state(...)``; its shardings say where every array goes, whatever
        mesh it was saved from. ``check``: called with the checkpoint's folder and record before its arrays are read; it
        raises where the run cannot resume from them. A damaged checkpoint is reported and moved aside, and the one
        before it is read. Raises UserError when the state has other parameters, when memory, disk or permissions fail
        (nothing is moved then), and when there are checkpoints and none can be read: no run starts anew over them.
        """
        self.wait()
        candidates = sorted(self.steps(), reverse=True) if step is None else [self.find_step(step)]
        candidates = gather(candidates)[0]  # a shared disk may show processes a rename at different moments
        for candidate in candidates:
            where = self._folder / str(candidate)
            share = jax.process_index(), jax.process_count()
            _, error = _catch(verify_checksums, where, share=share)
            if not self._is_good(candidate, error):
                continue
            found, error = _catch(self._read_run, where)
            if not self._is_good(candidate, error):
                continue
            values, saved = found
            record = parse_record(where, values)
            if check is not None:
                check(where, record)
            abstract = jax.tree.map(_place, abstract_state.replace(frozen={}))
            _check_shapes(where, saved, _shapes(abstract))
            found, error = _catch(self._load, where, {"state": abstract})
            if not self._is_good(candidate, error):
                continue
            if self._lead and not self._read_only and step is None:
                self._delete_old()  # a kill may have ended the save before it deleted them
            return Restored(record, found["state"])
        aside = sorted(path.name for path in self._folder.glob(f"*{UNREADABLE_SUFFIX}*"))
        if aside and step is None:
            raise UserError(
                f"checkpoints in {self._folder}: none can be read, found {', '.join(aside)}: repair one and rename "
                "it to its number, or delete them or use another workdir to start anew"
            )
        if candidates:
            raise UserError(f"checkpoints in {self._folder}: step {step} cannot be read, there are {self.steps()}")
        return None

    def _read_run(self, folder: pathlib.Path) -> tuple[Any, dict]:
        """The contents of run/data.json, and the shapes of the state."""
        values, saved = self._load(folder, {"run": None})["run"], self._read_shapes(folder)
        if not saved:
            raise ValueError("its list of arrays is empty")
        return values, saved

    def _read_shapes(self, folder: pathlib.Path) -> dict[str, str]:
        with self._context:
            return _shapes(ocp.checkpointables_metadata(folder).metadata["state"])

    def _load(self, folder: pathlib.Path, items: dict) -> dict:
        with self._context:
            return ocp.load_checkpointables(folder, items)

    def _is_good(self, step: int, error: Exception | None) -> bool:
        """Whether no process met an error in this checkpoint.

        After an error all processes follow one judgement, made before anything is moved: a checkpoint that contradicts
        its checksums is renamed, so that the run can save that step again. Raises UserError, and moves nothing, after
        any other error, as it may be whole, and where the folder is open read-only.
        """
        path = self._folder / str(step)
        judgement = error and [format_cause(error), is_damaged(path, error), is_out_of_memory(error)]
        judgements = list(filter(None, gather(judgement)))
        if not judgements:
            return True
        cause, damaged, out_of_memory = min(judgements, key=lambda judgement: judgement[1])
        if self._read_only and not path.exists():
            raise UserError(
                f"checkpoint {path}: was deleted meanwhile by the run that writes here: use another of steps "
                f"{self.steps()}, or have it keep more (checkpoint.keep)"
            ) from error
        if not damaged:
            advice = "free some memory" if out_of_memory else "check the disk and its permissions"
            message = f"checkpoint {path}: cannot be read now ({cause}), nothing was moved: {advice}, and start again"
            raise UserError(message) from error
        if self._read_only:
            raise UserError(f"checkpoint {path}: is damaged ({cause}): use another of steps {self.steps()}") from error
        target, number = path.with_name(path.name + UNREADABLE_SUFFIX), 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}{UNREADABLE_SUFFIX}.{number}")
        self._report(f"checkpoint {path}: cannot be read ({cause}), moved to {target.name}")
        if self._lead:
            try:
                path.rename(target)
            except OSError as failure:
                raise UserError(f"checkpoint {path}: is damaged ({cause}) and cannot be renamed: {failure}") from error
        gather(None)  # wait for the rename
        return False

    def close(self) -> None:
        """Wait for the save under way and release the threads. Raises UserError if a save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except UserError as failure:  # the run is stopping for another reason, which must be the one shown
            if failure is not error:
                self._report(str(failure))


def _catch(call: Callable, *arguments, **options) -> tuple[Any, Exception | None]:
    """(result, error) of ``call``: Orbax raises errors of many types for a torn folder."""
    try:
        return call(*arguments, **options), None
    except Exception as error:
        return None, error


def _place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """``leaf`` with a sharding: Orbax would use the file's, of devices that may not exist here."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno >= logging.CRITICAL


def _shapes(tree) -> dict[str, str]:
    """Path -> ``float32[3,4]`` of every array; keys are compared by their data, a uint32 array."""

    def format_shape(leaf) -> str:
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): format_shape(leaf) for path, leaf in leaves}


def _check_shapes(where: pathlib.Path, saved: dict[str, str], now: dict[str, str]) -> None:
    changed = [path for path in saved.keys() | now.keys() if saved.get(path) != now.get(path)]
    changed.sort(key=lambda path: (not path.startswith("params"), path))  # parameters before their moments
    if changed:
        changes = shorten([f"{path} {saved.get(path)!r} -> {now.get(path)!r}" for path in changed], 3)
        raise UserError(
            f"{where}: the train state differs from the checkpoint's ({changes}): resume with the same model and "
            "optimizer"
        )
