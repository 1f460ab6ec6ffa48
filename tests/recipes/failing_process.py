"""`postrain train` in one of several processes, in which something happens before its third update.

python failing_process.py full 1 train --config=... --process-id=...      in process 1 the disk is full
python failing_process.py killed 0 train --config=... --process-id=...    process 0 is killed
"""

import errno
import os
import signal
import sys

from postrain import cli
from postrain.training.rows import Rows


def fail(what):
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, "No space left on device", "runs/x")


if __name__ == "__main__":
    what, process, *words = sys.argv[1:]
    next_batch, calls = Rows.__next__, []

    def next_or_fail(rows):
        calls.append(1)
        if len(calls) == 3 and f"--process-id={process}" in words:
            fail(what)
        return next_batch(rows)

    Rows.__next__ = next_or_fail
    sys.exit(cli.main(words))
