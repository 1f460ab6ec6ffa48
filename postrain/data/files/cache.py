"""A disk cache for pieces of remote files, of limited size, shared by any number of processes.

Each piece is one file: four bytes of CRC-32, then the data. It appears by a rename, so that no reader sees a part of
it, and the CRC detects damage on the disk. Writers take turns by a lock on the file ``lock``. Its text is the sum of
the sizes, so that the folder is searched only when it is full: then the least recently used pieces are removed, until a
tenth is free. The sum is raised before a piece is written and lowered only by a search: a killed writer leaves it too
high, never too low.
"""

import errno
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
        except OSError:  # not in the cache, or just removed by another process
            return None
        if len(data) < 4 or zlib.crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "big"):
            path.unlink(missing_ok=True)
            return None
        return data[4:]

    def put(self, key: str, piece: bytes) -> None:
        """Keeps a piece if it fits. A disk that cannot be written is a warning: the storage still has the bytes."""
        size, path = len(piece) + 4, self._path(key)
        if size > self._limit:
            return
        partial = path.with_suffix(_PARTIAL)
        try:
            with lock(self._folder / "lock") as held:
                if not held:
                    raise OSError(errno.ENOLCK, "its file system has no locks")
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
        """Counts ``size`` bytes more, after removing pieces if they do not fit; the caller holds the lock."""
        total = (self._folder / "lock").read_bytes()
        if total.isdigit() and int(total) + size <= self._limit:
            used = int(total)
        else:
            used = self._remove_oldest(self._limit - size)
        (self._folder / "lock").write_bytes(str(used + size).encode())

    def _remove_oldest(self, room: int) -> int:
        """Removes the least recently used pieces if they have more than ``room`` bytes. Returns the bytes that stay."""
        pieces = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_PARTIAL):  # left by a writer that was killed: this one holds the lock
                os.unlink(entry.path)
            elif entry.name.endswith(_PIECE):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # removed by a reader that found it damaged
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
