"""Requests to a storage that fails or hangs now and then: made again after a wait, and named in the end."""

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
_RANDOM = random.Random()  # of its own: the waits must not move the seeds of the data
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StorageOptions:
    """How remote files are read; local files need none of it.

    Attributes:
      tries: of one request, before the run is stopped. The waits between them double from ``first_wait`` seconds to 30.
      timeout: seconds within which a request (at most 8 MiB) must be answered, or it has failed.
      cache_folder, cache_bytes: pieces of remote files are kept here, up to so many bytes; not where one is empty or 0.
    """

    tries: int = 8
    timeout: float = 60.0
    first_wait: float = 1.0
    cache_folder: str = ""
    cache_bytes: int = 0


def retried(options: StorageOptions, where: str, call: Callable[[], Any]) -> Any:
    """What ``call`` returns, sooner or later.

    Raises:
      UserError: naming ``where`` (``url`` or ``url@byte``): it would fail again, or has failed ``options.tries`` times.
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
    """What ``call`` returns; TimeoutError where it does not in time, and then its thread is left to itself."""
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
    """The failure behind a file that is "not found": fsspec's http calls every failure so, and the hub a repository."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and _is_of_hub(cause) and "Entry" not in type(cause).__name__:
        return cause
    hidden = isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not hasattr(cause, "response")
    return cause if hidden and getattr(cause, "status", 0) != 404 else error


def _is_of_hub(error: BaseException | None) -> bool:
    return type(error).__module__.startswith("huggingface_hub.")


def _is_permanent(error: Exception) -> bool:
    """Whether the same request would fail again: no such file, not allowed, not understood."""
    response = getattr(error, "response", None)
    statuses = (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None))
    refused = any(isinstance(s, int) and 400 <= s < 500 and s not in (408, 425, 429) for s in statuses)
    return refused or isinstance(error, _PERMANENT) or "Credential" in type(error).__name__
