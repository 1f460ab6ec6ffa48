"""Writing model folders so that each appears whole or not at all."""

import contextlib
import fnmatch
import os
import pathlib
import shutil
from collections.abc import Iterator

from postrain.errors import UserError
from postrain.files import check_local, lock
from postrain.hf.side_files import SIDE_FILES, SIDE_FOLDERS

# One of these files makes a folder a model's or an adapter's, which a new export may replace.
MODEL_MARKS = ("config.json", "adapter_config.json")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PARTIAL, UNCHECKED = ".partial", ".unchecked"  # suffixes of the hidden folders in which models are prepared
NEW, OLD = "new", "old"  # in a hidden folder: the model that will take the final name, the model that had it before


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    An older model folder of that name is then replaced (see check_replaceable). On any exception the temporary folder
    is deleted and ``folder`` stays as it was. Raises UserError when ``folder`` is a file, or a folder that holds
    anything but a model; when another process is writing it; and when writing fails (a full disk, a read-only place).
    """
    check_local(folder, "folder")
    folder = pathlib.Path(os.path.abspath(folder))
    check_replaceable(folder)
    try:
        with _hold(folder, PARTIAL) as place:
            temporary = place / NEW
            temporary.mkdir()
            yield temporary
            _swap(temporary, folder, place)
    except OSError as error:
        reason = error.strerror or error
        advice = "free space or choose another place"
        raise UserError(f"{folder}: could not be written ({reason}), nothing was left: {advice}") from error


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike, *, lead: bool = True) -> Iterator[pathlib.Path]:
    """Yields the path of a folder to write and check, which takes the name ``folder`` when the block ends well.

    For a check in which several processes take part. The path is the same in each; the process with ``lead`` moves the
    folder to its name. On any exception the new folder is deleted, and ``folder`` stays as it was.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    check_replaceable(folder)
    if not lead:
        yield _place(folder, UNCHECKED) / NEW
        return
    try:
        with _hold(folder, UNCHECKED) as place:
            yield place / NEW
            _swap(place / NEW, folder, place)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: could not be written ({reason}): choose another place") from error


def clear_leftovers(folder: str | os.PathLike) -> None:
    """Removes the hidden folders of killed processes that were writing ``folder``; one in use by a live process stays.

    An old model that such a process had already moved out of the way is put back.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    for suffix in (PARTIAL, UNCHECKED):
        if _place(folder, suffix).is_dir():
            with contextlib.suppress(OSError, UserError), _hold(folder, suffix):
                pass


def _place(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    return folder.parent / f".{folder.name}{suffix}"


@contextlib.contextmanager
def _hold(folder: pathlib.Path, suffix: str) -> Iterator[pathlib.Path]:
    """An empty hidden folder beside ``folder``, locked, and removed when the block ends, however it does.

    Its name is fixed, so that the next process finds what a killed one left; the system has released that one's lock.
    Raises UserError when another process holds it, and OSError.
    """
    place = _place(folder, suffix)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(place, wait=False, folder=True))
        except BlockingIOError as error:
            advice = "wait for it, or choose another place"
            raise UserError(f"{folder}: another process is writing it: {advice}") from error
        _put_back(folder, place)
        for left in place.iterdir():
            shutil.rmtree(left)
        try:
            yield place
        finally:
            with contextlib.suppress(OSError):  # an old model that cannot be put back is not deleted
                _put_back(folder, place)
                shutil.rmtree(place, ignore_errors=True)


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
        raise UserError(f"{folder}: holds files that do not belong to a model: choose another name")
    for name, path in found.items():
        known = name in (*MODEL_MARKS, *SIDE_FILES) or _is_weights(name)
        if not known or path.is_dir() != (name in SIDE_FOLDERS):
            raise UserError(f"{folder}: holds {name}, which is not part of a model: choose another name")


def _is_weights(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)


def _swap(new: pathlib.Path, folder: pathlib.Path, place: pathlib.Path) -> None:
    """Renames ``new`` to ``folder``; an older ``folder`` moves to ``place``, and ``_put_back`` can restore it."""
    if folder.exists():
        folder.rename(place / OLD)
    new.rename(folder)


def _put_back(folder: pathlib.Path, place: pathlib.Path) -> None:
    if (place / OLD).exists() and not folder.exists():
        (place / OLD).rename(folder)
