"""The language model inside a folder that holds more, such as Gemma 3 with its vision tower.

It is read as if it were a folder of its own, and exported as one, without the other parts.
"""

import os
import pathlib
from typing import NamedTuple

from postrain.hf.tensors import TensorFiles, read_json


class TextPart(NamedTuple):
    """Where the language model is: its architecture, its section of config.json, the prefixes of its tensors' names."""

    architecture: str
    section: str
    prefixes: dict[str, str]  # in the file -> in a folder of its own
    other_prefixes: tuple[str, ...]  # of all other tensors


TEXT_PARTS = {
    "Gemma3ForConditionalGeneration": TextPart(
        "Gemma3ForCausalLM",
        "text_config",
        {  # as transformers 4 wrote them, as 5 does
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
        },
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
}
SHARED_KEYS = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config")


def find_text_part(raw: dict) -> TextPart | None:
    """The text part that the content of a config.json names, None where the whole is a language model."""
    return next((TEXT_PARTS[name] for name in raw.get("architectures") or () if name in TEXT_PARTS), None)


def read_model_json(file: pathlib.Path) -> dict:
    """config.json, or of a folder with a text part, the config.json that the text part alone would have."""
    raw = read_json(file)
    part = find_text_part(raw)
    if part is None:
        return raw
    shared = {key: raw[key] for key in SHARED_KEYS if key in raw}
    return shared | dict(raw.get(part.section) or {}) | {"architectures": [part.architecture]}


def open_tensors(folder: str | os.PathLike) -> TensorFiles:
    """The folder's tensors; of a folder with a text part only its tensors, named as in a folder of their own."""
    files = TensorFiles(folder)
    config = pathlib.Path(folder) / "config.json"
    part = find_text_part(read_json(config)) if config.is_file() else None
    if part is not None:
        of_text = {name: info for name, info in files.infos.items() if not name.startswith(part.other_prefixes)}
        files.infos = {_rename(name, part.prefixes): info for name, info in of_text.items()}
    return files


def _rename(name: str, prefixes: dict[str, str]) -> str:
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if found is None else prefixes[found] + name.removeprefix(found)
