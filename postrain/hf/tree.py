"""The parameter tree by paths such as ``layers.attention.q.kernel``, beside the names of safetensors files."""

import dataclasses
import re

from postrain.hf.families import Family, TensorName
from postrain.models.config import ModelConfig
from postrain.models.params import ParamSpec, param_specs
from postrain.trees import flatten


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of a folder: where it goes in the tree and the shape it must have in the file."""

    name: str  # in the file
    entries: tuple[TensorName, ...]  # one, or all that the tensor holds in turns, in their order
    layer: int | None  # index into the stacked parameter
    expert: int | None  # index into one layer of it
    shape: tuple[int, ...]  # in the file: [out, in] for linear layers, the vocabulary without padding


def list_entries(config: ModelConfig, family: Family) -> list[tuple[TensorName, ParamSpec]]:
    """The rows of the family's table that a model of ``config`` has, in the table's order, with their specs."""
    specs = flatten(param_specs(config))
    named = {entry.param for entry in family.tensors}
    if unnamed := sorted(set(specs) - named):
        raise ValueError(f"postrain/hf/families.py names no tensors for {', '.join(unnamed)}")
    return [(entry, specs[entry.param]) for entry in family.tensors if entry.param in specs]


def list_tensors(config: ModelConfig, family: Family) -> list[FileTensor]:
    """Every tensor of the folder of such a model, layer by layer as Hugging Face orders its modules."""
    groups: dict[str, list[tuple[TensorName, ParamSpec]]] = {}
    for entry, spec in list_entries(config, family):
        groups.setdefault(entry.name, []).append((entry, spec))

    def make(name: str, layer: int | None = None, expert: int | None = None) -> FileTensor:
        entries = tuple(entry for entry, _ in groups[name])
        places = [i for i in (layer, expert) if i is not None]
        return FileTensor(name.format(*places), entries, layer, expert, file_shape(*groups[name][0], config))

    names = list(groups)
    first = next((i for i, name in enumerate(names) if groups[name][0][0].per_layer), len(names))
    stacked = [name for name in names if groups[name][0][0].per_layer]
    tensors = [make(name) for name in names[:first]]
    for layer in range(config.num_layers):
        for name in stacked:
            experts = range(config.moe.num_experts) if groups[name][0][0].per_expert else (None,)
            tensors += [make(name, layer, expert) for expert in experts]
    return tensors + [make(name) for name in names[first:] if name not in stacked]


def file_shape(entry: TensorName, spec: ParamSpec, config: ModelConfig) -> tuple[int, ...]:
    """Shape in the file of one layer (of one expert) of a parameter, and of those that share the tensor with it."""
    stacked = entry.per_layer + entry.per_expert
    shape, axes = spec.shape[stacked:], spec.axes[stacked:]
    shape = tuple(config.vocab_size if axis == "vocab" else size for axis, size in zip(axes, shape, strict=True))
    shape = (*shape[:-1], shape[-1] * entry.parts)
    return shape[::-1] if entry.transpose else shape


def group_layers(names: list[str]) -> str:
    """Names on one line, those that differ in the layer alone put together: ``model.layers.{0-3,7}.mlp...``."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name[: match.start(1)] + "{}" + name[match.end(1) :] if match else name
        groups.setdefault(pattern, []).extend([int(match.group(1))] if match else [])
    return ", ".join(
        pattern.replace("{}", _ranges(sorted(layers)), 1) if layers else pattern for pattern, layers in groups.items()
    )


def _ranges(layers: list[int]) -> str:
    if len(layers) == 1:
        return str(layers[0])
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"
