"""What a user may name as a model to run: a Hugging Face folder, or that of a PEFT adapter, which names its base."""

import os
import pathlib
from typing import NamedTuple

from jax.sharding import Mesh

from postrain.errors import UserError
from postrain.hf.config import ADAPTER_FILE, is_adapter
from postrain.hf.hub import locate_model
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_adapter
from postrain.hf.peft.rows import needed_vocabulary
from postrain.hf.tensors import read_json
from postrain.models.config import ModelConfig
from postrain.models.params import merge_params


class ModelFolder(NamedTuple):
    """Where the parts of a model lie; the three are one folder unless there is an adapter."""

    base: pathlib.Path
    tokenizer: pathlib.Path
    adapter: pathlib.Path | None = None


def find_model(name: str | os.PathLike) -> ModelFolder:
    """The parts of the model that ``name`` stands for; that they are whole is seen when they are loaded.

    ``name`` and the base that an adapter names are what ``locate_model`` takes; a base's folder may be as seen from
    here or from the adapter. Raises UserError when an adapter's base is not here, and as ``locate_model`` does.
    """
    adapter = pathlib.Path(name)
    if not is_adapter(adapter):
        folder = locate_model(os.fspath(name))
        return ModelFolder(folder, folder)
    base = _find_base(adapter)
    return ModelFolder(base, adapter if (adapter / "tokenizer.json").is_file() else base, adapter)


def _find_base(adapter: pathlib.Path) -> pathlib.Path:
    where = f"{adapter / ADAPTER_FILE}: base_model_name_or_path"
    name = read_json(adapter / ADAPTER_FILE).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} is {name!r}, expected the adapter's base model: write the path of its folder there")
    for folder in (locate_model(name), adapter / name):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{where} is {name!r}, expected the folder of the adapter's base model, found none: write its path there"
    )


def load_model(model: ModelFolder, *, mesh: Mesh | None = None, dtype: str = "float32") -> tuple[ModelConfig, dict]:
    """ModelConfig and the whole parameter tree, adapters beside their kernels; see load_pretrained and load_adapter."""
    vocab_size = needed_vocabulary(model.adapter)
    config, params = load_pretrained(model.base, mesh=mesh, dtype=dtype, vocab_size=vocab_size)
    if model.adapter is None:
        return config, params
    config, adapters = load_adapter(model.adapter, config, base_folder=model.base, mesh=mesh, dtype=dtype)
    return config, merge_params(adapters, params)
