"""What ends a run before its last step: a signal, after which it saves (StopRequest), and a hang (Watchdog)."""

import contextlib
import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

from postrain.cluster import processes
from postrain.cluster.processes import HANG

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_TO_WRITE = 10.0  # seconds for hang.txt: the disk may be what hangs


# Signals: SIGTERM and ^C ask a run to stop after the current step, so that it can save before it ends


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


# Hangs


class Watchdog:
    """A thread that ends a run which hangs, and reports its phase and the stacks of all its threads.

    ``with Watchdog(...) as watch:``, and in it ``with watch.phase("data"): ...``. The phases are "data", "step",
    "checkpoint", "evaluation", "export", and "run" for everything else. A launcher restarts a run that has ended; one
    that hangs costs its machines for nothing. In several processes, one that has stopped keeps all others waiting in
    the collectives of the step: the culprit is the one that hangs in another phase, or reports nothing.

    ``timeout``: seconds without progress after which the run ends, 0: never. Time in which this process did not run
    (stopped by a signal, or the machine asleep) does not count. ``process``, ``processes``: its number, and how many.
    """

    def __init__(self, workdir: pathlib.Path, timeout: float, *, process: int = 0, processes: int = 1):
        self._timeout, self._process, self._processes = timeout, process, processes
        self._file = workdir / (f"hang.{process}.txt" if processes > 1 else "hang.txt")
        self._phase = "run", True  # its name, and whether CPU time counts as progress
        self._progress, self._end = 0, threading.Event()  # a count: reading it needs no lock
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.step = 0  # set by the loop, for the message

    @contextlib.contextmanager
    def phase(self, name: str, *, watches_cpu: bool = True) -> Iterator[None]:
        """Names the phase of the block.

        ``watches_cpu``: CPU time of this process counts as progress, so that a long compilation is not a hang. False
        for phases that wait for an accelerator: some runtimes wait in a busy loop.
        """
        before, self._phase = self._phase, (name, watches_cpu)
        self._progress += 1
        try:
            yield
        finally:
            self._phase = before
            self._progress += 1

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._end.set()

    def _watch(self) -> None:
        tick, idle, seen = min(1.0, self._timeout / 10), 0.0, -1
        now, cpu = time.monotonic(), time.process_time()
        while not self._end.wait(tick):
            passed, used = time.monotonic() - now, time.process_time() - cpu
            now, cpu = now + passed, cpu + used
            (phase, watches_cpu), progress = self._phase, self._progress
            works = watches_cpu and used > 0.02 * passed
            idle = 0.0 if works or progress != seen else idle + min(passed, 2 * tick)
            seen = progress
            if idle >= self._timeout:
                self._stop(phase, idle)

    def _stop(self, phase: str, idle: float) -> None:
        others = ""
        if self._processes > 1:
            others = f" Process {self._process} of {self._processes}: one that has stopped keeps all others waiting."
        text = (
            f"error: no progress for {idle:.0f} s (train.hang_timeout) in phase '{phase}', step {self.step}.{others} "
            f"The stacks of all threads are below and in {self._file}; stopping with code {HANG}.\n"
        )
        sys.__stderr__.write(text)
        sys.__stderr__.flush()
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        writer = threading.Thread(target=self._write, args=(text,), daemon=True)
        writer.start()
        writer.join(_TO_WRITE)
        if several := processes.current():
            several.channel.fail(f"hung in phase '{phase}', step {self.step}", HANG)
        os._exit(HANG)

    def _write(self, text: str) -> None:
        with self._file.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
