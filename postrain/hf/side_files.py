"""The small files beside the weights that make a folder usable: tokenizer, chat template, stop set, licence."""

import json
import os
import pathlib
import shutil

from postrain.data.rendering.tokenizer import NewTokens, Tokenizer
from postrain.hf.tensors import read_json

GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
# Copied byte by byte where the source has them.
MODEL_SIDE_FILES = (GENERATION_FILE, "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "special_tokens_map.json",
    ADDED_TOKENS,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
SIDE_FOLDERS = ("additional_chat_templates",)
TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json", *SIDE_FOLDERS)
SIDE_FILES = MODEL_SIDE_FILES + TOKENIZER_FILES + TEMPLATE_FILES


def copy_side_files(source_folder: str | os.PathLike, folder: pathlib.Path, tokenizer: Tokenizer | None = None) -> None:
    """Copies the side files of ``source_folder``; with ``tokenizer``, that of a run, its files take their place.

    Tokenizer files then come from the tokenizer's folder, the one chat template is the run's, and
    generation_config.json stops where the run's evaluation stopped.
    """
    if tokenizer is None:
        _copy(SIDE_FILES, pathlib.Path(source_folder), folder)
        return
    _copy(MODEL_SIDE_FILES, pathlib.Path(source_folder), folder)
    _copy(TOKENIZER_FILES, tokenizer.folder, folder)
    if tokenizer.new_tokens is not None:
        _write_new_tokens(folder, tokenizer.new_tokens)
    _write_template(folder, tokenizer.chat_template)
    _write_stop_ids(folder, tokenizer.stop_ids)


def _copy(names: tuple[str, ...], source_folder: pathlib.Path, folder: pathlib.Path) -> None:
    for name in names:
        source = source_folder / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copyfile(source, folder / name)


def _write_template(folder: pathlib.Path, template: str) -> None:
    """Writes the template where every reader of the folder finds it, as the only one."""
    if template:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    config = folder / TOKENIZER_CONFIG
    if config.exists():
        raw = read_json(config)
        # Some readers prefer the template in here, and of several named ones another than the run's.
        if raw.get("chat_template", template) != template:
            del raw["chat_template"]
            _write_json(config, raw)


def _write_new_tokens(folder: pathlib.Path, new: NewTokens) -> None:
    """The tokenizer's files with the new tokens, everything else in them as it was."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": new.special}
    added = {new.first + i: {"content": text, **flags} for i, text in enumerate(new.texts)}
    file = folder / TOKENIZER_FILE
    raw = read_json(file)
    raw["added_tokens"] = raw.get("added_tokens", []) + [{"id": i, **token} for i, token in added.items()]
    _write_json(file, raw)
    # Older versions of transformers read these two, where they are, before tokenizer.json.
    file = folder / TOKENIZER_CONFIG
    raw = read_json(file) if file.exists() else {}
    if "added_tokens_decoder" in raw:
        raw["added_tokens_decoder"] |= {str(i): token for i, token in added.items()}
        _write_json(file, raw)
    file = folder / ADDED_TOKENS
    if file.exists():
        _write_json(file, read_json(file) | {token["content"]: i for i, token in added.items()})


def _write_stop_ids(folder: pathlib.Path, stop_ids: frozenset[int]) -> None:
    file = folder / GENERATION_FILE
    raw = read_json(file) if file.exists() else {}
    found = raw.get("eos_token_id")
    found = set() if found is None else set(found if isinstance(found, list) else [found])
    if found != stop_ids and stop_ids:
        _write_json(file, raw | {"eos_token_id": sorted(stop_ids)})


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
