"""`postrain launch`: the same training command in several processes, here or on a cluster.

``local:N`` starts N processes on this machine. For SLURM, Kubernetes and TPU pods the scripts of the folder ``launch/``
are filled in and passed to sbatch, kubectl and gcloud; ``--dry-run`` prints them instead. Every launch makes a new
secret for the control channel (authentication.py), which the processes find in their environment.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from postrain.cluster.authentication import SECRET, make_secret
from postrain.errors import UserError
from postrain.files import check_local

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "launch"
_SECONDS_TO_END = 20.0  # for the other local processes, once one has ended with an error
_TARGETS = "local:PROCESSES, slurm:HOSTS, k8s:HOSTS or tpu-pod:NAME"


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of ``postrain``, and where to run it."""

    target: str  # as on the command line
    arguments: Sequence[str]  # of `postrain`: train, its config, its workdir, what it overrides
    workdir: str
    gpus: int = 8  # of each host, for slurm and k8s
    image: str = ""  # of containers, for k8s
    volume: str = ""  # for k8s, CLAIM:/PATH: a persistent volume claim that all hosts may write, and where it appears


def launch(job: Job, *, dry_run: bool = False) -> int:
    """Starts ``job``, or with ``dry_run`` prints what would be started. Returns the exit code.

    Raises UserError: a workdir that is a URL, a target that does not exist or lacks a setting, no command to submit it.
    """
    check_local(job.workdir, "--workdir")
    kind, value = parse_target(job.target)
    if kind == "local":
        return run_local(job.arguments, int(value), dry_run=dry_run)
    text, command = fill(job)
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which(command[0]) is None:
        raise UserError(
            f"--target={job.target} needs {command[0]}, which is not installed here: install it, or print what it "
            "would get with --dry-run"
        )
    if kind == "slurm":
        _logs(job).mkdir(parents=True, exist_ok=True)  # sbatch says nothing when it cannot write there
    return subprocess.run(command, input=text, text=True).returncode


def parse_target(target: str) -> tuple[str, str]:
    """``"slurm:4"`` -> ``("slurm", "4")``."""
    kind, _, value = target.partition(":")
    counted = kind in ("local", "slurm", "k8s")
    if not (counted and value.isdigit() and int(value) > 0) and not (kind == "tpu-pod" and value):
        raise UserError(f"--target={target}: expected {_TARGETS}")
    return kind, value


def fill(job: Job) -> tuple[str, list[str]]:
    """The script of ``job.target`` with all its values, and the command that reads it from stdin."""
    kind, value = parse_target(job.target)
    module = ["-m", "postrain.cli", *job.arguments]
    values = {"NAME": _make_name(job), "HOSTS": value, "GPUS": str(job.gpus)}
    if kind == "slurm":
        logs = str(_logs(job))
        if "\\" in logs or "\n" in logs:
            raise UserError(f"--workdir {job.workdir}: sbatch takes no backslash or line break there: use another name")
        # sbatch reads quotes as a shell does, and %j as the number of the job.
        values |= {"COMMAND": shlex.join([sys.executable, *module]), "LOGS": shlex.quote(logs.replace("%", "%%"))}
        return _fill_script("slurm.sh", values), ["sbatch"]
    if kind == "tpu-pod":
        values |= {"COMMAND": shlex.join(["python3", *module]), "NAME": shlex.quote(value)}
        return _fill_script("tpu_pod.sh", values), ["bash"]
    claim, _, mount = job.volume.partition(":")
    if not job.image or not claim or not mount.startswith("/"):
        raise UserError(
            "--target=k8s needs --image=IMAGE with postrain in it and --volume=CLAIM:/PATH, a shared volume"
        )
    if not pathlib.PurePosixPath(job.workdir).is_relative_to(mount):
        raise UserError(f"--workdir {job.workdir}: expected a folder in {mount}, the volume that all hosts share")
    command = json.dumps(["python", *module]).replace("$(", "$$(")  # where Kubernetes puts variables in
    values |= {"COMMAND": command, "IMAGE": job.image, "CLAIM": claim, "MOUNT": mount, "SECRET": make_secret()}
    return _fill_script("k8s_jobset.yaml", values), ["kubectl", "apply", "-f", "-"]


def _fill_script(name: str, values: dict[str, str]) -> str:
    path = SCRIPTS / name
    if not path.is_file():
        raise UserError(
            f"{path}: the scripts to launch with are not here: run postrain from a checkout of its repository"
        )
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], path.read_text(encoding="utf-8"))


def _logs(job: Job) -> pathlib.Path:
    return pathlib.Path(job.workdir).absolute() / "logs"


def _make_name(job: Job) -> str:
    """The job's name, in the form of Kubernetes' names: workdir ``runs/My_run`` -> ``postrain-my-run-3fa95c``.

    The hash of the whole path and its volume keeps two runs with the same last folder apart.
    """
    workdir = pathlib.PurePath(job.workdir)
    words = re.sub(r"[^a-z0-9]+", "-", workdir.name.lower())
    digest = hashlib.sha256(f"{job.volume}\n{workdir}".encode()).hexdigest()
    return f"{f'postrain-{words}'[:33].strip('-')}-{digest[:6]}"


def run_local(arguments: Sequence[str], count: int, *, dry_run: bool = False) -> int:
    """``postrain ARGUMENTS`` in ``count`` processes of this machine; the first one's output is shown.

    SIGINT and SIGTERM reach all of them. Returns the exit code of the first that failed, 0 where none did.
    """
    coordinator = f"127.0.0.1:{find_ports()}"
    commands = [
        [
            *(sys.executable, "-m", "postrain.cli", *arguments),
            *(f"--coordinator={coordinator}", f"--num-processes={count}", f"--process-id={process}"),
        ]
        for process in range(count)
    ]
    if dry_run:
        print("\n".join([f"export {SECRET}=$(openssl rand -hex 32)", *map(shlex.join, commands)]))
        return 0
    environment = os.environ | {SECRET: make_secret()}
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    pass_on = lambda number, frame: [process.send_signal(number) for process in processes if process.poll() is None]
    # ^C reaches all processes of a terminal by itself; this one must outlive them.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> int:
    """Waits for all processes; kills those that outlive a failure, as one that never joined the others does."""
    first, deadline = 0, None
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed and deadline is None:
            first, deadline = failed[0], time.monotonic() + _SECONDS_TO_END
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.1)
    first = first or next((process.returncode for process in processes if process.returncode), 0)
    return first if first >= 0 else 128 - first


def find_ports() -> int:
    """A free port of this machine's loopback address after which another one is free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue
