"""Tokens per second and MFU: the operations that a step needs, as a share of the devices' peak."""

import functools
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from postrain.models.config import ModelConfig
from postrain.models.flops import BatchStats, count_flops

# Dense bfloat16 peak of one JAX device, from the vendors' data sheets, by device kind without vendor and memory.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "V100": 125e12,
    "V100 PCIe": 112e12,
    "T4": 65e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
# Words of a device kind that do not change its peak: vendor, board, memory.
_NO_MATTER = re.compile(r"NVIDIA|Tesla|RTX|SXM\d*|\d+GB?|HBM\w*", re.IGNORECASE)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Operations per second of all ``devices`` together; None when their kind is not in the table.

    Accelerators: the bfloat16 peak of the data sheet. CPU: no data sheet says, so a large float32 matrix
    product is timed once; all CPU devices of a process share the same cores and count once.
    """
    if devices[0].platform == "cpu":
        return measure_matmul_rate(devices[0])
    peak = PEAK_FLOPS.get(simplify_kind(devices[0].device_kind))
    return peak * len(devices) if peak else None


def simplify_kind(kind: str) -> str:
    """``NVIDIA A100-PCIE-40GB`` -> ``A100 PCIe``: what is left must be a whole name, "L40" is not "L4"."""
    words = [word for word in re.split(r"[ -]", kind) if word and not _NO_MATTER.fullmatch(word)]
    return " ".join("PCIe" if word.lower() == "pcie" else word for word in words)


@functools.cache
def measure_matmul_rate(device: jax.Device, size: int = 1024, repeats: int = 8) -> float:
    """Operations per second of the fastest of ``repeats`` float32 products [size, size]; takes about 0.5 s."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def compute_perf(
    config: ModelConfig, stats: BatchStats, seconds: float, devices: Sequence[jax.Device], row_groups: int = 1
) -> dict[str, float]:
    """``perf/tokens_per_second`` (of all hosts, padding excluded) and, where the peak is known, ``perf/mfu``.

    Args:
        stats: this host's rows of all batches worked off in ``seconds``.
        devices: this host's; the others have as many.
        row_groups: hosts with rows of their own (``data_process``); those that share rows work on them together. The
            rows of other groups are taken to cost what these do.
    """
    perf = {"perf/tokens_per_second": stats.tokens * row_groups / seconds}
    peak = peak_flops(devices)
    if peak is not None:
        flops = sum(count_flops(config, stats).values()) * row_groups
        perf["perf/mfu"] = flops / seconds / (peak * jax.process_count())
    return perf
