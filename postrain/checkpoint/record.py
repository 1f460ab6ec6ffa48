"""What a checkpoint holds beside the arrays of the train state, and the fingerprint of the model in it."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from postrain.config import NewTokensSection
from postrain.data.rendering.tokenizer import read_new_tokens
from postrain.errors import UserError
from postrain.files import digest, spread
from postrain.hf.tensors import list_weight_files, read_header
from postrain.models.config import LoraConfig
from postrain.models.heads import HeadConfig

WHOLE_BYTES = 20 * 10**9  # of a folder: up to here every byte is hashed (a GB takes under a second), above it samples
_BLOCK = 1 << 24  # read and hashed at once
_SAMPLE, _SAMPLES = 1 << 16, 16  # bytes of a sample, and samples of a tensor


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a checkpoint holds beside the train state, in run/data.json; all of it JSON."""

    step: int  # of the loop, which may have made more updates or fewer
    data_position: dict[str, Any]
    config: dict[str, Any]  # resolved
    data_fingerprint: dict[str, Any]
    model_fingerprint: dict[str, Any] | None
    held_out_fingerprint: dict[str, Any] | None = None  # None: no held-out rows
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of this step
    pending_metrics: dict[str, float] | None = None  # a line not yet written, since its evaluation was interrupted
    reports: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the files that a run appends to
    total_updates: int = 0  # of the whole run as it was planned, which its learning rates follow; 0: nobody knows
    unlogged: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # StepMeans of steps without a line yet


def parse_record(folder: pathlib.Path, values: Any) -> RunRecord:
    """The record that a checkpoint's run/data.json holds. Raises UserError where another version wrote it."""
    names = {field.name for field in dataclasses.fields(RunRecord)}
    if not isinstance(values, dict) or values.keys() != names:
        raise UserError(
            f"{folder}: another version of postrain wrote this checkpoint: resume with that version, or use another "
            "workdir"
        )
    return RunRecord(**values)


def fingerprint_model(
    folder: str | os.PathLike,
    lora: LoraConfig | None = None,
    new_tokens: NewTokensSection | None = None,
    quantization: str = "none",
    heads: Sequence[HeadConfig] = (),
) -> dict[str, Any]:
    """Fingerprint of a run's starting model, adapters, new tokens and heads, compared when the run resumes.

    ``rank`` and ``targets`` show in the parameters' shapes as well, ``alpha``, ``quantization``, the places of heads
    and what config.json says do not. Later keys are left out at their defaults, as older checkpoints do not have them.
    A reward model's also has ``trained_on``, the form of its rows, which is not compared: the rows themselves are.
    """
    adapters = lora and {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}
    if lora:
        later = {"ranks": dict(lora.ranks), "dora": lora.dora, "quantization": quantization}
        adapters |= {key: value for key, value in later.items() if value not in ({}, False, "none")}
    files = fingerprint_folder(folder)
    for name in ("config.json", "generation_config.json"):  # the second says where answers end, and is exported
        path = pathlib.Path(folder) / name
        files[name] = {"sha256": digest(path)} if path.is_file() else None
    fingerprint: dict[str, Any] = {"files": files, "lora": adapters}
    if heads:
        fingerprint["heads"] = [dataclasses.asdict(head) for head in heads]
    tokens = read_new_tokens(new_tokens) if new_tokens is not None else ()
    if tokens:
        listed = [[token.text, token.start] for token in tokens]
        found = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        trained = {"special": new_tokens.special, "train_alone": new_tokens.train_alone}
        fingerprint["new_tokens"] = {"count": len(tokens), "sha256": found} | trained
    return fingerprint


def fingerprint_folder(folder: str | os.PathLike, *, whole_bytes: int = WHOLE_BYTES) -> dict[str, Any]:
    """``{file: {bytes, hash}}`` for the files that hold a folder's weights; where the folder is does not matter.

    The hash (SHA-256 over those of stretches, so that all cores work on it) is over the whole file. Of a folder of
    more than ``whole_bytes`` it is over each file's header and sixteen stretches of every tensor, its first and last
    bytes among them: no other fine-tune of a model leaves all of those as they are, but a single weight may hide.
    """
    files = list_weight_files(folder)
    if not files:
        raise UserError(f"model.path={folder}: expected *.safetensors files, found none: give a Hugging Face folder")
    sizes = {path: path.stat().st_size for path in files}
    whole = sum(sizes.values()) <= whole_bytes
    fingerprint = {}
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for path, size in sizes.items():
            if whole:
                stretches = [(start, _BLOCK) for start in range(0, size, _BLOCK)]
            else:
                # The header, and stretches spread evenly over every tensor, all of a small one. They lie without gaps.
                bounds = sorted({info.offset for info in read_header(path).values()} | {size})
                stretches = [(0, bounds[0])]
                for start, stop in itertools.pairwise(bounds):
                    stretches += spread(start, stop, _SAMPLES, _SAMPLE)
            parts = pool.map(lambda stretch, path=path: digest(path, [stretch]), stretches)
            found = hashlib.sha256("".join(parts).encode()).hexdigest()
            fingerprint[path.name] = {"bytes": size, "hash": found}
    return fingerprint
