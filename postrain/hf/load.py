"""A Hugging Face folder -> ModelConfig and parameters, every device reading the slices that it holds.

Nothing unsharded exists on the way: the files are memory-mapped, and for each parameter each device is
given the rows and columns of its shard, cut out of the tensors' layers one by one. Besides the shards of its devices a
host holds one piece of one parameter (tests/benchmarks/load.py measures it).
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from postrain.errors import UserError
from postrain.hf.config import parse_dtype, read_config, read_family
from postrain.hf.families import IGNORED_TENSORS, Family, TensorName
from postrain.hf.find_model import locate_model
from postrain.hf.tensors import TensorFiles, open_tensors
from postrain.hf.tree import group_layers, list_entries, list_tensors
from postrain.models.config import ModelConfig
from postrain.models.params import ParamSpec, frozen_specs, make_packer
from postrain.sharding import named_shardings, to_host
from postrain.trees import flatten, unflatten

PIECE_BYTES = 128 * 2**20  # of a parameter, on the host on its way to a device


def load_pretrained(
    folder: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    vocab_size: int = 0,
    quantization: str = "none",
) -> tuple[ModelConfig, dict]:
    """ModelConfig and parameter tree (see postrain.models.params) of a Hugging Face folder.

    ``folder``: also what ``locate_model`` takes in its place.
    ``quantization``: of the linear layers' kernels and the embeddings, as in ModelConfig; each matrix is quantised from
    the file's numbers as it is read. ``dtype``: of everything else. With ``mesh`` the arrays are global, laid out by
    ``postrain.sharding``; without, they are on the default device. ``vocab_size``: rows of the vocabulary that the
    model is to have, where the folder has fewer; those past the folder's are zero. Raises UserError: config.json
    unsupported (see read_config), files missing or unreadable, tensors missing, left over or misshapen (all of them
    in one message).
    """
    folder = locate_model(os.fspath(folder))
    config = read_config(folder)
    files, _ = open_checked(folder, config)
    options = {"mesh": mesh, "dtype": dtype, "vocab_size": vocab_size, "quantization": quantization}
    return read_params(files, config, read_family(folder), **options)


def read_params(
    files: TensorFiles,
    config: ModelConfig,
    family: Family,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    vocab_size: int = 0,
    quantization: str = "none",
) -> tuple[ModelConfig, dict]:
    """ModelConfig and parameter tree out of checked files (``open_checked``); the rest as in load_pretrained."""
    config = dataclasses.replace(config, quantization=quantization)
    target = parse_dtype(dtype, "dtype")
    grown = dataclasses.replace(config, vocab_size=max(config.vocab_size, vocab_size))
    # Path of each kernel and embedding that ``quantization`` packs -> its leaves.
    packed: dict[str, dict[str, ParamSpec]] = {}
    for path, spec in flatten(frozen_specs(grown)).items():
        if spec.dtype:
            kernel, _, name = path.rpartition(".")
            packed.setdefault(kernel, {})[name] = spec
    leaves = {}
    for entry, spec in list_entries(grown, family):
        if entry.param in packed:
            read = make_reader(files, entry, spec, config, np.dtype(np.float32))
            arrays = place_quantized(read, spec, packed[entry.param], make_packer(spec, quantization), mesh)
            leaves |= {f"{entry.param}.{name}": array for name, array in arrays.items()}
        else:
            leaves[entry.param] = place(make_reader(files, entry, spec, config, target), spec, mesh)
    return grown, unflatten(leaves)


def open_checked(
    folder, config: ModelConfig, family: Family | None = None, others: dict[str, tuple[int, ...]] | None = None
) -> tuple[TensorFiles, list[tuple[TensorName, ParamSpec]]]:
    """The folder's tensors and the table rows they fill. Raises one UserError for all that does not fit.

    ``family``: None for the folder's own. ``others``: shapes of further tensors that it must have.
    """
    family = family or read_family(folder)
    files = open_tensors(folder)
    if config.tie_embeddings and not others:  # the projection onto the vocabulary has no tensor of its own
        _keep_one_embedding(files, family.tensors)
    expected = {tensor.name: tensor.shape for tensor in list_tensors(config, family)} | (others or {})
    entries = list_entries(config, family)
    ignored = [name for name in files.infos if any(re.fullmatch(pattern, name) for pattern in IGNORED_TENSORS)]
    natural = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    extra = sorted(set(files.infos) - set(expected) - set(ignored), key=natural)
    missing = [name for name in expected if name not in files.infos]
    misshapen = [
        f"{name} {list(files.infos[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in files.infos and files.infos[name].shape != shape
    ]
    problems = []
    if missing:
        problems.append(f"missing: {group_layers(missing)}")
    if extra:
        problems.append(f"left over: {group_layers(extra)}")
    if misshapen:
        problems.append(f"of another shape: {', '.join(misshapen)}")
    if problems:
        raise UserError(
            f"{folder}: tensors do not fit config.json: {'; '.join(problems)}: use the config.json that belongs to "
            "these weights, or download them again"
        )
    return files, entries


def _keep_one_embedding(files: TensorFiles, tensors: tuple[TensorName, ...]) -> None:
    """A tied model may carry its embedding twice, or as the projection alone. Copies that differ are refused."""
    names = {entry.param: entry.name for entry in tensors}
    copy, original = names["unembed.embedding"], names["embed.embedding"]
    if copy not in files.infos:
        return
    if original not in files.infos:
        files.rename({copy: original})
        return
    if files.infos[copy].shape != files.infos[original].shape:
        return  # left over
    rows, step = files.infos[copy].shape[0], 4096
    first, second = files.read(original), files.read(copy)
    for start in range(0, rows, step):
        if not np.array_equal(first[start : start + step], second[start : start + step]):
            raise UserError(
                f"{files.folder}: config.json ties the embeddings, but {copy} differs from {original}: set "
                "tie_word_embeddings to false if the model was trained untied"
            )
    del files.infos[copy]


def make_reader(
    files: TensorFiles, entry: TensorName, spec: ParamSpec, config: ModelConfig, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from an index into the parameter to its values, which reads those slices of the file alone."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True))
        whole = np.zeros([part.stop - part.start for part in index], dtype)
        stacked = index[: entry.per_layer + entry.per_expert]  # axes whose places, layer and expert, are in the name
        index = index[len(stacked) :]
        for places in itertools.product(*(range(part.start, part.stop) for part in stacked)):
            name = entry.name.format(*places)
            out = whole[tuple(place - part.start for place, part in zip(places, stacked, strict=True))]
            source = files.read(name)
            if entry.transpose:
                source = source.T
            if entry.parts > 1:
                source = source[..., entry.part :: entry.parts]
            if "vocab" in spec.axes:  # rows past the file's vocabulary stay zero
                source = source[min(index[0].start, config.vocab_size) : min(index[0].stop, config.vocab_size)]
                out[: source.shape[0]] = source[(slice(None), *index[1:])]
            else:
                out[...] = source[index]
            files.forget(name)
        return whole

    return read


def place(read: Callable[[tuple[slice, ...]], np.ndarray], spec: ParamSpec, mesh: Mesh | None) -> jax.Array:
    """The parameter on the default device, or each part of it on the devices of ``mesh`` that hold it."""
    if mesh is None:
        return _put(read, tuple(slice(0, size) for size in spec.shape), jnp.zeros(()).device)
    shape = jax.ShapeDtypeStruct(spec.shape, np.float32)
    sharding = named_shardings({"": spec.axes}, mesh, {"": shape})[""]
    parts: dict[tuple, jax.Array] = {}  # replicas on this host share one read
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        key = tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True))
        if key not in parts:
            parts[key] = _put(read, tuple(slice(*span) for span in key), device)
        arrays.append(jax.device_put(parts[key], device))
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def _put(read: Callable[[tuple[slice, ...]], np.ndarray], index: tuple[slice, ...], device: jax.Device) -> jax.Array:
    """One part on one device, some rows of its first axis after the other: the host never holds all of a large one."""
    first, *rest = index
    shape = tuple(part.stop - part.start for part in index)
    step = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))  # float32 at most
    cut = lambda start: read((slice(start, min(start + step, first.stop)), *rest))
    piece = cut(first.start)
    if len(piece) == shape[0]:
        return jax.device_put(piece, device)
    whole = jax.jit(lambda: jnp.zeros(shape, piece.dtype), out_shardings=SingleDeviceSharding(device))()
    for start in range(first.start, first.stop, step):
        piece = cut(start) if start > first.start else piece
        whole = _write(whole, piece, start - first.start)
        whole.block_until_ready()  # pieces read ahead would pile up
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, piece: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis=0)


def place_quantized(read, spec: ParamSpec, leaves: dict[str, ParamSpec], pack, mesh: Mesh | None) -> dict:
    """The leaves of a quantised parameter, laid out as ``place`` does.

    ``pack``: as ``make_packer`` has it. The host has one matrix, or some rows of an embedding, in float32 at a time.
    """
    parts, shardings = {}, {}
    for name, leaf in leaves.items():
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        whole = SingleDeviceSharding(jnp.zeros(()).device)
        shardings[name] = named_shardings({"": leaf.axes}, mesh, {"": shape})[""] if mesh else whole
        indices = shardings[name].addressable_devices_indices_map(leaf.shape).values()
        parts[name] = {_bounds(index, leaf.shape): None for index in indices}
        for bounds in parts[name]:
            parts[name][bounds] = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    pack = jax.jit(pack)
    for piece in _pieces(spec):
        held = []  # by this host: start and stop of the overlap along the axes of the piece
        for name, of_leaf in parts.items():
            for bounds in of_leaf:
                spans = [(max(a, at.start), min(b, at.stop)) for (a, b), at in zip(bounds, piece, strict=False)]
                if all(a < b for a, b in spans):
                    held.append((name, bounds, spans))
        if not held:
            continue
        found = jax.tree.map(to_host, pack(read((*piece, *[slice(None)] * (len(spec.shape) - len(piece))))))
        for name, bounds, leading in held:
            part, rest = parts[name][bounds], tuple(slice(*pair) for pair in bounds[len(piece) :])
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(leading, bounds, strict=False))
            of = tuple(slice(a - at.start, b - at.start) for (a, b), at in zip(leading, piece, strict=True))
            part[into] = found[name][(*of, *rest)]
    return {
        name: jax.make_array_from_callback(
            leaf.shape, shardings[name], lambda index, name=name, leaf=leaf: parts[name][_bounds(index, leaf.shape)]
        )
        for name, leaf in leaves.items()
    }


def _pieces(spec: ParamSpec) -> list[tuple[slice, ...]]:
    """The pieces that are quantised one by one: each matrix of a stack, or some rows of an embedding."""
    if "vocab" in spec.axes:
        rows, step = spec.shape[0], max(1, PIECE_BYTES // (4 * spec.shape[1]))
        return [(slice(start, min(start + step, rows)),) for start in range(0, rows, step)]
    return list(itertools.product(*([slice(i, i + 1) for i in range(size)] for size in spec.shape[:-2])))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Start and stop along every axis."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
