"""Before anything is compiled: do all processes have the same code, config, data, model, devices and workdir?

Each process states what it has, all statements go to all, and where two differ every process raises the same error,
which names who has what. Files are compared by size and a hash of their content, large ones of stretches of it.
"""

import collections
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import socket
import time
from collections.abc import Mapping, Sequence

import postrain
from postrain.cluster.processes import Processes, gather
from postrain.config import Config, to_dict
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.errors import UserError, shorten
from postrain.files import digest, spread
from postrain.training.workdir import make_workdir
from postrain.trees import flatten

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
VARIABLES = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_WHOLE, _STRETCH, _STRETCHES = 1 << 26, 1 << 16, 16  # bytes hashed whole; else so many stretches of so many bytes
_SHOWN = 8  # differences in one message
_SECONDS_TO_SEE = 30.0  # what network file systems may take to show a new file to other machines


def check_processes(processes: Processes, config: Config, workdir: str | os.PathLike) -> None:
    """Compares all processes and starts jax in them. Every process must call it.

    Raises UserError, in all processes the same: a difference, a workdir that one cannot write or does not share.
    """
    facts = describe_software() | describe_config(config) | describe_files(config)
    _compare(processes, facts, "the same on all machines")
    check_shared(processes, workdir)
    processes.start_log(workdir)
    processes.start_jax()
    _compare(processes, {"devices": describe_devices()}, "as many devices of one kind on all")


def _compare(processes: Processes, facts: Mapping[str, str], expected: str) -> None:
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if len(set(processes.channel.gather(digest))) == 1:  # as a rule, and hundreds of hosts have much to say
        return
    statements = processes.channel.gather(dict(facts))
    differences = compare(statements, processes.channel.hosts)
    if differences:
        raise UserError(f"the processes differ: {shorten(differences, _SHOWN, '; ')}: expected {expected}")


def compare(statements: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """A phrase for everything that is not the same in all ``statements``: who has what.

    Both arguments have an entry for each process.
    """
    differences = []
    for name in dict.fromkeys(name for statement in statements for name in statement):
        owners: dict[str, list[int]] = collections.defaultdict(list)
        for process, statement in enumerate(statements):
            owners[statement.get(name, "none")].append(process)
        if len(owners) > 1:
            parts = (f"{value} on {_name(owner, hosts)}" for value, owner in owners.items())
            differences.append(f"{name}: {', '.join(parts)}")
    return differences


def check_rows(fingerprints: Mapping[str, dict | None]) -> None:
    """Raises UserError, in all processes the same, where one has found other rows than another. All must call it.

    ``fingerprints`` by the key of the config, as ``data.train``: these know of the files that ``check_processes``
    cannot look up, of stores, folders in folders and patterns, and of how rows are rendered.
    """
    digest = hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()
    hosts, digests = zip(*gather([socket.gethostname(), digest]), strict=True)
    if len(set(digests)) == 1:
        return
    found = gather(dict(fingerprints))
    other = next(process for process, digest in enumerate(digests) if digest != digests[0])
    same = [[process for process, digest in enumerate(digests) if digest == digests[one]] for one in (0, other)]
    differences = [
        f"{key}: {change}"
        for key in fingerprints
        for change in compare_fingerprints(found[0][key] or {}, found[other][key] or {})
    ]
    raise UserError(
        f'the processes differ: {_name(same[1], hosts)} found other rows than {_name(same[0], hosts)} ("was"): '
        f"{shorten(differences, _SHOWN, '; ')}: expected the same rows on all machines"
    )


def _name(processes: list[int], hosts: Sequence[str]) -> str:
    return f"process{'es' * (len(processes) > 1)} {shorten((f'{i} ({hosts[i]})' for i in processes), 4)}"


def describe_software() -> dict[str, str]:
    """Versions, what decides about jax's devices and arithmetic, and a hash of this package's own code."""
    folder = pathlib.Path(postrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    variables = {name: os.environ.get(name, "not set") for name in VARIABLES}
    devices = {f"files {pattern}": str(len(glob.glob(pattern))) for pattern in DEVICE_FILES}
    return {"python": platform.python_version(), "postrain": digest.hexdigest()[:12]} | versions | variables | devices


def describe_config(config: Config) -> dict[str, str]:
    """Every key."""
    return {f"config key {name}": repr(value) for name, value in flatten(to_dict(config)).items()}


def describe_files(config: Config) -> dict[str, str]:
    """Size and hash of every file that the config names and that is on this machine: data, model, tokenizer.

    Raises UserError naming one that cannot be read.
    """
    named = [source.path for source in (*config.data.train, *config.data.eval)]
    named += [config.model.path, config.model.tokenizer, config.data.chat_template, config.model.new_tokens.file]
    files = [file for path in named if path and "://" not in path for file in _expand(path)]
    return {f"file {file}": _describe(file) for file in dict.fromkeys(files)}


def _expand(path: str) -> list[pathlib.Path]:
    """The file, those of a folder, or of a glob."""
    place = pathlib.Path(path)
    if place.is_dir():
        return sorted(file for file in place.iterdir() if file.is_file())
    if place.exists() or not glob.has_magic(path):
        return [place] if place.is_file() else []
    return [file for name in sorted(glob.glob(path, recursive=True)) for file in _expand(name)]


def _describe(file: pathlib.Path) -> str:
    size = file.stat().st_size
    stretches = None if size <= _WHOLE else spread(0, size, _STRETCHES, _STRETCH)
    return f"{size:,} bytes ({digest(file, stretches)[:8]})"


def check_shared(processes: Processes, workdir: str | os.PathLike) -> None:
    """Raises UserError where a process cannot write the workdir, or sees another folder there than process 0."""
    folder, lead = make_workdir(workdir), processes.index == 0
    name = f".shared-{secrets.token_hex(8)}"
    place = folder / processes.channel.gather(name)[0]
    try:
        if lead:
            place.touch()
        processes.channel.gather("written")
        deadline = time.monotonic() + _SECONDS_TO_SEE
        while not (seen := place.exists()) and time.monotonic() < deadline:
            os.listdir(folder)  # has a network file system look again
            time.sleep(0.2)
        blind = [process for process, sees in enumerate(processes.channel.gather(seen)) if not sees]
    finally:
        if lead:
            for probe in folder.glob(".shared-*"):  # one of a run that was killed just here, too
                probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"--workdir {workdir}: {_name(blind, processes.channel.hosts)} sees another folder there than process 0 "
            f"({processes.channel.hosts[0]}): expected one that all machines share"
        )


def describe_devices() -> str:
    """``4 x cpu``: of this process."""
    import jax

    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
