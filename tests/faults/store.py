"""An S3-compatible object store (moto's server) in a process of its own, which runs outlive and which can be killed.

It keeps everything in its memory: started again, it gets the same objects, with the same ETags, before it answers.
"""

import os
import pathlib
import socket
import subprocess
import sys
import time

import kills

BUCKET = "corpus"


class Store:
    """Holds the files of ``folder`` as ``s3://corpus/NAME``."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._log = folder, folder.parent / "store.log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{self._port}"
        os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        # The libraries' own tries are switched off: ours are what is tested.
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"no object store:\n{self._log.read_text()}") from None
                time.sleep(0.05)
        if kills.fork(self._upload, self._log):
            raise SystemExit(f"the object store takes nothing:\n{self._log.read_text()}")

    def _upload(self) -> None:
        """In a process of its own: s3fs has threads, of which a fork would keep nothing."""
        import s3fs

        s3fs.S3FileSystem().mkdir(BUCKET)
        for path in sorted(self._folder.iterdir()):
            s3fs.S3FileSystem().pipe_file(f"{BUCKET}/{path.name}", path.read_bytes())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def import_s3() -> None:
    """As ``kills.warm_up``; s3fs makes no tries of its own from then on."""
    import s3fs

    s3fs.S3FileSystem.retries = 1
