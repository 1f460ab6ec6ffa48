"""Pieces of remote files in a local folder of limited size, shared by any number of processes.

A piece is one file: four bytes of CRC-32, then its bytes. It appears by a rename, so that nobody sees half of one, and
the CRC finds what a disk has damaged. Writers take turns (a lock on ``lock``, which the system gives back when its
holder is killed), and ``lock`` holds the sum of the sizes, so that the folder is only searched when it is full: then
the pieces not used for longest go, until a tenth is free. The sum is raised before a piece is written and never lowered
without a search: a killed writer leaves it too high, never too low.
"""

import hashlib
import logging
import os
import pathlib
import zlib

from postrain.files import lock

_LOG = logging.getLogger(__name__)
_PIECE, _PARTIAL = ".piece", ".partial"


class PieceCache:
    """All of its files together, those being written included, never hold more than ``limit`` bytes."""

    def __init__(self, folder: str | os.PathLike, limit: int):
        self._folder, self._limit = pathlib.Path(folder), limit

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:  # never there, or just now removed by another process
            return None
        if len(data) < 4 or zlib.crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "big"):
            path.unlink(missing_ok=True)
            return None
        return data[4:]

    def put(self, key: str, piece: bytes) -> None:
        """Keeps a piece where it fits; a disk that takes none is no reason to stop, as the storage has the bytes."""
        size, path = len(piece) + 4, self._path(key)
        if size > self._limit:
            return
        partial = path.with_suffix(_PARTIAL)
        try:
            with lock(self._folder / "lock") as held:
                if not held:
                    raise OSError("its file system has no locks")
                if path.exists():
                    return
                self._make_room(size)
                try:
                    with open(partial, "wb") as f:
                        f.write(zlib.crc32(piece).to_bytes(4, "big"))
                        f.write(piece)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as e:
            _LOG.warning("the cache %s takes no more (%s); going on without", self._folder, e.strerror or e)

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / (hashlib.sha256(key.encode()).hexdigest() + _PIECE)

    def _make_room(self, size: int) -> None:
        total = (self._folder / "lock").read_bytes()
        if not total.isdigit() or int(total) + size > self._limit:
            used = self._search(self._limit - size)
        else:
            used = int(total)
        (self._folder / "lock").write_bytes(str(used + size).encode())

    def _search(self, room: int) -> int:
        """Bytes in the folder, after the oldest pieces have gone where there were more than ``room``."""
        pieces = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_PARTIAL):  # of a writer that was killed: whoever lives holds the lock
                os.unlink(entry.path)
            elif entry.name.endswith(_PIECE):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # found damaged by a reader
                    continue
                pieces.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in pieces)
        if used > room:
            for _, size, path in sorted(pieces):
                if used <= min(room, self._limit * 9 // 10):
                    break
                pathlib.Path(path).unlink(missing_ok=True)
                used -= size
        return used
