"""Folders that appear whole or not at all."""

import contextlib
import fnmatch
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from postrain.errors import UserError
from postrain.hf.side_files import SIDE_FILES, SIDE_FOLDERS

# What marks a folder as a model's or an adapter's, which a new export may replace.
MODEL_MARKS = ("config.json", "adapter_config.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    An older model folder of that name is replaced then (see check_replaceable). On any exception, the temporary
    folder is deleted and what stood at ``folder`` before stands there still. Raises UserError when ``folder`` is a
    file, or a folder that holds anything but a model, and when writing fails (a full disk, a read-only place).
    """
    folder = pathlib.Path(os.path.abspath(folder))
    check_replaceable(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        yield temporary
        # mkdtemp is private by design; a model folder gets what mkdir would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _swap(temporary, folder)
    except OSError as error:
        reason = error.strerror or error
        advice = "free space or choose another place"
        raise UserError(f"{folder}: could not be written ({reason}), nothing was left: {advice}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike, *, lead: bool = True) -> Iterator[pathlib.Path]:
    """Yields the path of a folder to write and check, which takes the name ``folder`` when the block ends well.

    For a check in which several processes take part: the path is the same in each, and the one that leads puts the
    folder in its place. On any exception it is deleted, and what stood at ``folder`` before stands there still.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    check_replaceable(folder)
    staged = folder.parent / f".{folder.name}.unchecked"
    try:
        yield staged
        if lead:
            try:
                _swap(staged, folder)
            except OSError as error:
                raise UserError(f"{folder}: could not be written ({error.strerror}): choose another place") from error
    finally:
        if lead:
            shutil.rmtree(staged, ignore_errors=True)


def check_replaceable(folder: str | os.PathLike) -> None:
    """Raises UserError unless ``folder`` is absent, empty, or holds a model or an adapter and nothing else."""
    folder = pathlib.Path(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder to write, found a file: choose another name")
    found = {path.name: path for path in sorted(folder.iterdir())}
    # A lone config.json may be anything's, a run's for one.
    model = set(found).intersection(MODEL_MARKS) and any(_is_weights(name) for name in found)
    if found and not model:
        raise UserError(f"{folder}: holds files that are no model to replace: choose another name")
    for name, path in found.items():
        known = name in (*MODEL_MARKS, *SIDE_FILES) or _is_weights(name)
        if not known or path.is_dir() != (name in SIDE_FOLDERS):
            raise UserError(f"{folder}: holds {name}, which is no part of a model, and stays: choose another name")


def _is_weights(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)


def _swap(new: pathlib.Path, folder: pathlib.Path) -> None:
    """``new`` takes the name ``folder``; what had it is deleted afterwards."""
    if not folder.exists():
        new.rename(folder)
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    try:
        folder.rename(old / folder.name)
        try:
            new.rename(folder)
        except OSError:
            (old / folder.name).rename(folder)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
