"""Integrity of checkpoints: the checksums of their files, and whether an error in reading proves damage.

``checksums.txt`` is written last, before the folder gets its name. A line is ``CRC32 BYTES NAME``, and the last one
covers the lines above it. CRC-32 finds every flipped bit, every burst of up to 32 bits, and all but one in 4e9 of any
other damage, at the speed of memory and without Python's lock. Orbax's own checks cover its indices, not the arrays.

A checkpoint that cannot be read is damaged for good, or it may be whole and something else failed: the machine, a
library. Only a damaged one may be moved aside: one that contradicts its checksums while every file that is there can be
read. What fails after the checksums were found to hold is never taken for damage.
"""

import concurrent.futures
import errno
import os
import pathlib
import zlib
from collections.abc import Collection

from postrain.errors import shorten

MANIFEST = "checksums.txt"
_CHUNK = 1 << 22  # bytes read at a time
_THREADS = 4
_SHOWN = 2  # files named in one message

# TensorStore's messages begin with absl's names of status codes; its exceptions say nothing else of the cause.
MACHINE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")


class Damaged(ValueError):
    """Files of a checkpoint are missing, or contradict their checksums, or the list of these is broken."""


# --- checksums ---


def write_checksums(folder: pathlib.Path) -> None:
    """Flushes every file of ``folder`` to the disk and writes its manifest. Raises OSError."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _read(folder / name, sync=True), names)
        text = "".join(f"{crc:08x} {size} {name}\n" for (crc, size), name in zip(found, names, strict=True))
    text += f"{zlib.crc32(text.encode()):08x} {len(text.encode())} {MANIFEST}\n"
    with open(folder / MANIFEST, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(place)


def verify_checksums(folder: pathlib.Path, names: Collection[str] | None = None, *, share: tuple[int, int] = (0, 1)):
    """Checks the files of ``folder`` against their checksums.

    ``names``: only these files. ``share``: (index, count) of a process that reads only its part of them. Raises Damaged
    naming the files that differ, and OSError where a file cannot be read.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    body, _, last = raw.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n"
    if last != f"{zlib.crc32(body):08x} {len(body)} {MANIFEST}".encode() or not raw.endswith(b"\n"):
        raise Damaged(f"{MANIFEST}: expected its own checksum in the last line, found {last[:60]!r}")
    rows = [line.split(" ", 2) for line in body.decode().splitlines()]
    listed = {name: (int(crc, 16), int(size)) for crc, size, name in rows}
    chosen = sorted(listed.keys() if names is None else names)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        differences = pool.map(lambda name: _find_difference(folder, name, listed.get(name)), chosen)
        wrong = [difference for difference in differences if difference]
    if wrong:
        raise Damaged(shorten(wrong, _SHOWN, "; "))


def _find_difference(folder: pathlib.Path, name: str, expected: tuple[int, int] | None) -> str:
    """The difference between a file and its line of the manifest, in words; "" where they agree."""
    if expected is None:
        return f"{name}: expected a checksum of it in {MANIFEST}, found none"
    crc, size = expected
    try:
        found_crc, found_size = _read(folder / name)
    except FileNotFoundError:
        return f"{name}: expected {size} bytes, found no file"
    if found_size != size:
        return f"{name}: expected {size} bytes, found {found_size}"
    return "" if found_crc == crc else f"{name}: expected checksum {crc:08x}, found {found_crc:08x}"


def _read(path: pathlib.Path, *, sync: bool = False) -> tuple[int, int]:
    """(crc32, bytes) of a file; ``sync``: flushed to the disk first. Raises OSError naming the file."""
    crc, size, buffer = 0, 0, memoryview(bytearray(_CHUNK))
    try:
        with open(path, "rb", buffering=0) as file:
            if sync:
                os.fsync(file.fileno())
            while count := file.readinto(buffer):
                crc, size = zlib.crc32(buffer[:count], crc), size + count
    except OSError as error:  # of a read has no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    return crc, size


def sync_folder(folder: pathlib.Path) -> None:
    """Flushes the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- is it damaged, or did the machine fail? ---


def is_damaged(path: pathlib.Path, error: BaseException) -> bool:
    """Whether ``error``, raised while the checkpoint folder ``path`` was read, proves that the folder is damaged."""
    return isinstance(error, Damaged) and _can_be_read(path)


def format_cause(error: BaseException) -> str:
    """The first cause of a known sort, else the innermost, on one line; of all but Damaged at most 200 characters."""
    causes = list_causes(error)
    known = [cause for cause in causes if _is_machine_failure(cause) or isinstance(cause, Damaged)]
    cause = (known or causes[-1:])[0]
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if isinstance(cause, Damaged) else text[:200]


def list_causes(error: BaseException) -> list[BaseException]:
    """``error`` and the errors it was raised from, outermost first: Orbax wraps every error several times."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def is_out_of_memory(error: BaseException) -> bool:
    return any(isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e)[:2000] for e in list_causes(error))


def _is_machine_failure(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno not in (None, errno.ENOENT)
    return isinstance(error, MemoryError) or str(error).startswith(MACHINE)


def _can_be_read(path: pathlib.Path) -> bool:
    """Whether the folder is there and all its files open: a disk that fails may show a file as missing."""

    def raise_error(error: OSError) -> None:
        raise error

    try:
        for folder, _, names in os.walk(path, onerror=raise_error):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    file.read(1)
                    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                    file.read(1)
    except OSError:
        return False
    return path.is_dir()
