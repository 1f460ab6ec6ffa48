"""What the processes of a run tell each other besides arrays: who failed and why, values to compare, when to stop.

A TCP connection from every process to process 0, JSON lines, each way at any time; threads of their own, so that a
process that is blocked in a collective hears of a failure. jax's own service notices a dead process after a hundred
seconds, and does not know why; here a closed connection is noticed at once, a lost machine by TCP's keep-alive.
A process that fails says so before it ends; one whose connection closes without a word was killed.
"""

import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from postrain.errors import UserError

SECONDS_TO_MEET = 300.0  # from the first process's start to the last one's
SECONDS_TO_END = 5.0  # for the others to end, so that process 0, which they all depend on, is the last
LOST = "died without a word (killed, out of memory, or its machine is gone)"
LOST_CODE = 128 + signal.SIGTERM  # the run can go on from its checkpoint: launchers start it again
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost machine: after 20 seconds


class NotMet(UserError):
    """The processes have not all come in time: a machine may have been lost, so that starting again may help."""

    exit_code = LOST_CODE


class Failure(NamedTuple):
    """Why a run ends."""

    process: int
    host: str
    error: str  # one line
    code: int  # that all processes exit with

    def __str__(self) -> str:
        return f"process {self.process} ({self.host}) {self.error}"


class _Line:
    """One connection: JSON objects out, from any thread, and in, from one."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection, self._file, self._lock = connection, connection.makefile("rb"), threading.Lock()

    def send(self, message: dict) -> None:
        """A connection that is closed is the reader's to notice."""
        try:
            with self._lock:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> dict | None:
        """The next object; None when the connection is closed, or what came is not ours."""
        try:
            return json.loads(self._file.readline() or b"null")
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class Hub:
    """In process 0: accepts all processes, its own among them, and passes on what they say."""

    def __init__(self, port: int, num_processes: int):
        """Raises UserError when the port is taken."""
        self._count, self._lock = num_processes, threading.Lock()
        self._lines: dict[int, _Line] = {}
        self._hosts: dict[int, str] = {}
        self._values: dict[str, dict[int, Any]] = {}
        self._passed: dict[int, int] = {}  # steps after which a process went on
        self._signal: int | None = None
        self._failure: Failure | None = None
        self._finished = False
        self._gone = queue.SimpleQueue()  # processes whose connection has closed
        try:
            both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            self._listener = socket.create_server(("", port), backlog=num_processes + 16, **both)
        except OSError as error:
            raise UserError(
                f"several processes: port {port} of this machine cannot be listened on ({error.strerror}): choose "
                f"another --coordinator=HOST:PORT; the port after it, this one, must be free too"
            ) from error
        threading.Thread(target=self._accept, name="hub", daemon=True).start()

    def missing(self) -> list[int]:
        """Processes that have not come."""
        with self._lock:
            return [process for process in range(self._count) if process not in self._lines]

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(_Line(connection),), daemon=True).start()

    def _serve(self, line: _Line) -> None:
        hello = line.receive()
        if not isinstance(hello, dict) or "hello" not in hello:  # somebody else's connection
            line.close()
            return
        process = hello["hello"]
        with self._lock:
            wrong = None
            if hello["of"] != self._count:
                wrong = f"says that it is one of {hello['of']} processes, process 0 that there are {self._count}"
            elif process in self._lines:
                wrong = f"is there twice: {hello['host']} and {self._hosts[process]} both have that number"
            else:
                self._lines[process], self._hosts[process] = line, hello["host"]
            complete, failure = len(self._lines) == self._count, self._failure
        if wrong:
            failure = Failure(process, hello["host"], wrong, 2)
        if failure is not None:  # its own, or of one that was there earlier
            line.send({"failed": failure})
        if wrong:
            self._fail(failure)
            return
        if complete:
            self._tell({"met": [self._hosts[process] for process in range(self._count)]})
        while (message := line.receive()) is not None:
            self._handle(process, message)
        self._gone.put(process)
        if not self._finished:
            self._fail(Failure(process, self._hosts[process], LOST, LOST_CODE))

    def _handle(self, process: int, message: dict) -> None:
        if "failed" in message:  # in a thread: this one must see that the process has ended
            threading.Thread(target=self._fail, args=(Failure(*message["failed"]),), daemon=True).start()
        elif "gather" in message:
            name = message["gather"]
            with self._lock:
                values = self._values.setdefault(name, {})
                values[process] = message["value"]
                complete = len(values) == self._count
                if complete:
                    del self._values[name]
                self._finished |= complete and name == "leave"
            if complete:
                self._tell({"gathered": name, "values": [values[i] for i in range(self._count)]})
        elif "stop" in message:
            with self._lock:
                first, self._signal = self._signal is None, self._signal or message["stop"]
            if first:
                self._tell({"stopping": True})
        elif "passed" in message:
            with self._lock:
                self._passed[process] = message["passed"]
                complete = len(self._passed) == self._count
            if complete:
                self._tell({"stop_at": max(self._passed.values()) + 1, "number": self._signal})

    def _tell(self, message: dict) -> None:
        """To process 0 last: where it ends then, the others have been told."""
        for process in sorted(self._lines, reverse=True):
            self._lines[process].send(message)

    def _fail(self, failure: Failure) -> None:
        """The first failure is the cause, what follows from it is not told."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure, lines = failure, dict(self._lines)
        lead = lines.pop(0, None)
        for line in lines.values():
            line.send({"failed": failure})
        deadline, waiting = time.monotonic() + SECONDS_TO_END, set(lines)
        while waiting and (left := deadline - time.monotonic()) > 0:
            try:
                waiting.discard(self._gone.get(timeout=left))
            except queue.Empty:
                break
        if lead is not None:
            lead.send({"failed": failure})


class Channel:
    """A process's connection to the hub. ``on_failure`` is called, in a thread, when another process has failed."""

    def __init__(
        self, address: tuple[str, int], process: int, num_processes: int, hub: Hub | None, on_failure: Callable
    ):
        """Returns when all processes have come. Raises NotMet naming those that did not, within five minutes."""
        self.process, self.num_processes = process, num_processes
        self._on_failure, self._changed = on_failure, threading.Condition()
        self._failing = self._left = self._stopping = False
        self._told: Failure | None = None  # why the run ends, where it is not this process alone that does
        self._gathered: dict[str, list] = {}
        self._number = 0
        self._passed, self._stop = 0, None
        self.hosts: list[str] = []  # of every process, by number
        deadline = time.monotonic() + SECONDS_TO_MEET
        self._line = _Line(_connect(address, deadline))
        self._line.send({"hello": process, "of": num_processes, "host": socket.gethostname()})
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        with self._changed:
            if not self._changed.wait_for(lambda: self.hosts, deadline - time.monotonic()):
                who = f"; missing: {', '.join(map(str, hub.missing()))}" if hub else ""
                raise NotMet(
                    f"several processes: not all {num_processes} came within {SECONDS_TO_MEET:.0f} seconds{who}: see "
                    "why they did not start"
                )

    def _listen(self) -> None:
        while (message := self._line.receive()) is not None:
            failure = Failure(*message["failed"]) if "failed" in message else None
            with self._changed:
                self.hosts = message.get("met", self.hosts)
                self._stopping |= "stopping" in message
                if "gathered" in message:
                    self._gathered[message["gathered"]] = message["values"]
                    self._left |= message["gathered"] == "leave"
                if "stop_at" in message:
                    self._stop = message
                self._told = self._told or failure
                self._changed.notify_all()
                passed = self._passed
            if "stopping" in message:
                self._line.send({"passed": passed})
            if failure is not None and not self._failing:
                self._on_failure(failure)
        if not (self._left or self._failing):
            self._on_failure(Failure(0, self.hosts[0] if self.hosts else "which all meet", LOST, LOST_CODE))

    def gather(self, value: Any) -> list:
        """``value`` (JSON) of every process, by number. Every process must call it, as often as the others."""
        self._number += 1
        return self._gather(f"value {self._number}", value)

    def _gather(self, name: str, value: Any) -> list:
        self._line.send({"gather": name, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: name in self._gathered)
            return self._gathered.pop(name)

    def fail(self, error: str, code: int) -> Failure:
        """Tells all why this process ends; returns when they know, and in process 0 when they have ended.

        Returns why the run ends: this, or what another process had said before.
        """
        own = Failure(self.process, socket.gethostname(), error, code)
        with self._changed:
            self._failing = True
        self._line.send({"failed": own})
        with self._changed:
            self._changed.wait_for(lambda: self._told, SECONDS_TO_END + 1)
            return self._told or own

    def agree_on_stop(self, number: int | None) -> int | None:
        """The signal because of which all processes stop after this step; None: they go on. For after every step.

        ``number``: the signal that came to this process, None without. From the first signal on each process waits
        here, and says how many steps it was let past: the run stops after the first one that none is past. Steps are
        counted by the calls, since a run may go back to an earlier step.
        """
        with self._changed:
            if number is not None and not self._stopping:
                self._stopping = True
                self._line.send({"stop": int(number)})
            self._changed.wait_for(lambda: self._stop or not self._stopping)
            if self._stop and self._passed + 1 >= self._stop["stop_at"]:
                return self._stop["number"]
            self._passed += 1
            return None

    @property
    def stopping(self) -> bool:
        """Whether the processes have agreed on a step after which the run stops."""
        return self._stop is not None

    def leave(self) -> None:
        """Returns when every process has called it: what fails until then fails in all."""
        self._gather("leave", os.getpid())
        self._line.close()


def _connect(address: tuple[str, int], deadline: float) -> socket.socket:
    """Process 0 may start after this one, and its name be known later still."""
    while True:
        try:
            connection = socket.create_connection(address, timeout=10)
            connection.settimeout(None)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise NotMet(
                    f"several processes: process 0 does not answer at {address[0]}:{address[1]} ({error.strerror}): "
                    "does it run, is the port open, does --coordinator name its machine?"
                ) from error
            time.sleep(0.2)
