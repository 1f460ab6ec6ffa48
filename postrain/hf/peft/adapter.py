"""LoRA and DoRA adapters as the folders that `peft` reads and writes.

A PEFT folder has adapter_config.json and adapter_model.safetensors, whose matrices are [rank, in] and
[out, rank] (Hu et al. 2021, arXiv:2106.09685), one pair for each linear layer of each decoder layer, with DoRA
(arXiv:2402.09353) a vector [out] of magnitudes beside them. Those of experts: postrain.hf.peft.experts.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from postrain.config import is_hub_name
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.hf.config import ADAPTER_FILE, ADAPTER_WEIGHTS, config_file, parse_dtype, read_family
from postrain.hf.families import TENSORS, TensorName, find_text_part
from postrain.hf.find_model import ModelFolder
from postrain.hf.folders import copy_side_files
from postrain.hf.load import load_pretrained, place
from postrain.hf.peft.experts import (
    MODULE,
    PARAMETERS,
    list_parameters,
    pack_a,
    pack_b,
    unpack_a,
    unpack_b,
)
from postrain.hf.peft.keys import check_keys, is_targeted, match_pattern, read_names
from postrain.hf.peft.rows import describe_rows, needed_vocabulary, read_rows, row_tensors
from postrain.hf.save import gather, write_folder
from postrain.hf.tensors import TensorFiles, read_json
from postrain.hf.tree import group_layers
from postrain.models.config import LoraConfig, ModelConfig
from postrain.models.lora import adapter_specs, lora_specs
from postrain.models.params import LINEARS, merge_params
from postrain.trees import flatten, unflatten

PREFIX = "base_model.model."  # PeftModel's own two levels
LAYER = "model.layers.{}."
LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor that an adapter's file has of every layer, and the leaves of the parameter tree that it holds."""

    name: str  # in the file, {} the layer
    shape: tuple[int, ...]
    write: Callable[[list[np.ndarray]], np.ndarray]  # one layer of the leaves, in their order -> the tensor
    leaves: dict[str, Callable[[np.ndarray], np.ndarray]]  # path -> its layer out of the tensor


def save_adapter(
    folder: str | os.PathLike,
    adapter_params: dict,
    config: ModelConfig,
    *,
    base_folder: str | os.PathLike,
    base_name: str = "",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes the adapters (tree of models.lora.adapter_specs, float32 in the file) as a PEFT folder.

    ``base_folder`` is named in adapter_config.json as the model that the adapter belongs to, by ``base_name`` where
    that is not empty (the user's name for the model; the folder may be a cache's). Its tokenizer is copied along, or
    ``tokenizer``, which the adapter was trained with. Raises UserError when the folder cannot be written.
    """
    if config.lora is None:
        raise ValueError("save_adapter: config.lora is None")
    leaves = flatten(adapter_params)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    expected = {path: spec.shape for path, spec in flatten(adapter_specs(config)).items()}
    if wrong := sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path)):
        raise ValueError(f"adapters do not fit config.lora: {', '.join(wrong)}")
    check_base(base_folder)
    table = read_family(base_folder).tensors
    listed = _list_tensors(config, table)
    tensors = {tensor.name.format(layer): (tensor, layer) for layer in range(config.num_layers) for tensor in listed}
    rows = row_tensors(config, PREFIX)

    def fetch(name: str) -> np.ndarray:
        if name in rows:
            return gather(leaves[rows[name]])
        tensor, layer = tensors[name]
        return tensor.write([gather(leaves[path], (layer,)) for path in tensor.leaves])

    def finish(temporary: pathlib.Path) -> None:
        raw = _adapter_config(config, table, base_name or str(base_folder)) | describe_rows(config)
        (temporary / ADAPTER_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        copy_side_files(base_folder, temporary, tokenizer)
        load_adapter(temporary, config, base_folder=base_folder)

    announced = [(name, tensor.shape, np.dtype(np.float32)) for name, (tensor, _) in tensors.items()]
    announced += [(name, leaves[path].shape, np.dtype(np.float32)) for name, path in rows.items()]
    one_file = {"file_name": ADAPTER_WEIGHTS, "max_shard_bytes": 2**63}
    write_folder(folder, announced, fetch, finish, source_folder=base_folder, **one_file)


def load_adapter(
    folder: str | os.PathLike,
    config: ModelConfig,
    *,
    base_folder: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
) -> tuple[ModelConfig, dict]:
    """``config`` with the adapter's ranks, alpha and targets, and its tree, laid out over ``mesh`` where there is one.

    ``base_folder``: of the model that ``config`` was read from; a model with experts needs it. Raises UserError when
    the folder is not a LoRA adapter, uses a variant that is not supported, or does not fit the model.
    """
    raw = read_json(pathlib.Path(folder) / ADAPTER_FILE)
    check_keys(raw, config, pathlib.Path(folder) / ADAPTER_FILE)
    files = TensorFiles(folder, one_file=ADAPTER_WEIGHTS)
    if base_folder is None and config.moe:
        raise ValueError("load_adapter: a model with experts needs base_folder")
    table = TENSORS if base_folder is None else read_family(base_folder).tensors
    config = dataclasses.replace(config, new_rows=read_rows(raw, config, pathlib.Path(folder) / ADAPTER_FILE))
    rows = row_tensors(config, PREFIX)
    targets = _find_targets(set(files.infos) - set(rows), raw, table, config, folder)
    lora, factors = _parse_config(raw, targets, table, config, folder)
    config = dataclasses.replace(config, lora=lora)
    tensors, layers = _list_tensors(config, table, fused=True), range(config.num_layers)
    specs = flatten(adapter_specs(config))
    shapes = {tensor.name.format(layer): tensor.shape for layer in layers for tensor in tensors}
    shapes |= {name: specs[path].shape for name, path in rows.items()}
    _check_shapes(files, shapes, folder)
    target = parse_dtype(dtype, "dtype")
    row_names = {path: name for name, path in rows.items()}
    holders = {path: tensor for tensor in tensors for path in tensor.leaves}

    def make_reader(path: str):
        if path in row_names:
            return lambda index: files.read(row_names[path])[index].astype(target)
        tensor, factor = holders[path], factors[path.split(".")[-2]] if path.endswith("lora_b") else 1

        def read(index: tuple[slice, ...]) -> np.ndarray:
            found = [
                tensor.leaves[path](files.read(tensor.name.format(layer)))[index[1:]] for layer in layers[index[0]]
            ]
            return (np.stack(found) if factor == 1 else np.stack(found).astype(np.float32) * factor).astype(target)

        return read

    return config, unflatten({path: place(make_reader(path), spec, mesh) for path, spec in specs.items()})


def _check_shapes(files: TensorFiles, shapes: dict[str, tuple[int, ...]], folder) -> None:
    wrong = [
        f"{name} {list(files.infos[name].shape) if name in files.infos else 'missing'} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name not in files.infos or files.infos[name].shape != shape
    ]
    left_over = sorted(set(files.infos) - set(shapes))
    if wrong or left_over:
        extra = [f"left over: {group_layers(left_over)}"] if left_over else []
        raise UserError(f"{folder}: the adapter does not fit the model: {'; '.join(wrong + extra)}: use its base model")


def load_model(model: ModelFolder, *, mesh: Mesh | None = None, dtype: str = "float32") -> tuple[ModelConfig, dict]:
    """ModelConfig and the whole parameter tree, adapters beside their kernels; see load_pretrained and load_adapter."""
    vocab_size = needed_vocabulary(model.adapter)
    config, params = load_pretrained(model.base, mesh=mesh, dtype=dtype, vocab_size=vocab_size)
    if model.adapter is None:
        return config, params
    config, adapters = load_adapter(model.adapter, config, base_folder=model.base, mesh=mesh, dtype=dtype)
    return config, merge_params(adapters, params)


def check_base(folder: str | os.PathLike) -> None:
    """Raises UserError where `peft` would look for the adapters' layers under names other than those in the file."""
    if find_text_part(read_json(config_file(folder))) is not None:
        raise UserError(
            f"config key 'export.format' = 'adapter': {folder} holds more than a language model, whose layers `peft` "
            "finds under other names: export with export.format=merged"
        )


def _modules(table: tuple[TensorName, ...]) -> dict[str, str]:
    """Target -> the linear layer's module in a decoder layer, ``self_attn.q_proj``; without experts."""
    linears = [entry for entry in table if entry.transpose and not entry.per_expert]
    named = {entry.param.split(".")[-2]: entry.name.removeprefix(LAYER).removesuffix(".weight") for entry in linears}
    return {target: module for target, module in named.items() if target in LINEARS}


def _list_tensors(config: ModelConfig, table: tuple[TensorName, ...], fused: bool = False) -> list[_Tensor]:
    """All that the file has of one layer. ``fused``: gate and up of experts share one A, as `peft` trains them."""
    specs, found = flatten(lora_specs(config)), []
    for target, module in _modules(table).items():
        for leaf, suffix in LEAVES.items():
            for path in [path for path in specs if path.split(".")[-2:] == [target, leaf]]:
                name = f"{PREFIX}{LAYER}{module}.{suffix}"
                found.append(_Tensor(name, specs[path].shape[:0:-1], lambda rows: rows[0].T, {path: np.transpose}))
    if config.moe:
        for parameter, module in list_parameters(config.lora).items():
            found += _list_expert_tensors(config, table, parameter, f"{PREFIX}{LAYER}{module}", fused)
    return found


def _list_expert_tensors(config, table, parameter: str, module: str, fused: bool) -> list[_Tensor]:
    members, num_experts = PARAMETERS[parameter], config.moe.num_experts
    present = [target for target in members if target in config.lora.targets]
    specs = lora_specs(config)["layers"]["moe"]
    size_in = specs[present[0]]["lora_a"].shape[2]
    size_out = specs[present[0]]["lora_b"].shape[3] * len(members)
    ranks = [config.lora.rank_of(target) for target in present]
    width = num_experts * (ranks[0] if fused else sum(ranks))
    interleaved = any(entry.parts > 1 for entry in table)  # output channels of gate and up take turns
    write_b = lambda rows: pack_b(dict(zip(present, rows, strict=True)), members, interleaved)
    read_a = functools.partial(unpack_a, num_experts=num_experts)
    read_b = lambda i: lambda matrix: unpack_b(matrix, num_experts, i, len(members), interleaved)
    paths_a, paths_b = ([f"layers.moe.{target}.{leaf}" for target in present] for leaf in ("lora_a", "lora_b"))
    return [
        _Tensor(f"{module}{LEAVES['lora_a']}", (width, size_in), pack_a, dict.fromkeys(paths_a, read_a)),
        _Tensor(
            f"{module}{LEAVES['lora_b']}",
            (size_out, width),
            write_b,
            {path: read_b(members.index(target)) for path, target in zip(paths_b, present, strict=True)},
        ),
    ]


def _split_targets(lora: LoraConfig, table, config: ModelConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Of the targets: the module of each linear layer, and the fused parameter of each linear layer of experts."""
    modules = {target: module for target, module in _modules(table).items() if target in lora.targets}
    parameters = {target: name for name, members in PARAMETERS.items() for target in members}
    experts = {t: f"{MODULE}.{parameters[t]}" for t in lora.targets if t in parameters} if config.moe else {}
    return {target: module for target, module in modules.items() if target not in experts}, experts


def _adapter_config(config: ModelConfig, table: tuple[TensorName, ...], base_name: str) -> dict:
    """The keys of `peft.LoraConfig` that differ from its defaults, or say what the adapter is."""
    lora = config.lora
    base_name, _, revision = base_name.partition("@") if is_hub_name(base_name) else (base_name, "", "")
    modules, experts = _split_targets(lora, table, config)
    ranks = {module.split(".")[-1]: lora.rank_of(target) for target, module in modules.items()}
    for target, parameter in experts.items():
        ranks[parameter] = ranks.get(parameter, 0) + lora.rank_of(target)
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": revision or None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora.rank},
        "target_modules": sorted(module.split(".")[-1] for module in modules.values()),
        "target_parameters": sorted(set(experts.values())) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": False,
    }


def _find_targets(names: set[str], raw: dict, table, config: ModelConfig, folder) -> tuple[str, ...]:
    """The linear layers that have adapters, by the tensors: ``target_modules`` may be a pattern."""
    modules = {module: target for target, module in _modules(table).items()}
    suffixes = "|".join(re.escape(suffix) for suffix in LEAVES.values())
    found = set()
    where = pathlib.Path(folder) / ADAPTER_FILE
    for name in sorted(names):
        match = re.fullmatch(rf"{re.escape(PREFIX)}model\.layers\.\d+\.([\w.]+)\.({suffixes})", name)
        if match and match[1] in modules:
            if not is_targeted(raw, name.removeprefix(PREFIX).removesuffix(f".{match[2]}"), where):
                raise UserError(
                    f"{where}: target_modules and exclude_modules leave {name} out: `peft` does not apply it"
                )
            found.add(modules[match[1]])
        elif not (match and config.moe and re.fullmatch(rf"{re.escape(MODULE)}(\.base_layer)?", match[1])):
            example = f"{PREFIX}{LAYER.format(0)}self_attn.q_proj.{LEAVES['lora_a']}"
            raise UserError(
                f"{folder}: adapter tensor {name} belongs to no linear layer of a decoder: expected names such as "
                f"{example}, as PeftModel.save_pretrained writes them; adapters of other layers are not supported"
            )
    for parameter in read_names(raw, "target_parameters", where):
        name = parameter.split(".")[-1]
        if not config.moe or name not in PARAMETERS:
            raise UserError(
                f"{where}: target_parameters has {parameter!r}, supported are {', '.join(PARAMETERS)} of experts"
            )
        found.update(PARAMETERS[name])
    if not found:
        raise UserError(f"{folder}: {ADAPTER_WEIGHTS} has no adapter tensors: save the adapter again")
    return tuple(target for target in LINEARS if target in found)


def _is_number(value, kinds: type = int | float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _parse_config(raw: dict, targets, table, config: ModelConfig, folder) -> tuple[LoraConfig, dict[str, float]]:
    """The adapters' config, and by target the factor of B that makes up for `peft`'s own way of scaling."""
    where = pathlib.Path(folder) / ADAPTER_FILE
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not (_is_number(rank, int) and rank > 0 and _is_number(alpha) and alpha > 0):
        raise UserError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers above 0")
    for key, kinds, least in (("rank_pattern", int, 1), ("alpha_pattern", int | float, 0)):
        patterns = raw.get(key) or {}
        numbers = isinstance(patterns, dict) and all(_is_number(v, kinds) and v >= least for v in patterns.values())
        if not numbers:
            raise UserError(f"{where}: {key} is {json.dumps(patterns)[:60]}, expected numbers by names of modules")
    # Rank-stabilised LoRA (arXiv:2312.03732) scales by alpha / sqrt(r) where plain LoRA does by alpha / r.
    stable = lambda alpha, rank: alpha * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    lora = LoraConfig(rank, stable(alpha, rank), targets, dora=bool(raw.get("use_dora")))
    ranks, factors = {}, {}
    for names in _split_targets(lora, table, config):
        for target, module in names.items():
            ranks[target] = _read_pattern(raw, "rank_pattern", module, rank, config, where)
            own_alpha = _read_pattern(raw, "alpha_pattern", module, alpha, config, where)
            factors[target] = stable(own_alpha, ranks[target]) / lora.alpha
    if lora.dora and config.moe and (experts := [target for target in targets if target in ("gate", "up", "down")]):
        raise UserError(f"{where}: use_dora with adapters of experts ({', '.join(experts)}) is not supported")
    others = tuple((target, ranks[target]) for target in targets if ranks[target] != rank)
    return dataclasses.replace(lora, ranks=others), factors


def _read_pattern(raw: dict, key: str, module: str, default, config: ModelConfig, where):
    """The value that `peft` takes for a module of every layer: of the first pattern that its full name ends with."""
    patterns = raw.get(key) or {}
    found = set()
    for layer in range(config.num_layers):
        name = LAYER.format(layer) + module
        fits = (value for p, value in patterns.items() if match_pattern(rf"(.*\.)?({p})", name, key, where))
        found.add(next(fits, default))
    if len(found) > 1:
        raise UserError(f"{where}: {key} gives {module} other values in other layers, {sorted(found)}: not supported")
    return found.pop()
