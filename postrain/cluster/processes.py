"""Several processes as one run: started from the environment, stopped together, each with its log.

``join`` meets the other processes before anything else, so that whatever goes wrong in one of them from then on, a
config that is not there as much as a full disk at step 10,000, ends all of them with that error within seconds. An
error ends a process by ``os._exit``: the others no longer take part in what jax and Orbax would still wait for.
One process alone meets nobody, and everything here leaves it as it is.
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
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from postrain.cluster.channel import Channel, Failure, Hub
from postrain.cluster.discover import Cluster
from postrain.errors import UserError

LOGS = "logs"  # in the workdir
HANG = 124  # exit code after a hang, as `timeout` has it
_HEARTBEAT_SECONDS = 3600  # the channel knows earlier, and why
_SHUTDOWN_SECONDS = 30
# What fails because another process has ended is told after that one's end is known, which comes by another way.
_SECONDS_TO_HEAR = {UserError: 0.5, Exception: 3.0}


class Processes:
    """This process among those of the run."""

    def __init__(self, cluster: Cluster, explain: Callable[[Exception], str | None]):
        """Returns when all have met. ``explain``: one line for an error that is the machine's, None for a bug."""
        self.cluster, self._explain = cluster, explain
        self._terminal, self._ending = sys.stderr, threading.Lock()
        hub = Hub(cluster.control[1], cluster.num_processes) if cluster.process_id == 0 else None
        host, port = cluster.control
        address = ("127.0.0.1" if hub else host, port)
        self.channel = Channel(address, cluster.process_id, cluster.num_processes, hub, self._stop_with)

    @property
    def index(self) -> int:
        return self.cluster.process_id

    def start_jax(self) -> None:
        """``jax.distributed``; must come before anything asks jax for a device."""
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # jax's own SIGTERM handler would swallow the signal until somebody asks for it.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                self.cluster.coordinator,
                self.cluster.num_processes,
                self.index,
                local_device_ids=self.cluster.local_device_ids,
                cluster_detection_method="deactivate",
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
        """From now on what this process prints is in ``workdir/logs/process-00001.log``; the first one's is not."""
        if self.index == 0:
            return
        path = pathlib.Path(workdir) / LOGS / f"process-{self.index:05}.log"
        try:
            path.parent.mkdir(exist_ok=True)
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another --workdir") from error
        _flush()
        self._terminal = os.fdopen(os.dup(2), "w")
        for number in (1, 2):  # what libraries of C++ print, too
            os.dup2(log, number)
        os.close(log)
        sys.stdout.reconfigure(line_buffering=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} process {self.index} of {self.cluster.num_processes} on {socket.gethostname()}, {os.getpid()}")

    def _stop_with(self, failure: Failure) -> None:
        """In the channel's thread: another process has failed."""
        with self._ending:
            _flush()
            print(f"error: {failure}", file=sys.stderr)
            if failure.code == HANG:  # this process may be the one for which that one waited
                faulthandler.dump_traceback(sys.stderr)
            if failure.process == 0 and self._terminal is not sys.stderr:  # whose terminal shows nothing more
                print(f"error: {failure}", file=self._terminal, flush=True)
            _exit(failure.code)

    def stop_all(self, error: BaseException) -> None:
        """Ends all processes, this one too, because of ``error`` in this one. Does not return."""
        seconds = _SECONDS_TO_HEAR[UserError if isinstance(error, UserError) else Exception]
        threading.Event().wait(seconds)
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
        """Returns when all processes have come to their end."""
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            sys.modules["jax"].distributed.shutdown()
        self.channel.leave()


_current: Processes | None = None


def current() -> Processes | None:
    """The processes of this run; None where this is the only one."""
    return _current


@contextlib.contextmanager
def join(cluster: Cluster | None, explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """The run of the block is one of ``cluster``: it begins when all processes are there and ends when all are done."""
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
    """An exception in the block ends all processes at once, before anything is cleaned up that would wait for them."""
    try:
        yield
    except BaseException as error:
        if _current is None or (isinstance(error, SystemExit) and _current.channel.stopping):
            raise
        _current.stop_all(error)


def agree_on_stop(number: int | None) -> int | None:
    """The signal because of which the run ends after this step: ``number``, or in several processes the one for which
    they all agreed on this step, whichever of them it came to. None: it goes on. To be asked once after each step."""
    return number if _current is None else _current.channel.agree_on_stop(number)


def meet() -> None:
    """Returns when all processes have called it: after compiling, which takes one longer than another, and before
    the first collective, which on CPUs waits for thirty seconds only."""
    if _current is not None:
        _current.channel.gather(None)


def gather(value: Any) -> list[Any]:
    """The JSON-able ``value`` of every process, in their order. To be called by all of them at the same point."""
    if _current is not None:
        return _current.channel.gather(value)
    import jax

    if jax.process_count() == 1:
        return [value]
    import numpy as np  # processes that were started by their own call of jax.distributed
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
