"""adapter_config.json: every key is used, known to be harmless, or refused by its name, as `peft` would compute it."""

import json
import pathlib
import re

from postrain.errors import UserError
from postrain.hf.config import ABSENT
from postrain.models.config import ModelConfig

USED_KEYS = frozenset(
    "peft_type r lora_alpha target_modules exclude_modules target_parameters rank_pattern alpha_pattern use_rslora "
    "use_dora trainable_token_indices layers_to_transform fan_in_fan_out".split()
)
# Say who made the adapter, of which base and how it was started and trained. `tests/hf/test_adapter_keys.py` holds
# these tables to the fields of the installed `peft`.
HARMLESS_KEYS = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode layers_pattern "
    "loftq_config lora_dropout lora_ga_config megatron_core parent_library peft_version qalora_group_size revision "
    "runtime_config task_type".split()
)
# Keys that change the computation unless they have one of these values.
NEUTRAL_VALUES: dict[str, tuple] = {
    "bias": (None, "none"),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "kasa_config": (None,),
    "enable_lora": (None,),
    "merge_weights": (None, False),
    # Other starts (PiSSA, OLoRA, ...) change the base weights too.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


def is_targeted(raw: dict, module: str, where: pathlib.Path) -> bool:
    """Whether `peft` gives a linear layer, by its full name, an adapter."""

    def named(key: str) -> bool:
        if isinstance(raw[key], str):
            return bool(match_pattern(raw[key], module, key, where))
        return any(f".{module}".endswith(f".{ending}") for ending in read_names(raw, key, where))

    if raw.get("exclude_modules") and named("exclude_modules"):
        return False
    wanted = raw.get("target_modules")
    return wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear") or named("target_modules")


def read_names(raw: dict, key: str, where: pathlib.Path) -> list[str]:
    """A list of names, empty where the key is absent. Raises UserError for anything else."""
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {key} is {json.dumps(value)[:60]}, expected a list of names")
    return value


def match_pattern(pattern: str, text: str, key: str, where: pathlib.Path) -> re.Match | None:
    """Of the whole ``text``. Raises UserError when the pattern, a value of ``key``, is not one."""
    try:
        return re.fullmatch(pattern, text)
    except re.error as error:
        raise UserError(f"{where}: {key} has the pattern {pattern!r}, which cannot be read ({error})") from error


def check_keys(raw: dict, config: ModelConfig, where: pathlib.Path) -> None:
    """Refuses by its name every key that changes the computation in a way that is not here, or may do so.

    ``raw``: the content of adapter_config.json, ``where``: its path. Raises UserError.
    """
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {raw.get('peft_type')!r}, supported is LORA")
    for key, value in raw.items():
        found = f"{where}: {key} is {json.dumps(value)[:60]}"
        if key in NEUTRAL_VALUES:
            if value not in NEUTRAL_VALUES[key]:
                raise UserError(f"{found}, which is not supported")
        elif key not in USED_KEYS | HARMLESS_KEYS and value not in ABSENT:
            raise UserError(
                f"{found}, which LoRA of `peft` does not have: delete it from a copy if it changes no numbers"
            )
    layers = raw.get("layers_to_transform")
    if layers not in (None, []) and layers != list(range(config.num_layers)):
        raise UserError(f"{where}: layers_to_transform is {json.dumps(layers)[:60]}, supported is every layer")
    for key in ("use_dora", "use_rslora", "fan_in_fan_out"):
        if raw.get(key) not in (None, False, True):
            raise UserError(f"{where}: {key} is {json.dumps(raw[key])[:60]}, expected true or false")
    if raw.get("fan_in_fan_out") and raw.get("target_parameters"):  # of linear layers `peft` knows better
        raise UserError(f"{where}: fan_in_fan_out with target_parameters is not supported")
