"""What a run prints before its first step."""

import jax
from jax.sharding import Mesh

from postrain.compute.build import Model
from postrain.config import Config, format_config
from postrain.models.attention import select_backend
from postrain.models.params import axes_of, lora_specs, num_params, param_specs, shapes_of
from postrain.sharding import describe_mesh, num_row_shards, undivided_dimensions


def format_summary(config: Config, mesh: Mesh, model: Model, total_steps: int) -> str:
    """Config, devices, parameters, the batch equation, the attention back end; several lines."""
    trained, frozen = num_params(model.params), num_params(model.frozen)
    data, train = config.data, config.train
    hosts = jax.process_count()
    rows = data.batch_size // (train.micro_batches * hosts)
    slots = data.batch_size * data.sequence_length
    lines = [
        "config (* = not the default)",
        format_config(config),
        f"devices     {describe_mesh(mesh)}, jax {jax.__version__}",
        *(f"            {line}" for line in describe_undivided(model, mesh)),
        f"parameters  {trained:,} trained, {frozen:,} frozen ({trained / (trained + frozen):.2%} trained)",
        f"batch       {rows} rows x {data.sequence_length} tokens x {train.micro_batches} micro-batches x {hosts} hosts "
        f"= {slots:,} tokens an update, over {num_row_shards(mesh)} row shards; {total_steps:,} updates",
        f"attention   {select_backend(model.config.attention)}, {model.config.compute_dtype}, remat {model.config.remat}",
    ]
    return "\n".join(lines)


def describe_undivided(model: Model, mesh: Mesh) -> list[str]:
    """What the mesh leaves whole although it names an axis for it."""
    specs = [param_specs(model.config), *([lora_specs(model.config)] if model.config.lora else [])]
    return [line for spec in specs for line in undivided_dimensions(axes_of(spec), mesh, shapes_of(spec))]


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
