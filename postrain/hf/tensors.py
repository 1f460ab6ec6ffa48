"""Tensors of a Hugging Face folder: slices out of its safetensors files, and files written tensor by tensor.

Reading goes through a memory map, for a slice of a tensor must cost that slice, and the numpy side of the
`safetensors` package has no bfloat16. The package still checks every header.

Format: 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), the tensors' bytes.
"""

import dataclasses
import itertools
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from postrain.errors import UserError, shorten
from postrain.hf.families import BARE_PREFIXES, find_text_part
from postrain.hf.mxfp4 import GROUP, SUFFIXES, Mxfp4Tensor

ONE_FILE = "model.safetensors"
INDEX_FILE = f"{ONE_FILE}.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MXFP4 = "MXFP4"  # not a dtype of safetensors: blocks and scales that are read as one tensor
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OTHER_WEIGHTS = {  # files in the place of those, and what to do then
    "*.gguf": "postrain import FILE.gguf OUT",
    "*.bin": "save it again with safetensors: model.save_pretrained(folder, safe_serialization=True)",
    "adapter_model.safetensors": "merge the adapter into its base model first",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``dtype`` as safetensors spells it, ``offset`` in bytes from the start of the file."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class TensorFiles:
    """All tensors of a folder: ``infos`` by name, ``read(name)`` an array over the file's memory map.

    Raises UserError, naming the file, when there is none, one is missing or unreadable, when the index and
    the files disagree, and when there are two sets of weights that differ.
    """

    def __init__(self, folder: str | os.PathLike, one_file: str = ONE_FILE):
        self.folder = pathlib.Path(folder)
        self.infos: dict[str, TensorInfo] = {}
        self._maps: dict[pathlib.Path, mmap.mmap] = {}
        self._packed: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        index = find_index(self.folder, one_file)
        if index is not None:
            self._open_sharded(index)
            if (self.folder / one_file).exists():
                self._refuse_another_set(self.folder / one_file, index)
        elif (self.folder / one_file).exists():
            self.infos = read_header(self.folder / one_file)
        else:
            found = "neither: give the folder of a Hugging Face model"
            for pattern, advice in OTHER_WEIGHTS.items():
                if others := sorted(path.name for path in self.folder.glob(pattern)):
                    found = f"{others[0]}: {advice}"
                    break
            raise UserError(f"{self.folder}: expected {one_file} or {one_file}.index.json, found {found}")

        # What is there as blocks and scales is one tensor, under the name that it would have unpacked.
        stems = {name.removesuffix(SUFFIXES[0]) for name in self.infos if name.endswith(SUFFIXES[0])}
        for name in sorted(stem for stem in stems if stem + SUFFIXES[1] in self.infos and stem not in self.infos):
            blocks, scales = (self.infos.pop(name + suffix) for suffix in SUFFIXES)
            experts, size_out, groups = scales.shape
            if (blocks.dtype, scales.dtype) != ("U8", "U8") or blocks.shape != (*scales.shape, 16):
                raise UserError(f"{blocks.file}: {name}_blocks and {name}_scales are not MXFP4: download it again")
            self._packed[name] = blocks, scales
            shape = (experts, groups * GROUP, size_out)
            self.infos[name] = TensorInfo(blocks.file, MXFP4, shape, blocks.offset, blocks.num_bytes)

    def _open_sharded(self, index: pathlib.Path) -> None:
        weight_map = read_weight_map(index)
        for file in sorted(set(weight_map.values())):
            found = read_header(self.folder / file)
            listed = {name for name, where in weight_map.items() if where == file}
            if absent := sorted(listed - set(found)):
                raise UserError(f"{self.folder / file}: lacks tensors that the index lists there: {shorten(absent, 8)}")
            if unlisted := sorted(set(found) - listed):
                names = shorten(unlisted, 8)
                raise UserError(f"{index}: has no entry for tensors of {file}: {names}: download it again")
            self.infos |= found

    def _refuse_another_set(self, file: pathlib.Path, index: pathlib.Path) -> None:
        """A whole file beside the index's: `transformers` reads that one, others the index's. They must be the same."""
        if all(info.file == file for info in self.infos.values()):
            return
        others = read_header(file)
        outline = lambda infos: {name: (info.dtype, info.shape) for name, info in infos.items()}
        here, there = outline(others), outline(self.infos)
        different = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        if not different:
            raw = lambda info: self._map(dataclasses.replace(info, shape=(info.num_bytes,)), np.dtype(np.uint8))
            pairs = ((name, raw(others[name]), raw(info)) for name, info in self.infos.items())
            different = list(itertools.islice((name for name, a, b in pairs if not np.array_equal(a, b)), 1))
        if different:
            raise UserError(
                f"{self.folder}: holds two sets of weights that differ, {file.name} and the files of {index.name}, for "
                f"one in {different[0]}; transformers reads the former, others the latter: move away the one not meant"
            )

    def rename(self, names: dict[str, str]) -> None:
        """Gives tensors other names, old -> new."""
        self.infos = {names.get(name, name): info for name, info in self.infos.items()}
        self._packed = {names.get(name, name): parts for name, parts in self._packed.items()}

    def read(self, name: str) -> np.ndarray | Mxfp4Tensor:
        """The tensor as a read-only array over the file: only the parts that are sliced or copied are read."""
        if name in self._packed:
            return Mxfp4Tensor(*(self._map(info, np.dtype(np.uint8)) for info in self._packed[name]))
        info = self.infos[name]
        if info.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"{info.file}: tensor {name} is {info.dtype}, expected one of {known}: dequantise it first")
        return self._map(info, DTYPES[info.dtype])

    def forget(self, name: str) -> None:
        """Releases the pages of the file that were read for a tensor, which count as this process's memory."""
        file = self._packed[name][0].file if name in self._packed else self.infos[name].file
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            self._maps[file].madvise(mmap.MADV_DONTNEED)

    def _map(self, info: TensorInfo, dtype: np.dtype) -> np.ndarray:
        if info.file not in self._maps:
            with open(info.file, "rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[info.file], dtype, math.prod(info.shape), info.offset).reshape(info.shape)


def open_tensors(folder: str | os.PathLike) -> TensorFiles:
    """The folder's tensors, of a folder with a text part only its own, named as in the folder of a language model.

    A folder saved without the level ``model.``, as that of a model without a head is, gets it.
    """
    files = TensorFiles(folder)
    config = pathlib.Path(folder) / "config.json"
    part = find_text_part(read_json(config)) if config.is_file() else None
    if part is not None:
        of_text = {}
        for name, info in files.infos.items():
            if not name.startswith(part.other_prefixes):
                prefix = next((prefix for prefix in part.prefixes if name.startswith(prefix)), "")
                of_text[part.prefixes.get(prefix, "") + name.removeprefix(prefix)] = info
        files.infos = of_text
    bare = [name for name in files.infos if name.startswith(BARE_PREFIXES) and f"model.{name}" not in files.infos]
    files.rename({name: f"model.{name}" for name in bare})
    return files


def list_weight_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files of a folder that hold its weights: those of the index, or the one; none where neither is there."""
    index, one = find_index(pathlib.Path(folder)), pathlib.Path(folder) / ONE_FILE
    if index is not None:
        return [index.parent / name for name in sorted(set(read_weight_map(index).values()))]
    return [one] if one.exists() else []


def find_index(folder: pathlib.Path, one_file: str = ONE_FILE) -> pathlib.Path | None:
    """The index by which weights are read: none where a whole file is there, and nothing of what the index names."""
    index = folder / f"{one_file}.index.json"
    if not index.exists():
        return None
    if not (folder / one_file).exists() or any((folder / name).exists() for name in parse_weight_map(index).values()):
        return index
    return None  # left behind by weights that are gone


def read_weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> file, of an index. Raises UserError when it is not one, and when a file is not there."""
    weight_map = parse_weight_map(index)
    missing = sorted({file for file in weight_map.values() if not (index.parent / file).is_file()})
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}: download them")
    return weight_map


def parse_weight_map(index: pathlib.Path) -> dict[str, str]:
    """As ``read_weight_map``, also where the files are not there yet."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: expected a `weight_map` of tensor names to files: download the file again")
    return weight_map


def read_json(file: pathlib.Path) -> dict:
    """A JSON object. Raises UserError when the file is missing, is not JSON, or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: not found") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}): download or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(file: pathlib.Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file. Raises UserError when it is truncated or not in that format."""
    try:
        safe_open(file, framework="numpy")  # checks the header against the length of the file
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}): download or write it again") from error
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def write_tensors(
    folder: pathlib.Path,
    tensors: list[tuple[str, tuple[int, ...], np.dtype]],
    fetch: Callable[[str], np.ndarray],
    *,
    file_name: str = ONE_FILE,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes tensors to safetensors files of at most ``max_shard_bytes`` and, when there are several, their index.

    ``tensors`` are (name, shape, dtype); ``fetch(name)`` gives each array when its turn comes, so that one
    tensor at a time is in memory. A tensor larger than a shard gets one of its own.
    """
    shards, size, total = [[]], 0, 0
    for tensor in tensors:
        num_bytes = math.prod(tensor[1]) * tensor[2].itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + num_bytes, total + num_bytes
    stem, weight_map = file_name.removesuffix(".safetensors"), {}
    for i, shard in enumerate(shards):
        name = file_name if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, fetch)
        weight_map |= {tensor: name for tensor, _, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{file_name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: pathlib.Path, tensors: list, fetch: Callable[[str], np.ndarray]) -> None:
    # Wide dtypes first, as the safetensors package orders them: every tensor is aligned to its own width.
    tensors = sorted(tensors, key=lambda tensor: -tensor[2].itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, dtype in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape, dtype in tensors:
            array = np.ascontiguousarray(fetch(name).astype(dtype, copy=False))
            if array.shape != shape:
                raise ValueError(f"{name}: fetched shape {array.shape}, announced {shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())  # a full disk behind a network shows itself here at the latest
