"""What a training step needs of hardware that need not be there: memory, operations, communication, a bound of MFU.

The recipe's own train step, the very function that ``postrain train`` compiles, is compiled ahead of time from shapes
alone for the devices of a target. Memory is what the compiler says, split into kinds by the shapes that each device
holds. Not counted: evaluation, generation and checkpoints, which happen between steps.
"""

import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.config import Config
from postrain.errors import UserError
from postrain.hf.hub import locate_model
from postrain.plan.advice import advise
from postrain.plan.collectives import read_collectives
from postrain.plan.report import PlanReport
from postrain.plan.roofline import bound_step
from postrain.plan.targets import INSTALL, Target, open_target
from postrain.plan.traced_flops import count_traced_flops
from postrain.sharding import make_mesh
from postrain.training.flops import BatchStats, count_flops, count_pairs
from postrain.training.model import Model, Step, abstract_model, count_params
from postrain.training.summary import describe_undivided

MakeStep = Callable[[Config, Model, Mesh, int], Step]
PLANNED_STEPS = 1_000_000  # of the schedule, where the config leaves them to the data; the program is the same


class Program(NamedTuple):
    """A config's step, compiled for a target; ``compiled`` is None where the compiler refused it."""

    config: Config
    mesh: Mesh
    model: Model
    step: Step
    traced: Any
    compiled: Any
    refused: int | None  # bytes of a device that it would need
    seconds: float


def make_plan(config: Config, target_name: str, make_step: MakeStep) -> PlanReport:
    """The report on ``config`` at ``target_name``, with advice where it does not fit."""
    target = open_target(target_name)
    folder = locate_model(config.model.path, weights=False)
    program = compile_step(config, folder, target, make_step)
    memory = count_memory(program)
    needed = memory["total"]
    advice = []
    if needed > target.usable:
        advice = advise(program, memory, target, lambda changed: weigh_step(changed, folder, target, make_step))
    return PlanReport(
        target=describe_target(target),
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        model=describe_model(program),
        batch=describe_batch(config),
        memory=memory,
        fits=needed <= target.usable,
        compiled=program.compiled is not None,
        flops=(flops := describe_flops(program)),
        **describe_communication(program, target, flops, memory),
        advice=advice,
        notes=describe_undivided(program.model, program.mesh),
        compile_seconds=round(program.seconds, 1),
    )


def weigh_step(config: Config, folder: str | os.PathLike, target: Target, make_step: MakeStep) -> tuple[int, bool]:
    """Bytes of a device that a step needs, and whether that was compiled rather than seen to be too much already."""
    mesh = make_mesh(config.mesh, target.devices)
    model = abstract_model(config, folder, mesh)
    least = count_least(make_step(config, model, mesh, config.train.steps or PLANNED_STEPS), model)
    if least > target.usable:
        return least, False
    program = compile_step(config, folder, target, make_step)
    return count_memory(program)["total"], True


def count_least(step: Step, model: Model) -> int:
    """Bytes of a device that no way of computing the step avoids: what it is given, and the gradients."""
    return sum(count_held(step, model).values()) + count_gradients(step)


def compile_step(config: Config, folder: str | os.PathLike, target: Target, make_step: MakeStep) -> Program:
    """Traces, lowers and compiles the step of ``config``. Raises UserError where mesh or batch do not divide."""
    started = time.perf_counter()
    mesh = make_mesh(config.mesh, target.devices)
    model = abstract_model(config, folder, mesh)
    step = make_step(config, model, mesh, config.train.steps or PLANNED_STEPS)
    compiled = refused = None
    try:
        traced = step.train_step.trace(step.state, step.batch)
        compiled = traced.lower().compile(compiler_options=target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        refused = read_refusal(str(error))
        if refused is None:
            raise UserError(f"--target={target.name}: {explain_compiler(str(error))}") from error
    return Program(config, mesh, model, step, traced, compiled, refused, time.perf_counter() - started)


def explain_compiler(message: str) -> str:
    """One line for a compilation that failed for another reason than memory."""
    if "No PTX compilation provider" in message or "libdevice not found" in message:
        return f"the compiler of CUDA's own language is not installed: {INSTALL}"
    return f"the compiler could not compile the step: {' '.join(message.split())[:300]}"


def read_refusal(message: str) -> int | None:
    """Bytes of a device that a program would need, where the TPU compiler says that they are too many.

    What one of its messages calls temporaries has the arguments in it: it is ``peak_memory_in_bytes`` of a program
    that compiles.
    """
    match = re.search(r"(?:required for HLO temporaries \(|[Uu]sed )([\d.]+)([KMGT])\b", message)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2])) if match else None


def count_held(step: Step, model: Model) -> dict[str, int]:
    """Bytes of a device for what the step is given, by kind, from shapes and shardings."""
    state = step.state
    return {
        "parameters_trained": shard_bytes(state.params),
        "parameters_frozen": shard_bytes(state.frozen),
        "optimizer": shard_bytes((state.opt_state, state.step, state.rng, state.history)),
        "average": shard_bytes(state.ema),
        "batch": shard_bytes(step.batch),
    }


def shard_bytes(tree: Any) -> int:
    """Bytes of the parts that the busiest device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def count_memory(program: Program) -> dict[str, int]:
    """Bytes of a device by kind; the kinds add up to "total".

    "gradients" are the float32 sums that exist at the end of backward, a part of the compiler's temporaries;
    "activations" is the rest of those. "padding" is what layouts add to the arguments, "program" the code. Where the
    compiler refused the step, all that is not known by shapes is in "activations".
    """
    held, gradients = count_held(program.step, program.model), count_gradients(program.step)
    if program.compiled is None:
        activations = max(program.refused - gradients - sum(held.values()), 0)
        kinds = {**held, "gradients": gradients, "activations": activations, "outputs": 0, "padding": 0, "program": 0}
        return {**kinds, "total": sum(kinds.values())}
    said = program.compiled.memory_analysis()
    outputs = said.output_size_in_bytes - said.alias_size_in_bytes
    temporaries = said.temp_size_in_bytes
    if program.mesh.devices.flat[0].platform == "tpu":
        # There the size of temporaries counts what loops carry twice; the peak is what the compiler holds the program
        # to. On GPUs temporaries are one allocation, larger than what is live at one time.
        temporaries = said.peak_memory_in_bytes - said.argument_size_in_bytes - outputs
    gradients = min(gradients, temporaries)
    kinds = {
        **held,
        "gradients": gradients,
        "activations": temporaries - gradients,
        "outputs": outputs,
        "padding": said.argument_size_in_bytes - sum(held.values()),
        "program": said.generated_code_size_in_bytes,
    }
    return {**kinds, "total": sum(kinds.values())}


def count_gradients(step: Step) -> int:
    """Bytes of a device for one float32 gradient of every trained parameter, laid out like the parameter."""
    return sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(step.state.params))


def describe_target(target: Target) -> dict:
    chip = target.chip
    names = ("memory", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "source")
    return {
        "name": target.name,
        "devices": len(target.devices),
        "hosts": target.num_hosts,
        "kind": target.devices[0].device_kind,
        "usable_bytes": target.usable,
        "usable_why": target.usable_why,
        "peak_flops": target.peak_flops,
        **{name: chip and getattr(chip, name) or None for name in names},
    }


def describe_model(program: Program) -> dict:
    config = program.model.config
    trained, frozen = count_params(program.model)
    return {
        "parameters_trained": trained,
        "parameters_frozen": frozen,
        "compute_dtype": config.compute_dtype,
        "remat": config.remat,
    }


def describe_batch(config: Config) -> dict:
    data = config.data
    return {
        "rows": data.batch_size,
        "sequence_length": data.sequence_length,
        "micro_batches": config.train.micro_batches,
        "tokens": data.batch_size * data.sequence_length,
    }


def describe_flops(program: Program) -> dict:
    """Operations of a step on all devices. "model": the formula of ``perf/mfu``, for full rows of one document each.

    "executed": at least what is carried out, recomputation included. "compiler": what XLA counts for all devices,
    the body of each loop once; None where it does not tell.
    """
    data, config = program.config.data, program.model.config
    rows, length = data.batch_size, data.sequence_length
    model = count_flops(config, BatchStats(rows * length, rows * length, count_pairs(config, np.full(rows, length))))
    # Attention and the projection onto the vocabulary run in loops over blocks whose number hangs on the data.
    outside = model["attention"] + model["unembedding"]
    executed = count_traced_flops(program.traced.jaxpr) + outside
    counted = (program.compiled.cost_analysis() or {}).get("flops") if program.compiled else None
    return {
        "model": sum(model.values()),
        "model_by_kind": model,
        "executed": max(executed, sum(model.values())),
        "compiler": counted and counted * program.mesh.size,
    }


def describe_communication(program: Program, target: Target, flops: dict, memory: dict) -> dict:
    """Collectives by kind, and the roofline that stands on them; None where the compiler refused the step."""
    if program.compiled is None:
        return {"collectives": None, "uncounted_collectives": None, "bound": None}
    collectives, unknown = read_collectives(program.compiled.as_text(), program.mesh.size)
    by_kind: dict[str, dict] = {}
    for one in collectives:
        kind = by_kind.setdefault(one.kind, {"times": 0, "payload_bytes": 0, "received_bytes": 0})
        kind["times"] += one.times
        kind["payload_bytes"] += one.payload * one.times
        kind["received_bytes"] += round(one.received)
    bound = None
    if target.chip:
        tokens = program.config.data.batch_size * program.config.data.sequence_length
        bound = bound_step(target, program.mesh, flops, memory, collectives, tokens)
    return {"collectives": by_kind, "uncounted_collectives": unknown, "bound": bound}
