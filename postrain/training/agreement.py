"""Checks that all processes have the same code, config, data, model, devices and workdir, before anything is compiled.

Each process sends its facts to all. If two differ, every process raises the same error, which names who has what. Files
are compared by size and a hash of their content, large ones by a hash of sixteen stretches of it.
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
from postrain.config import Config, is_hub_name, to_dict
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.files.hub import fetch_small_files
from postrain.errors import UserError, shorten
from postrain.files import digest, spread
from postrain.report.workdir import make_workdir
from postrain.trees import flatten

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
VARIABLES = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_WHOLE, _STRETCH, _STRETCHES = 1 << 26, 1 << 16, 16  # largest file hashed whole; else bytes of a stretch, and how many
_SHOWN = 8  # differences in one message
_SECONDS_TO_SEE = 30.0  # for a network file system to show a new file to other machines


def check_processes(processes: Processes, config: Config, workdir: str | os.PathLike) -> None:
    """Compares all processes and starts jax in them. Every process must call it.

    Raises UserError, the same in all processes: a difference, a workdir that one cannot write or does not share.
    """
    facts = software_facts() | config_facts(config) | file_facts(config)
    _compare(processes, facts, "the same on all machines")
    check_shared(processes, workdir)
    processes.start_log(workdir)
    processes.start_jax()
    import jax

    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    devices = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))  # of this process: ``4 x cpu``
    _compare(processes, {"devices": devices}, "as many devices of one kind on all")


def _compare(processes: Processes, facts: Mapping[str, str], expected: str) -> None:
    own = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if len(set(processes.channel.gather(own))) == 1:  # the usual case: spares hundreds of hosts all the facts
        return
    differences = find_differences(processes.channel.gather(dict(facts)), processes.channel.hosts)
    if differences:
        raise UserError(f"the processes differ: {shorten(differences, _SHOWN, '; ')}: expected {expected}")


def find_differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """A phrase for each fact that is not the same in all processes, naming who has what.

    Both arguments have an entry for each process.
    """
    differences = []
    for name in dict.fromkeys(name for own in facts for name in own):
        owners: dict[str, list[int]] = collections.defaultdict(list)
        for process, own in enumerate(facts):
            owners[own.get(name, "none")].append(process)
        if len(owners) > 1:
            parts = (f"{value} on {_format_processes(owner, hosts)}" for value, owner in owners.items())
            differences.append(f"{name}: {', '.join(parts)}")
    return differences


def check_rows(fingerprints: Mapping[str, dict | None]) -> None:
    """Raises UserError, the same in all processes, if one has found other rows than another. All must call it.

    ``fingerprints`` by the key of the config, such as ``data.train``. They cover what ``check_processes`` cannot look
    up: files in stores, in folders of folders and behind patterns, and how rows are rendered.
    """
    own = hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()
    hosts, hashes = zip(*gather([socket.gethostname(), own]), strict=True)
    if len(set(hashes)) == 1:
        return
    found = gather(dict(fingerprints))
    other = next(process for process, one in enumerate(hashes) if one != hashes[0])
    groups = [[i for i, one in enumerate(hashes) if one == reference] for reference in (hashes[0], hashes[other])]
    differences = [
        f"{key}: {change}"
        for key in fingerprints
        for change in compare_fingerprints(found[0][key] or {}, found[other][key] or {})
    ]
    lead, others = (_format_processes(group, hosts) for group in groups)
    raise UserError(
        f'the processes differ: {others} found other rows than {lead} ("was"): {shorten(differences, _SHOWN, "; ")}: '
        "expected the same rows on all machines"
    )


def _format_processes(processes: list[int], hosts: Sequence[str]) -> str:
    shown = shorten([f"{process} ({hosts[process]})" for process in processes], 4)
    return f"process{'es' * (len(processes) > 1)} {shown}"


# Facts of a process


def software_facts() -> dict[str, str]:
    """Versions, settings that change jax's devices or arithmetic, and a hash of this package's own code."""
    folder = pathlib.Path(postrain.__file__).parent
    code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    variables = {name: os.environ.get(name, "not set") for name in VARIABLES}
    devices = {f"files {pattern}": str(len(glob.glob(pattern))) for pattern in DEVICE_FILES}
    return {"python": platform.python_version(), "postrain": code.hexdigest()[:12]} | versions | variables | devices


def config_facts(config: Config) -> dict[str, str]:
    """Every key."""
    return {f"config key {name}": repr(value) for name, value in flatten(to_dict(config)).items()}


def file_facts(config: Config) -> dict[str, str]:
    """Size and hash of every file of this machine that the config names: data, model, tokenizer.

    Of a model or tokenizer on the Hugging Face hub, the commit. Raises UserError naming a file that cannot be read.
    """
    named = [source.path for source in (*config.data.train, *config.data.eval)]
    named += [config.model.path, config.model.tokenizer, config.data.chat_template, config.model.new_tokens.file]
    named.append(config.distill.teacher)
    files = [file for path in named if path and "://" not in path for file in _expand(path)]
    models = config.model.path, config.model.tokenizer, config.distill.teacher
    hub_names = [name for name in models if is_hub_name(name)]
    commits = {f"{name} on the Hugging Face hub": f"commit {fetch_small_files(name).name}" for name in hub_names}
    contents = {}
    for file in dict.fromkeys(files):
        size = file.stat().st_size
        stretches = None if size <= _WHOLE else spread(0, size, _STRETCHES, _STRETCH)
        contents[f"file {file}"] = f"{size:,} bytes ({digest(file, stretches)[:8]})"
    return contents | commits


def _expand(path: str) -> list[pathlib.Path]:
    """The file itself, or those of a folder or a glob."""
    place = pathlib.Path(path)
    if place.is_dir():
        return sorted(file for file in place.iterdir() if file.is_file())
    if place.exists() or not glob.has_magic(path):
        return [place] if place.is_file() else []
    return [file for name in sorted(glob.glob(path, recursive=True)) for file in _expand(name)]


def check_shared(processes: Processes, workdir: str | os.PathLike) -> None:
    """Raises UserError if a process cannot write the workdir, or sees another folder there than process 0."""
    folder, lead = make_workdir(workdir), processes.index == 0
    name = f".shared-{secrets.token_hex(8)}"
    place = folder / processes.channel.gather(name)[0]
    try:
        if lead:
            place.touch()
        processes.channel.gather("written")
        deadline = time.monotonic() + _SECONDS_TO_SEE
        while not (seen := place.exists()) and time.monotonic() < deadline:
            os.listdir(folder)  # makes a network file system look again
            time.sleep(0.2)
        blind = [process for process, sees in enumerate(processes.channel.gather(seen)) if not sees]
    finally:
        if lead:
            for probe in folder.glob(".shared-*"):  # also of a run that was killed just here
                probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"--workdir {workdir}: {_format_processes(blind, processes.channel.hosts)} sees another folder there than "
            f"process 0 ({processes.channel.hosts[0]}): expected one that all machines share"
        )
