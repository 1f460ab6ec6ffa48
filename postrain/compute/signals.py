"""SIGTERM and ^C as a request to stop at the next step, so that a run can save before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopRequest:
    """``number`` is the signal that came, None as long as none did."""

    number: int | None = None


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Inside the block the first SIGTERM or SIGINT only sets ``number``; a second one ends the program as ever.

    Outside the main thread, where Python cannot set handlers, nothing is caught.
    """
    request, before = StopRequest(), {}

    def note(number, frame):
        del frame
        request.number = number
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
