"""SIGTERM and ^C ask a run to stop after the current step, so that it can save before it ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from postrain.cluster import processes

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(BaseException):
    """A signal came in a block of ``StopRequest.interrupts``. A BaseException, so that no library handles it."""


class StopRequest:
    """``number`` is the signal that came, None until one does; in several processes one that all have agreed on."""

    def __init__(self):
        self.number: int | None = None
        self._noted, self._interrupts, self._alone = 0, False, processes.current() is None

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Has a signal raise Interrupted in the block; not with several processes, of which the others would wait."""
        self._interrupts = self._alone
        try:
            yield
        finally:
            self._interrupts = False

    def agree(self) -> None:
        """Sets ``number`` to a signal that any process has got, in all after the same step. Call it after each step."""
        if not self._alone:
            self.number = processes.agree_on_stop(self._noted or None)

    def note(self, number: int) -> None:
        self._noted = number
        if self._alone:
            self.number = number
        if self._interrupts:
            raise Interrupted


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Has the first SIGTERM or SIGINT in the block set ``number``; a second one gets the default handler.

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
    """Has ^C end the process in the block, which is for imports.

    Libraries that try an import take a KeyboardInterrupt for a failed one, and go on half imported.
    """

    def end(number, frame):
        del frame
        os.write(2, b"error: interrupted\n")
        os._exit(EXIT_CODES[number])

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # the handler of a job in the background
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_pid_1() -> None:
    """Moves the program of a container's first process, PID 1, into a child process, and waits for it.

    The kernel withholds from PID 1 every signal that has no handler, also one that would end any other process.
    Python's handlers do not help: they run only after a compilation. PID 1 passes SIGINT and SIGTERM on, reaps
    orphans, and ends with the child's exit code, or 128 + n if signal n has ended it.
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
