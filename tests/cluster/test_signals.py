"""The first signal is a request, the second one is obeyed at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from postrain.cluster.stopping import catch_stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with catch_stop_signals() as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        assert stop.number == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


@pytest.fixture
def default_interrupt():
    """^C as in a terminal: a job in the background starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_interrupt_interrupts(default_interrupt):
    with pytest.raises(KeyboardInterrupt), catch_stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_is_caught():
    found = []

    def work():
        with catch_stop_signals() as stop:
            found.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(("handler", "code", "output"), [("default_int_handler", 130, ""), ("SIG_IGN", 0, "went on")])
def test_an_import_cannot_swallow_an_interrupt(handler, code, output):
    text = f"""
import signal
from postrain.cli import ends_at_once
signal.signal(signal.SIGINT, signal.{handler})
with ends_at_once():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    print("went on")
"""
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (code, output)
    assert result.stderr == ("error: interrupted\n" if code else "")


PID_1 = """
import os, signal, sys
from postrain import cli

os.getpid = lambda: 1
signal.signal(signal.SIGTERM, signal.SIG_DFL)

def work(args, overrides):
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    print("begun", os.getppid(), flush=True)
    if sys.argv[-1] != "wait":
        return int(sys.argv[-1])
    while True:
        os.read(os.pipe()[0], 1)  # as in a compilation, where no Python handler would run

cli.run_import = work
sys.argv = ["postrain", "import", "x.gguf", sys.argv[-1]]
sys.exit(cli.main())
"""


def start_as_pid_1(word):
    """The program as a container's first process would run it, and the parent that its work sees."""
    process = subprocess.Popen([sys.executable, "-c", PID_1, word], stdout=subprocess.PIPE, text=True)
    begun, parent = process.stdout.readline().split()
    assert begun == "begun"
    return process, int(parent)


@pytest.mark.parametrize("code", [0, 2, 124])
def test_pid_1_ends_as_its_child_does(code):
    process, parent = start_as_pid_1(str(code))
    assert parent == process.pid and process.communicate(timeout=30)[0] == "" and process.returncode == code


def test_pid_1_passes_a_signal_on_and_ends_as_a_shell_would():
    """To PID 1 the kernel gives only what is waited for or handled, so no default action may be counted on."""
    process, parent = start_as_pid_1("wait")
    assert parent == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
