"""Lists and opens files of data: local, ``s3://``, ``gs://``, ``hf://``, any path that fsspec knows.

A remote file is read in pieces, each by its own request for a range of bytes. A request that fails or hangs is repeated
for the same range (``postrain.data.files.remote``): no byte is read twice, and a body that ends too early is never
mistaken for the end of the file. Pieces may be kept in a folder of limited size.

The libraries below find the credentials (environment, their own files, the machine's role).
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from postrain.data.files import hub
from postrain.data.files.remote import PieceCache, StorageOptions, real_error, retry
from postrain.errors import UserError

PIECE = 8 << 20  # bytes of one request
TAIL = 256 << 10  # bytes of a request where less than a piece is known to be needed
LISTING = 10  # a listing may take so many times the time-out of a request: it consists of many requests
FORMATS = {  # by the suffix
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".ndjson.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".ndjson.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
_DESCRIPTIONS = (".json", ".csv", ".tsv")  # in a folder of data these are rather about it
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "LastModified", "last_modified", "updated")
DEFAULTS = StorageOptions()


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """``url`` is an absolute path where the file is local; ``version`` changes with the contents (ETag, else time)."""

    url: str
    bytes: int
    version: str


def list_files(paths: str | Sequence[str], options: StorageOptions = DEFAULTS) -> list[StoredFile]:
    """The files at a path or at each of several, in their order; those of one path are sorted by name.

    A path is a file, a folder, a glob or has braces: ``part-{00000..00031}.jsonl``, ``{a,b}/*.parquet``. A folder that
    ``datasets`` saved is the Arrow files that its state.json lists, in that order. Any other folder is all files in it
    with a suffix of ``FORMATS``, but no ``.json``, ``.csv`` or ``.tsv``, which rather describe the data there; names
    with ``_`` in front are left out of it, and those with ``.`` of globs too. Where a glob or a folder gives shards
    named ``NAME-00000-of-00032``, all 32 must be there.

    Raises:
      UserError: nothing there, a missing shard, a file listed twice, a folder of several splits, a storage that
        refuses or does not answer, a package that is not installed.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    files: list[StoredFile] = []
    for path in paths:
        if not path:
            raise UserError("a path is empty: expected a file, a glob or a folder of data")
        fs, inner = _filesystem(path)
        found = _list_one(fs, inner, path, options)
        files += found or _list_braces(fs, path, options)
    seen = set()
    for file in files:
        if file.url in seen:
            raise UserError(f"{file.url} is listed twice by {', '.join(paths)}: its rows would be read twice")
        seen.add(file.url)
    return files


def source_name(path: str) -> str:
    """The default name of a source: the last part of its path, without the suffix of its format."""
    last = path.rstrip("/").rpartition("/")[2]
    suffix = max((s for s in FORMATS if last.endswith(s)), key=len, default="")
    return last.removesuffix(suffix) if suffix else pathlib.PurePath(last).stem


def open_file(
    file: StoredFile, options: StorageOptions = DEFAULTS, start: int = 0, stop: int | None = None
) -> BinaryIO:
    """A seekable binary file at position ``start``.

    ``stop`` is a hint for the size of requests: all bytes up to it will be read, and few after it. None: single ranges
    will be read.

    Raises:
      UserError: here or in any read, if the storage refuses access or ``options.tries`` requests for the same bytes
        have failed; here, if the file has changed since it was listed.
    """
    fs, path = _filesystem(file.url)
    check_unchanged(file, options)
    if isinstance(fs, LocalFileSystem):
        try:
            reader: BinaryIO = open(file.url, "rb", buffering=1 << 20)
        except OSError as e:
            raise UserError(f"{file.url} cannot be read: {e.strerror}") from e
    else:
        path = retry(options, file.url, lambda: _pin(fs, path)[0])
        reader = io.BufferedReader(_RemoteReader(file, fs, path, options, stop), buffer_size=64 << 10)
    reader.seek(start)
    return reader


def read_if_there(url: str, options: StorageOptions = DEFAULTS) -> bytes | None:
    """The whole content of a small file; None where there is none. Raises UserError as ``open_file``."""
    fs, path = _filesystem(url)

    def look() -> dict | None:
        try:
            return _info(fs, path)
        except FileNotFoundError as e:
            if not isinstance(real_error(e), FileNotFoundError):
                raise
            return None

    info = retry(options, url, look)
    if info is None or info["type"] == "directory":
        return None
    file = _local_file(path) if isinstance(fs, LocalFileSystem) else _stored_file(url, info)
    with open_file(file, options, 0, file.bytes) as reader:
        return reader.read()


def check_unchanged(file: StoredFile, options: StorageOptions = DEFAULTS) -> None:
    """Raises UserError if the stored file has changed since it was listed."""
    fs, path = _filesystem(file.url)
    if isinstance(fs, LocalFileSystem):
        try:
            found = _local_file(path)
        except OSError as e:
            raise UserError(f"{file.url} cannot be read: {e.strerror}") from e
    else:
        found = _stored_file(file.url, retry(options, file.url, lambda: _info(fs, path)))
    if found != file:
        raise UserError(
            f"{file.url} has changed since it was listed ({file.bytes} bytes, version {file.version}; now "
            f"{found.bytes} bytes, version {found.version}): restore it, or start again with the data as they are now"
        )


def is_local(url: str) -> bool:
    return isinstance(_filesystem(url)[0], LocalFileSystem)


def parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """``function`` of each item, in order; in 16 threads, since each call mostly waits for an answer."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def local_copy(file: StoredFile, options: StorageOptions = DEFAULTS) -> Iterator[str]:
    """A path on the disk for readers that need one. The copy of a remote file is anonymous: it ends with the process.

    Raises:
      UserError: as ``open_file``; the copy cannot be written.
    """
    if is_local(file.url):
        check_unchanged(file)
        yield file.url
        return
    with contextlib.ExitStack() as stack:
        try:
            if options.cache_folder:
                pathlib.Path(options.cache_folder).mkdir(parents=True, exist_ok=True)
            copy = stack.enter_context(tempfile.TemporaryFile(dir=options.cache_folder or None))
            with open_file(file, options, 0, file.bytes) as source:
                shutil.copyfileobj(source, copy, PIECE)
            copy.flush()
        except OSError as e:
            raise UserError(
                f"{file.url} is read from a copy on the disk, and its {file.bytes} bytes could not be written ({e}): "
                "free some space, or name another cache folder"
            ) from e
        yield f"/dev/fd/{copy.fileno()}"


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL (one per process: fsspec keeps them) and the path in it.

    Without access to the Hugging Face hub, what its cache holds is local.
    """
    if ":" in url and "://" not in url and os.path.exists(url):
        if "::" in url:
            raise UserError(f"{url}: '::' stands between file systems, as in zip://x.jsonl::file:///a.zip: rename it")
        return LocalFileSystem(), os.path.abspath(url)  # file:a may be a name, too
    if url.startswith("hf://") and hub.is_offline():
        url = hub.cached_path(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as e:
        protocol = url.partition("::")[2].partition("://")[0] or url.partition("://")[0]
        advice = f": pip install -e '.[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else ""
        raise UserError(f"{url} needs a package that is not installed: {e}{advice}") from e
    except ValueError as e:
        raise UserError(f"{url} cannot be read: {e}; expected a path or an fsspec URL such as s3://BUCKET/KEY") from e


class _RemoteReader(io.RawIOBase):
    def __init__(self, file: StoredFile, fs, path: str, options: StorageOptions, stop: int | None):
        self._file, self._fs, self._path, self._options, self._stop = file, fs, path, options, stop
        self._cache = PieceCache(options.cache_folder, options.cache_bytes) if options.cache_folder else None
        self._position, self._begin, self._piece = 0, 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.bytes}[whence]
        return self._position

    def readinto(self, buffer) -> int:
        if self._position >= self._file.bytes:
            return 0
        if not 0 <= self._position - self._begin < len(self._piece):
            self._begin, self._piece = self._position, memoryview(self._read(self._position, len(buffer)))
        data = self._piece[self._position - self._begin :][: len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, start: int, wanted: int) -> bytes:
        if self._stop is None:
            left = max(wanted, TAIL)
        else:
            left = self._stop - start if start < self._stop else TAIL
        stop = min(start + min(left, PIECE), self._file.bytes)
        key = f"{self._file.url}\n{self._file.version}\n{self._file.bytes}\n{start}\n{stop}"
        cache = self._cache if self._file.version else None
        if cache is not None and (piece := cache.get(key)) is not None:
            return piece
        where = f"{self._file.url}@{start}"
        piece = retry(self._options, where, lambda: _fetch(self._fs, self._path, start, stop))
        if cache is not None:
            cache.put(key, piece)
        return piece


def _fetch(fs, path: str, start: int, stop: int) -> bytes:
    if fs.async_impl:
        piece = fs.cat_file(path, start=start, end=stop)
    else:  # cat_file would read ahead
        with fs.open(path, "rb", cache_type="none") as f:
            f.seek(start)
            piece = f.read(stop - start)
    if len(piece) != stop - start:
        raise OSError(f"expected {stop - start} bytes, received {len(piece)}")
    return piece


def _info(fs, path: str) -> dict:
    place, fixed = _pin(fs, path)
    if not fixed:
        fs.invalidate_cache()
    return fs.info(place)


def _pin(fs, path: str) -> tuple[str, bool]:
    """(path, whether its content can never change): on the Hugging Face hub, the path at a commit.

    The commit is that of the branch when this process first asked. Listings of a commit are cached, those of other
    storages are requested again for each file that is opened.
    """
    if fs.protocol != "hf":
        return path, False
    place = fs.resolve_path(path)
    if not hasattr(place, "repo_id"):  # a bucket, which has no commits
        return path, False
    commit = hub.find_commit(fs, place.repo_type, place.repo_id, place.revision)
    return f"{path.partition(place.repo_id)[0]}{place.repo_id}@{commit}/{place.path_in_repo}", True


def _local_file(path: str) -> StoredFile:
    status = os.stat(path)  # fsspec would give the time of a link
    return StoredFile(path, status.st_size, str(status.st_mtime_ns))


def _stored_file(url: str, info: dict) -> StoredFile:
    version = next((str(info[k]) for k in _VERSIONS if info.get(k)), "")
    return StoredFile(url, int(info.get("size") or 0), version.strip('"'))


def _list_one(fs, inner: str, path: str, options: StorageOptions) -> list[StoredFile]:
    """Files at a path without braces; none where there is nothing."""

    def look() -> tuple[dict | None, dict[str, dict], bytes]:
        """What is at the path (None: a glob, or nothing), the files there, the state.json of a folder of datasets."""
        fs.invalidate_cache()
        try:
            info = fs.info(inner)
        except FileNotFoundError as e:
            if not isinstance(real_error(e), FileNotFoundError):
                raise
            entries = fs.glob(inner, detail=True) if any(c in inner for c in "*?[") else {}
            return None, {n: i for n, i in entries.items() if not n.rpartition("/")[2].startswith(".")}, b""
        if info["type"] != "directory":
            return info, {info["name"]: info}, b""
        entries, state = fs.find(inner, detail=True), f"{info['name'].rstrip('/')}/state.json"
        return info, entries, fs.cat_file(state) if state in entries else b""

    patient = dataclasses.replace(options, timeout=LISTING * options.timeout)
    info, entries, state = retry(patient, path, look, first=True)
    if info and info["type"] == "directory":
        inside = {n.removeprefix(info["name"]).strip("/"): n for n in entries}
        wanted = _saved_by_datasets(path, inside, state) or [n for n in inside if _is_data(n)]
        entries = {inside[n]: entries[inside[n]] for n in wanted}
    names = [n for n, i in entries.items() if i["type"] != "directory"]
    if isinstance(fs, LocalFileSystem):
        files = [_local_file(n) for n in names]
    else:
        rest = path.partition("::")[1] + path.partition("::")[2]
        files = [_stored_file(fs.unstrip_protocol(n) + rest, entries[n]) for n in names]
    if not info or info["type"] == "directory":
        _check_shards(path, files)
    return sorted(files, key=lambda f: f.url)


def _list_braces(fs, path: str, options: StorageOptions) -> list[StoredFile]:
    """Files at each of the paths that the braces of ``path`` stand for, sorted by name. Raises UserError."""
    patterns = _expand(path)
    if patterns == [path]:
        raise UserError(_explain_nothing(fs, path))
    found = parallel(lambda p: _list_one(fs, _filesystem(p)[1], p, options), patterns)
    if missing := [p for p, files in zip(patterns, found, strict=True) if not files]:
        raise UserError(f"{path}: {len(missing)} of {len(patterns)} names match no file, the first is {missing[0]}")
    return sorted(itertools.chain.from_iterable(found), key=lambda f: f.url)


def _explain_nothing(fs, path: str) -> str:
    """Why there is no file of data at a path without braces."""
    if path.count("[") != path.count("]"):
        return f"{path} matches no file, and looks like part of a list that lacks a bracket: write lists as [a,b]"
    problem = f"{path} matches no file; expected {', '.join(FORMATS)}, a glob of them, or a folder"
    if not isinstance(fs, LocalFileSystem):
        return problem
    place = pathlib.Path(_filesystem(path)[1])
    if place.is_dir():
        return f"{problem}, in which {', '.join(_DESCRIPTIONS)} are left out: name such files themselves"
    missing = next((folder for folder in reversed(place.parents) if not folder.exists()), None)
    if missing is None or any(c in str(missing) for c in "*?["):
        return problem if str(place) == path else f"{problem}; looked for {place}"
    return f"{problem}; looked for {place}, and there is no folder {missing}"


def _saved_by_datasets(path: str, names: Iterable[str], state: bytes) -> list[str]:
    """The files of a folder that ``datasets`` saved; it keeps intermediate results beside them. Empty: it is not one.

    Raises UserError: a folder of several splits, a state.json that cannot be read, a file that it lists is missing.
    """
    if "dataset_dict.json" in names:
        splits = [
            f"{path.rstrip('/')}/{n.removesuffix('/state.json')}"
            for n in names
            if n.count("/") == 1 and n.endswith("/state.json")
        ]
        raise UserError(f"{path} holds several splits; give one of them as the path: {', '.join(splits) or 'none'}")
    if not state:
        return []
    try:
        listed = [entry["filename"] for entry in json.loads(state)["_data_files"]]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}/state.json cannot be read: {type(e).__name__}: {e}: save the folder again") from None
    if missing := [name for name in listed if name not in names]:
        raise UserError(f"{path}: {missing[0]}, which its state.json lists, is missing: copy the folder again")
    return listed


def _is_data(name: str) -> bool:
    if any(part[:1] in ("", ".", "_") for part in name.split("/")) or name.endswith(_DESCRIPTIONS):
        return False
    return name.endswith(tuple(FORMATS))


def _check_shards(path: str, files: list[StoredFile]) -> None:
    """Raises UserError if files named ``-00000-of-00032`` are not complete."""
    there: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d{4,})-of-(\d{4,})(.*)", file.url):
            before, number, total, after = match.groups()
            there.setdefault((before, total, after), set()).add(int(number))
    for (before, total, after), numbers in there.items():
        if missing := sorted(set(range(int(total))) - numbers):
            first = f"{before}-{missing[0]:0{len(total)}}-of-{total}{after}"
            again = " (the same `postrain teach` again writes those of a teacher)" if after == ".parquet" else ""
            raise UserError(
                f"{path}: {len(missing)} of {int(total)} shards are missing, the first is {first}: add them{again}, or "
                "select some with braces, as {00000..00003}"
            )


def _expand(path: str) -> list[str]:
    """The paths that braces stand for: ``{a,b}``, ``{00..31}``. Raises UserError if the numbers of a range go down."""
    for match in re.finditer(r"\{([^{}]*)\}", path):
        inside = match[1]
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
            first, last = numbers.groups()
            if int(first) > int(last):
                raise UserError(f"{path}: {match[0]} counts down and gives no file: expected {{{last}..{first}}}")
            choices = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        elif "," in inside:
            choices = inside.split(",")
        else:
            continue
        return [p for c in choices for p in _expand(path[: match.start()] + c + path[match.end() :])]
    return [path]
