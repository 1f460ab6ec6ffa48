"""The texts that a run prints: its summary before the first step, its memory, its metrics."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.config import Config, format_config
from postrain.models import grouped_dot
from postrain.models.attention.dispatch import select_backend
from postrain.models.config import ModelConfig
from postrain.models.flops import format_formula
from postrain.models.lora import adapter_specs
from postrain.models.params import axes_of, frozen_specs, shapes_of
from postrain.sharding import data_process, format_mesh, mesh_context, num_row_shards, undivided_dimensions
from postrain.training.model import Model, count_params


def format_summary(config: Config, mesh: Mesh, model: Model, total_steps: int) -> str:
    """Config, devices, parameters, the batch equation, the back ends; several lines."""
    trained, frozen = count_params(model)
    data, train = config.data, config.train
    _, hosts = data_process(mesh)  # processes that share rows count as one
    rows = data.batch_size // (train.micro_batches * hosts)
    slots = data.batch_size * data.sequence_length
    lines = [
        "config (* = not the default)",
        format_config(config),
        f"devices     {format_mesh(mesh)}, jax {jax.__version__}",
        *(f"            {line}" for line in format_undivided(model, mesh)),
        f"parameters  {trained:,} trained, {frozen:,} frozen ({trained / (trained + frozen):.2%} trained)",
        f"batch       {rows} rows x {data.sequence_length} tokens x {train.micro_batches} micro-batches x {hosts} hosts"
        f" = {slots:,} tokens an update, over {num_row_shards(mesh)} row shards; {total_steps:,} updates",
        *format_backends(model.config, mesh),
        f"MFU         {format_formula(model.config)}",
    ]
    return "\n".join(lines)


def format_backends(config: ModelConfig, mesh: Mesh) -> list[str]:
    """Lines naming the back ends of attention and the experts. Raises UserError where the devices cannot run them."""
    with mesh_context(mesh):
        lines = [f"attention   {select_backend(config.attention)}, {config.compute_dtype}, remat {config.remat}"]
        if config.moe:
            lines.append(f"experts     {grouped_dot.select_backend(config.moe.backend)}")
    return lines


def format_undivided(model: Model, mesh: Mesh) -> list[str]:
    """Lines for the parameters that the mesh leaves whole although it names an axis for them."""
    specs = [frozen_specs(model.config), adapter_specs(model.config)]
    return [line for spec in specs for line in undivided_dimensions(axes_of(spec), mesh, shapes_of(spec))]


def format_overlong_warning(lengths: Sequence[int] | np.ndarray, config: ModelConfig) -> str:
    """A warning where documents are longer than the context length of pre-training, else ""."""
    longer = sum(int(length) > config.max_positions for length in lengths)
    if not longer:
        return ""
    return (
        f"warning     {longer:,} of {len(lengths):,} documents are longer than the {config.max_positions:,} positions "
        f"that the model was pre-trained for, the longest takes {max(lengths):,}: data.sequence_length would limit them"
    )


def format_memory(compiled: jax.stages.Compiled) -> str:
    """The memory of the compiled step on each device: state and batch, and temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return "memory      not reported by this back end"
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    temporary += memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = (arguments + temporary) / 2**30
    return (
        f"memory      {total:.2f} GiB a device: {arguments / 2**30:.2f} for the state and the batch, "
        f"{temporary / 2**30:.2f} for the step"
    )


# Metrics from 0 to 1, by the ends of their names.
SHARES = ("accuracy", "accuracies", "exact_match", "valid_json")


def format_metrics(step: int, metrics: Mapping[str, float]) -> str:
    """``step 40  eval/loss 0.1234  eval/exact_match 81.0%``: shares in per cent, the others as numbers."""
    shown = {name: float(value) for name, value in metrics.items() if name.startswith("eval/")}
    parts = [f"{name} {value:.1%}" if name.endswith(SHARES) else f"{name} {value:.4f}" for name, value in shown.items()]
    return "  ".join([f"step {step}", *parts])


def environment_facts(mesh: Mesh) -> dict[str, str]:
    """Devices, host and versions: what the figures of a report depend on besides the config."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
    return {
        "devices": format_mesh(mesh),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
    }
