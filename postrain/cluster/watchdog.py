"""A thread that ends a run which hangs, and reports its phase and the stacks of all its threads.

A launcher restarts a run that has ended; one that hangs costs its machines for nothing. The phases are "data", "step",
"checkpoint", "evaluation", "export", and "run" for everything else. In several processes, one that has stopped keeps
all others waiting in the collectives of the step: the culprit is the one that hangs in another phase, or reports
nothing.
"""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from postrain.cluster.processes import HANG, current

_TO_WRITE = 10.0  # seconds for hang.txt: the disk may be what hangs


class Phase(NamedTuple):
    name: str
    watches_cpu: bool


class Watchdog:
    """``with Watchdog(...) as watch:``, and in it ``with watch.phase("data"): ...``.

    ``timeout``: seconds without progress after which the run ends, 0: never. Time in which this process did not run
    (stopped by a signal, or the machine asleep) does not count. ``process``, ``processes``: its number, and how many.
    """

    def __init__(self, workdir: pathlib.Path, timeout: float, *, process: int = 0, processes: int = 1):
        self._timeout, self._process, self._processes = timeout, process, processes
        self._file = workdir / (f"hang.{process}.txt" if processes > 1 else "hang.txt")
        self._phase = Phase("run", watches_cpu=True)
        self._progress, self._end = 0, threading.Event()  # a count: reading it needs no lock
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.step = 0  # set by the loop, for the message

    @contextlib.contextmanager
    def phase(self, name: str, *, watches_cpu: bool = True) -> Iterator[None]:
        """Names the phase of the block.

        ``watches_cpu``: CPU time of this process counts as progress, so that a long compilation is not a hang. False
        for phases that wait for an accelerator: some runtimes wait in a busy loop.
        """
        before, self._phase = self._phase, Phase(name, watches_cpu)
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
            phase, progress = self._phase, self._progress
            works = phase.watches_cpu and used > 0.02 * passed
            idle = 0.0 if works or progress != seen else idle + min(passed, 2 * tick)
            seen = progress
            if idle >= self._timeout:
                self._stop(phase.name, idle)

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
        if processes := current():
            processes.channel.fail(f"hung in phase '{phase}', step {self.step}", HANG)
        os._exit(HANG)

    def _write(self, text: str) -> None:
        with self._file.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
