"""What a run prints before its first step, and at the end."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from postrain.config import Config, format_config
from postrain.models import grouped_dot
from postrain.models.attention.dispatch import select_backend
from postrain.models.config import ModelConfig
from postrain.models.flops import format_formula
from postrain.models.lora import adapter_specs
from postrain.models.params import axes_of, frozen_specs, shapes_of
from postrain.sharding import data_process, describe_mesh, mesh_context, num_row_shards, undivided_dimensions
from postrain.training.model import Model, count_params


def format_summary(config: Config, mesh: Mesh, model: Model, total_steps: int) -> str:
    """Config, devices, parameters, the batch equation, the back ends; several lines."""
    trained, frozen = count_params(model)
    data, train = config.data, config.train
    _, hosts = data_process(mesh)  # those that share rows count as one
    rows = data.batch_size // (train.micro_batches * hosts)
    slots = data.batch_size * data.sequence_length
    lines = [
        "config (* = not the default)",
        format_config(config),
        f"devices     {describe_mesh(mesh)}, jax {jax.__version__}",
        *(f"            {line}" for line in describe_undivided(model, mesh)),
        f"parameters  {trained:,} trained, {frozen:,} frozen ({trained / (trained + frozen):.2%} trained)",
        f"batch       {rows} rows x {data.sequence_length} tokens x {train.micro_batches} micro-batches x {hosts} hosts"
        f" = {slots:,} tokens an update, over {num_row_shards(mesh)} row shards; {total_steps:,} updates",
        *describe_backends(model.config, mesh),
        f"MFU         {format_formula(model.config)}",
    ]
    return "\n".join(lines)


def describe_backends(config: ModelConfig, mesh: Mesh) -> list[str]:
    """What computes attention and the experts. Raises UserError where the devices cannot run what is asked for."""
    with mesh_context(mesh):
        lines = [f"attention   {select_backend(config.attention)}, {config.compute_dtype}, remat {config.remat}"]
        if config.moe:
            lines.append(f"experts     {grouped_dot.select_backend(config.moe.backend)}")
    return lines


def describe_undivided(model: Model, mesh: Mesh) -> list[str]:
    """What the mesh leaves whole although it names an axis for it."""
    specs = [frozen_specs(model.config), adapter_specs(model.config)]
    return [line for spec in specs for line in undivided_dimensions(axes_of(spec), mesh, shapes_of(spec))]


def describe_overlong(lengths: Sequence[int], config: ModelConfig) -> str:
    """A warning where documents take more positions than the model was made for, else ""."""
    longer = sum(int(length) > config.max_positions for length in lengths)
    if not longer:
        return ""
    return (
        f"warning     {longer:,} of {len(lengths):,} documents are longer than the {config.max_positions:,} positions "
        f"that the model was made for, the longest takes {max(lengths):,}: data.sequence_length would limit them"
    )


def format_memory(compiled: jax.stages.Compiled) -> str:
    """What the compiled step needs on each device: state and batch, and what it makes on the way."""
    memory = compiled.memory_analysis()
    if memory is None:
        return "memory      this back end does not tell"
    held, made = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    made += memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = (held + made) / 2**30
    return (
        f"memory      {total:.2f} GiB a device: {held / 2**30:.2f} for the state and the batch, "
        f"{made / 2**30:.2f} for the step"
    )


SHARES = ("accuracy", "accuracies", "exact_match", "valid_json")  # ends of names of metrics from 0 to 1


def format_metrics(step: int, metrics: Mapping[str, float]) -> str:
    """``step 40  eval/loss 0.1234  eval/exact_match 81.0%``: shares in per cent, the others as numbers."""
    shown = {name: float(value) for name, value in metrics.items() if name.startswith("eval/")}
    parts = [f"{name} {value:.1%}" if name.endswith(SHARES) else f"{name} {value:.4f}" for name, value in shown.items()]
    return "  ".join([f"step {step}", *parts])


def describe_environment(mesh: Mesh) -> dict[str, str]:
    """What the numbers of a report depend on besides the config."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
    return {
        "devices": describe_mesh(mesh),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
    }
