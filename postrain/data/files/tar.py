"""Rows of a tar file laid out as WebDataset does: consecutive files that share a name up to its first dot are a row.

``0001.json`` is a JSON object whose keys are the row's; ``0001.prompt.txt`` is its key ``prompt``, ``0001.txt`` its key
``text``; ``0001.meta.json`` is its key ``meta``; any other file is a key named by what follows the first dot, with
bytes. Folders and hidden files belong to no row; a file without a suffix is refused.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from postrain.data.messages import BadRow, RowRef

BLOCK = 512  # bytes of which tar files are made


def read_tar(file: io.BufferedIOBase, source: str, url: str) -> Iterator[tuple[RowRef, Any]]:
    """(where, row or BadRow), rows numbered from 1; ``file`` can seek.

    Raises:
      tarfile.TarError: cut off, or a header whose checksum is wrong.
    """
    archive = tarfile.open(fileobj=file, mode="r:")
    name, parts, number = None, [], 0
    while (member := archive.next()) is not None:
        archive.members = []  # tarfile keeps them all
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not (member.isfile() and stem):
            continue
        if member.issparse():
            raise tarfile.ReadError(f"{member.name} is sparse, which is not read here")
        if (folder, stem) != name and parts:
            number += 1
            yield _row(parts, RowRef(source, url, number))
            parts = []
        name = folder, stem
        file.seek(member.offset_data)  # extractfile is slow
        data = file.read(member.size)
        if len(data) != member.size:
            raise tarfile.ReadError(f"{len(data)} of {member.size} bytes of {member.name}")
        parts.append((suffix, data))
    _check_end(archive, file)
    if parts:
        yield _row(parts, RowRef(source, url, number + 1))


def _row(parts: list[tuple[str, bytes]], ref: RowRef) -> tuple[RowRef, Any]:
    row: dict[str, Any] = {}
    for suffix, data in parts:
        try:
            fields = _fields(suffix, data)
        except (ValueError, RecursionError) as e:  # of UTF-8 and of JSON
            return ref, BadRow(ref, f"its .{suffix} is not valid: {e}")
        if not isinstance(fields, dict):
            return ref, BadRow(ref, f"its .{suffix} must hold a JSON object; found {type(fields).__name__}")
        if twice := sorted(row.keys() & fields.keys()):
            return ref, BadRow(ref, f"{', '.join(twice)} comes from .{suffix} and from a file before it")
        row |= fields
    return ref, row


def _fields(suffix: str, data: bytes) -> Any:
    if not suffix:
        raise ValueError("a file of a row needs a suffix, as .json or .txt")
    key, _, kind = suffix.rpartition(".")
    if kind == "json":
        value = json.loads(data.decode("utf-8-sig"))
        return {key: value} if key else value
    if kind == "txt":
        return {key or "text": data.decode("utf-8-sig")}
    return {suffix: data}


def _check_end(archive: tarfile.TarFile, file: io.BufferedIOBase) -> None:
    """tarfile takes a header that is missing or wrong for the end; a whole archive ends in zeros, and only there."""
    file.seek(archive.offset)
    end = file.read(BLOCK)
    if len(end) < BLOCK:
        raise tarfile.ReadError(f"no end of the archive at byte {archive.offset}")
    while end:
        if end.strip(b"\0"):
            raise tarfile.ReadError(f"neither a file nor the end of the archive at byte {archive.offset}")
        end = file.read(1 << 16)
