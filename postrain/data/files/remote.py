"""Remote files: requests that are repeated where a storage fails or hangs, and a cache on the disk.

``retry`` repeats a request, and in the end raises one error that names the file.

``PieceCache`` holds pieces of remote files. It has a limited size and is shared by any number of processes. Each piece
is one file: four bytes of CRC-32, then the data. It appears by a rename, so that no reader sees a part of it, and the
CRC detects damage on the disk. Writers take turns by a lock on the file ``lock``. Its text is the sum of the sizes, so
that the folder is searched only when it is full: then the least recently used pieces are removed, until a tenth is
free. The sum is raised before a piece is written and lowered only by a search: a killed writer leaves it too high,
never too low.

Both are our own because no library passes tests/data/test_storage_remote.py and test_cache.py in their place (tried:
obstore 0.12.1; s3fs, aiohttp and fsspec 2026.9 with retries of their own):

* obstore resumes a truncated body where it ended. But ``get_range`` returns a complete answer of too few bytes ("lie")
  as the data, without an error. It has no cache on the disk, and reads neither ``hf://`` nor ``zip://`` nor a user's
  own file system, so that all of this would stay beside it.
* s3fs stops at an answer of too few bytes without another try, and a request that hangs ("stall") is repeated together
  with pieces that were read before. For ``http://`` fsspec has no retries (test_http).
* The block cache of fsspec raises TypeError after a failed request. It has no limit of bytes and no checksums, and
  several processes may not share it.
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import logging
import os
import pathlib
import queue
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

from postrain.data.files import hub
from postrain.errors import UserError
from postrain.files import lock

MAX_WAIT = 30.0  # seconds between two tries
FIRST_TRIES = 3  # of a storage of which nothing has been read, and whose host cannot be reached
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    LookupError,
    ImportError,
    NotImplementedError,
)
_RANDOM = random.Random()  # a generator of its own: waiting must not change the random numbers of the data
_PIECE, _PARTIAL = ".piece", ".partial"  # suffixes in the cache
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StorageOptions:
    """How remote files are read; local files ignore them.

    Attributes:
      tries: attempts at one request before the run stops. Waits between them double from ``first_wait`` seconds to 30.
      timeout: seconds after which an unanswered request (at most 8 MiB) has failed.
      cache_folder, cache_bytes: where pieces of remote files are kept, and the limit of their size; "" or 0: not kept.
    """

    tries: int = 8
    timeout: float = 60.0
    first_wait: float = 1.0
    cache_folder: str = ""
    cache_bytes: int = 0


# Requests


def retry(options: StorageOptions, where: str, call: Callable[[], Any], *, first: bool = False) -> Any:
    """Calls ``call`` until it succeeds, and returns its result.

    ``first``: nothing has been read of this storage yet, so that a machine without a network is told so in seconds.

    Raises:
      UserError: naming ``where`` (``url`` or ``url@byte``), for an error that would come again, or after
        ``options.tries`` failures.
    """
    begin = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return _within(options.timeout, call)
        except Exception as e:
            error = real_error(e)
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if _is_of_hub(error) and (reason := hub.explain(error)):
                raise UserError(f"{where} cannot be read: {reason}") from error
            if _is_permanent(error):
                advice = "" if isinstance(error, FileNotFoundError) else " and who may read it"
                raise UserError(f"{where} cannot be read ({cause}): check the path{advice}") from error
            lost = first and _cannot_reach(error, where)
            tries = min(FIRST_TRIES, options.tries) if lost else options.tries
            if attempt >= tries:
                advice = "check the storage and the network, then start the same command again"
                if lost and where.startswith("hf://"):
                    advice = "check the network, or fetch it by `hf download` where there is one and set HF_HUB_OFFLINE"
                raise UserError(
                    f"{where} cannot be read: {attempt} tries within {time.monotonic() - begin:.0f} s have failed, "
                    f"the last one with {cause}: {advice}"
                ) from error
        wait = min(options.first_wait * 2 ** (attempt - 1), MAX_WAIT) * _RANDOM.uniform(0.5, 1)
        _LOG.warning("%s: try %d of %d failed (%s); next in %.1f s", where, attempt, tries, cause, wait)
        time.sleep(wait)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Calls ``call`` in a thread. Raises TimeoutError if it takes longer; the thread then ends by itself."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        try:
            answers.put((call(), None))
        except BaseException as e:
            answers.put((None, e))

    threading.Thread(target=run, daemon=True, name="storage request").start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def real_error(error: Exception) -> Exception:
    """The cause of a FileNotFoundError that means something else: any failure of http, a repository of the hub."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    if _is_of_hub(cause) and "Entry" not in type(cause).__name__:
        return cause
    hidden = not hasattr(cause, "response") and getattr(cause, "status", 0) != 404
    return cause if hidden else error


def _is_of_hub(error: BaseException | None) -> bool:
    return type(error).__module__.startswith("huggingface_hub.")


def _cannot_reach(error: BaseException | None, where: str) -> bool:
    """Whether the name of the storage's host was not found, or there is no way to it: mostly, no network at all.

    The hub itself never refuses a connection: that is a firewall, or a proxy that is not there.
    """
    codes = (*_NO_ROUTE, errno.ECONNREFUSED) if where.startswith("hf://") else _NO_ROUTE
    while error is not None:
        if isinstance(error, socket.gaierror) or getattr(error, "errno", None) in codes:
            return True
        error = getattr(error, "os_error", None) or error.__cause__ or error.__context__
    return False


def _is_permanent(error: Exception) -> bool:
    """Whether the same request would fail again: no such file, no access, an invalid request."""
    response = getattr(error, "response", None)
    statuses = (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None))
    refused = any(isinstance(s, int) and 400 <= s < 500 and s not in (408, 425, 429) for s in statuses)
    return refused or isinstance(error, _PERMANENT) or "Credential" in type(error).__name__


# Pieces on the disk


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
            _warn_of_cache(self._folder, str(e.strerror or e))

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / (hashlib.sha256(key.encode()).hexdigest() + _PIECE)

    def _make_room(self, size: int) -> None:
        """Counts ``size`` bytes more, after removing pieces if they do not fit; the caller holds the lock."""
        total = (self._folder / "lock").read_bytes()
        if total.isdigit() and int(total) + size <= self._limit:
            (self._folder / "lock").write_bytes(str(int(total) + size).encode())
            return
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
        used, room = sum(size for _, size, _ in pieces), self._limit - size
        if used > room:  # the least recently used go first
            for _, bytes_of_piece, path in sorted(pieces):
                if used <= min(room, self._limit * 9 // 10):
                    break
                pathlib.Path(path).unlink(missing_ok=True)
                used -= bytes_of_piece
        (self._folder / "lock").write_bytes(str(used + size).encode())


@functools.cache  # once for each cause: every piece of a run would meet it
def _warn_of_cache(folder: pathlib.Path, cause: str) -> None:
    _LOG.warning("the cache %s takes no more (%s); going on without", folder, cause)
