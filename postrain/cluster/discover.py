"""Which process of how many this one is, from the command line or the environment. Nothing is started here.

Searched in this order; the first that is found counts: ``--coordinator``, ``--num-processes`` and ``--process-id`` (or
``POSTRAIN_COORDINATOR``, ...), Open MPI, SLURM, a TPU pod. So mpirun inside of a SLURM job counts.

``jax.distributed.initialize`` detects clusters too, but keeps what it finds to itself: it returns only once all
processes are connected, its key-value store is private, and ``jax.process_index()`` starts the devices. The control
channel needs the three values earlier, before jax is even imported: a wrong key of the config must end all processes
at once, and versions and devices are compared before anything of jax may fail on their difference. So this file reads
the variables that jax reads, a test compares its answers with those of jax, and jax gets the values found here. Two
things are new: Open MPI 5, and one process for all GPUs of a machine, which jax would give its first GPU alone.
"""

import dataclasses
import glob
import http.client
import importlib.util
import os
import re
import urllib.request
import zlib
from collections.abc import Mapping

from postrain.errors import UserError

TPU_PORT = 8482  # the default of jax
_FLAGS = {"coordinator": "--coordinator", "num_processes": "--num-processes", "process_id": "--process-id"}
_PORTS = range(61440, 65535, 2)  # of the coordinator; the one after each is for the control channel
_SECONDS = 2.0  # for Google's metadata server, a link-local address


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A place among several processes."""

    coordinator: str  # host:port of process 0 for jax.distributed; the control channel has the port after it
    num_processes: int
    process_id: int
    found: str  # the settings that say so, for messages
    local_device_ids: tuple[int, ...] | None = None  # of the GPUs of this machine; None: all that the process sees

    @property
    def channel_address(self) -> tuple[str, int]:
        """Host and port of the control channel."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


def find_cluster(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """This process's place; None if it is the only one and the first three settings are not set.

    The arguments are those of the command line. Raises UserError if settings are incomplete, cannot be read or
    contradict each other, naming what was found.
    """
    # What the user says: settings in the order of Cluster's fields, and the same as text for messages.
    settings, texts = {}, []
    for (name, flag), value in zip(_FLAGS.items(), (coordinator, num_processes, process_id), strict=True):
        variable = f"POSTRAIN_{name.upper()}"
        other = environment.get(variable) or None
        if value is not None and other is not None and str(value) != other:
            raise UserError(f"several processes: {flag}={value}, but {variable}={other}: leave one of them out")
        found = (flag, str(value)) if value is not None else (variable, other)
        # An indexed Job of Kubernetes numbers its pods; alone, the number does not make them one run.
        if found[1] is None and name == "process_id" and len(settings) == 2 and "JOB_COMPLETION_INDEX" in environment:
            found = ("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"])
        if found[1] is not None:
            settings[name] = found[1] if name == "coordinator" else _number(*found)
            texts.append("=".join(found))
    said = ", ".join(texts)
    if len(settings) == 3:  # for one process too: jax's collectives then add up in the order of several
        return _check(Cluster(*settings.values(), found=said))
    # What the launcher says; of the user's settings only the coordinator goes with it.
    cluster = _find_open_mpi(environment) or _find_slurm(environment) or _find_tpu_pod(environment)
    if settings and (cluster is None or list(settings) != ["coordinator"]):
        missing = [flag for name, flag in _FLAGS.items() if name not in settings]
        raise UserError(
            f"several processes: found {said} without {' and '.join(missing)}: give all "
            "three, or none of them under srun, mpirun or on a TPU pod"
        )
    if cluster is not None and not cluster.coordinator and not settings:
        raise UserError(
            f"several processes: {cluster.found}, but Open MPI does not say where process 0 is: give "
            "--coordinator=HOST:PORT, the machine of rank 0"
        )
    if settings:
        cluster = dataclasses.replace(cluster, coordinator=settings["coordinator"], found=f"{cluster.found}, {said}")
    return _check(cluster) if cluster is not None and cluster.num_processes > 1 else None


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"several processes: {name}={text!r}: expected a whole number from 0 on")
    return int(text)


def _check(cluster: Cluster) -> Cluster:
    if cluster.process_id >= cluster.num_processes:
        raise UserError(
            f"several processes: process {cluster.process_id} of {cluster.num_processes} ({cluster.found}): they are "
            "numbered from 0, so the number must be below their count"
        )
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(
            f"several processes: coordinator {cluster.coordinator!r} ({cluster.found}): expected HOST:PORT of process "
            "0, the port and the one after it free"
        )
    return cluster


def _find_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """From `srun`, which sets SLURM_STEP_*; in the batch script itself there is no step and one process."""
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    get = lambda name, default: _number(name, environment.get(name, default))
    tasks, nodes = get("SLURM_STEP_NUM_TASKS", "1"), get("SLURM_STEP_NUM_NODES", "1")
    step = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    one_each = tasks <= nodes
    return Cluster(
        f"{first_host(environment['SLURM_STEP_NODELIST'])}:{_choose_port(step)}",
        tasks,
        get("SLURM_PROCID", "0"),
        f"SLURM_PROCID={environment['SLURM_PROCID']}, SLURM_STEP_NUM_TASKS={tasks}",
        None if one_each else _own_gpu(environment, get("SLURM_LOCALID", "0")),
    )


def _own_gpu(environment: Mapping[str, str], local_id: int) -> tuple[int, ...] | None:
    """Each of several processes on a machine takes the GPU of its number, unless it sees just one anyway."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    return None if visible and "," not in visible else (local_id,)


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list: ``node[007-009,12],other`` -> ``node007``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"several processes: SLURM_STEP_NODELIST={nodes!r}: expected names of machines")
    return "".join(part or "" for part in match.groups())


def _choose_port(name: str) -> int:
    """The same port on every machine, and hardly that of another job there."""
    return _PORTS[zlib.crc32(name.encode()) % len(_PORTS)]


def _find_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    """From `mpirun`. Assumes that rank 0 runs where mpirun does, which is Open MPI's default."""
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    get = lambda name, default: _number(name, environment.get(name, default))
    size, rank = get("OMPI_COMM_WORLD_SIZE", "1"), get("OMPI_COMM_WORLD_RANK", "0")
    local_size, local_rank = get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"), get("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    # Version 4: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911. Version 5: prterun-HOST-PID@1.
    uri, namespace = environment.get("OMPI_MCA_orte_hnp_uri", ""), environment.get("PMIX_NAMESPACE", "")
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^\],]+)", uri) or re.match(r"prterun-(.+)-\d+@", namespace)
    host = "127.0.0.1" if local_size == size else address and next(part for part in address.groups() if part)
    port = _choose_port(namespace or uri)
    return Cluster(
        f"{f'[{host}]' if ':' in host else host}:{port}" if host else "",
        size,
        rank,
        f"OMPI_COMM_WORLD_RANK={rank}, OMPI_COMM_WORLD_SIZE={size}",
        _own_gpu(environment, local_rank) if local_size > 1 else None,
    )


def _find_tpu_pod(environment: Mapping[str, str]) -> Cluster | None:
    """From Kubernetes' TPU_WORKER_* or, on a TPU VM, from the metadata server; several slices from MEGASCALE_*."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if names:
        settings, said = environment, "TPU_WORKER_HOSTNAMES"
        hosts, worker = names.split(","), environment.get("TPU_WORKER_ID", "")
    elif has_tpu() and "TPU_SKIP_MDS_QUERY" not in environment:
        attributes = {name: _read_metadata(name, environment) for name in ("agent-worker-number", "tpu-env")}
        if attributes["agent-worker-number"] is None:
            return None
        # Lines NAME: 'value'; the environment comes before them.
        lines = [line.split(":", 1) for line in (attributes["tpu-env"] or "").splitlines() if ":" in line]
        settings = {name.strip(): value.strip().strip("'") for name, value in lines}
        settings |= {name: value for name, value in environment.items() if value}
        said = "the metadata of the TPU VM"
        endpoints = (_read_metadata("worker-network-endpoints", environment) or "").split(",")
        hosts, worker = [end.split(":")[-1] for end in endpoints], attributes["agent-worker-number"]
    else:
        return None
    slices = _number("MEGASCALE_NUM_SLICES", settings.get("MEGASCALE_NUM_SLICES") or "1")
    own_slice = _number("MEGASCALE_SLICE_ID", settings.get("MEGASCALE_SLICE_ID") or "0")
    process = _number("TPU_WORKER_ID", worker.strip()) + own_slice * len(hosts)
    lead = (settings.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Cluster(f"{lead}:{TPU_PORT}", len(hosts) * slices, process, f"{said}: worker {worker} of {len(hosts)}")


def has_tpu() -> bool:
    """Whether a TPU's device files are here, and libtpu to use them."""
    devices = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _read_metadata(name: str, environment: Mapping[str, str]) -> str | None:
    """An attribute of this virtual machine; None if there is no such attribute or no such server."""
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return answer.read(1 << 20).decode()
    except (OSError, http.client.HTTPException, UnicodeDecodeError):  # something else may answer there
        return None
