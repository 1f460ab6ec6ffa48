"""What a training step needs of hardware, which need not be here: memory, operations, communication, a bound of MFU.

The recipe's own train step, the very function that ``postrain train`` compiles, is compiled ahead of time from shapes
alone for the devices of a target. Memory is what the compiler says, split into kinds by the shapes that each device
holds. Not counted: evaluation, generation and checkpoints, which happen between steps.

Where the step does not fit, changes of the config are compiled one after another, until one fits.
"""

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.config import Config
from postrain.config.rules import choose_reference
from postrain.errors import UserError
from postrain.hf.find_model import locate_model
from postrain.models.config import LoraConfig, ModelConfig
from postrain.models.flops import BatchStats, count_flops, count_pairs
from postrain.plan.collectives import Collective, read_collectives
from postrain.plan.report import (
    Attempt,
    BatchSizes,
    CollectiveFacts,
    Flops,
    Memory,
    ModelFacts,
    PlanReport,
    TargetFacts,
    format_change,
)
from postrain.plan.roofline import bound_step, count_traced_flops
from postrain.plan.targets import INSTALL, Target, open_target
from postrain.sharding import make_mesh, num_row_shards
from postrain.training.model import Model, abstract_model, count_params, freezes_base
from postrain.training.program import Program
from postrain.training.session import format_undivided

MakeProgram = Callable[[Config, Model, Mesh, int], Program]
PLANNED_STEPS = 1_000_000  # of the schedule, where the config leaves them to the data; the program is the same
GPU_FRACTION = 0.95  # of a GPU's memory that JAX may be given where nothing else runs
MARGIN = 1.2  # over the micro-batches that a proportion says
SHORTEST = 256  # positions of a row below which no shorter row is proposed


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A config's train step, compiled for a target."""

    config: Config
    mesh: Mesh
    model: Model  # abstract; with a teacher or reference beside it
    program: Program
    traced: jax.stages.Traced
    compiled: jax.stages.Compiled | None  # None where the compiler refused it
    refused: int | None  # bytes of a device that it would need then
    seconds: float  # of tracing and compilation


def make_plan(config: Config, target_name: str, make_program: MakeProgram) -> PlanReport:
    """The report on ``config`` at ``target_name``, with advice where it does not fit.

    ``make_program``: the recipe's, the function that ``train`` calls.
    """
    target = open_target(target_name)
    folder = locate_model(config.model.path, weights=False)
    step = compile_step(config, folder, target, make_program)
    memory, flops = count_memory(step), count_step_flops(step)
    advice = []
    if memory.total > target.usable:
        advice = advise(step, memory, target, lambda changed: weigh_step(changed, folder, target, make_program))
    trained, frozen = count_params(step.model)
    model_config, tokens = step.model.config, config.data.batch_size * config.data.sequence_length
    collectives, unknown, bound = None, None, None
    if step.compiled is not None:
        found, unknown = read_collectives(step.compiled.as_text(), step.mesh.size)
        collectives = sum_by_kind(found)
        bound = bound_step(target, step.mesh, flops, memory, found, tokens) if target.chip else None
    return PlanReport(
        target=target_facts(target),
        mesh={axis: size for axis, size in step.mesh.shape.items() if size > 1},
        model=ModelFacts(trained, frozen, model_config.compute_dtype, model_config.remat),
        batch=BatchSizes(config.data.batch_size, config.data.sequence_length, config.train.micro_batches, tokens),
        memory=memory,
        fits=memory.total <= target.usable,
        compiled=step.compiled is not None,
        flops=flops,
        collectives=collectives,
        uncounted_collectives=unknown,
        bound=bound,
        advice=advice,
        notes=format_undivided(step.model, step.mesh),
        compile_seconds=round(step.seconds, 1),
    )


def target_facts(target: Target) -> TargetFacts:
    chip = target.chip
    return TargetFacts(
        name=target.name,
        devices=len(target.devices),
        hosts=len({device.process_index for device in target.devices}),
        kind=target.devices[0].device_kind,
        usable_bytes=target.usable,
        usable_why=target.usable_why,
        peak_flops=target.peak_flops,
        memory=chip and chip.memory,
        memory_bandwidth=chip and chip.memory_bandwidth,
        link_bandwidth=chip and chip.link_bandwidth,
        network_bandwidth=chip and chip.network_bandwidth or None,
        source=chip and chip.source,
    )


# Compilation.


def compile_step(config: Config, folder: str | os.PathLike, target: Target, make_program: MakeProgram) -> CompiledStep:
    """Traces, lowers and compiles the step of ``config``.

    Raises UserError: mesh or batch do not divide, or the compiler fails for another reason than memory.
    """
    started = time.perf_counter()
    mesh = make_mesh(config.mesh, target.devices)
    model = abstract_model(config, folder, mesh)
    program = make_program(config, model, mesh, config.train.steps or PLANNED_STEPS)
    compiled = refused = None
    try:
        traced = program.train_step.trace(program.abstract_state, program.abstract_batch)
        compiled = traced.lower().compile(compiler_options=target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        refused = read_refusal(str(error))
        if refused is None:
            raise UserError(f"--target={target.name}: {explain_compiler(str(error))}") from error
    return CompiledStep(config, mesh, program.model, program, traced, compiled, refused, time.perf_counter() - started)


def explain_compiler(message: str) -> str:
    """One line for a compilation that failed for another reason than memory."""
    if "No PTX compilation provider" in message or "libdevice not found" in message:
        return f"the compiler of CUDA's own language is not installed: {INSTALL}"
    return f"the compiler could not compile the step: {' '.join(message.split())[:300]}"


def read_refusal(message: str) -> int | None:
    """Bytes of a device that a program would need, where the TPU compiler says that they are too many.

    What one of its messages calls temporaries includes the arguments: it is ``peak_memory_in_bytes`` of a program
    that compiles.
    """
    match = re.search(r"(?:required for HLO temporaries \(|[Uu]sed )([\d.]+)([KMGT])\b", message)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2])) if match else None


# Memory and operations.


def count_memory(step: CompiledStep) -> Memory:
    """Bytes of a device by kind.

    Where the compiler refused the step, all that does not follow from shapes is in "activations".
    """
    held, gradients = count_held(step.program), count_gradients(step.program)
    arguments = sum(held.values())
    if step.compiled is None:
        assert step.refused is not None
        return Memory(**held, gradients=gradients, activations=max(step.refused - gradients - arguments, 0))
    said = step.compiled.memory_analysis()
    outputs = said.output_size_in_bytes - said.alias_size_in_bytes
    temporaries = said.temp_size_in_bytes
    if step.mesh.devices.flat[0].platform == "tpu":
        # There the size of temporaries counts what loops carry twice; the peak is what the compiler holds the program
        # to. On GPUs temporaries are one allocation, larger than what is live at one time.
        temporaries = said.peak_memory_in_bytes - said.argument_size_in_bytes - outputs
    gradients = min(gradients, temporaries)
    return Memory(
        **held,
        gradients=gradients,
        activations=temporaries - gradients,
        outputs=outputs,
        padding=said.argument_size_in_bytes - arguments,
        program=said.generated_code_size_in_bytes,
    )


def count_held(program: Program) -> dict[str, int]:
    """Bytes of a device for the state and the batch, by field of Memory, from shapes and shardings."""
    state = program.abstract_state
    return {
        "parameters_trained": shard_bytes(state.params),
        "parameters_frozen": shard_bytes(state.frozen),
        "optimizer": shard_bytes((state.opt_state, state.step, state.rng, state.history)),
        "average": shard_bytes(state.ema),
        "batch": shard_bytes(program.abstract_batch),
    }


def shard_bytes(tree: Any) -> int:
    """Bytes of the parts that the busiest device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def count_gradients(program: Program) -> int:
    """Bytes of a device for one float32 gradient of every trained parameter, laid out like the parameter."""
    leaves = jax.tree.leaves(program.abstract_state.params)
    return sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def count_step_flops(step: CompiledStep) -> Flops:
    data, config = step.config.data, step.model.config
    rows, length = data.batch_size, data.sequence_length
    projected = rows * length if step.model.projects else 0  # onto the vocabulary
    stats = lambda of: BatchStats(rows * length, projected, count_pairs(of, np.full(rows, length)))
    model = count_flops(config, stats(config))
    # Attention and the projection onto the vocabulary run in loops over blocks whose number depends on the data.
    executed = count_traced_flops(step.traced.jaxpr) + model["attention"] + model["unembedding"]
    for other in list_forward_only(step):
        whole = count_flops(dataclasses.replace(other, lora=None, new_rows=None), stats(other))
        executed += (whole["attention"] + whole["unembedding"]) / 3  # no gradients
    counted = (step.compiled.cost_analysis() or {}).get("flops") if step.compiled else None
    total = sum(model.values())
    return Flops(total, model, max(executed, total), counted and counted * step.mesh.size)


def list_forward_only(step: CompiledStep) -> list[ModelConfig]:
    """Models that a step computes besides the one that trains: a teacher, a reference that is not read from a file."""
    found = [step.model.teacher] if step.model.teacher else []
    if step.config.recipe == "preference" and choose_reference(step.config) in ("base", "live"):
        found.append(step.model.config)
    return found


def sum_by_kind(collectives: list[Collective]) -> dict[str, CollectiveFacts]:
    facts: dict[str, CollectiveFacts] = {}
    for one in collectives:
        known = facts.get(one.kind, CollectiveFacts(0, 0, 0))
        facts[one.kind] = CollectiveFacts(
            known.times + one.times,
            known.payload_bytes + one.payload * one.times,
            known.received_bytes + round(one.received),
        )
    return facts


# Advice: what to change so that a step fits.


def advise(
    step: CompiledStep, memory: Memory, target: Target, weigh: Callable[[Config], tuple[int, bool]]
) -> list[Attempt]:
    """Changes that were tried, in order, until one fits.

    ``weigh(config) -> (bytes of a device, whether that was compiled)``. Each change contains the ones before it, the
    ones that cost least first: memory that JAX leaves free, parameters split over more devices, smaller
    micro-batches (the same result), recomputation (a third more operations), adapters, a quantised base under them,
    shorter rows.
    """
    needed = memory.total
    if target.chip and target.chip.platform == "gpu" and target.usable < needed <= GPU_FRACTION * target.chip.memory:
        return [Attempt({"environment XLA_CLIENT_MEM_FRACTION": GPU_FRACTION}, needed, compiled=True, fits=True)]
    attempts = []
    for change, config in list_changes(step, memory, target.usable):
        print(f"does not fit, trying {format_change(change)}", file=sys.stderr, flush=True)
        needed, compiled = weigh(config)
        attempts.append(Attempt(change, needed, compiled, fits=needed <= target.usable))
        if attempts[-1].fits:
            break
    return attempts


def weigh_step(
    config: Config, folder: str | os.PathLike, target: Target, make_program: MakeProgram
) -> tuple[int, bool]:
    """Bytes of a device that a step needs, and whether it was compiled: not if inputs and gradients do not fit."""
    mesh = make_mesh(config.mesh, target.devices)
    model = abstract_model(config, folder, mesh)
    program = make_program(config, model, mesh, config.train.steps or PLANNED_STEPS)
    least = sum(count_held(program).values()) + count_gradients(program)
    if least > target.usable:
        return least, False
    return count_memory(compile_step(config, folder, target, make_program)).total, True


def list_changes(step: CompiledStep, memory: Memory, usable: int) -> Iterator[tuple[dict[str, Any], Config]]:
    """Longer and longer lists of changed keys, each with the config that it gives."""
    config, mesh = step.config, step.mesh
    rows = config.data.batch_size // num_row_shards(mesh)
    changes: list[dict[str, Any]] = []
    if mesh.shape["data"] > 1:
        changes.append({"mesh.data": 1, "mesh.fsdp": -1})
    for count in list_micro_batches(config.train.micro_batches, rows, memory, usable):
        changes.append({"train.micro_batches": count})
    if config.model.remat != "full":
        changes.append({"model.remat": "full"})
    if not freezes_base(config):  # then no rows of new tokens train alone, and adapters may
        changes.append({"model.lora.rank": LoraConfig().rank})
    even = step.model.config.embed_size % 2 == 0  # NF4 packs two numbers in a byte
    alone = config.model.new_tokens.train_alone
    if config.model.quantization == "none" and even and not config.model.fp8 and not alone:
        changes.append({"model.quantization": "nf4"})
    length = config.data.sequence_length
    while length // 2 >= SHORTEST:
        length //= 2
        changes.append({"data.sequence_length": length})
    change: dict[str, Any] = {}
    for more in changes:
        change = change | more
        yield change, replace_keys(config, change)


def list_micro_batches(now: int, rows: int, memory: Memory, usable: int) -> list[int]:
    """Numbers of micro-batches to try in place of ``now`` for the ``rows`` that a device has in a step.

    The one that should be enough, as activations shrink with the rows of a micro-batch, and the largest.
    """
    room = usable - (memory.total - memory.activations)
    wanted = now * memory.activations / room * MARGIN if room > 0 else rows
    counts = [count for count in range(now + 1, rows + 1) if rows % count == 0]
    enough = [count for count in counts if count >= wanted]
    return sorted({*enough[:1], *counts[-1:]})


def replace_keys(config: Any, change: dict[str, Any]) -> Any:
    """``config`` with dotted keys set."""
    for key, value in change.items():
        name, _, rest = key.partition(".")
        new = replace_keys(getattr(config, name), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{name: new})
    return config
