"""The parameter tree by paths such as ``layers.attention.q.kernel``, beside the names of safetensors files."""

import dataclasses
import itertools
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
    groups: dict[str, list[tuple[TensorName, ParamSpec]]] = {}  # those that share a tensor
    for entry, spec in list_entries(config, family):
        groups.setdefault(entry.name, []).append((entry, spec))
    # Names of layers stand together in the table: what comes before them, all layers in turn, what comes after.
    places: list[tuple[str, int | None, int | None]] = []
    for per_layer, together in itertools.groupby(groups, lambda name: "{}" in name):
        names = list(together)
        for layer in range(config.num_layers) if per_layer else (None,):
            for name in names:
                experts = range(config.moe.num_experts) if groups[name][0][0].per_expert else (None,)
                places += [(name, layer, expert) for expert in experts]
    tensors = []
    for name, layer, expert in places:
        entry, spec = groups[name][0]
        stacked = entry.per_layer + entry.per_expert
        axes = zip(spec.axes[stacked:], spec.shape[stacked:], strict=True)
        shape = tuple(config.vocab_size if axis == "vocab" else size for axis, size in axes)
        shape = (*shape[:-1], shape[-1] * entry.parts)
        shape = shape[::-1] if entry.transpose else shape
        written = name.format(*[i for i in (layer, expert) if i is not None])
        tensors.append(FileTensor(written, tuple(entry for entry, _ in groups[name]), layer, expert, shape))
    return tensors


def group_layers(names: list[str]) -> str:
    """Names on one line, those that differ in the layer alone put together: ``model.layers.{0-3,7}.mlp...``."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name[: match.start(1)] + "{}" + name[match.end(1) :] if match else name
        groups.setdefault(pattern, []).extend([int(match.group(1))] if match else [])
    parts = []
    for pattern, layers in groups.items():
        runs: list[list[int]] = []  # of consecutive layers
        for layer in sorted(layers):
            if runs and layer == runs[-1][-1] + 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        spans = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        parts.append(pattern.replace("{}", spans if len(layers) == 1 else f"{{{spans}}}", 1) if layers else pattern)
    return ", ".join(parts)
