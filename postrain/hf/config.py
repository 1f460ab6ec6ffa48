"""config.json -> ModelConfig. Every key is used, known to be harmless, or refused by its name.

A key that changes the maths and is skipped gives a model that is nearly right, which is the worst kind.
"""

import json
import math
import os
import pathlib

import numpy as np

from postrain.errors import UserError
from postrain.hf.families import (
    FAMILIES,
    HARMLESS_KEYS,
    NEUTRAL_VALUES,
    TEXT_PARTS,
    USED_KEYS,
    Family,
    find_text_part,
)
from postrain.hf.tensors import DTYPES, INDEX_FILE, ONE_FILE, read_json
from postrain.models.config import ModelConfig, RopeConfig

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RUN_KEYS = {"model", "data", "optimizer"}  # of the config.json of a run
DTYPE_KEYS = ("dtype", "torch_dtype")  # as transformers 5 writes it, as 4 did
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
YARN_OPTIONS = {"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}
KEY_ALIASES = {"num_experts": "num_local_experts"}  # transformers has written both
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Of a folder that holds more than a language model, for all its parts.
SHARED_KEYS = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config")


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder.

    Raises UserError, naming folder and key, when config.json is missing or broken, when its architecture
    is unknown, and when a key has a value that changes the maths in a way this library does not have.
    """
    return parse_config(read_model_json(config_file(folder)), str(config_file(folder)))


def config_file(folder: str | os.PathLike) -> pathlib.Path:
    """Path of config.json. Raises UserError when the folder or the file is not there, or belongs to something else."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a Hugging Face model, found nothing of that name")
    refuse_other_folders(folder)
    if not (folder / CONFIG_FILE).is_file():
        advice = "postrain import FILE.gguf OUT" if list(folder.glob("*.gguf")) else "give a Hugging Face model folder"
        raise UserError(f"{folder}: holds no {CONFIG_FILE}: {advice}")
    return folder / CONFIG_FILE


def read_model_json(file: pathlib.Path) -> dict:
    """config.json, or of a folder with a text part, the config.json that the text part alone would have."""
    raw = read_json(file)
    part = find_text_part(raw)
    if part is None:
        return raw
    shared = {key: raw[key] for key in SHARED_KEYS if key in raw}
    return shared | dict(raw.get(part.section) or {}) | {"architectures": [part.architecture]}


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether ``folder`` holds a PEFT adapter, and not the weights of a whole model too."""
    whole = any((folder / name).exists() for name in (ONE_FILE, INDEX_FILE))
    return not whole and (folder / ADAPTER_FILE).is_file()


def refuse_other_folders(folder: pathlib.Path) -> None:
    """Raises UserError when ``folder`` is an adapter's, or a run's, which has a config.json of its own kind."""
    if is_adapter(folder):
        raise UserError(
            f"{folder}: expected a whole model, found an adapter: merge it into its base model first (`postrain export "
            "--format=merged` does, for a run of postrain)"
        )
    if (folder / CONFIG_FILE).is_file() and RUN_KEYS <= set(read_json(folder / CONFIG_FILE)):
        export = folder / "export"
        exported = any((export / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE))
        command = f"`postrain export --workdir={folder} --output=OUT`"
        advice = f"give its export, {export}" if exported else f"export one with {command}"
        raise UserError(f"{folder}: expected the folder of a model, found the workdir of a run: {advice}")


def read_family(folder: str | os.PathLike) -> Family:
    """The family of a folder, for the names of its tensors."""
    return _find_family(read_model_json(config_file(folder)), str(config_file(folder)))


def parse_config(raw: dict, where: str) -> ModelConfig:
    """ModelConfig of the content of a config.json; ``where`` begins the error messages."""
    family = _find_family(raw, where)
    _refuse_unknown(raw, family, where)
    values = family.defaults | {KEY_ALIASES.get(key, key): value for key, value in raw.items()}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vocab, embed, mlp, num_layers, num_heads = (_positive(values, key, where) for key in sizes)
    activation = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {activation!r}, supported are {', '.join(ACTIVATIONS)}")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = num_heads
    num_kv_heads = _positive(values, "num_key_value_heads", where)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if not values.get("head_dim"):
        if embed % num_heads:
            raise UserError(
                f"{where}: hidden_size {embed} is not a multiple of num_attention_heads and head_dim is absent"
            )
        values["head_dim"] = embed // num_heads
    _check_layer_types(values, num_layers, where)
    ropes = _parse_ropes(values, family, where)
    shared = dict(
        vocab_size=vocab,
        embed_size=embed,
        mlp_size=mlp,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_positive(values, "head_dim", where),
        max_positions=_positive(values, "max_position_embeddings", where),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        activation=ACTIVATIONS[activation],
        init_std=float(values.get("initializer_range", 0.02)),
    )
    config = ModelConfig(**shared | ropes | family.mechanisms(values))
    if config.moe is not None and not 1 <= config.moe.experts_per_token <= config.moe.num_experts:
        raise UserError(
            f"{where}: num_experts_per_tok is {config.moe.experts_per_token}, expected 1 to the number of experts, "
            f"{config.moe.num_experts}"
        )
    return config


def parse_dtype(name: str, where: str) -> np.dtype:
    """Name such as "bfloat16" -> numpy dtype. Raises UserError for a name that is not a float dtype of safetensors."""
    names = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in names:
        raise UserError(f"{where}: dtype {name!r}, expected one of {', '.join(names)}")
    return names[name]


def write_config(
    folder: pathlib.Path, source_folder: str | os.PathLike, dtype: str | None = None, vocab_size: int | None = None
) -> None:
    """Copies config.json of ``source_folder``, with ``dtype`` and ``vocab_size`` in place of its own where they differ.

    ``quantization_config`` is dropped: weights are never written quantised. Of a folder that holds more than a language
    model, the config of the language model is written (families.TEXT_PARTS).
    """
    raw = read_model_json(config_file(source_folder))
    quantized = raw.pop("quantization_config", None)
    unchanged = raw == read_json(config_file(source_folder)) and vocab_size in (
        None,
        read_config(source_folder).vocab_size,
    )
    if dtype is None and quantized is None and unchanged:
        (folder / CONFIG_FILE).write_bytes(config_file(source_folder).read_bytes())
        return
    keys = [key for key in DTYPE_KEYS if key in raw] or [DTYPE_KEYS[0]]
    if dtype is not None:
        raw |= dict.fromkeys(keys, dtype)
    if vocab_size is not None:
        raw["vocab_size"] = vocab_size
    text = json.dumps(raw, indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _find_family(raw: dict, where: str) -> Family:
    architectures = raw.get("architectures")
    if not architectures:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        architectures = [by_type.get(raw.get("model_type"), f"model_type {raw.get('model_type')!r}")]
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        found = ", ".join(map(str, architectures))
        raise UserError(
            f"{where}: architecture {found} is not supported; supported are {', '.join([*FAMILIES, *TEXT_PARTS])}"
        )
    return FAMILIES[known[0]]


def _refuse_unknown(raw: dict, family: Family, where: str) -> None:
    known = USED_KEYS | HARMLESS_KEYS | set(family.defaults) | set(NEUTRAL_VALUES) | {"layer_types"}
    if unknown := sorted(key for key in raw if KEY_ALIASES.get(key, key) not in known):
        raise UserError(
            f"{where}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}: this library cannot know whether "
            "that changes the maths; delete the keys that do not from a copy of config.json"
        )
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in (None, "mxfp4") or (quantization is not None and method is None):
        raise UserError(
            f"{where}: quantization_config.quant_method is {_short(method)}: of quantised weights, mxfp4 can be read; "
            "take the folder with the unquantised weights"
        )
    for key, neutral in NEUTRAL_VALUES.items():
        if key not in family.defaults and key in raw and raw[key] not in neutral:
            raise UserError(f"{where}: {key} is {_short(raw[key])}, which this library does not compute: not supported")


def _check_layer_types(values: dict, num_layers: int, where: str) -> None:
    types = values.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != num_layers:
        raise UserError(f"{where}: layer_types is {_short(types)}, expected a list of {num_layers} (num_hidden_layers)")
    if other := sorted(set(map(str, types)) - LAYER_TYPES):
        raise UserError(f"{where}: layer_types has {', '.join(other)}: supported are {', '.join(sorted(LAYER_TYPES))}")
    if "sliding_attention" in types and values.get("sliding_window") is None:
        raise UserError(f"{where}: layer_types has sliding_attention, but sliding_window is not set")


def _parse_ropes(values: dict, family: Family, where: str) -> dict[str, RopeConfig]:
    """``rope``, and ``local_rope`` where the family has one for its layers with a window.

    From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).
    """
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    stated = dict(values.get(key) or {})
    theta = float(values.get("rope_theta") or 10_000.0)
    if not family.local_rope:
        return {"rope": _parse_rope(stated, key, theta, values, where)}
    by_type = stated if set(stated) & LAYER_TYPES else {"full_attention": stated}
    local_theta = float(values["rope_local_base_freq"])
    full, local = (by_type.get(name) or {} for name in ("full_attention", "sliding_attention"))
    return {
        "rope": _parse_rope(dict(full), f"{key}.full_attention", theta, values, where),
        "local_rope": _parse_rope(dict(local), f"{key}.sliding_attention", local_theta, values, where),
    }


def _parse_rope(stated: dict, key: str, theta: float, values: dict, where: str) -> RopeConfig:
    theta = float(stated.pop("rope_theta", None) or theta)
    kind, old_kind = stated.pop("rope_type", None), stated.pop("type", None)
    kind = kind or old_kind or "default"
    if kind not in ROPE_KEYS:
        raise UserError(f"{where}: {key}.rope_type is {_short(kind)}, supported are {', '.join(ROPE_KEYS)}")
    if stated.get("partial_rotary_factor") in (None, 1):
        stated.pop("partial_rotary_factor", None)
    if absent := sorted(ROPE_KEYS[kind] - set(stated)):
        raise UserError(f"{where}: {key} lacks {', '.join(absent)}, which rope type {kind} needs")
    options = YARN_OPTIONS if kind == "yarn" else set()
    if unknown := sorted(set(stated) - ROPE_KEYS[kind] - options):
        raise UserError(f"{where}: {key} has {', '.join(unknown)}, which rope type {kind} does not know here")
    try:
        numbers = {name: float(value) for name, value in stated.items() if value is not None}
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {key} holds a value that is not a number: {_short(stated)}") from error
    if kind == "yarn":
        # The defaults of `transformers`: the attention factor is 0.1 ln(factor) + 1.
        scale = lambda factor, m=1.0: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
        mscale, mscale_all = numbers.pop("mscale", 0.0), numbers.pop("mscale_all_dim", 0.0)
        numbers.setdefault("factor", values["max_position_embeddings"] / numbers["original_max_position_embeddings"])
        factor = numbers["factor"]
        usual = scale(factor, mscale) / scale(factor, mscale_all) if mscale and mscale_all else scale(factor)
        numbers.setdefault("attention_factor", usual)
        numbers["truncate"] = bool(numbers.get("truncate", True))
    if "original_max_position_embeddings" in numbers:
        numbers["original_max_positions"] = int(numbers.pop("original_max_position_embeddings"))
    return RopeConfig(theta=theta, kind=kind, **numbers)


def _positive(values: dict, key: str, where: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} is {_short(value)}, expected a whole number above 0")
    return value


def _short(value, limit: int = 60) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
