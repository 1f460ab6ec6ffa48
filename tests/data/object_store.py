"""An S3-compatible object store on loopback (moto's server), with a proxy before it that does what networks do."""

import contextlib
import http.client
import http.server
import pathlib
import socket
import struct
import threading
import time

import s3fs
from moto.server import ThreadedMotoServer

BUCKET = "corpus"
FAULTS = ("error", "reset", "short", "lie", "stall")


class FaultProxy:
    """Hands requests on to a store.

    ``faults`` is what happens to the coming reads of contents, in their order; None leaves one alone:
    "error" (503), "reset" (connection reset in mid-body), "short" (body ends too early), "lie" (a whole answer of fewer
    bytes than asked for), "stall" (nothing more comes), "denied" (403).
    ``away``: every connection is dropped without an answer. ``reads``: (path, range) of the contents handed out whole.
    """

    def __init__(self, target_port: int):
        self.target_port, self.faults, self.reads, self.away = target_port, [], [], False
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def log_message(self, *_) -> None:
        """Says nothing."""

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.proxy.away:
            return self._reset()
        store = http.client.HTTPConnection("127.0.0.1", self.proxy.target_port)
        store.request(self.command, self.path, body=body, headers=dict(self.headers))
        answer = store.getresponse()
        data = answer.read()
        store.close()
        wanted = self.headers.get("Range")
        fault = self.proxy.faults.pop(0) if wanted and self.command == "GET" and self.proxy.faults else None
        if fault in ("error", "denied"):
            status, data, headers = (503, b"", []) if fault == "error" else (403, b"", [])
        else:
            status, headers = answer.status, answer.getheaders()
        sent = data if fault is None else data[: len(data) // 2]
        length = len(sent) if fault in ("lie", "error", "denied") else len(data)
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(key, value)
        if self.command == "HEAD":
            length = answer.getheader("Content-Length", "0")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if fault is None and wanted:
            self.proxy.reads.append((self.path, wanted))
        if fault == "stall":
            self.wfile.flush()
            self.proxy.released.wait(30)
        if fault == "reset":
            self._reset()
        self.close_connection = self.close_connection or fault is not None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextlib.contextmanager
def serve_store(monkeypatch):
    """A proxy before an empty store with the bucket ``BUCKET``, which s3fs uses while this lasts.

    The libraries' own tries (5 of s3fs, 5 of botocore) are switched off: ours are what is tested.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = FaultProxy(port)
    for key, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield proxy
    finally:
        s3fs.S3FileSystem().rm(BUCKET, recursive=True)
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.stop()
        server.stop()


def upload(path: pathlib.Path | bytes, name: str) -> str:
    """Puts a file or bytes into the bucket and gives its URL."""
    data = path if isinstance(path, bytes) else path.read_bytes()
    s3fs.S3FileSystem().pipe_file(f"{BUCKET}/{name}", data)
    return f"s3://{BUCKET}/{name}"


def come_back(proxy: FaultProxy, seconds: float) -> threading.Thread:
    """The store answers again after so many seconds."""

    def wait():
        time.sleep(seconds)
        proxy.away = False

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
