"""SIGTERM and ^C as a request to stop at the next step, so that a run can save before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from postrain.compute import distributed

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(BaseException):
    """A signal came in a block of ``StopRequest.interrupts``. No library may take it for an error of its own."""


class StopRequest:
    """``number`` is the signal that came, None as long as none did; of several processes: one that all know of."""

    def __init__(self):
        self.number: int | None = None
        self._noted, self._interrupts, self._alone = 0, False, distributed.current() is None

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """In the block a signal raises Interrupted; of a run of one process: others would wait for this one."""
        self._interrupts = self._alone
        try:
            yield
        finally:
            self._interrupts = False

    def agree(self) -> None:
        """``number`` becomes the signal that any process has got, in all after the same step. For after every step."""
        if not self._alone:
            self.number = distributed.agree_on_stop(self._noted or None)

    def note(self, number: int) -> None:
        self._noted = number
        if self._alone:
            self.number = number
        if self._interrupts:
            raise Interrupted


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Inside the block the first SIGTERM or SIGINT only sets ``number``; a second one ends the program as ever.

    Outside the main thread, where Python cannot set handlers, nothing is caught.
    """
    request, before = StopRequest(), {}

    def note(number, frame):
        del frame
        signal.signal(number, before[number])
        request.note(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
