"""What every file of a checkpoint must read as: ``checksums.txt``, written last, before the folder gets its name.

A line is ``CRC32 BYTES NAME``, and the last one covers the lines above it. CRC-32 finds every flipped bit, every burst
of up to 32 bits, and all but one in 4e9 of any other damage, at the speed of memory and without Python's lock. Orbax's
own checks do not: they cover its indices, and not the arrays.
"""

import concurrent.futures
import os
import pathlib
import zlib
from collections.abc import Collection

from postrain.checkpoint.damage import Damaged
from postrain.errors import shorten

MANIFEST = "checksums.txt"
_CHUNK = 1 << 22  # bytes that are read at a time
_THREADS = 4
_SHOWN = 2  # files in one message


def write_checksums(folder: pathlib.Path) -> None:
    """Brings every file of ``folder`` to the disk and writes its manifest. Raises OSError."""
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
    """Raises Damaged naming the files of ``folder`` that are not as they were written, OSError when it cannot tell.

    ``names``: only of these files. ``share``: (index, count) of a process that reads only its part of them.
    """
    listed = _read_manifest(folder)
    chosen = sorted(listed.keys() if names is None else names)[share[0] :: share[1]]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        wrong = [line for line in pool.map(lambda name: _compare(folder, name, listed.get(name)), chosen) if line]
    if wrong:
        raise Damaged(shorten(wrong, _SHOWN, "; "))


def _read_manifest(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Name -> (crc32, bytes)."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    body, _, last = raw.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n"
    if last != f"{zlib.crc32(body):08x} {len(body)} {MANIFEST}".encode() or not raw.endswith(b"\n"):
        raise Damaged(f"{MANIFEST}: expected its own checksum in the last line, found {last[:60]!r}")
    rows = [line.split(" ", 2) for line in body.decode().splitlines()]
    return {name: (int(crc, 16), int(size)) for crc, size, name in rows}


def _compare(folder: pathlib.Path, name: str, expected: tuple[int, int] | None) -> str:
    """What is wrong with a file, "" when nothing is."""
    if expected is None:
        return f"{name}: expected a checksum of it in {MANIFEST}, found none"
    crc, size = expected
    try:
        found_crc, found_size = _read(folder / name)
    except FileNotFoundError:
        return f"{name}: expected {size} bytes, found no such file"
    if found_size != size:
        return f"{name}: expected {size} bytes, found {found_size}"
    return "" if found_crc == crc else f"{name}: expected checksum {crc:08x}, found {found_crc:08x}"


def _read(path: pathlib.Path, *, sync: bool = False) -> tuple[int, int]:
    """(crc32, bytes) of a file; ``sync``: once it is on the disk."""
    crc, size, buffer = 0, 0, memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while count := file.readinto(buffer):
            crc, size = zlib.crc32(buffer[:count], crc), size + count
    return crc, size


def sync_folder(folder: pathlib.Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
