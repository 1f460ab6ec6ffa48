"""Local files: written whole or not at all, locked, hashed; JSON lines read back."""

import codecs
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from postrain.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Writing


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, and its missing folders. A crash leaves the old file or the new one, never a part.

    Raises UserError when it cannot be written (a full disk, a read-only place).
    """
    path = pathlib.Path(path)
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # else a crash may leave the new name with nothing behind it
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        advice = "free some space or choose another place" if error.errno in _FULL else "choose another place"
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {advice}") from error


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")


def check_local(path: str | os.PathLike, name: str) -> None:
    """Raises UserError for an address such as ``gs://bucket/run``, which would become a folder ``gs:`` on this machine.

    ``name`` is what the user knows the path by, such as "--workdir".
    """
    if "://" in os.fspath(path):
        raise UserError(
            f"{name} {path}: expected a path of this machine, found the address of a storage: mount the bucket, or use "
            "a shared file system"
        )


def check_text(path: str, name: str) -> None:
    """Raises UserError for a path that is not UTF-8, or that cannot be written in the encoding of the locale.

    Libraries in C++ and Rust take neither.
    """
    try:
        path.encode()
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} {ascii(path)}: expected a path in UTF-8, and a locale that has its characters: set "
            "LC_ALL=C.UTF-8, or choose another name"
        ) from error


def check_no_pattern(path: str | os.PathLike, name: str) -> None:
    """Raises UserError for a folder of checkpoints whose path the library that reads them would take for a pattern.

    It would then find none of the files that it has written, or those of a folder beside it.
    """
    where = os.path.abspath(path)
    check_text(where, name)
    if found := [character for character in "*?[\\" if character in where]:
        raise UserError(
            f"{name} {where}: checkpoints in a folder with {' '.join(found)} in its path cannot be read again: choose "
            "another name, or give a link to the folder whose own path has none"
        )


def check_writable(path: str | os.PathLike, name: str) -> None:
    """Raises UserError where ``write_whole`` could not put a file: to be called before the work that fills it.

    Nothing is left behind. ``name`` is what the user knows the path by, such as "--output".
    """
    if not os.fspath(path):
        raise UserError(f"{name} is empty: expected the name of a file to write")
    check_local(path, name)
    path = pathlib.Path(path)
    if os.path.isdir(path):
        raise UserError(f"{name} {path} is a folder, expected the name of a file: name one in it, as {path / 'NAME'}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{name} {path} is not an ordinary file, and writing would replace it: choose another place")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    names = (*path.absolute().relative_to(folder).parts, _partial(path).name)
    try:
        if max(len(os.fsencode(name)) for name in names) > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{name} {path} cannot be written ({folder}: {error.strerror}): choose another place"
        ) from error


# Locks and digests


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, wait: bool = True, folder: bool = False) -> Iterator[bool]:
    """Holds ``path``, a file or with ``folder`` a folder, against all other callers while the block runs.

    It is made where it is missing, its parents too, and stays; but the holder may remove it, and the next caller then
    makes a new one. The operating system releases the lock of a process that is killed.

    Yields:
      Whether the lock is held: False on a (network) file system without locks, where the block runs all the same.

    Raises:
      BlockingIOError: another process, or another thread, holds it, and ``wait`` is False.
      OSError: it cannot be made or opened.
    """
    path = pathlib.Path(path)
    while True:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:
                held = False
            # Between our open and our lock the last holder may have removed it: that lock would keep nobody out.
            if held:
                try:
                    removed = not os.path.samestat(os.fstat(descriptor), path.stat())
                except FileNotFoundError:
                    removed = True
                if removed:
                    continue
            yield held
            return
        finally:
            os.close(descriptor)


def digest(path: str | os.PathLike, stretches: Iterable[tuple[int, int]] | None = None) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, or of its ``stretches`` alone: (first byte, bytes) of each.

    Raises UserError naming a file that cannot be read.
    """
    try:
        with pathlib.Path(path).open("rb") as file:
            if stretches is None:
                return hashlib.file_digest(file, "sha256").hexdigest()
            found = hashlib.sha256()
            for start, size in stretches:
                file.seek(start)
                found.update(file.read(size))
            return found.hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from error


def spread(start: int, stop: int, count: int, size: int) -> list[tuple[int, int]]:
    """``count`` stretches of ``size`` bytes, evenly from byte ``start`` to ``stop``, for ``digest``.

    The first and the last bytes are among them. Fewer bytes than that are one stretch.
    """
    last = stop - start - size
    if last <= size * count:
        return [(start, stop - start)]
    return [(start + last * i // (count - 1), size) for i in range(count)]


# JSON lines


def read_jsonl(path: str | os.PathLike, *, drop_torn: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Only "\\n" ends a line: JSON strings may hold U+2028, U+2029 and U+0085, at which ``str.splitlines`` splits. A byte
    order mark at the start is left out.

    Args:
        drop_torn: leave out a last line without newline, which a kill cut off; for files that are appended to.

    Raises:
        UserError: naming file and line, for a line that is not a JSON object in UTF-8; for a file that cannot be read.
    """
    try:
        lines = pathlib.Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if drop_torn:
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # of decoding too
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}:{number}: not valid JSON: {reason}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        found.append((number, row))
    return found
