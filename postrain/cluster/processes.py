"""Several processes as one run: they join each other first, stop together, and each has its log.

``join`` comes before anything else, so that any error of one process from then on, a missing config as much as a full
disk at step 10,000, ends all of them with that error within seconds. An error ends a process by ``os._exit``: a normal
exit would have jax and Orbax wait for processes that take no part any more. In a run of one process nothing here does
anything.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from postrain.cluster.authentication import read_secret
from postrain.cluster.channel import Channel, Failure, Hub
from postrain.cluster.discover import Cluster
from postrain.errors import UserError

LOGS = "logs"  # in the workdir
HANG = 124  # exit code after a hang, as `timeout` has it
_HEARTBEAT_SECONDS = 3600  # the channel knows earlier, and why
_SHUTDOWN_SECONDS = 30
# Delay before an error is reported: if a peer's death caused it, that peer's own report arrives first.
_SECONDS_TO_HEAR = {UserError: 0.5, Exception: 3.0}


class Processes:
    """This process among those of the run."""

    def __init__(self, cluster: Cluster, explain: Callable[[Exception], str | None]):
        """Returns when all processes have joined.

        ``explain``: one line for an error that is the machine's, None for a bug. Raises UserError: no secret or
        another one than the others have, an address or port that cannot be listened on, processes missing.
        """
        self.cluster, self._explain = cluster, explain
        self._terminal, self._ending = sys.stderr, threading.Lock()
        secret = read_secret(cluster.num_processes)
        lead = cluster.process_id == 0
        self._hub = Hub(cluster.channel_address, cluster.num_processes, secret) if lead else None
        address = self._hub.address if lead else cluster.channel_address
        self.channel = Channel(address, self.index, cluster.num_processes, secret, self._hub, self._stop_with)

    @property
    def index(self) -> int:
        return self.cluster.process_id

    def start_jax(self) -> None:
        """Calls ``jax.distributed.initialize``; must come before anything asks jax for a device.

        jax's own service listens on the hub's address, too, one port before it.
        """
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # jax's own SIGTERM handler would swallow the signal until somebody asks for it.
        jax.config.update("jax_enable_preemption_service", False)
        bind = None
        if self._hub is not None:
            host, port = self._hub.address
            bind = f"[{host}]:{port - 1}" if ":" in host else f"{host}:{port - 1}"
        try:
            jax.distributed.initialize(
                self.cluster.coordinator,
                self.cluster.num_processes,
                self.index,
                local_device_ids=self.cluster.local_device_ids,
                cluster_detection_method="deactivate",
                coordinator_bind_address=bind,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"several processes: jax.distributed did not start with coordinator {self.cluster.coordinator} "
                f"({reason}): choose another --coordinator=HOST:PORT"
            ) from error

    def start_log(self, workdir: str | os.PathLike) -> None:
        """Sends what this process prints to ``workdir/logs/process-00001.log``; process 0 keeps the terminal."""
        if self.index == 0:
            return
        path = pathlib.Path(workdir) / LOGS / f"process-{self.index:05}.log"
        try:
            path.parent.mkdir(exist_ok=True)
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another --workdir") from error
        _flush()
        self._terminal = os.fdopen(os.dup(2), "w", errors="backslashreplace")
        # The descriptors, so that it holds for C++ libraries too.
        for number in (1, 2):
            os.dup2(log, number)
        os.close(log)
        sys.stdout.reconfigure(line_buffering=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} process {self.index} of {self.cluster.num_processes} on {socket.gethostname()}, {os.getpid()}")

    def _stop_with(self, failure: Failure) -> None:
        """Ends this process because another one has failed; called in the channel's thread."""
        with self._ending:
            _flush()
            print(f"error: {failure}", file=sys.stderr)
            if failure.code == HANG:  # that process may have waited for this one
                faulthandler.dump_traceback(sys.stderr)
            if failure.process == 0 and self._terminal is not sys.stderr:  # its terminal shows nothing more
                print(f"error: {failure}", file=self._terminal, flush=True)
            _exit(failure.code)

    def stop_all(self, error: BaseException) -> None:
        """Ends all processes, this one too, because of ``error`` in this one. Does not return."""
        time.sleep(_SECONDS_TO_HEAR[UserError if isinstance(error, UserError) else Exception])
        if isinstance(error, UserError):
            message, code = str(error), error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            message, code = "interrupted", 130
        elif isinstance(error, SystemExit):
            message, code = f"exit code {error.code}", error.code if isinstance(error.code, int) else 1
        else:
            known = self._explain(error) if isinstance(error, Exception) else None
            if known is None:
                traceback.print_exception(error)
            message, code = known or f"{type(error).__name__}: {error}", 1
        message = " ".join(message.splitlines())
        with self._ending:
            cause = self.channel.fail(f"stopped: {message}", code)
            _flush()
            print(f"error: {message if cause.process == self.index else cause}", file=sys.stderr)
            _exit(cause.code)

    def leave(self) -> None:
        """Returns when all processes have done their work."""
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            sys.modules["jax"].distributed.shutdown()
        self.channel.leave()


_current: Processes | None = None


def current() -> Processes | None:
    """The processes of this run; None if this is the only one."""
    return _current


@contextlib.contextmanager
def join(cluster: Cluster | None, explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Runs the block as one process of ``cluster``: from when all have joined until all are done."""
    global _current
    if cluster is None:
        yield
        return
    _current = Processes(cluster, explain)
    with stop_all_on_error():
        stopped = None
        try:
            yield
        except SystemExit as stop:  # after a signal, for which all have agreed on a step
            if not _current.channel.stopping:
                raise
            stopped = stop
        _current.leave()
    _current = None
    if stopped is not None:
        raise stopped


@contextlib.contextmanager
def stop_all_on_error() -> Iterator[None]:
    """Ends all processes on an exception in the block, before any clean-up that would wait for the others."""
    try:
        yield
    except BaseException as error:
        if _current is None or (isinstance(error, SystemExit) and _current.channel.stopping):
            raise
        _current.stop_all(error)


def agree_on_stop(number: int | None) -> int | None:
    """The signal because of which the run stops after this step; None: it goes on. Call it once after each step.

    ``number``: the signal that came to this process, None without one. Several processes all get the same answer after
    the same step, whichever of them the signal came to.
    """
    return number if _current is None else _current.channel.agree_on_stop(number)


def barrier() -> None:
    """Returns when all processes have called it.

    For between compiling, which takes some processes longer, and the first collective, which on CPUs waits for thirty
    seconds only.
    """
    if _current is not None:
        _current.channel.gather(None)


def gather(value: Any) -> list[Any]:
    """``value`` (JSON) of every process, by number. Every process must call it at the same point."""
    if _current is not None:
        return _current.channel.gather(value)
    import jax

    if jax.process_count() == 1:
        return [value]
    # The program that called us has called jax.distributed itself, so that there is no channel.
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes.tolist(), strict=True)]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed terminal
            stream.flush()


def _exit(code: int) -> None:
    _flush()
    os._exit(code)
