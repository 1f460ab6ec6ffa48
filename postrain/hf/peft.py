"""LoRA adapters as the folders that `peft` reads and writes.

A PEFT folder has adapter_config.json and adapter_model.safetensors, whose matrices are [rank, in] and
[out, rank] (Hu et al. 2021, arXiv:2106.09685), one pair for each linear layer of each decoder layer.
"""

import dataclasses
import json
import math
import os
import pathlib
import re

import numpy as np
from jax.sharding import Mesh

from postrain.data.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.hf.config import ADAPTER_FILE, parse_dtype, read_family
from postrain.hf.families import TENSORS, TensorName
from postrain.hf.load import place
from postrain.hf.peft_rows import describe_rows, read_rows, row_tensors
from postrain.hf.safetensors_io import TensorFiles, read_json
from postrain.hf.save import gather, write_folder
from postrain.hf.side_files import copy_side_files
from postrain.hf.tree import flatten, group_layers, unflatten
from postrain.models.config import LoraConfig, ModelConfig
from postrain.models.params import adapter_specs, lora_specs

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PeftModel's own two levels
# Change what the adapter computes unless they have one of these values.
NEUTRAL_VALUES: dict[str, tuple] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "kasa_config": (None,),
    # Other starts (PiSSA, OLoRA, ...) change the base weights too.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


def save_adapter(
    folder: str | os.PathLike,
    adapter_params: dict,
    config: ModelConfig,
    *,
    base_folder: str | os.PathLike,
    base_name: str = "",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes the adapters (tree of models.params.adapter_specs, float32 in the file) as a PEFT folder.

    ``base_folder`` is named in adapter_config.json as the model that the adapter belongs to, by ``base_name`` where
    that is given (what the user calls it; the folder may be a cache's). Its tokenizer is copied along, or
    ``tokenizer``, what the adapter was trained with. Raises UserError when the folder cannot be written.
    """
    _check_adapter(adapter_params, config)
    check_targets(config)
    leaves = flatten(adapter_params)
    tensors = {name: entry for name, entry in _adapter_tensors(config, read_family(base_folder).tensors)}
    rows = row_tensors(config, PREFIX)

    def fetch(name: str) -> np.ndarray:
        if name in rows:
            return gather(leaves[rows[name]])
        path, layer = tensors[name]
        return gather(leaves[path], (layer,)).T

    def finish(temporary: pathlib.Path) -> None:
        described = _adapter_config(config.lora, base_name or str(base_folder)) | describe_rows(config)
        text = json.dumps(described, indent=2) + "\n"
        (temporary / ADAPTER_FILE).write_text(text, encoding="utf-8")
        copy_side_files(base_folder, temporary, tokenizer)
        load_adapter(temporary, config)

    announced = [(name, leaves[path].shape[:0:-1], np.dtype(np.float32)) for name, (path, _) in tensors.items()]
    announced += [(name, leaves[path].shape, np.dtype(np.float32)) for name, path in rows.items()]
    one_file = {"file_name": WEIGHTS_FILE, "max_shard_bytes": 2**63}
    write_folder(folder, announced, fetch, finish, source_folder=base_folder, **one_file)


def load_adapter(
    folder: str | os.PathLike, config: ModelConfig, *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, dict]:
    """``config`` with the adapter's rank, alpha and targets, and its tree, laid out over ``mesh`` if given.

    Raises UserError when the folder is no LoRA adapter, uses a variant that is not supported, or does not
    fit the model.
    """
    raw = read_json(pathlib.Path(folder) / ADAPTER_FILE)
    files = TensorFiles(folder, one_file=WEIGHTS_FILE)
    config = dataclasses.replace(config, new_rows=read_rows(raw, config, pathlib.Path(folder) / ADAPTER_FILE))
    rows = row_tensors(config, PREFIX)
    targets = _find_targets({name for name in files.infos if name not in rows}, TENSORS, folder)
    config = dataclasses.replace(config, lora=_parse_config(raw, targets, folder))
    tensors = _adapter_tensors(config, TENSORS)
    specs = flatten(adapter_specs(config))
    names: dict[str, list[str]] = {}
    for name, (path, _) in tensors:
        names.setdefault(path, []).append(name)
    shapes = {name: specs[path].shape[:0:-1] for name, (path, _) in tensors}
    shapes |= {name: specs[path].shape for name, path in rows.items()}
    wrong = [
        f"{name} {list(files.infos[name].shape) if name in files.infos else 'missing'} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name not in files.infos or files.infos[name].shape != shape
    ]
    left_over = sorted(set(files.infos) - set(shapes))
    if wrong or left_over:
        extra = [f"left over: {group_layers(left_over)}"] if left_over else []
        raise UserError(f"{folder}: the adapter does not fit the model: {'; '.join(wrong + extra)}: use its base model")
    target = parse_dtype(dtype, "dtype")

    row_names = {path: name for name, path in rows.items()}

    def make_reader(path: str):
        def read(index: tuple[slice, ...]) -> np.ndarray:
            if path in row_names:
                return files.read(row_names[path])[index].astype(target)
            matrices = [files.read(name).T[index[1:]] for name in names[path][index[0]]]
            return np.stack(matrices).astype(target)

        return read

    return config, unflatten({path: place(make_reader(path), spec, mesh) for path, spec in specs.items()})


def check_targets(config: ModelConfig) -> None:
    """Raises UserError when the adapters of ``config`` stand where PEFT's format has no place for them."""
    if config.moe and (experts := sorted({"gate", "up", "down"} & set(config.lora.targets))):
        raise UserError(
            f"config key 'model.lora.targets': PEFT's format has no adapters of experts, found {', '.join(experts)}: "
            "leave them out, or export with export.format=merged"
        )


def _check_adapter(adapter_params: dict, config: ModelConfig) -> None:
    if config.lora is None:
        raise ValueError("save_adapter: config.lora is None")
    found = {path: tuple(leaf.shape) for path, leaf in flatten(adapter_params).items()}
    expected = {path: spec.shape for path, spec in flatten(adapter_specs(config)).items()}
    if found != expected:
        wrong = sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
        raise ValueError(f"adapters do not fit config.lora: {', '.join(wrong)}")


def _adapter_tensors(config: ModelConfig, table: tuple[TensorName, ...]) -> list[tuple[str, tuple[str, int]]]:
    """(name in the file, (path in the tree, layer)) of every adapter matrix, layer by layer."""
    specs, found = flatten(lora_specs(config)), []
    for layer in range(config.num_layers):
        for entry in table:
            for matrix in ("lora_a", "lora_b"):
                path = entry.param.removesuffix("kernel") + matrix
                if path in specs:
                    module = entry.name.format(layer).removesuffix("weight")
                    found.append(
                        (f"{PREFIX}{module}{'lora_A' if matrix == 'lora_a' else 'lora_B'}.weight", (path, layer))
                    )
    return found


def _adapter_config(lora: LoraConfig, base_name: str) -> dict:
    """What `peft.LoraConfig` needs; every key that is left out has its default there."""
    modules = {entry.param.split(".")[-2]: entry.name.split(".")[-2] for entry in TENSORS if entry.transpose}
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted(modules[target] for target in lora.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def _find_targets(names: set[str], table: tuple[TensorName, ...], folder) -> tuple[str, ...]:
    """The linear layers that have adapters, by the tensors: ``target_modules`` may be a pattern."""
    modules = {".".join(e.name.split(".")[-3:-1]): e.param.split(".")[-2] for e in table if e.transpose}
    found = set()
    for name in sorted(names):
        match = re.fullmatch(rf"{re.escape(PREFIX)}model\.layers\.\d+\.(\w+\.\w+)\.lora_[AB]\.weight", name)
        if match is None or match[1] not in modules:
            raise UserError(f"{folder}: adapter tensor {name} belongs to no linear layer of a decoder: not supported")
        found.add(modules[match[1]])
    if not found:
        raise UserError(f"{folder}: {WEIGHTS_FILE} has no adapter tensors: save the adapter again")
    return tuple(target for target in modules.values() if target in found)


def _parse_config(raw: dict, targets: tuple[str, ...], folder) -> LoraConfig:
    where = pathlib.Path(folder) / ADAPTER_FILE
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {raw.get('peft_type')!r}, supported is LORA")
    for key, neutral in NEUTRAL_VALUES.items():
        if key in raw and raw[key] not in neutral:
            raise UserError(f"{where}: {key} is {json.dumps(raw[key])}, which is not supported")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    numbers = isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)
    if not numbers:
        raise UserError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers above 0")
    # Rank-stabilised LoRA (arXiv:2312.03732) scales by alpha / sqrt(r) where plain LoRA does by alpha / r.
    return LoraConfig(rank, alpha * math.sqrt(rank) if raw.get("use_rslora") else float(alpha), targets)
