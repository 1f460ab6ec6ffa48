"""What a run's checkpoints stand on besides themselves: the weights and config of the model folder, the adapters."""

import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

from postrain.config import NewTokensSection
from postrain.data.rendering.new_tokens import read_new_tokens
from postrain.errors import UserError
from postrain.hf.tensors import read_header
from postrain.models.config import LoraConfig

WHOLE_BYTES = 20 * 10**9  # of a folder: up to here every byte is hashed (a GB takes under a second), above it samples
_BLOCK = 1 << 24  # read and hashed at once
_SAMPLE, _SAMPLES = 1 << 16, 16  # bytes of a sample, and samples of a tensor


class _Span(NamedTuple):
    """A stretch of a file."""

    start: int
    bytes: int


def fingerprint_model(
    folder: str | os.PathLike,
    lora: LoraConfig | None = None,
    new_tokens: NewTokensSection | None = None,
    quantization: str = "none",
) -> dict[str, Any]:
    """Of the model that a run starts from, the adapters and new tokens that it trains: for a resume to name changes.

    ``rank`` and ``targets`` show in the parameters' shapes as well, ``alpha``, ``quantization`` and what config.json
    says do not. Later keys are left out at their defaults, as older checkpoints do not have them.
    """
    adapters = lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}
    if lora:
        later = {"ranks": dict(lora.ranks), "dora": lora.dora, "quantization": quantization}
        adapters |= {key: value for key, value in later.items() if value not in ({}, False, "none")}
    files = fingerprint_folder(folder)
    for name in ("config.json", "generation_config.json"):  # the second says where answers end, and is exported
        path = pathlib.Path(folder) / name
        files[name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else None
    fingerprint = {"files": files, "lora": adapters}
    tokens = read_new_tokens(new_tokens) if new_tokens is not None else ()
    if tokens:
        listed = [[token.text, token.start] for token in tokens]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        trained = {"special": new_tokens.special, "train_alone": new_tokens.train_alone}
        fingerprint["new_tokens"] = {"count": len(tokens), "sha256": digest} | trained
    return fingerprint


def fingerprint_folder(folder: str | os.PathLike, *, whole_bytes: int = WHOLE_BYTES) -> dict[str, Any]:
    """``{file: {bytes, hash}}`` for the safetensors files of a model folder; where the folder is does not matter.

    The hash (SHA-256 over those of stretches, so that all cores work on it) is over the whole file. Of a folder of
    more than ``whole_bytes`` it is over each file's header and sixteen stretches of every tensor, its first and last
    bytes among them: no other fine-tune of a model leaves all of those as they are, but a single weight may hide.
    """
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"model.path={folder}: expected *.safetensors files, found none: give a Hugging Face folder")
    sizes = {path: path.stat().st_size for path in files}
    whole = sum(sizes.values()) <= whole_bytes
    fingerprint = {}
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for path, size in sizes.items():
            spans = _cut(size) if whole else _sample(path)
            digest = hashlib.sha256()
            for part in pool.map(lambda span, path=path: _hash(path, span), spans):
                digest.update(part)
            fingerprint[path.name] = {"bytes": size, "hash": digest.hexdigest()}
    return fingerprint


def _hash(path: pathlib.Path, span: _Span) -> bytes:
    with path.open("rb") as file:
        file.seek(span.start)
        return hashlib.sha256(file.read(span.bytes)).digest()


def _cut(size: int) -> list[_Span]:
    return [_Span(start, _BLOCK) for start in range(0, size, _BLOCK)]


def _sample(path: pathlib.Path) -> list[_Span]:
    """The header, and stretches spread evenly over every tensor; all of a small one. Tensors lie without gaps."""
    bounds = sorted({info.offset for info in read_header(path).values()} | {path.stat().st_size})
    spans = [_Span(0, bounds[0])]
    for start, stop in itertools.pairwise(bounds):
        last = stop - start - _SAMPLE
        if last <= _SAMPLE * _SAMPLES:
            spans.append(_Span(start, stop - start))
        else:
            spans += [_Span(start + last * i // (_SAMPLES - 1), _SAMPLE) for i in range(_SAMPLES)]
    return spans
