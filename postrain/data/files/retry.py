"""Retries of requests to a storage that sometimes fails or hangs, and one error that names the file in the end.

These retries and ``postrain.data.files.cache`` are our own because no library passes tests/data/test_storage_remote.py
and test_cache.py in their place (tried: obstore 0.12.1; s3fs, aiohttp and fsspec 2026.9 with retries of their own):

* obstore resumes a truncated body where it ended. But ``get_range`` returns a complete answer of too few bytes ("lie")
  as the data, without an error. It has no cache on the disk, and reads neither ``hf://`` nor ``zip://`` nor a user's
  own file system, so that all of this would stay beside it.
* s3fs stops at an answer of too few bytes without another try, and a request that hangs ("stall") is repeated together
  with pieces that were read before. For ``http://`` fsspec has no retries (test_http).
* The block cache of fsspec raises TypeError after a failed request. It has no limit of bytes and no checksums, and
  several processes may not share it.
"""

import dataclasses
import itertools
import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from postrain.data.files import hub
from postrain.errors import UserError

MAX_WAIT = 30.0  # seconds between two tries
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


def retry(options: StorageOptions, where: str, call: Callable[[], Any]) -> Any:
    """Calls ``call`` until it succeeds, and returns its result.

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
            if attempt >= options.tries:
                raise UserError(
                    f"{where} cannot be read: {attempt} tries within {time.monotonic() - begin:.0f} s have failed, "
                    f"the last one with {cause}: check the storage and the network, then start the same command again"
                ) from error
        wait = min(options.first_wait * 2 ** (attempt - 1), MAX_WAIT) * _RANDOM.uniform(0.5, 1)
        _LOG.warning("%s: try %d of %d failed (%s); next in %.1f s", where, attempt, options.tries, cause, wait)
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
    if isinstance(error, FileNotFoundError) and _is_of_hub(cause) and "Entry" not in type(cause).__name__:
        return cause
    hidden = isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not hasattr(cause, "response")
    return cause if hidden and getattr(cause, "status", 0) != 404 else error


def _is_of_hub(error: BaseException | None) -> bool:
    return type(error).__module__.startswith("huggingface_hub.")


def _is_permanent(error: Exception) -> bool:
    """Whether the same request would fail again: no such file, no access, an invalid request."""
    response = getattr(error, "response", None)
    statuses = (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None))
    refused = any(isinstance(s, int) and 400 <= s < 500 and s not in (408, 425, 429) for s in statuses)
    return refused or isinstance(error, _PERMANENT) or "Credential" in type(error).__name__
