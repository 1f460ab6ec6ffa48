"""config.json -> ModelConfig. Every key is used, known to be harmless, or refused by its name.

A key that changes the maths and is skipped gives a model that is nearly right, which is the worst kind.
"""

import json
import os
import pathlib

import numpy as np

from postrain.errors import UserError
from postrain.hf.families import FAMILIES, HARMLESS_KEYS, NEUTRAL_VALUES, USED_KEYS, Family
from postrain.hf.safetensors_io import DTYPES, INDEX_FILE, ONE_FILE, read_json
from postrain.models.config import ModelConfig, RopeConfig

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
RUN_KEYS = {"model", "data", "optimizer"}  # of the config.json of a run
DTYPE_KEYS = ("dtype", "torch_dtype")  # as transformers 5 writes it, as 4 did
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder.

    Raises UserError, naming folder and key, when config.json is missing or broken, when its architecture
    is unknown, and when a key has a value that changes the maths in a way this library does not have.
    """
    return parse_config(read_json(config_file(folder)), str(config_file(folder)))


def config_file(folder: str | os.PathLike) -> pathlib.Path:
    """Path of config.json. Raises UserError when the folder or the file is not there, or belongs to something else."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a Hugging Face model, found no folder of that name")
    refuse_other_folders(folder)
    if not (folder / CONFIG_FILE).is_file():
        advice = "postrain import FILE.gguf OUT" if list(folder.glob("*.gguf")) else "give a Hugging Face model folder"
        raise UserError(f"{folder}: holds no {CONFIG_FILE}: {advice}")
    return folder / CONFIG_FILE


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
    return _find_family(read_json(config_file(folder)), str(config_file(folder)))


def parse_config(raw: dict, where: str) -> ModelConfig:
    """ModelConfig of the content of a config.json; ``where`` stands at the start of error messages."""
    family = _find_family(raw, where)
    _refuse_unknown(raw, family, where)
    values = family.defaults | {key: value for key, value in raw.items() if value is not None}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vocab, embed, mlp, num_layers, num_heads = (_positive(values, key, where) for key in sizes)
    activation = values.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {activation!r}, supported are {', '.join(ACTIVATIONS)}")
    values.setdefault("num_key_value_heads", num_heads)
    num_kv_heads = _positive(values, "num_key_value_heads", where)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if not values.get("head_dim"):
        if embed % num_heads:
            raise UserError(
                f"{where}: hidden_size {embed} is no multiple of num_attention_heads and head_dim is absent"
            )
        values["head_dim"] = embed // num_heads
    max_positions = _positive(values, "max_position_embeddings", where)
    return ModelConfig(
        vocab_size=vocab,
        embed_size=embed,
        mlp_size=mlp,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_positive(values, "head_dim", where),
        max_positions=max_positions,
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        activation=ACTIVATIONS[activation],
        rope=_parse_rope(raw, where),
        init_std=float(values.get("initializer_range", 0.02)),
        **family.mechanisms(values),
    )


def source_dtype(folder: str | os.PathLike) -> np.dtype | None:
    """The dtype that config.json states for the weights, None when it states none."""
    raw = read_json(config_file(folder))
    stated = next((raw[key] for key in DTYPE_KEYS if raw.get(key)), None)
    return None if stated is None else parse_dtype(str(stated).removeprefix("torch."), str(config_file(folder)))


def parse_dtype(name: str, where: str) -> np.dtype:
    """Name such as "bfloat16" -> numpy dtype. Raises UserError for anything that is no float of safetensors."""
    names = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in names:
        raise UserError(f"{where}: dtype {name!r}, expected one of {', '.join(names)}")
    return names[name]


def write_config(folder: pathlib.Path, source_folder: str | os.PathLike, dtype: str | None = None) -> None:
    """Copies config.json of ``source_folder`` as it is but for the dtype, when ``dtype`` names another."""
    raw = read_json(config_file(source_folder))
    if dtype is None:
        (folder / CONFIG_FILE).write_bytes(config_file(source_folder).read_bytes())
        return
    keys = [key for key in DTYPE_KEYS if key in raw] or [DTYPE_KEYS[0]]
    text = json.dumps(raw | dict.fromkeys(keys, dtype), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _find_family(raw: dict, where: str) -> Family:
    architectures = raw.get("architectures")
    if not architectures:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        architectures = [by_type.get(raw.get("model_type"), f"model_type {raw.get('model_type')!r}")]
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        found = ", ".join(map(str, architectures))
        raise UserError(f"{where}: architecture {found} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[known[0]]


def _refuse_unknown(raw: dict, family: Family, where: str) -> None:
    known = USED_KEYS | HARMLESS_KEYS | set(family.defaults) | set(NEUTRAL_VALUES) | {"sliding_window", "layer_types"}
    if unknown := sorted(set(raw) - known):
        raise UserError(
            f"{where}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}: this library cannot know whether "
            "that changes the maths; delete from a copy of config.json what does not"
        )
    for key, neutral in NEUTRAL_VALUES.items():
        if key in raw and raw[key] not in neutral:
            raise UserError(f"{where}: {key} is {_short(raw[key])}, which this library does not compute: not supported")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window") is not False:
        raise UserError(f"{where}: sliding_window is {raw['sliding_window']}: attention windows are not supported")
    if other := sorted(set(raw.get("layer_types") or ()) - {"full_attention"}):
        raise UserError(f"{where}: layer_types has {', '.join(other)}: only full_attention is supported")


def _parse_rope(raw: dict, where: str) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    values = dict(raw.get(key) or {})
    theta = float(values.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    kind, old_kind = values.pop("rope_type", None), values.pop("type", None)
    kind = kind or old_kind or "default"
    if kind not in ROPE_KEYS:
        raise UserError(f"{where}: {key}.rope_type is {_short(kind)}, supported are {', '.join(ROPE_KEYS)}")
    if values.get("partial_rotary_factor") in (None, 1):
        values.pop("partial_rotary_factor", None)
    if absent := sorted(ROPE_KEYS[kind] - set(values)):
        raise UserError(f"{where}: {key} lacks {', '.join(absent)}, which rope type {kind} needs")
    if unknown := sorted(set(values) - ROPE_KEYS[kind]):
        raise UserError(f"{where}: {key} has {', '.join(unknown)}, which rope type {kind} does not know here")
    try:
        numbers = {name: float(value) for name, value in values.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {key} holds something that is no number: {_short(values)}") from error
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
