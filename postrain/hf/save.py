"""Parameters -> a Hugging Face folder that `transformers` loads as is.

Names, dtypes and config are the source folder's; so are tokenizer, chat template and generation config, unless a
run used others. Tensors are gathered and written one at a time; the folder appears when it is whole.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.hf.config import (
    DTYPE_KEYS,
    config_file,
    parse_dtype,
    read_config,
    read_family,
    read_model_json,
    write_config,
)
from postrain.hf.families import PROJECTION
from postrain.hf.find_model import locate_model
from postrain.hf.folders import atomic_folder, copy_side_files
from postrain.hf.load import load_pretrained, open_checked
from postrain.hf.tensors import DTYPES, INDEX_FILE, ONE_FILE, open_tensors, write_tensors
from postrain.hf.tree import FileTensor, list_tensors
from postrain.models.config import ModelConfig
from postrain.models.params import param_specs
from postrain.sharding import to_host
from postrain.trees import flatten


def save_pretrained(
    folder: str | os.PathLike,
    params: dict,
    config: ModelConfig,
    *,
    source_folder: str | os.PathLike,
    dtype: str = "as_loaded",
    tokenizer: Tokenizer | None = None,
    layers: Sequence[int] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes ``params`` (without adapters: see models.lora.merge_lora) as a Hugging Face folder.

    ``source_folder`` is the folder that the model was loaded from; its vocabulary may have grown since. ``dtype``:
    "as_loaded" (each tensor's dtype in the source) or "float32", "bfloat16", "float16". ``tokenizer``: what the model
    was trained with, where that may be another than the source folder's. ``layers``: of the source, which ``params``
    has, where these are not all. Every process must call it; the first one writes.
    Raises UserError when the folder cannot be written; no partial folder is left then.
    """
    leaves = flatten(params)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    expected = {path: spec.shape for path, spec in flatten(param_specs(config)).items()}
    if wrong := sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path)):
        listed = ", ".join(f"{path} {found.get(path)} instead of {expected.get(path)}" for path in wrong)
        raise ValueError(f"parameters do not fit the model config: {listed}")
    tensors = list_tensors(config, read_family(source_folder))
    dtypes = choose_dtypes(tensors, source_folder, dtype, layers)
    tensors.sort(key=lambda tensor: -dtypes[tensor.name].itemsize)  # the order of a file, so of every gather
    by_name = {tensor.name: tensor for tensor in tensors}

    def fetch(name: str) -> np.ndarray:
        return fetch_tensor(leaves, by_name[name], dtypes[name])

    def finish(temporary: pathlib.Path) -> None:
        write_config(temporary, source_folder, None if dtype == "as_loaded" else dtype, config.vocab_size, layers)
        copy_side_files(source_folder, temporary, tokenizer)
        open_checked(temporary, config)

    announced = [(tensor.name, tensor.shape, dtypes[tensor.name]) for tensor in tensors]
    write_folder(folder, announced, fetch, finish, source_folder=source_folder, max_shard_bytes=max_shard_bytes)


def save_layers(source: str | os.PathLike, folder: str | os.PathLike, layers: Sequence[int]) -> None:
    """Writes a model of these layers of another one, counted from 0, in this order: a student for distillation.

    ``source``: what ``locate_model`` takes. Everything but the layers is as it is there.
    Raises UserError: layers that it does not have, or whose attention windows its config.json could not tell.
    """
    source, layers = locate_model(os.fspath(source)), list(layers)
    config = read_config(source)
    if not layers or not all(0 <= i < config.num_layers for i in layers):
        raise UserError(f"layers {layers}: expected some of 0 to {config.num_layers - 1}, which {source} has")
    windows = tuple(config.layer_windows[i] for i in layers) if config.layer_windows else ()
    config = dataclasses.replace(config, num_layers=len(layers), layer_windows=windows if any(windows) else ())
    with tempfile.TemporaryDirectory() as place:
        write_config(pathlib.Path(place), source, layers=layers)
        if read_config(place).layer_windows != config.layer_windows:
            raise UserError(
                f"layers {layers}: which have an attention window follows from their places in {source}, and would be "
                "others here: choose layers whose windows come in the same order"
            )
    _, params = load_pretrained(source)
    params["layers"] = jax.tree.map(lambda leaf: leaf[np.asarray(layers)], params["layers"])
    save_pretrained(folder, params, config, source_folder=source, layers=layers)


def write_folder(
    folder: str | os.PathLike,
    tensors: list[tuple[str, tuple[int, ...], np.dtype]],
    fetch: Callable[[str], np.ndarray],
    finish: Callable[[pathlib.Path], None],
    *,
    source_folder: str | os.PathLike,
    **options,
) -> None:
    """Writes a folder of tensors that appears when it is whole: ``finish`` adds the other files and reads it back.

    ``tensors``, ``fetch`` and ``options`` are those of write_tensors. Every process must call it, as ``fetch`` may
    gather from all; the first one writes. Raises UserError when ``folder`` is ``source_folder``, which is still read.
    """
    if os.path.realpath(folder) == os.path.realpath(source_folder):
        raise UserError(f"{folder}: is the folder that the model was loaded from: export to another one")
    if jax.process_index() == 0:
        with atomic_folder(folder) as temporary:
            write_tensors(temporary, tensors, fetch, **options)
            finish(temporary)
    else:
        for name, _, _ in tensors:
            fetch(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("write_folder")


def fetch_tensor(leaves: dict[str, jax.Array], tensor: FileTensor, dtype: np.dtype | None = None) -> np.ndarray:
    """One tensor as the file has it: one layer, without vocabulary padding, [out, in]. Gathers that layer alone.

    With ``dtype`` in that one: UserError, naming the tensor, where a value is not finite, or too large for it.
    """
    places = tuple(i for i in (tensor.layer, tensor.expert) if i is not None)
    arrays = [gather(leaves[entry.param], places) for entry in tensor.entries]
    array = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
    array = array.T if tensor.entries[0].transpose else array[: tensor.shape[0]]
    if dtype is None:
        return array
    with np.errstate(over="ignore"):  # reported below, with the tensor's name
        cast = array.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        value = array[~np.isfinite(cast)].astype(np.float64).flat[0]
        found = f"tensor {tensor.name} has values that are not finite in {dtype.name}, such as {value:.4g}"
        raise UserError(f"export: {found}: choose another export.dtype")
    return cast


def gather(param, places: tuple[int, ...] = ()) -> np.ndarray:
    """A parameter, or its part at ``places`` (layer, expert), whole on this host, wherever its parts are."""
    if isinstance(param, np.ndarray):
        return param[places]
    devices = param.sharding.device_set
    if len(devices) > 1:
        everywhere = NamedSharding(param.sharding.mesh, PartitionSpec())
        return to_host(_make_gather(everywhere)(param, places))
    if not places or next(iter(devices)).platform == "cpu":  # the host's own memory is not copied
        return to_host(param)[places]
    return to_host(param[places])


@functools.cache
def _make_gather(sharding: NamedSharding):
    """(parameter, places) -> that part of it on every device."""
    return jax.jit(lambda param, places: param[places], out_shardings=sharding)


def choose_dtypes(
    tensors: list[FileTensor], source_folder, dtype: str, layers: Sequence[int] | None = None
) -> dict[str, np.dtype]:
    """Dtype of every tensor in the files; ``dtype`` and ``layers`` as in save_pretrained."""
    if dtype != "as_loaded":
        return dict.fromkeys([tensor.name for tensor in tensors], parse_dtype(dtype, "export.dtype"))
    raw, folder = read_model_json(config_file(source_folder)), pathlib.Path(source_folder)
    name = str(next((raw[key] for key in DTYPE_KEYS if raw.get(key)), "float32")).removeprefix("torch.")
    stated = parse_dtype(name, str(config_file(source_folder)))
    weights = (folder / ONE_FILE).exists() or (folder / INDEX_FILE).exists()
    infos = open_tensors(folder).infos if weights else {}
    known = {name: DTYPES[info.dtype] for name, info in infos.items() if info.dtype in DTYPES}
    if tied := known.get(PROJECTION):  # which may be the only tensor of a tied embedding
        known = {t.name: tied for t in tensors if t.entries[0].param == "embed.embedding"} | known
    names = {t.name: t.name for t in tensors}
    if layers is not None:  # a tensor of layer i was one of layer layers[i]
        there = list_tensors(read_config(source_folder), read_family(source_folder))
        by_place = {(t.entries, t.layer, t.expert): t.name for t in there}
        place = lambda t: (t.entries, t.layer if t.layer is None else layers[t.layer], t.expert)
        names = {t.name: by_place[place(t)] for t in tensors}
    return {t.name: known.get(names[t.name], stated) for t in tensors}  # packed ones are written in the stated dtype
