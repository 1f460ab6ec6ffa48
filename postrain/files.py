"""Text files that appear whole or not at all, and JSON lines read back."""

import json
import os
import pathlib
from typing import Any

from postrain.errors import UserError


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
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}): free some space or choose another place") from error


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
