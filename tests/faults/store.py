"""An S3-compatible object store (moto's server) in a process of its own, which runs outlive and which can be killed.

It keeps everything in its memory: started again, it gets the same objects, with the same ETags, before it answers.

python store.py PORT FOLDER
"""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

BUCKET = "corpus"
ENVIRONMENT = {  # the libraries' own tries are switched off: ours are what is tested
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Store:
    """Holds the files of ``folder`` as ``s3://corpus/NAME``."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._log = folder, folder.parent / "store.log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        os.environ |= ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}"}
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            command = [sys.executable, __file__, str(self._port), str(self._folder)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
                break
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise SystemExit(f"no object store:\n{self._log.read_text()}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def import_s3() -> None:
    """As ``kills.warm_up``; s3fs makes no tries of its own from then on."""
    import s3fs

    s3fs.S3FileSystem.retries = 1


def serve(port: int, folder: pathlib.Path) -> None:
    """Filled at another port, since whoever waits for this one asks as soon as it answers."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    files = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    files.mkdir(BUCKET)
    for path in sorted(folder.iterdir()):
        files.pipe_file(f"{BUCKET}/{path.name}", path.read_bytes())
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    threading.Event().wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
