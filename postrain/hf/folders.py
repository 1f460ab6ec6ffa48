"""Folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from postrain.errors import UserError

# What marks a folder as a model's or an adapter's, which a new export may replace.
MODEL_MARKS = ("config.json", "adapter_config.json")


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    An older model folder of that name is replaced then. On any exception, the temporary folder is deleted
    and what stood at ``folder`` before stands there still. Raises UserError when ``folder`` is a file, or a
    folder of something that is no model, and when writing fails (a full disk, a read-only place).
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


def check_replaceable(folder: pathlib.Path) -> None:
    """Raises UserError unless ``folder`` is absent, empty, or a model or adapter folder."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder to write, found a file: choose another name")
    found = {path.name for path in folder.iterdir()}
    if found and not found.intersection(MODEL_MARKS):
        raise UserError(f"{folder}: holds files and no config.json, so it is no model to replace: choose another name")


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
