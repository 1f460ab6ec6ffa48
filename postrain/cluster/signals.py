"""SIGTERM and ^C as a request to stop at the next step, so that a run can save before it ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from postrain.cluster import processes as distributed

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


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """For imports: in the block ^C ends the process. Libraries that try imports take a KeyboardInterrupt for a failed
    one, and are then half there, or go on without."""

    def end(number, frame):
        del frame
        os.write(2, b"error: interrupted\n")
        os._exit(EXIT_CODES[number])

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as a job in the background has it
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_pid_1() -> None:
    """For the first process of a container, PID 1: the program goes on in a child, for which this one stays behind.

    The kernel keeps from PID 1 every signal that has no handler: what ends any other process at once would be lost.
    Python's own handlers are none for that: they wait until a compilation is over. This process passes SIGINT and
    SIGTERM on, reaps what is orphaned, and ends with the child's exit code, 128 + n where signal n has ended it.
    """
    passed = set(EXIT_CODES)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed | {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed | {signal.SIGCHLD})
        return
    while True:
        found = signal.sigwaitinfo(passed | {signal.SIGCHLD})
        if found.si_signo in passed:
            if found.si_code <= 0:  # sent by a process: a terminal's ^C reaches the child by itself
                os.kill(child, found.si_signo)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                os._exit(code if code >= 0 else 128 - code)
