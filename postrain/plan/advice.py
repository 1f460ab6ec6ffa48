"""What to change so that a step fits, tried out: each change is compiled, until one fits."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from postrain.config import Config
from postrain.models.config import LoraConfig
from postrain.plan.report import describe_change
from postrain.plan.targets import Target
from postrain.sharding import num_row_shards

GPU_FRACTION = 0.95  # of a GPU's memory that JAX may be given where nothing else runs
MARGIN = 1.2  # over what a proportion says
SHORTEST = 256  # positions of a row below which no shorter row is proposed


def advise(program, memory: dict[str, int], target: Target, weigh: Callable[[Config], tuple[int, bool]]) -> list[dict]:
    """Changes that were tried, in order, until one fits: {"change", "needed", "compiled", "fits"}.

    ``weigh(config) -> (bytes of a device, whether that was compiled)``. Each change contains the ones before it, the
    ones that cost least first: memory that JAX leaves free, parameters split over more devices, smaller
    micro-batches (the same result), recomputation (a third more operations), adapters, a quantised base under them,
    shorter rows.
    """
    tried, needed = [], memory["total"]
    if target.chip and target.chip.platform == "gpu" and target.usable < needed <= GPU_FRACTION * target.chip.memory:
        change = {"environment XLA_CLIENT_MEM_FRACTION": GPU_FRACTION}
        return [{"change": change, "needed": needed, "compiled": True, "fits": True}]
    for change, config in list_changes(program, memory, target.usable):
        words = describe_change(change)
        print(f"does not fit, trying {words}", file=sys.stderr, flush=True)
        size, compiled = weigh(config)
        tried.append({"change": change, "needed": size, "compiled": compiled, "fits": size <= target.usable})
        if size <= target.usable:
            break
    return tried


def list_changes(program, memory: dict[str, int], usable: int) -> Iterator[tuple[dict[str, Any], Config]]:
    """Ever longer lists of changed keys, with the config that they give."""
    config, mesh = program.config, program.mesh
    rows = config.data.batch_size // num_row_shards(mesh)
    steps: list[dict[str, Any]] = []
    if mesh.shape["data"] > 1:
        steps.append({"mesh.data": 1, "mesh.fsdp": -1})
    for count in list_micro_batches(config.train.micro_batches, rows, memory, usable):
        steps.append({"train.micro_batches": count})
    if config.model.remat != "full":
        steps.append({"model.remat": "full"})
    if not program.model.frozen:  # then nothing trains alone, and adapters may
        rank = LoraConfig().rank
        steps.append({"model.lora.rank": rank})
    even = program.model.config.embed_size % 2 == 0  # NF4 packs two numbers in a byte
    alone = config.model.new_tokens.train_alone
    if config.model.quantization == "none" and even and not config.model.fp8 and not alone:
        steps.append({"model.quantization": "nf4"})
    length = config.data.sequence_length
    while length // 2 >= SHORTEST:
        length //= 2
        steps.append({"data.sequence_length": length})
    change: dict[str, Any] = {}
    for step in steps:
        change = change | step
        yield change, replace_keys(config, change)


def list_micro_batches(now: int, rows: int, memory: dict[str, int], usable: int) -> list[int]:
    """Numbers to try in place of ``now`` for the ``rows`` that a device has in a step.

    The one that should be enough, as activations shrink with the rows of a micro-batch, and the largest.
    """
    room = usable - (memory["total"] - memory["activations"])
    wanted = now * memory["activations"] / room * MARGIN if room > 0 else rows
    counts = [count for count in range(now + 1, rows + 1) if rows % count == 0]
    enough = [count for count in counts if count >= wanted]
    return sorted({*enough[:1], *counts[-1:]})


def replace_keys(config: Any, change: dict[str, Any]) -> Any:
    """``config`` with dotted keys set."""
    for key, value in change.items():
        config = _replace(config, key.split("."), value)
    return config


def _replace(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    new = _replace(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: new})
