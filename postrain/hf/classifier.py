"""Hugging Face's ``*ForSequenceClassification`` folders: a trunk and one head, ``score.weight``, without bias.

`transformers` finds the position that it scores by token value: the last that is not ``pad_token_id``. Where padding is
the end token too, that is one before the end of a text that ends with it (transformers issues 35352, 35909); here it is
the last position of the text, whatever its token. With a padding token of its own both agree.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.hf.config import (
    CONFIG_FILE,
    DTYPE_KEYS,
    config_file,
    parse_config,
    parse_dtype,
    read_family,
    read_model_json,
)
from postrain.hf.families import FAMILIES, Family, TensorName
from postrain.hf.folders import copy_side_files
from postrain.hf.load import make_reader, open_checked, place
from postrain.hf.save import choose_dtypes, fetch_tensor, write_folder
from postrain.hf.tensors import read_json
from postrain.hf.tree import FileTensor, list_entries, list_tensors
from postrain.models.config import ModelConfig
from postrain.models.heads import HeadConfig, head_specs
from postrain.trees import flatten, unflatten

SCORE = TensorName("heads.score.kernel", "score.weight", transpose=True)
HEAD_NAME = "score"


def load_classifier(
    folder: str | os.PathLike, *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, HeadConfig, dict]:
    """Trunk, head and parameters of a classifier's folder: ``compute_hidden``, then ``apply_heads`` with the head.

    ``tie_embeddings`` of the config is True: it has no projection onto the vocabulary. Raises UserError as
    load_pretrained does, and when the folder is not a classifier's.
    """
    config, family, labels = _read_classifier(folder)
    head = HeadConfig(HEAD_NAME, labels)
    files, _ = open_checked(folder, config, family, {SCORE.name: (labels, config.embed_size)})
    target, leaves = parse_dtype(dtype, "dtype"), {}
    score = flatten(head_specs([head], config.embed_size))[SCORE.param]
    for entry, spec in [*list_entries(config, family), (SCORE, score)]:
        leaves[entry.param] = place(make_reader(files, entry, spec, config, target), spec, mesh)
    return config, head, unflatten(leaves)


def save_classifier(
    folder: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    head: HeadConfig,
    *,
    source_folder: str | os.PathLike,
    labels: Sequence[str] = (),
    dtype: str = "as_loaded",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes trunk and head as a folder that `transformers` loads with ``AutoModelForSequenceClassification``.

    ``params``: ``embed``, ``layers``, ``final_norm`` and ``heads``; a projection onto the vocabulary is left out.
    ``source_folder``: of the language model or classifier that it was trained from. ``labels``: names of the outputs.
    ``dtype`` and ``tokenizer`` as in save_pretrained. Raises UserError when the folder cannot be written, ValueError
    for a head that the format has no place for.
    """
    if head.position != "last" or head.bias or (labels and len(labels) != head.outputs):
        raise ValueError(f"expected a head at the last position without bias and a label for each output, found {head}")
    raw = read_model_json(config_file(source_folder))
    by_classifier = {family.classifier: family for family in FAMILIES.values()}
    of_classifier = [by_classifier[name] for name in raw.get("architectures") or () if name in by_classifier]
    family = of_classifier[0] if of_classifier else read_family(source_folder)
    config = dataclasses.replace(config, tie_embeddings=True)
    entry = dataclasses.replace(SCORE, param=f"heads.{head.name}.kernel")
    score = FileTensor(SCORE.name, (entry,), None, None, (head.outputs, config.embed_size))
    tensors = [*list_tensors(config, family), score]
    dtypes, leaves = choose_dtypes(tensors, source_folder, dtype), flatten(params)
    by_name = {tensor.name: tensor for tensor in tensors}

    def fetch(name: str) -> np.ndarray:
        return fetch_tensor(leaves, by_name[name], dtypes[name])

    def finish(temporary: pathlib.Path) -> None:
        described = _make_config(raw, family, head, labels) | {"vocab_size": config.vocab_size}
        if dtype != "as_loaded":
            described |= dict.fromkeys([key for key in DTYPE_KEYS if key in raw] or DTYPE_KEYS[:1], dtype)
        text = json.dumps(described, indent=2, ensure_ascii=False)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        copy_side_files(source_folder, temporary, tokenizer)
        open_checked(temporary, config, family, {SCORE.name: score.shape})

    announced = [(tensor.name, tensor.shape, dtypes[tensor.name]) for tensor in tensors]
    write_folder(folder, announced, fetch, finish, source_folder=source_folder, max_shard_bytes=5 * 10**9)


def _make_config(raw: dict, family: Family, head: HeadConfig, labels: Sequence[str]) -> dict:
    """The content of config.json, but for dtype and vocabulary."""
    names = list(labels) or [f"LABEL_{i}" for i in range(head.outputs)]
    described = {key: value for key, value in raw.items() if key not in ("quantization_config", "num_labels")}
    if described.get("pad_token_id") is None:  # without one transformers takes no batches
        eos = described.get("eos_token_id")
        described["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return described | {
        "architectures": [family.classifier],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _read_classifier(folder) -> tuple[ModelConfig, Family, int]:
    """Trunk, family and number of outputs of a folder."""
    where = str(config_file(folder))
    raw = read_json(config_file(folder))
    known = {family.classifier: name for name, family in FAMILIES.items()}
    found = [name for name in raw.get("architectures") or () if name in known]
    if not found:
        stated = ", ".join(map(str, raw.get("architectures") or ["none"]))
        raise UserError(f"{where}: architecture {stated}, expected a classifier's: one of {', '.join(known)}")
    causal = known[found[0]]
    labels = raw.get("num_labels", len(raw.get("id2label") or (0, 1)))  # two where nothing is stated
    raw = {key: value for key, value in raw.items() if key != "num_labels"}
    config = parse_config(raw | {"architectures": [causal], "tie_word_embeddings": True}, where)
    return config, FAMILIES[causal], labels
