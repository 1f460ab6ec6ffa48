"""Control channel between the processes of a run: failures, gathered values, stop requests.

Every process has a TCP connection to process 0, the hub, on which both ends may send at any time. Threads read it, so
that a process that is blocked in a collective hears of a failure. jax's own service notices a dead process after a
hundred seconds and cannot say why it died; here a closed connection is noticed at once, a lost machine by TCP's
keep-alive. A process that fails sends its error before it ends; if a connection closes without one, it was killed.

The hub listens on one address, the one that the coordinator's name stands for, and only until all processes have
joined. A process that does not know the run's secret cannot join (authentication.py).
"""

import contextlib
import errno
import ipaddress
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from postrain.cluster.authentication import LONGEST, SECRET, Connection, WrongSecret, admit, introduce
from postrain.errors import UserError, shorten

SECONDS_TO_JOIN = 300.0  # from the first process's start to the last one's
SECONDS_TO_RESOLVE = 60.0  # process 0's own name: Kubernetes' DNS may know a new pod only after half a minute
SECONDS_TO_END = 5.0  # for the others to end, so that process 0, which they all depend on, is the last
LOST = "ended without an error message (killed, out of memory, or its machine is lost)"
LOST_CODE = 128 + signal.SIGTERM  # the run can go on from its checkpoint: launchers start it again
_STRANGERS = 64  # connections besides those of the processes that may be proving that they know the secret, and
_SECONDS_TO_LINGER = 1.0  # for how long more of them may
_WAITING = 4096  # connections that wait to be accepted; Linux allows no more unless told otherwise
_TICK = 0.5  # seconds between two looks at whether all processes have joined


class ProcessesMissing(UserError):
    """Not all processes have joined in time: a machine may have been lost, so that starting again may help."""

    exit_code = LOST_CODE


class Failure(NamedTuple):
    """Why a run ends."""

    process: int
    host: str
    error: str  # one line
    code: int  # that all processes exit with

    def __str__(self) -> str:
        return f"process {self.process} ({self.host}) {self.error}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on one address: the first of ``host`` that is this machine's, loopback ones last.

    As many connections as the system allows may wait to be accepted: a stranger's must not keep a process's out.

    Raises UserError if no address of ``host`` is this machine's or the port is taken, ProcessesMissing if nobody knows
    ``host`` for a minute.
    """
    deadline = time.monotonic() + SECONDS_TO_RESOLVE
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessesMissing(
                    f"several processes: process 0 cannot look up its own name, the coordinator's {host!r} "
                    f"({error.strerror}): expected a name or an address of its machine: choose another --coordinator"
                ) from error
            time.sleep(0.5)
    places = sorted(((place, family) for family, *_, place in found), key=lambda one: is_loopback(one[0][0]))
    addresses = list(dict.fromkeys(place[0] for place, _ in places))
    for place, family in places:
        if ipaddress.ip_address(place[0].partition("%")[0]).is_unspecified:  # 0.0.0.0 would be every address
            continue
        try:
            return socket.create_server(place, family=family, backlog=_WAITING)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise UserError(
                    f"several processes: port {port} of {place[0]} cannot be listened on ({error.strerror}): choose "
                    "another --coordinator=HOST:PORT; the port after it, this one, must be free too"
                ) from error
    raise UserError(
        f"several processes: the coordinator's host {host!r} is {shorten(addresses, 4)}: expected an address of "
        "process 0's own machine: name one that it has and the others reach with --coordinator=HOST:PORT"
    )


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine reach ``address``, such as 127.0.0.1, 127.0.1.1 or ::1."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class Hub:
    """In process 0: accepts all processes, its own among them, and passes on what they send."""

    def __init__(self, address: tuple[str, int], num_processes: int, secret: str):
        """Listens on ``address``, as ``listen`` does."""
        self._host, self._count, self._secret, self._lock = address[0], num_processes, secret, threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._hosts: dict[int, str] = {}
        self._refused: dict[str, None] = {}  # addresses of processes with another secret
        self._values: dict[str, dict[int, Any]] = {}
        self._steps: dict[int, int] = {}  # steps after which a process went on, once a signal has come
        self._signal: int | None = None
        self._failure: Failure | None = None
        self._finished = False
        self._ended = queue.SimpleQueue()  # processes whose connection has closed
        self._proving: dict[socket.socket, float] = {}  # and when they came, the oldest first
        self._listener = listen(*address)
        place = self._listener.getsockname()
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV  # with the zone of a link-local address
        self.address: tuple[str, int] = (socket.getnameinfo(place, numeric)[0], place[1])
        threading.Thread(target=self._accept, name="hub", daemon=True).start()

    def missing(self) -> list[int]:
        """Processes that have not joined."""
        with self._lock:
            return [process for process in range(self._count) if process not in self._connections]

    def missing_error(self) -> UserError:
        """The error that says who has not joined, and what may have kept them from it."""
        text = f"{_missing(self._count)}; missing: {shorten(self.missing(), 8)}"
        if self._refused:
            text += f"; refused, for another {SECRET}: {shorten(self._refused, 4)}"
        host, (address, _) = self._host, self.address
        if is_loopback(address) and host not in (address, "localhost"):
            return UserError(
                f"{text}: the coordinator's host {host!r} is {address} on its own machine, which no other machine "
                "reaches: name its address on the network with --coordinator=HOST:PORT"
            )
        return ProcessesMissing(f"{text}: see why they did not start")

    def _accept(self) -> None:
        with self._listener:
            self._listener.settimeout(_TICK)
            while self.missing():
                self._send_away()
                try:
                    connected, place = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError:  # no more open files, or the other end has gone
                    time.sleep(_TICK)
                    continue
                with self._lock:
                    self._proving[connected] = time.monotonic()
                try:
                    threading.Thread(target=self._serve, args=(connected, place[0]), daemon=True).start()
                except RuntimeError:  # no more threads
                    connected.close()
                    self._claim(connected)

    def _send_away(self) -> None:
        """Closes the oldest connections where too many prove nothing, so that strangers leave room for processes.

        None that ``_claim`` has taken is among them: a process that has been told that it is in stays in.
        """
        with self._lock:
            many = len(self._proving) - self._count - _STRANGERS
            for connected, since in list(self._proving.items())[: max(many, 0)]:
                if time.monotonic() - since > _SECONDS_TO_LINGER:
                    del self._proving[connected]
                    with contextlib.suppress(OSError):
                        connected.shutdown(socket.SHUT_RDWR)  # which wakes its thread; close would not

    def _claim(self, connected: socket.socket) -> bool:
        """Takes a connection out of those that may be sent away; False: it has been."""
        with self._lock:
            return self._proving.pop(connected, None) is not None

    def _serve(self, connected: socket.socket, address: str) -> None:
        hello = None
        try:
            connection = Connection(connected)
            hello = admit(connection, self._secret, lambda: self._claim(connected))
        except WrongSecret:
            if len(self._refused) < _STRANGERS:
                self._refused[address] = None
        except OSError:  # it has gone
            connected.close()
        finally:
            self._claim(connected)
        if hello is None:
            return
        process = hello["process"]
        with self._lock:
            wrong = None
            if hello["of"] != self._count:
                wrong = f"says that it is one of {hello['of']} processes, process 0 that there are {self._count}"
            elif process in self._connections:
                wrong = f"is there twice: {hello['host']} and {self._hosts[process]} both have that number"
            else:
                self._connections[process], self._hosts[process] = connection, hello["host"]
            complete, failure = len(self._connections) == self._count, self._failure
        if wrong:
            failure = Failure(process, hello["host"], wrong, 2)
        if failure is not None:  # its own, or of one that joined earlier
            connection.send({"failed": failure})
        if wrong:
            self._fail(failure)
            return
        if complete:
            self._send_all({"hosts": [self._hosts[process] for process in range(self._count)]})
        while isinstance(message := connection.receive(), dict):
            self._handle(process, message)
        self._ended.put(process)
        if not self._finished:
            self._fail(Failure(process, self._hosts[process], LOST, LOST_CODE))
        connection.close()

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
                self._send_all({"gathered": name, "values": [values[i] for i in range(self._count)]})
        elif "stop" in message:
            with self._lock:
                first, self._signal = self._signal is None, self._signal or message["stop"]
            if first:
                self._send_all({"stopping": True})
        elif "steps" in message:
            with self._lock:
                self._steps[process] = message["steps"]
                complete = len(self._steps) == self._count
            if complete:
                self._send_all({"stop_at": max(self._steps.values()) + 1, "number": self._signal})

    def _send_all(self, message: dict) -> None:
        """To process 0 last: it may end then, and the others have the message."""
        for process in sorted(self._connections, reverse=True):
            self._connections[process].send(message)

    def _fail(self, failure: Failure) -> None:
        """Sends the first failure, which is the cause, to all; what follows from it is not sent."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure, connections = failure, dict(self._connections)
        lead = connections.pop(0, None)
        for connection in connections.values():
            connection.send({"failed": failure})
        deadline, waiting = time.monotonic() + SECONDS_TO_END, set(connections)
        while waiting and (left := deadline - time.monotonic()) > 0:
            try:
                waiting.discard(self._ended.get(timeout=left))
            except queue.Empty:
                break
        if lead is not None:
            lead.send({"failed": failure})


class Channel:
    """A process's connection to the hub. ``on_failure`` is called, in a thread, when another process has failed."""

    def __init__(
        self,
        address: tuple[str, int],
        process: int,
        num_processes: int,
        secret: str,
        hub: Hub | None,
        on_failure: Callable[[Failure], None],
    ):
        """Returns when all processes have joined.

        Raises ProcessesMissing naming those that did not within five minutes, WrongSecret.
        """
        self.process, self.num_processes = process, num_processes
        self._on_failure, self._changed = on_failure, threading.Condition()
        self._failing = self._left = self._stopping = False
        self._cause: Failure | None = None  # why the run ends, as the hub has sent it
        self._gathered: dict[str, list] = {}
        self._gathers = 0  # calls of ``gather``
        self._steps, self._stop = 0, None
        self.hosts: list[str] = []  # of every process, by number
        deadline = time.monotonic() + SECONDS_TO_JOIN
        hello = {"process": process, "of": num_processes, "host": socket.gethostname()}
        self._connection = _connect(address, secret, hello, deadline)
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        with self._changed:
            complete = self._changed.wait_for(lambda: self.hosts, deadline - time.monotonic())
        if not complete:
            raise (
                hub.missing_error()
                if hub
                else ProcessesMissing(f"{_missing(num_processes)}: see why the others did not start")
            )

    def _listen(self) -> None:
        while isinstance(message := self._connection.receive(limit=LONGEST * self.num_processes), dict):  # all values
            failure = Failure(*message["failed"]) if "failed" in message else None
            with self._changed:
                self.hosts = message.get("hosts", self.hosts)
                self._stopping |= "stopping" in message
                if "gathered" in message:
                    self._gathered[message["gathered"]] = message["values"]
                    self._left |= message["gathered"] == "leave"
                if "stop_at" in message:
                    self._stop = message
                self._cause = self._cause or failure
                self._changed.notify_all()
                steps = self._steps
            if "stopping" in message:
                self._connection.send({"steps": steps})
            if failure is not None and not self._failing:
                self._on_failure(failure)
        if not (self._left or self._failing):
            self._on_failure(Failure(0, self.hosts[0] if self.hosts else "the coordinator", LOST, LOST_CODE))

    def gather(self, value: Any) -> list:
        """``value`` (JSON) of every process, by number. Every process must call it, as often as the others.

        Raises UserError where ``value`` is too long for a message.
        """
        self._gathers += 1
        return self._gather(f"value {self._gathers}", value)

    def _gather(self, name: str, value: Any) -> list:
        self._connection.send({"gather": name, "value": value}, LONGEST)
        with self._changed:
            self._changed.wait_for(lambda: name in self._gathered)
            return self._gathered.pop(name)

    def fail(self, error: str, code: int) -> Failure:
        """Sends all processes the reason why this one ends.

        Returns when they have it, and in process 0 when they have ended: why the run ends, which is this reason or
        the one that another process had sent before.
        """
        own = Failure(self.process, socket.gethostname(), error, code)
        with self._changed:
            self._failing = True
        self._connection.send({"failed": own})
        with self._changed:
            self._changed.wait_for(lambda: self._cause, SECONDS_TO_END + 1)
            return self._cause or own

    def agree_on_stop(self, number: int | None) -> int | None:
        """The signal because of which all processes stop after this step; None: they go on. Call it after every step.

        ``number``: the signal that came to this process, None without one. From the first signal on every process
        waits here and sends the number of steps after which it went on: the run stops after the first step that no
        process has passed. Steps are the calls of this method.
        """
        with self._changed:
            if number is not None and not self._stopping:
                self._stopping = True
                self._connection.send({"stop": int(number)})
            self._changed.wait_for(lambda: self._stop or not self._stopping)
            if self._stop and self._steps + 1 >= self._stop["stop_at"]:
                return self._stop["number"]
            self._steps += 1
            return None

    @property
    def stopping(self) -> bool:
        """Whether the processes have agreed on a step after which the run stops."""
        return self._stop is not None

    def leave(self) -> None:
        """Returns when every process has called it: a failure until then is a failure of all."""
        self._gather("leave", os.getpid())
        self._connection.close()


def _missing(num_processes: int) -> str:
    return f"several processes: not all {num_processes} joined within {SECONDS_TO_JOIN:.0f} seconds"


def _connect(address: tuple[str, int], secret: str, hello: dict, deadline: float) -> Connection:
    """Tries until ``deadline``: process 0 may start after this one, and its name be known later still."""
    place = f"{address[0]}:{address[1]}"
    while True:
        try:
            connection = Connection(socket.create_connection(address, timeout=10))
            if introduce(connection, secret, hello, deadline - time.monotonic()):
                return connection
            connection.close()
            reason = "what listens there is not process 0 of a run, or has ended"
        except WrongSecret as error:
            raise WrongSecret(
                f"several processes: process 0 at {place} {error}: expected the same in all of them: set "
                f"{SECRET} alike where each is started, or choose another --coordinator if another run is at {place}"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise ProcessesMissing(
                f"several processes: process 0 does not answer at {place} ({reason}): see that it runs, that the port "
                "is open, and that --coordinator names its machine"
            )
        time.sleep(0.2)
