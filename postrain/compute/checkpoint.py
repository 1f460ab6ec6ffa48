"""Checkpoints: one atomic unit of all that a run needs to go on as if it had never stopped.

A checkpoint ``checkpoints/STEP/`` holds ``state`` (the TrainState without ``frozen``, by Orbax) and
``run/data.json``: data position, resolved config, fingerprint of the data pipeline, fingerprint of the frozen
base, metrics. It is written under another name and renamed when it is whole and on disk, so a run killed at any
instant finds its previous checkpoint. ``frozen`` is not saved: it is read again from the model folder, and a
folder that has changed since is refused.
"""

import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from postrain.config import CheckpointConfig
from postrain.errors import UserError
from postrain.types import TrainState

TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
UNREADABLE_SUFFIX = ".unreadable"
DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read back."""

    step: int
    state: TrainState  # with ``frozen`` empty: put the base in with ``state.replace(frozen=...)``
    data_position: dict[str, Any]
    config: dict[str, Any]  # resolved, as the run that saved it had it
    metrics: dict[str, Any]


class Checkpointer:
    """Saves and restores the checkpoints of one run; a context manager, so that no save is left unfinished.

    Keeps the ``config.keep`` newest and, besides, the ``config.keep_best`` best by ``config.metric``. A save
    runs in the background (unless ``config.asynchronous`` is off). If it fails, the next call of any method
    raises, and ``close`` at the latest; older checkpoints are deleted only after a newer one is whole.
    ``report`` gets a line for everything that was found broken and left aside.
    """

    def __init__(self, folder, config: CheckpointConfig, *, report: Callable[[str], None] = print):
        _check(config)
        self._folder, self._config, self._report = pathlib.Path(folder).absolute(), config, report
        self._pending = None  # response of the save under way
        self._failure: UserError | None = None
        # Orbax logs the traceback of a failed save from five threads; the exception itself reaches the caller.
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        try:
            for part in sorted(self._folder.glob(f"*{TEMPORARY_SUFFIX}")) if jax.process_index() == 0 else ():
                report(f"checkpoint {part}: an unfinished save, removed")
                shutil.rmtree(part)
            self._orbax = self._open()
        except OSError as error:
            raise UserError(
                f"checkpoints: cannot use folder {self._folder} ({error}): use another workdir"
            ) from error

    def _open(self) -> ocp.training.Checkpointer:
        policies, config = ocp.training.preservation_policies, self._config
        keep = [policies.LatestN(config.keep)]
        if config.keep_best:
            keep.append(
                policies.BestN(  # Orbax keeps the last of the sorted ones
                    get_metric_fn=lambda metrics: metrics[config.metric],
                    reverse=config.mode == "min",
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="run")
        context = ocp.Context()
        context.checkpointables.registry = registry
        # Float32 weights shrink by 8% and saving takes ten times as long: not worth a pause in training.
        context.array.saving.use_compression = False
        return ocp.training.Checkpointer(
            self._folder,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data_position: dict,
        config: dict,
        fingerprint: dict,
        base_fingerprint: dict | None = None,
        metrics: dict | None = None,
    ) -> None:
        """Start to save ``state`` after ``step`` updates; returns once the arrays may be donated.

        All dicts must be JSON. ``fingerprint``: of the data pipeline. ``metrics``: the latest ones; the best
        checkpoints are chosen among those saved with ``config.metric`` in them. Raises UserError when the
        previous save failed.
        """
        self.wait()
        metrics = dict(metrics or {})
        run = {
            "data_position": data_position,
            "config": config,
            "fingerprint": fingerprint,
            "base_fingerprint": base_fingerprint,
            "metrics": metrics,
        }
        items = {"state": state.replace(frozen={}), "run": json.loads(json.dumps(run))}
        score = metrics.get(self._config.metric, math.nan)
        best = {self._config.metric: float(score)} if math.isfinite(score) else None
        try:
            self._pending = self._orbax.save_checkpointables_async(step, items, metrics=best, force=True)
        except (OSError, ValueError) as error:
            self._fail(error)
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the save under way is on disk. Raises UserError if it, or any save before it, failed."""
        if self._failure is not None:
            raise self._failure
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # whatever went wrong in Orbax's threads must not be lost
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        for part in self._folder.glob(f"*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(part, ignore_errors=True)  # room for the log of what happened; never a finished one
        kept = self._orbax.latest
        left = f"the checkpoint of step {kept.step} is whole" if kept else "there is no earlier one"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "look at the folder's disk and permissions"
        if any(text in str(error) for text in DISK_FULL):
            advice = "free some space or lower checkpoint.keep, and start again"
        message = f"checkpoint in {self._folder} was not saved ({reason}); {left}: {advice}"
        self._failure = UserError(message)
        raise self._failure from error

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending; one that is still being written is not among them."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, None when there is none. Waits for a save under way."""
        self.wait()
        return max(self.steps(), default=None)

    def restore(
        self,
        abstract_state: TrainState,
        *,
        fingerprint: dict,
        base_fingerprint: dict | None = None,
        step: int | None = None,
    ) -> Restored | None:
        """The newest readable checkpoint (or that of ``step``); None when the folder has none.

        ``abstract_state``: ``abstract_train_state(...)``; its shardings say where every array goes, whatever
        mesh it was saved from. A damaged checkpoint is reported, moved aside, and the one before it taken.
        Raises UserError when the data pipeline or the frozen base is not the one that was saved (naming what
        changed), when the state has other parameters, or when no checkpoint can be read.
        """
        self.wait()
        if step is not None and step not in self.steps():
            raise UserError(f"checkpoints in {self._folder}: no step {step}, found {self.steps() or 'none'}")
        candidates = sorted(self.steps(), reverse=True) if step is None else [step]
        for candidate in candidates:
            try:
                run = self._orbax.load_checkpointables(candidate, {"run": None})["run"]
                saved = _shapes(self._orbax.checkpointables_metadata(candidate).metadata["state"])
                if not saved:
                    raise ValueError("its list of arrays is damaged")
            except Exception as error:  # Orbax has no one type for a torn folder
                self._set_aside(candidate, error)
                continue
            where = self._folder / str(candidate)
            _compare(f"{where}: the data pipeline", run["fingerprint"], fingerprint, "another workdir")
            _compare(f"{where}: the frozen base", run["base_fingerprint"], base_fingerprint, "the same model.path")
            abstract = jax.tree.map(_place, abstract_state.replace(frozen={}))
            _compare(f"{where}: the train state", saved, _shapes(abstract), "the same model and optimizer")
            try:
                state = self._orbax.load_checkpointables(candidate, {"state": abstract})["state"]
            except Exception as error:
                self._set_aside(candidate, error)
                continue
            return Restored(candidate, state, run["data_position"], run["config"], run["metrics"])
        if candidates:
            raise UserError(f"checkpoints in {self._folder}: none of {candidates} can be read: use another workdir")
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        """Rename a damaged checkpoint, so that the run can save that step again; nothing is deleted."""
        cause = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        path = self._folder / str(step)
        target = path.with_name(path.name + UNREADABLE_SUFFIX)
        self._report(f"checkpoint {path}: cannot be read ({cause[0][:200]}), moved to {target.name}")
        if jax.process_index() == 0:
            if target.exists():
                shutil.rmtree(target)
            path.rename(target)
        self._orbax.reload()

    def close(self) -> None:
        """Wait for the save under way and release the threads. Raises UserError if a save failed."""
        try:
            self.wait()
        finally:
            if self._failure is None:
                self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except UserError as failure:  # the run is stopping for another reason, which must be the one that is seen
            if failure is not error:
                self._report(str(failure))


def _place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Without a sharding Orbax would take the one in the file, of devices that may not exist here."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno >= logging.CRITICAL


def _check(config: CheckpointConfig) -> None:
    for key, least in (("every", 0), ("keep", 1), ("keep_best", 0)):
        if getattr(config, key) < least:
            raise UserError(f"checkpoint.{key}: expected {least} or more, found {getattr(config, key)}")
    if config.mode not in ("min", "max"):
        raise UserError(f"checkpoint.mode: expected 'min' or 'max', found {config.mode!r}")


def _flatten(tree, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}").items()}
    return {prefix.lstrip("."): tree}


def _shapes(tree) -> dict[str, str]:
    """Path -> ``float32[3,4]`` of every array; keys are compared by their data, a uint32 array."""

    def describe(leaf) -> str:
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): describe(leaf) for path, leaf in leaves}


def _compare(what: str, saved, now, advice: str) -> None:
    saved, now = _flatten(json.loads(json.dumps(saved))), _flatten(json.loads(json.dumps(now)))
    changed = [key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key)]
    changed.sort(key=lambda key: (not key.startswith("params"), key))  # a parameter says more than its moments
    if changed:
        shown = ", ".join(f"{key or 'all'} {saved.get(key)!r} -> {now.get(key)!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{what} is not the one of this checkpoint ({shown}{more}): go on with {advice}")


def fingerprint_folder(folder, *, samples: int = 16, sample_bytes: int = 1 << 16) -> dict[str, Any]:
    """``{file: {bytes, sha256}}`` for the safetensors files of a model folder; where the folder is does not matter.

    The hash is over each file's header (names, dtypes, shapes, offsets) and ``samples`` evenly spaced blocks of
    ``sample_bytes``: another fine-tune changes all of them, and a 100 GB model still takes milliseconds.
    """
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"model.path={folder}: expected *.safetensors files, found none: give a Hugging Face folder")
    fingerprint = {}
    for path in files:
        digest, size = hashlib.sha256(), path.stat().st_size
        with path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(file.read(min(header_bytes, size)))
            for i in range(samples):
                file.seek(max(header_bytes, header_bytes + (size - header_bytes - sample_bytes) * i // (samples - 1)))
                digest.update(file.read(sample_bytes))
        fingerprint[path.name] = {"bytes": size, "sha256": digest.hexdigest()}
    return fingerprint
