"""Text files that appear whole or not at all, and JSON lines read back."""

import errno
import json
import os
import pathlib
import tempfile
from typing import Any

from postrain.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a file and its missing folders; whatever happens, what is found at ``path`` is the old file or the new.

    Raises UserError when it cannot be written (a full disk, a read-only place).
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a crash may leave the new name with nothing behind it
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        advice = "free some space or choose another place" if error.errno in _FULL else "choose another place"
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {advice}") from error


def check_local(path: str | os.PathLike, name: str) -> None:
    """Raises UserError for an address such as ``gs://bucket/run``, which would become a folder ``gs:`` on this machine.

    ``name`` is what the user knows the path by, such as "--workdir".
    """
    if "://" in os.fspath(path):
        raise UserError(
            f"{name} {path}: expected a path of this machine, found the address of a storage: mount the bucket, or use "
            "a shared file system"
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
        raise UserError(f"{name} {path} is no ordinary file, which writing would replace: choose another place")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{name} {path} cannot be written ({folder}: {error.strerror}): choose another place"
        ) from error


def read_jsonl(path: str | os.PathLike, *, drop_torn: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Only "\\n" ends a line: JSON strings may hold U+2028, U+2029 and U+0085, at which ``str.splitlines`` splits.

    Args:
        drop_torn: leave out a last line without newline, which a kill cut off; for files that are appended to.

    Raises:
        UserError: naming file and line, what is no JSON object in UTF-8; naming the file, one that cannot be read.
    """
    try:
        lines = pathlib.Path(path).read_bytes().split(b"\n")
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
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        found.append((number, row))
    return found
