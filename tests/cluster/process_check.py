"""One of the processes of test_processes.py: joins the others and runs the test's case. Only one case needs jax.

python process_check.py COORDINATOR COUNT PROCESS CASE
"""

import json
import os
import signal
import socket
import sys
import time

from postrain.cluster import processes
from postrain.cluster.discover import find_cluster
from postrain.errors import UserError


def block():
    """In a system call, as in a collective: nothing but a thread can end it."""
    os.read(os.pipe()[0], 1)


def run(case, process):
    channel = processes.current().channel
    if case == "gather":
        print(json.dumps([channel.gather(process), channel.gather({"twice": process * 2})]))
    elif case.startswith("error"):
        if process == int(case[-1]):
            time.sleep(0.2)
            raise UserError("data.jsonl:7: no\nassistant message")
        block()
    elif case.startswith("bug"):
        if process == int(case[-1]):
            raise ZeroDivisionError("by zero")
        block()
    elif case == "consequence":  # process 1 is killed, which gives the others errors of their own
        if process == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("Gloo: connection closed by peer")
    elif case.startswith("killed"):
        if process == int(case[-1]):
            os.kill(os.getpid(), signal.SIGKILL)
        block()
    elif case == "last":  # one fails when the others have done their work
        if process == 2:
            time.sleep(0.5)
            raise UserError("late")
    elif case == "stop":
        train_until_stopped(process)
    elif case == "jax":
        processes.current().start_jax()
        host, port = processes.current().cluster.coordinator.split(":")
        for address in (host, "127.0.0.1"):
            with socket.socket() as probe:
                print(address, probe.connect_ex((address, int(port))) == 0)
    elif case.startswith("share "):
        from postrain.training import agreement

        agreement._SECONDS_TO_SEE = 1.0
        agreement.check_shared(processes.current(), case.removeprefix("share "))


def train_until_stopped(process):
    """Processes that are up to two steps apart; process 1 gets the signal, and process 2 another a little later."""
    request = None
    for step in range(1, 2000):
        if (process, step) in ((1, 50), (2, 52)):
            request = signal.SIGTERM
        time.sleep(0.0005 * ((step * 7 + process) % 3))
        number = processes.agree_on_stop(request)
        if number:
            print(f"stopped after {step}")
            raise SystemExit(128 + number)


if __name__ == "__main__":
    coordinator, count, process, case = sys.argv[1:]
    explain = lambda error: "the disk is full" if isinstance(error, OSError) else None
    try:
        with processes.join(find_cluster(coordinator, int(count), int(process)), explain):
            run(case, int(process))
    except UserError as error:  # from before all had joined
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print("done")
