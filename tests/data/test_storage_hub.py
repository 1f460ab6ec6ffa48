"""hf:// by the real client, from a server that answers as the hub's own does for a data set."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import HfFileSystem
from tiny_models import make_tiny_model

from postrain.data.files import storage
from postrain.data.files.formats import list_blocks, read_block
from postrain.data.files.hub import find_commit
from postrain.data.files.storage import StorageOptions, StoredFile, list_files
from postrain.errors import UserError

QUICK = StorageOptions(tries=3, timeout=20.0, first_wait=0.01)


class Hub(http.server.BaseHTTPRequestHandler):
    """One data set, o/d, whose branch ``main`` is the last of its commits."""

    protocol_version = "HTTP/1.1"
    commits, questions, faults, url = {}, [], [], ""

    @classmethod
    def commit(cls, **files):
        cls.commits[hashlib.sha1(repr(files).encode()).hexdigest()] = files

    def log_message(self, *_):
        """Says nothing."""

    def _send(self, status, data, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"(?:/api)?/datasets/o/d/(revision|tree|resolve)/(\w+)/?(.*)", path)
        what, revision, name = found.groups() if found else ("revision", "main", "")
        commit = list(self.commits)[-1] if revision == "main" else revision
        files = self.commits.get(commit, {})
        if not found and path != "/api/datasets/o/d":
            return self._send(404, b"{}", X_Error_Code="RepoNotFound")
        if what == "resolve":
            start, end = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["range"]).groups()
            fault = self.faults.pop(0) if self.faults else None
            return self._send(fault or 206, b"" if fault else files[name][int(start) : int(end) + 1])
        self.questions.append(path)
        if what == "revision":
            return self._send(200, json.dumps({"id": "o/d", "sha": commit}).encode())
        tree = [
            {"type": "file", "path": n, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for n, data in files.items()
        ]
        return self._send(200, json.dumps(tree).encode())


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(storage, "PIECE", 30_000)
    for kept in (Hub.commits, Hub.questions, Hub.faults):
        kept.clear()
    Hub.url = url
    yield Hub
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def lines_of(letter):
    return b"".join(b'{"text": "%s%d"}\n' % (letter, i) for i in range(4000))


def texts(blocks):
    return [raw["text"] for block in blocks for _, raw in read_block(block, "s", QUICK)]


def test_a_data_set_of_the_hub_is_read_at_one_commit(hub):
    hub.commit(**{"README.md": b"1", "a.jsonl": lines_of(b"a"), "b.jsonl": lines_of(b"b")})
    files = list_files("hf://datasets/o/d", QUICK)
    version = hashlib.sha1(lines_of(b"a")).hexdigest()
    assert files[0] == StoredFile("hf://datasets/o/d/a.jsonl", len(lines_of(b"a")), version)
    assert files == list_files("hf://datasets/o/d/*.jsonl", QUICK)
    blocks = list_blocks(files, 10_000, QUICK)
    rows = [f"{letter}{i}" for letter in "ab" for i in range(4000)]
    hub.faults[:] = [None, 503]
    assert texts(blocks) == rows and not hub.faults
    hub.questions.clear()
    hub.commit(**{"README.md": b"2", "a.jsonl": lines_of(b"A"), "b.jsonl": lines_of(b"b")})
    assert texts(blocks) == rows and not hub.questions  # nothing is asked again for each block
    find_commit.cache_clear()  # as another process begins
    with pytest.raises(UserError, match=f"a.jsonl has changed since it was listed .* version {version}; now"):
        texts(blocks[:1])
    assert texts(b for b in blocks if b.file == files[1]) == rows[4000:]


def test_what_is_not_on_the_hub_is_named(hub):
    hub.commit(**{"a.jsonl": b"{}\n"})
    for url in ("hf://datasets/o/d/b.jsonl", "hf://datasets/o/nothing/a.jsonl"):
        with pytest.raises(UserError, match=f"{url} matches no file"):
            list_files(url, QUICK)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_command_line_reads_from_the_hub(hub, tmp_path, streaming):
    """In a process of its own, as the client decides when it is loaded whether it may ask the hub at all."""
    hub.commit(**{"a.jsonl": b'{"text": "out of the hub"}\n' * 8})
    model = make_tiny_model(tmp_path / "model", "llama", vocab_size=301)
    url, config = "hf://datasets/o/d/a.jsonl", tmp_path / "c.py"
    values = {"model": {"path": str(model)}, "data": {"train": url, "streaming": streaming}, "train": {"steps": 1}}
    config.write_text(f"def get_config(arg=None):\n    return {values!r}\n")
    command = [sys.executable, "-m", "postrain.cli", "preview", f"--config={config}"]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0 and "of the hub<|im_end|>" in result.stdout, result.stderr
    begun = time.monotonic()
    environment["HF_HUB_OFFLINE"] = "1"
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 2 and time.monotonic() - begun < 20  # eight tries would take a minute
    assert result.stderr == f"error: {url} cannot be read: HF_HUB_OFFLINE is set in the environment: unset it\n"
