"""The thread that owns the engine. Other threads hand it requests, and get events by their own callbacks."""

import dataclasses
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from postrain.rollout.constraints import ConstraintFactory
from postrain.rollout.engine import Engine
from postrain.rollout.requests import Event, SamplingParams


class QueueFull(Exception):
    """More requests than the server takes at a time."""


@dataclasses.dataclass(frozen=True)
class Submission:
    """One answer that is wanted: the arguments of ``Engine.submit``."""

    prompt: Sequence[int]
    sampling: SamplingParams
    sample_id: int = 0
    constraint: ConstraintFactory | None = None
    until: Callable[[int], bool | None] | None = None


@dataclasses.dataclass(eq=False)
class Ticket:
    """Submissions that belong together. ``sink(i, event)`` is called in the engine's thread; an exception as the event
    says that nothing more will come for submission i."""

    submissions: list[Submission]
    sink: Callable[[int, Event | Exception], None]
    handles: dict[int, int] = dataclasses.field(default_factory=dict)  # of the engine -> i
    open: int = 0  # submissions that have not ended; under the thread's lock


class EngineThread:
    """Runs ``engine`` in a thread of its own. ``most``: answers under way or waiting, beyond which none is taken."""

    def __init__(self, engine: Engine, most: int):
        self.engine, self.most = engine, most
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # by the engine's handle
        self._lock = threading.Lock()
        self._open = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for any thread ---

    @property
    def num_open(self) -> int:
        return self._open

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def reserve(self) -> None:
        """Counts an answer that is still to be submitted, until ``release``. Raises QueueFull where it has no room."""
        with self._lock:
            if self._open >= self.most:
                raise QueueFull
            self._open += 1

    def release(self) -> None:
        with self._lock:
            self._open -= 1

    def submit(
        self,
        submissions: list[Submission],
        sink: Callable[[int, Event | Exception], None],
        num_reserved: int = 0,
    ) -> Ticket:
        """Raises QueueFull where not all of them have room, ``num_reserved`` of them that which was reserved."""
        with self._lock:
            if self._open + len(submissions) - num_reserved > self.most:
                raise QueueFull
            self._open += len(submissions)
        ticket = Ticket(submissions, sink, open=len(submissions))
        self._commands.put(lambda: self._begin(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what has not ended; no events come for it from then on."""
        self._commands.put(lambda: self._cancel(ticket))

    def call(self, function: Callable[[Engine], Any]) -> Future:
        """Has ``function(engine)`` called between two steps."""
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(function(self.engine))
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(run)
        return future

    def stop(self) -> None:
        """Ends the thread after the step that it is in."""
        self._commands.put(None)
        self._thread.join()

    # --- in the engine's thread ---

    def _run(self) -> None:
        while True:
            try:
                # Idle, it sleeps until there is something to do.
                command = self._commands.get(block=self.engine.is_idle)
            except queue.Empty:
                command = None
            else:
                if command is None:
                    return
            try:
                if command is not None:
                    command()
                if self._commands.empty():
                    for event in self.engine.step():
                        self._deliver(event)
            except Exception as error:
                traceback.print_exception(error, file=sys.stderr)
                self._give_up(error)

    def _begin(self, ticket: Ticket) -> None:
        for i, one in enumerate(ticket.submissions):
            try:
                handle = self.engine.submit(
                    one.prompt,
                    one.sampling,
                    sample_id=one.sample_id,
                    constraint=one.constraint() if one.constraint else None,
                    until=one.until,
                )
            except Exception as error:
                self._end(ticket, i, error)
                continue
            ticket.handles[handle] = i
            self._tickets[handle] = ticket, i

    def _deliver(self, event: Event) -> None:
        if event.handle not in self._tickets:
            return
        ticket, i = self._tickets[event.handle]
        if event.completion is None:
            ticket.sink(i, event)
            return
        del self._tickets[event.handle], ticket.handles[event.handle]
        self._end(ticket, i, event)

    def _end(self, ticket: Ticket, i: int, event: Event | Exception) -> None:
        self._free(ticket, 1)
        ticket.sink(i, event)

    def _free(self, ticket: Ticket, count: int) -> None:
        with self._lock:
            self._open -= count
            ticket.open -= count

    def _cancel(self, ticket: Ticket) -> None:
        for handle in list(ticket.handles):
            self.engine.cancel(handle)
            del self._tickets[handle], ticket.handles[handle]
        self._free(ticket, ticket.open)

    def _give_up(self, error: Exception) -> None:
        """Ends every request: what a failed step leaves in the cache is not known."""
        tickets, self._tickets = self._tickets, {}
        self.engine.reset()
        for handle, (ticket, i) in tickets.items():
            del ticket.handles[handle]
            self._end(ticket, i, error)
