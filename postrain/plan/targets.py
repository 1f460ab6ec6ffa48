"""Hardware that a program can be compiled for on any machine: its published figures, and its devices as XLA sees them.

    TPU slices     v5e:4x4, v5p:2x2x2      chips along each axis of the torus
    GPU nodes      h100:1x8                nodes x GPUs of a node
    this machine   cpu:8                   devices that share its cores and its memory

The TPU compiler is in the libtpu wheel, the GPU compiler in the wheels of the CUDA plugin and of nvcc; neither needs
an accelerator, a driver or a network. The extra ``postrain[plan]`` has both.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from postrain.errors import UserError
from postrain.training.throughput import PEAK_FLOPS, simplify_kind

GIB = 2**30
INSTALL = "pip install -e '.[plan]' (Linux)"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Bandwidths in bytes per second; of the links in one direction, all links of the chip together."""

    platform: str
    kind: str  # as JAX calls it
    memory: int  # bytes of device memory that programs may have, before what JAX leaves free
    memory_bandwidth: float
    link_bandwidth: float  # to the chips of its slice or node
    source: str
    shapes: tuple[str, ...] = ()  # slices that there are; (): as the compiler says
    node_size: int | None = None  # GPUs of a node at most
    network_bandwidth: float = 0.0  # of a GPU to other nodes


# TPU: memory is what libtpu lets a program have (it says so when it refuses one), the rest is from Google's pages.
# "Bidirectional inter-chip interconnect bandwidth" there is twice what is sent in one direction.
# GPU: NVIDIA's data sheets; half of NVLink's 900 GB/s goes out; a DGX has one 400 Gb/s adapter per GPU.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TPU = "cloud.google.com/tpu/docs/"
CHIPS = {
    "v5e": Chip("tpu", "TPU v5 lite", int(15.75 * GIB), 819e9, 200e9, _TPU + "v5e", _FLAT),
    "v5p": Chip("tpu", "TPU v5", int(95.74 * GIB), 2765e9, 600e9, _TPU + "v5p"),
    "v6e": Chip("tpu", "TPU v6 lite", int(31.25 * GIB), 1638e9, 400e9, _TPU + "v6e", _FLAT),
    "h100": Chip(
        "gpu", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 450e9, "NVIDIA H100 SXM data sheet", (), 8, 50e9
    ),
    "h200": Chip("gpu", "NVIDIA H200", 150_754_820_096, 4.8e12, 450e9, "NVIDIA H200 SXM data sheet", (), 8, 50e9),
}
# Beyond, setting the devices up takes minutes and gigabytes; the largest pods have about as many chips.
MOST_DEVICES = {"cpu": 1024, "gpu": 8192, "tpu": 8960}
EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:2x4, h100:1x8, h200:2x8, cpu:8"

# What XLA's GPU compiler asks of a device (its DeviceDescription proto); an H200 is an H100 with other memory.
_HOPPER = """gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. ``chip`` is None for the CPU, of which nothing is published."""

    name: str
    chip: Chip | None
    devices: list[jax.Device]
    usable: int  # bytes of a device that a program can really have
    usable_why: str
    compiler_options: dict

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 operations per second of one device."""
        return PEAK_FLOPS[simplify_kind(self.chip.kind)] if self.chip else None


def open_target(name: str) -> Target:
    """The target of a name such as ``v5e:4x4``.

    Raises UserError: an unknown chip, a slice that does not exist, a compiler that is not installed, more CPU devices
    than JAX has already started with.
    """
    match = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", name.strip().lower())
    chip_name = match[1] if match else name.partition(":")[0]
    if chip_name not in (*CHIPS, "cpu"):
        raise UserError(f"--target={name}: expected one of {', '.join(CHIPS)} or cpu, as in {EXAMPLES}")
    if not match:
        raise UserError(f"--target={name}: expected CHIP:SHAPE, as in {EXAMPLES}")
    shape = tuple(int(size) for size in match[2].split("x"))
    if 0 in shape:
        raise UserError(f"--target={name}: every size must be at least 1")
    platform = "cpu" if chip_name == "cpu" else CHIPS[chip_name].platform
    if math.prod(shape) > MOST_DEVICES[platform]:
        raise UserError(f"--target={name}: {math.prod(shape):,} devices, expected at most {MOST_DEVICES[platform]:,}")
    if chip_name == "cpu":
        return _open_cpu(name, shape)
    chip = CHIPS[chip_name]
    return {"tpu": _open_tpu, "gpu": _open_gpu}[chip.platform](name, chip, match[2], shape)


def _open_cpu(name: str, shape: tuple[int, ...]) -> Target:
    if len(shape) != 1:
        raise UserError(f"--target={name}: expected cpu:NUMBER, as in cpu:8")
    [count] = shape
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # JAX has started: what it has is all that there is
    devices = jax.devices("cpu")
    if len(devices) < count:
        advice = "run `postrain plan` in a process of its own, without XLA_FLAGS"
        raise UserError(f"--target={name}: JAX has already started with {len(devices)} CPU devices: {advice}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    why = f"1/{count} of this machine's {memory / GIB:.1f} GiB"
    return Target(name, None, devices[:count], memory // count, why, {})


# Without these libtpu asks the network which machine this is, and complains when nobody answers; and of two processes
# only one could load it.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _open_tpu(name: str, chip: Chip, layout: str, shape: tuple[int, ...]) -> Target:
    if chip.shapes and layout not in chip.shapes:
        raise UserError(f"--target={name}: there is no such slice; expected one of {', '.join(chip.shapes)}")
    _require_compiler(name, "TPU", "libtpu")
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # Two by two chips are on a host; a smaller slice is a part of one.
    host = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
    devices = _list_devices(name, name.strip().lower(), "tpu", **host)
    return Target(name, chip, devices, chip.memory, "of device memory, as libtpu counts it", {})


def _open_gpu(name: str, chip: Chip, layout: str, shape: tuple[int, ...]) -> Target:
    if len(shape) != 2 or shape[1] > chip.node_size:
        raise UserError(f"--target={name}: expected NODESxGPUS with at most {chip.node_size} GPUs a node, as in 2x8")
    _require_compiler(name, "GPU", "jax_plugins.xla_cuda13")
    fill = {"bandwidth": int(chip.memory_bandwidth), "memory": chip.memory, "kind": chip.kind}
    options = {"target_config": _HOPPER.format(**fill), "topology": f"1x{layout}"}
    devices = _list_devices(name, "", "cuda", **options)
    fraction, why = gpu_memory_fraction()
    # Autotuning would run candidates on the GPU; the program's memory and communication do not depend on it.
    return Target(name, chip, devices, int(fraction * chip.memory), why, {"xla_gpu_autotune_level": 0})


def gpu_memory_fraction() -> tuple[float, str]:
    """The share of a GPU's memory that JAX takes, and why: 0.75 unless the environment says otherwise."""
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if value := os.environ.get(variable):
            try:
                return float(value), f"by {variable}={value}"
            except ValueError as error:
                raise UserError(
                    f"{variable}: expected a number, found {value!r}: set a share such as 0.9, or unset it"
                ) from error
    return 0.75, "75% of device memory, which JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise"


def _require_compiler(name: str, platform: str, module: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its package is missing
        found = None
    if found is None:
        raise UserError(f"--target={name}: the {platform} compiler is not installed: {INSTALL}")


def _list_devices(name: str, topology_name: str, platform: str, **options: Any) -> list[jax.Device]:
    """The devices as the compiler of ``platform`` describes them."""
    # JAX can write an executable for a device that is not there into its cache, but not read it back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return list(topologies.get_topology_desc(topology_name, platform, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error)
        raise UserError(f"--target={name}: there is no such slice: {reason}") from error
