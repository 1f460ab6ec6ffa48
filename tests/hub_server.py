"""A server with the routes of the Hugging Face hub that ``huggingface_hub`` uses to read models and data sets."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading

LFS_BYTES = 2_000  # files of more bytes are stored apart and found by a redirect, as on the hub


class Repository:
    """Its branch ``main`` is its last commit. ``gated``: its files need a token; ``private``: all of it does."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.gated = self.private = False

    def commit(self, files) -> str:
        """Adds a commit of ``files``, a folder or {name: bytes}; returns its id."""
        if not isinstance(files, dict):
            files = {
                p.relative_to(files).as_posix(): p.read_bytes() for p in pathlib.Path(files).rglob("*") if p.is_file()
            }
        found = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[found] = dict(files)
        return found

    def head(self) -> str:
        """The id of the last commit."""
        return list(self.commits)[-1]


class HubServer(http.server.ThreadingHTTPServer):
    """``repositories`` by kind ("models", "datasets") and name; ``requests`` are all so far; ``faults``: status of the
    next requests for the content of a file, None for a good answer; ``fail``: status of every request."""

    daemon_threads = True
    token = "hf_good"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.faults: list[int | None] = []
        self.fail = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def repository(self, name: str, kind: str = "models") -> Repository:
        return self.repositories.setdefault((kind, name), Repository())

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent since ``requests`` was cleared."""
        return {r.split("/", 6)[-1] for r in self.requests if r.startswith("GET") and "/resolve/" in r}


@contextlib.contextmanager
def serve_hub():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""

    def _send(self, status, data=b"", **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status, code, message):
        self._send(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].replace("%2F", "/")
        self.server.requests.append(f"{self.command} {path}")
        if self.server.fail:
            return self._send(self.server.fail, b"{}")
        if stored := re.fullmatch(r"/lfs/(\w+)", path):
            return self._send_content(self._stored()[stored[1]])
        found = re.fullmatch(
            r"(?:/api)?(?:/(models|datasets))?/([\w.-]+/[\w.-]+?)(?:/(revision|tree|resolve)/(refs/pr/\d+|[^/]+)/?(.*))?",
            path,
        )
        kind, name, what, revision, file = found.groups() if found else ("", "", "", "", "")
        repository = self.server.repositories.get((kind or "models", name))
        allowed = self.headers.get("authorization") == f"Bearer {self.server.token}"
        if repository is None or (repository.private and not allowed):
            return self._refuse(404 if allowed else 401, "RepoNotFound", "Repository not found")
        revision = revision or "main"
        commit = repository.head() if revision == "main" else revision
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if what == "tree":
            return self._send(200, json.dumps([_entry(n, d) for n, d in files.items()]).encode())
        if what != "resolve":
            siblings = [{"rfilename": n} for n in files]
            return self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        if repository.gated and not allowed:
            return self._refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
        if file not in files:
            return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self._send_file(files[file], commit)

    def _send_file(self, data, commit):
        entry = _entry("", data)
        if "lfs" not in entry:
            return self._send_content(data, ETag=f'"{entry["oid"]}"', X_Repo_Commit=commit)
        where = f"{self.server.url.replace('127.0.0.1', 'localhost')}/lfs/{entry['lfs']['oid']}"
        linked = {"X_Linked_Etag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(len(data))}
        return self._send(302, b"", Location=where, X_Repo_Commit=commit, ETag='"redirect"', **linked)

    def _send_content(self, data, **headers):
        fault = self.server.faults.pop(0) if self.server.faults and self.command == "GET" else None
        if fault:
            return self._send(fault)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if span is None:
            return self._send(200, data, **headers)
        start, stop = int(span[1]), min(int(span[2] or len(data) - 1) + 1, len(data))
        return self._send(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}", **headers)

    def _stored(self):
        every = [f for r in self.server.repositories.values() for c in r.commits.values() for f in c.values()]
        return {hashlib.sha256(data).hexdigest(): data for data in every}


def _entry(name, data):
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) > LFS_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def point_at(monkeypatch, url: str, cache: pathlib.Path, *, offline: bool = False) -> None:
    """Has ``huggingface_hub``, which reads the environment when it is imported, use a server and a cache."""
    import huggingface_hub
    from huggingface_hub import constants

    from postrain.data.files import hub

    for name, value in (
        ("ENDPOINT", url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", offline),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_TOKEN_PATH", str(cache / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()
    huggingface_hub.utils.logging.set_verbosity_error()
    assert hub


def forget() -> None:
    """As another process begins: nothing of the hub is known."""
    from postrain.data.files import hub

    hub.fetch_small_files.cache_clear()
    hub.find_commit.cache_clear()
