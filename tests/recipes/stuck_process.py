"""`postrain train` on a stream whose storage stops to answer before its tenth batch, and which then gets a SIGTERM.

python stuck_process.py train --config=...
"""

import os
import signal
import sys
import threading
import time

from postrain import cli
from postrain.data.batches import streamed as stream

if __name__ == "__main__":
    next_batch, calls = stream.ShardBatches.next_batch, []

    def give_or_wait(*arguments):
        calls.append(1)
        if len(calls) == 10:
            print("stuck", flush=True)
            threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM)).start()  # the batches before are used up
            time.sleep(300)
        return next_batch(*arguments)

    stream.ShardBatches.next_batch = give_or_wait
    sys.exit(cli.main(sys.argv[1:]))
