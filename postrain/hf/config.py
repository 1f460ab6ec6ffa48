"""config.json -> ModelConfig. Every key is used, known to be harmless, mentioned once, or refused by its name.

A key that changes the maths and is skipped gives a model that is nearly right, which is the worst kind. `transformers`
is the measure: what it reads, for this family or for any, is used or refused, and a key that it does not read is
mentioned unless its value says that something is absent.
"""

import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Collection, Sequence

import numpy as np

from postrain.errors import UserError
from postrain.hf.families import (
    FAMILIES,
    HARMLESS_KEYS,
    MEANINGS,
    NEUTRAL_VALUES,
    REPEATED_KEYS,
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
ABSENT: tuple = (None, False, 0, "", [], {})  # values of any key that say that there is nothing of the kind
SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob")
COUNTS = ("num_local_experts", "moe_intermediate_size", "sliding_window_pattern")
NUMBERS = ("query_pre_attn_scalar", "swiglu_alpha", "swiglu_limit", "rope_local_base_freq")  # above 0
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # null or above 0
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Of a folder that holds more than a language model, for all its parts.
SHARED_KEYS = (
    *("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id"),
    *("quantization_config", "auto_map", "transformers_weights", "per_layer_config", "is_causal"),
)


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
    outer = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}  # that of the section is not read then
    return shared | dict(raw.get(part.section) or {}) | outer | {"architectures": [part.architecture]}


def is_adapter(folder: pathlib.Path, names: Collection[str] | None = None) -> bool:
    """Whether ``folder`` holds a PEFT adapter. ``names``: of all its files, where not all have been fetched.

    Raises UserError where it holds the weights of a whole model, too: which of the two is meant, nobody can tell.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return False
    names = {path.name for path in folder.iterdir()} if names is None else names
    if whole := next((name for name in (ONE_FILE, INDEX_FILE) if name in names), None):
        raise UserError(
            f"{folder}: holds an adapter ({ADAPTER_FILE}) and a whole model ({whole}); transformers reads the former, "
            "others the latter: give a folder that has one of them alone"
        )
    return True


def refuse_other_folders(folder: pathlib.Path, names: Collection[str] | None = None) -> None:
    """Raises UserError when ``folder`` is an adapter's, or a run's, which has a config.json of its own kind.

    ``names``: as in ``is_adapter``.
    """
    if is_adapter(folder, names):
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
    values = family.defaults | {KEY_ALIASES.get(key, key): value for key, value in raw.items()}
    _check_keys(raw, values, family, where)
    _check_values(values, family, where)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vocab, embed, mlp, num_layers, num_heads = (_positive(values, key, where) for key in sizes)
    activation_key = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    activation = values.get(activation_key) or values.get("hidden_act") or "silu"
    if str(activation) not in ACTIVATIONS:
        raise UserError(f"{where}: {activation_key} is {_short(activation)}, supported are {', '.join(ACTIVATIONS)}")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = num_heads
    num_kv_heads = _positive(values, "num_key_value_heads", where)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if values.get("head_dim") is None:
        if embed % num_heads:
            raise UserError(
                f"{where}: hidden_size {embed} is not a multiple of num_attention_heads and head_dim is absent"
            )
        values["head_dim"] = embed // num_heads
    _check_layer_types(values, num_layers, where)
    ropes = _parse_ropes(values, raw, family, where)
    shared = dict(
        vocab_size=vocab,
        embed_size=embed,
        mlp_size=mlp,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_positive(values, "head_dim", where),
        max_positions=_positive(values, "max_position_embeddings", where),
        norm_eps=_number(values, "rms_norm_eps", where, default=1e-6),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        activation=ACTIVATIONS[activation],
        init_std=_number(values, "initializer_range", where, default=0.02),
    )
    read = values if "layer_types" in family.defaults else {k: v for k, v in values.items() if k != "layer_types"}
    config = ModelConfig(**shared | ropes | family.mechanisms(read))
    _check_unread_layer_types(config, values, family, where)
    return config


def parse_dtype(name: str, where: str) -> np.dtype:
    """Name such as "bfloat16" -> numpy dtype. Raises UserError for a name that is not a float dtype of safetensors."""
    names = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in names:
        raise UserError(f"{where}: dtype {name!r}, expected one of {', '.join(names)}")
    return names[name]


def write_config(
    folder: pathlib.Path,
    source_folder: str | os.PathLike,
    dtype: str | None = None,
    vocab_size: int | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Copies config.json of ``source_folder``, with ``dtype`` and ``vocab_size`` in place of its own where they differ.

    ``layers``: of the source that the model consists of, None: all.

    ``quantization_config`` is dropped: weights are never written quantised. Of a folder that holds more than a language
    model, the config of the language model is written (families.TEXT_PARTS).
    """
    raw = read_model_json(config_file(source_folder))
    quantized = raw.pop("quantization_config", None)
    unchanged = raw == read_json(config_file(source_folder)) and vocab_size in (
        None,
        read_config(source_folder).vocab_size,
    )
    if dtype is None and quantized is None and unchanged and layers is None:
        (folder / CONFIG_FILE).write_bytes(config_file(source_folder).read_bytes())
        return
    keys = [key for key in DTYPE_KEYS if key in raw] or [DTYPE_KEYS[0]]
    if dtype is not None:
        raw |= dict.fromkeys(keys, dtype)
    if vocab_size is not None:
        raw["vocab_size"] = vocab_size
    if layers is not None:
        raw["num_hidden_layers"] = len(layers)
        if raw.get("layer_types"):
            raw["layer_types"] = [raw["layer_types"][i] for i in layers]
    text = json.dumps(raw, indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _find_family(raw: dict, where: str) -> Family:
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if not architectures:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        architectures = [by_type.get(model_type, f"model_type {model_type!r}")]
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        found = ", ".join(map(str, architectures))
        if any(family.classifier in architectures for family in FAMILIES.values() if family.classifier):
            raise UserError(
                f"{where}: architecture {found} is a reward model or classifier, expected a language model: "
                "`postrain score` reads it"
            )
        raise UserError(
            f"{where}: architecture {found} is not supported; supported are {', '.join([*FAMILIES, *TEXT_PARTS])}"
        )
    family = FAMILIES[known[0]]
    if model_type not in (None, family.model_type):  # `transformers` goes by the type, others by the architecture
        raise UserError(
            f"{where}: model_type is {_short(model_type)}, but that of {known[0]} is {family.model_type}: correct the "
            "wrong one"
        )
    return family


def _check_keys(raw: dict, values: dict, family: Family, where: str) -> None:
    """Refuses every key that may change the maths, and mentions those that nobody reads.

    ``values``: ``raw`` over the family's defaults.
    """
    of_others = {key for other in FAMILIES.values() for key in other.defaults}
    refused, unread = [], {}
    for name, value in raw.items():
        key = KEY_ALIASES.get(name, name)
        if raw.get(key, value) != value:  # under its other name
            refused.append(f"{name} is {_short(value)} and {key} {_short(raw[key])}")
        if key in USED_KEYS | HARMLESS_KEYS | set(family.defaults):
            continue
        if key in family.fixed:
            fits = value in (None, family.fixed[key])
        elif key in REPEATED_KEYS:
            fits = value in (None, values.get(REPEATED_KEYS[key]))
        elif key in NEUTRAL_VALUES:
            fits = value in NEUTRAL_VALUES[key]
        else:
            fits = value in ABSENT
            if not fits and key not in of_others:
                unread[key] = value
                continue
        if not fits:
            meaning = f" ({MEANINGS[key]})" if key in MEANINGS else ""
            refused.append(f"{name} is {_short(value)}{meaning}")
    if refused:
        raise UserError(
            f"{where}: {', '.join(refused)}, which this library does not compute: take a model without it; a key that "
            "changes no logits may be deleted, from a copy of config.json"
        )
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in (None, "mxfp4") or (quantization is not None and method is None):
        raise UserError(
            f"{where}: quantization_config.quant_method is {_short(method)}: of quantised weights, mxfp4 can be read; "
            "take the folder with the unquantised weights"
        )
    if unread:
        found = ", ".join(f"{key} = {_short(value)}" for key, value in sorted(unread.items()))
        _mention(f"{where}: ignored, as transformers does not read it for {family.model_type}: {found}")


@functools.cache  # once
def _mention(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_values(values: dict, family: Family, where: str) -> None:
    """Refuses values of another kind than expected, and those with which nothing can be computed."""
    for key in SWITCHES:
        if key in values:
            if values[key] not in (None, False, True):
                raise UserError(f"{where}: {key} is {_short(values[key])}, expected true or false")
            values[key] = bool(values[key])
    own = values.keys() & family.defaults.keys()
    for key in [key for key in COUNTS if key in own]:
        _positive(values, key, where)
    if "num_experts_per_tok" in own:
        used, experts = values["num_experts_per_tok"], values["num_local_experts"]
        if isinstance(used, bool) or not isinstance(used, int) or not 1 <= used <= experts:
            found = f"num_experts_per_tok is {_short(used)}"
            raise UserError(f"{where}: {found}, expected 1 to the number of experts, {experts}")
    for key in [key for key in (*NUMBERS, *CAPS) if key in own]:
        if not (key in CAPS and values[key] is None) and _number(values, key, where) <= 0:
            raise UserError(f"{where}: {key} is {_short(values[key])}, expected a number above 0")
    switched = "use_sliding_window" in family.defaults  # else a window that is stated is used
    if values.get("sliding_window") is not None and (values["use_sliding_window"] if switched else True):
        _positive(values, "sliding_window", where)
    start = values.get("max_window_layers", 0)
    if switched and values["use_sliding_window"] and (isinstance(start, bool) or not isinstance(start, int)):
        raise UserError(f"{where}: max_window_layers is {_short(start)}, expected a whole number")


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


def _check_unread_layer_types(config: ModelConfig, values: dict, family: Family, where: str) -> None:
    """Refuses ``layer_types`` of a family that does not read them, where its layers are of other types."""
    types = values.get("layer_types")
    if types is None or "layer_types" in family.defaults:
        return
    windows = config.layer_windows or (0,) * config.num_layers
    if types != ["sliding_attention" if window else "full_attention" for window in windows]:
        raise UserError(
            f"{where}: layer_types is {_short(types)}, which {family.model_type} does not read: all of its layers have "
            f"{'a window' if config.layer_windows else 'no window'}: not supported"
        )


def _parse_ropes(values: dict, raw: dict, family: Family, where: str) -> dict[str, RopeConfig]:
    """``rope``, and ``local_rope`` where the family has one for its layers with a window.

    From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before); ``raw`` is ``values``
    without the family's defaults. A ``rope_scaling`` beside ``rope_parameters`` must say the same: `transformers` 5
    takes it and drops the other with its theta.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(key) or {}, dict):
            raise UserError(f"{where}: {key} is {_short(values[key])}, expected an object")
    if values.get("rope_parameters") is None:  # null is as good as absent
        values["rope_parameters"] = family.defaults.get("rope_parameters")
    stated, scaling = (dict(values.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    theta = _number(values, "rope_theta", where, default=10_000.0)
    original = values.get("original_max_position_embeddings")
    if not family.local_rope:

        def read(key: str, chosen: dict) -> RopeConfig:
            if original is not None and (chosen.get("rope_type") or chosen.get("type")) in ("llama3", "yarn"):
                chosen["original_max_position_embeddings"] = original  # that of the whole comes first
            return _parse_rope(chosen, key, theta, values, where)

        rope = read("rope_scaling", scaling) if scaling else read("rope_parameters", dict(stated))
        if scaling and raw.get("rope_parameters") and read("rope_parameters", stated) != rope:
            found = " and ".join(f"{key} is {_short(raw[key])}" for key in ("rope_parameters", "rope_scaling"))
            raise UserError(
                f"{where}: {found}: expected the same in both, as software reads one or the other: state all of it in "
                "rope_parameters, theta too, and delete rope_scaling"
            )
        return {"rope": rope}

    # By type of layer. What stands beside the types is not read, and rope_scaling is laid over the full layers' rope.
    flat = {key: value for key, value in stated.items() if key not in LAYER_TYPES}
    if flat and not (flat.get("rope_type", "default") == "default" and flat.get("rope_theta", theta) == theta):
        raise UserError(
            f"{where}: rope_parameters has {', '.join(flat)}, but {family.model_type} reads it by layer type: state "
            "that in rope_parameters.full_attention and .sliding_attention"
        )
    if scaling.get("type", "default") != "default" and "rope_type" not in scaling:
        raise UserError(f"{where}: rope_scaling.type is not read by {family.model_type}: name it rope_type")
    full, local = (dict(stated.get(name) or {}) for name in ("full_attention", "sliding_attention"))
    local_theta = _number(values, "rope_local_base_freq", where)
    return {
        "rope": _parse_rope(full | scaling, "rope_parameters.full_attention", theta, values, where),
        "local_rope": _parse_rope(local, "rope_parameters.sliding_attention", local_theta, values, where),
    }


def _parse_rope(stated: dict, key: str, theta: float, values: dict, where: str) -> RopeConfig:
    own_theta, kind, old_kind = (stated.pop(name, None) for name in ("rope_theta", "rope_type", "type"))
    kind = kind or old_kind or "default"
    if kind not in ROPE_KEYS:
        raise UserError(f"{where}: {key}.rope_type is {_short(kind)}, supported are {', '.join(ROPE_KEYS)}")
    if stated.get("partial_rotary_factor") in (None, 1):
        stated.pop("partial_rotary_factor", None)
    # Null: of yarn's factor, the ratio of the lengths; of truncate, false; of every other, as good as absent.
    derived = {"factor"} & set(stated) if kind == "yarn" else set()
    if stated.get("truncate", True) is None:
        stated["truncate"] = False
    stated = {name: value for name, value in stated.items() if value is not None}
    if absent := sorted(ROPE_KEYS[kind] - set(stated) - derived):
        raise UserError(f"{where}: {key} lacks {', '.join(absent)}, which rope type {kind} needs")
    options = YARN_OPTIONS if kind == "yarn" else set()
    if unknown := sorted(set(stated) - ROPE_KEYS[kind] - options):
        raise UserError(f"{where}: {key} has {', '.join(unknown)}, which rope type {kind} does not know here")
    numbers = {name: _number(stated, name, f"{where}: {key}") for name in stated}
    theta = theta if own_theta is None else _number({"rope_theta": own_theta}, "rope_theta", f"{where}: {key}")
    for name, value in (numbers | {"rope_theta": theta}).items():
        if name in ROPE_KEYS[kind] | {"rope_theta"} and value <= 0:
            raise UserError(f"{where}: {key}.{name} is {value:g}, expected a number above 0")
    if kind == "yarn":
        # The defaults of `transformers`: the attention factor is 0.1 ln(factor) + 1, and 0 rotations mean the default.
        scale = lambda factor, m=1.0: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
        mscale, mscale_all = numbers.pop("mscale", 0.0), numbers.pop("mscale_all_dim", 0.0)
        numbers = {name: value for name, value in numbers.items() if value or name not in ("beta_fast", "beta_slow")}
        ratio = _positive(values, "max_position_embeddings", where) / numbers["original_max_position_embeddings"]
        numbers.setdefault("factor", ratio)
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


def _number(values: dict, key: str, where: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {_short(value)}, expected a number")
    return float(value)


def _short(value, limit: int = 60) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
