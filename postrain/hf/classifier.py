"""Hugging Face's ``*ForSequenceClassification`` folders: a trunk and one head, ``score.weight``, without bias.

`transformers` finds the position that it scores by token value: the last that is not ``pad_token_id``. Where padding is
the end token too, that is one before the end of a text that ends with it (transformers issues 35352, 35909); here it is
the last position of the text, whatever its token. So a folder that is written here names a padding token that ends no
text, in config.json and in the tokenizer's files (``choose_pad``). Without one `transformers` takes single texts alone,
and scores their last position.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.hf.config import (
    CONFIG_FILE,
    DTYPE_KEYS,
    config_file,
    parse_config,
    read_config,
    read_family,
    read_model_json,
)
from postrain.hf.families import FAMILIES, Family, TensorName
from postrain.hf.folders import copy_side_files, find_answer_end, write_pad_token
from postrain.hf.load import make_reader, open_checked, place, read_params
from postrain.hf.save import choose_dtypes, fetch_tensor, write_folder
from postrain.hf.tensors import TensorFiles
from postrain.hf.tree import FileTensor, list_tensors
from postrain.models.config import ModelConfig
from postrain.models.heads import HeadConfig, head_specs
from postrain.trees import flatten, unflatten

SCORE = TensorName("heads.score.kernel", "score.weight", transpose=True)
HEAD_NAME = "score"
TRAINED_ON = "postrain_trained_on"  # a key of config.json, of which transformers takes no notice
_CAUSAL = {family.classifier: name for name, family in FAMILIES.items()}  # classifier -> language model


class Trunk(NamedTuple):
    """What a folder says of the trunk of a language model or a classifier.

    Attributes:
      config: without a projection onto the vocabulary, ``tie_embeddings`` is True.
      family: for the names of its tensors.
      labels: of a classifier the names of its outputs; () of a language model.
      trained_on: of a classifier "messages", which are put through the chat template, or "text", which is not; "" where
        that is not recorded.
    """

    config: ModelConfig
    family: Family
    labels: tuple[str, ...]
    trained_on: str = ""


def read_trunk(folder: str | os.PathLike) -> Trunk:
    """The trunk of a folder. Raises UserError as ``read_config`` does."""
    where = config_file(folder)
    raw = read_model_json(where)
    causal = next((_CAUSAL[name] for name in raw.get("architectures") or () if name in _CAUSAL), "")
    if not causal:
        config = dataclasses.replace(parse_config(raw, str(where)), tie_embeddings=True)
        return Trunk(config, read_family(folder), ())
    names = raw.get("id2label") or {}
    number = raw.get("num_labels", len(names) or 2)  # two where nothing is stated
    raw = {key: value for key, value in raw.items() if key != "num_labels"}
    config = parse_config(raw | {"architectures": [causal], "tie_word_embeddings": True}, str(where))
    labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(number))
    return Trunk(config, FAMILIES[causal], labels, str(raw.get(TRAINED_ON, "")))


def open_trunk(folder: str | os.PathLike) -> tuple[TensorFiles, Trunk]:
    """The tensors of a folder, checked, and its trunk; those of a classifier have ``SCORE``. Raises UserError."""
    trunk = read_trunk(folder)
    if not trunk.labels:
        return open_checked(folder, read_config(folder), trunk.family)[0], trunk
    shape = (len(trunk.labels), trunk.config.embed_size)
    return open_checked(folder, trunk.config, trunk.family, {SCORE.name: shape})[0], trunk


def load_trunk(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    vocab_size: int = 0,
    quantization: str = "none",
) -> tuple[ModelConfig, dict]:
    """Config and parameters of the trunk of a language model or a classifier; of the latter with ``heads.score``.

    Arguments and errors are those of load_pretrained; the head is float32 in any case.
    """
    files, trunk = open_trunk(folder)
    options = {"mesh": mesh, "vocab_size": vocab_size, "quantization": quantization}
    config, params = read_params(files, trunk.config, trunk.family, dtype=dtype, **options)
    if not trunk.labels:
        return config, params
    spec = flatten(head_specs([HeadConfig(HEAD_NAME, len(trunk.labels))], config.embed_size))[SCORE.param]
    read = make_reader(files, SCORE, spec, trunk.config, np.dtype(np.float32))
    return config, params | unflatten({SCORE.param: place(read, spec, mesh)})


def load_classifier(
    folder: str | os.PathLike, *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, HeadConfig, dict]:
    """Trunk, head and parameters of a classifier's folder: ``compute_hidden``, then ``apply_heads`` with the head.

    ``tie_embeddings`` of the config is True: it has no projection onto the vocabulary. Raises UserError as
    load_pretrained does, and when the folder is not a classifier's.
    """
    if not (labels := read_trunk(folder).labels):
        stated = ", ".join(map(str, read_model_json(config_file(folder)).get("architectures") or ["none"]))
        raise UserError(
            f"{config_file(folder)}: architecture {stated}, expected a classifier's: one of {', '.join(_CAUSAL)}"
        )
    config, params = load_trunk(folder, mesh=mesh, dtype=dtype)
    return config, HeadConfig(HEAD_NAME, len(labels)), params


def save_classifier(
    folder: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    head: HeadConfig,
    *,
    source_folder: str | os.PathLike,
    labels: Sequence[str] = (),
    trained_on: str = "",
    dtype: str = "as_loaded",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes trunk and head as a folder that `transformers` loads with ``AutoModelForSequenceClassification``.

    ``params``: ``embed``, ``layers``, ``final_norm`` and ``heads``; a projection onto the vocabulary is left out.
    ``source_folder``: of the language model or classifier that it was trained from. ``labels``: names of the outputs.
    ``trained_on``: as ``Trunk`` has it. ``dtype`` and ``tokenizer`` as in save_pretrained. Raises UserError when the
    folder cannot be written, ValueError for a head that the format has no place for.
    """
    if head.position != "last" or head.bias or (labels and len(labels) != head.outputs):
        raise ValueError(f"expected a head at the last position without bias and a label for each output, found {head}")
    raw, family = read_model_json(config_file(source_folder)), read_trunk(source_folder).family
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
        described |= {TRAINED_ON: trained_on} if trained_on else {}
        if tokenizer is not None:
            described["pad_token_id"] = None if (pad := choose_pad(tokenizer, config.vocab_size)) is None else pad[1]
        if dtype != "as_loaded":
            described |= dict.fromkeys([key for key in DTYPE_KEYS if key in raw] or DTYPE_KEYS[:1], dtype)
        text = json.dumps(described, indent=2, ensure_ascii=False)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        copy_side_files(source_folder, temporary, tokenizer)
        if tokenizer is not None and pad is not None:
            write_pad_token(temporary, pad[0])
        open_checked(temporary, config, family, {SCORE.name: score.shape})

    announced = [(tensor.name, tensor.shape, dtypes[tensor.name]) for tensor in tensors]
    write_folder(folder, announced, fetch, finish, source_folder=source_folder, max_shard_bytes=5 * 10**9)


def choose_pad(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, int] | None:
    """The token to pad texts with that ends none of them, and its id; None where the tokenizer has no such token.

    The tokenizer's own where it is one, else its beginning of text, its unknown token or another special one; below
    ``vocab_size``, that of the model.
    """
    ends = {tokenizer.eos_id, tokenizer.fast.token_to_id(find_answer_end(tokenizer))}
    named = [tokenizer.special_tokens.get(key) for key in ("pad_token", "bos_token", "unk_token")]
    found = [(text, tokenizer.fast.token_to_id(text)) for text in named if text is not None]
    others = sorted(tokenizer.control_tokens.items(), key=lambda item: item[1])
    found += [(text, i) for text, i in others if i not in tokenizer.stop_ids]
    return next(((text, i) for text, i in found if i is not None and i < vocab_size and i not in ends), None)


def _make_config(raw: dict, family: Family, head: HeadConfig, labels: Sequence[str]) -> dict:
    """The content of config.json, but for dtype and vocabulary."""
    names = list(labels) or [f"LABEL_{i}" for i in range(head.outputs)]
    described = {
        key: value for key, value in raw.items() if key not in ("quantization_config", "num_labels", TRAINED_ON)
    }
    if described.get("pad_token_id") is None:  # without one transformers takes no batches
        eos = described.get("eos_token_id")
        described["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return described | {
        "architectures": [family.classifier],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
