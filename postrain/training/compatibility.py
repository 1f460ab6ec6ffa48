"""Whether a run can go on from what its workdir holds, told before data is rendered and the model loaded.

What a resume refuses is known from the newest checkpoint's ``run/data.json`` and the files that the config names now.
``Checkpointer.restore`` compares once more, with what only rendering and loading tell.
"""

import bisect
import dataclasses
import json
import os
import pathlib

from postrain.checkpoint.checksums import verify_checksums
from postrain.checkpoint.model_fingerprint import fingerprint_model
from postrain.config import Config, OptimizerConfig, SourceConfig
from postrain.data.batches.fingerprint import compare_fingerprints, digest_change, make_fingerprint
from postrain.data.batches.open import fingerprint_stream
from postrain.data.batches.shard_reader import open_block_source
from postrain.data.batches.source import Source, open_source
from postrain.data.messages import BadRow
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError, shorten
from postrain.training.model import make_lora_config
from postrain.training.optimizer import describe_structure

_SHOWN = 8  # changes in one message


def check_resume(checkpoints: pathlib.Path, config: Config, tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Raises UserError naming everything because of which the run in ``checkpoints`` cannot go on with ``config``, or
    the export that a new run would replace.

    Args:
        tokenizer: the one that ``config`` names now.
        folder: of the model that ``config`` names now.
    """
    place, saved = _read_newest(checkpoints)
    if saved is None:
        export = checkpoints.parent / "export"
        if config.export.format != "none" and export.exists():
            raise UserError(
                f"{checkpoints.parent} has the export of a finished run, and no checkpoint to go on from: a new run "
                f"would replace it: use another workdir, or move {export} away"
            )
        return
    model = fingerprint_model(
        folder, make_lora_config(config.model.lora), config.model.new_tokens, config.model.quantization
    )
    models = _compare_models(saved["base_fingerprint"], model)
    now = _fingerprint_data(saved["fingerprint"], config, tokenizer)
    data, change = compare_fingerprints(saved["fingerprint"], now), digest_change(saved["fingerprint"], now)
    if change == config.data.accept_change:
        data = []
    if any(change.startswith("model.new_tokens") for change in models):  # which make it another tokenizer
        data = [change for change in data if not change.startswith("the tokenizer")]
    changes = [
        *data,
        *models,
        *_compare_optimizers(saved["config"]["optimizer"], config.optimizer),
    ]
    if changes:
        ways = ["change it back", "use another workdir"]
        if len(changes) == len(data):  # other weights or another optimizer are another run
            ways.append(f"go on with the changed data by --config.data.accept_change={change}")
        raise UserError(
            f"{place}: the run cannot go on from here, since what it stands on has changed: "
            f"{shorten(changes, _SHOWN, '; ')}: {', or '.join(ways)}"
        )


def check_length(checkpoints: pathlib.Path, total_steps: int) -> None:
    """Raises UserError when the run in ``checkpoints`` has done more than ``total_steps`` updates.

    Neither end would be what was asked for: the model of an earlier step cannot be made from this one, and this one
    is of another length of training.
    """
    place, _ = _read_newest(checkpoints)
    if place is not None and int(place.name) > total_steps:
        raise UserError(
            f"{place}: the run already is at step {place.name}, past the {total_steps} that train.steps (or "
            "train.epochs) asks for: ask for at least as many, take the model of a checkpoint with `postrain export "
            "--step`, or use another workdir"
        )


def _read_newest(checkpoints: pathlib.Path) -> tuple[pathlib.Path, dict] | tuple[None, None]:
    """The newest checkpoint that can be read and what it says of its run. Damaged ones are for restore to report."""
    steps = [path for path in checkpoints.glob("*") if path.name.isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
        try:
            verify_checksums(path, ["run/data.json"])
            saved = json.loads((path / "run" / "data.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(saved, dict) and {"fingerprint", "base_fingerprint", "config"} <= saved.keys():
            return path, saved
    return None, None


def _fingerprint_data(saved: dict, config: Config, tokenizer: Tokenizer) -> dict:
    """As it would be saved now; the documents, which are not known yet, as they were."""
    if config.data.streaming:
        sources = [open_block_source(source, config.data) for source in config.data.train]
        return fingerprint_stream(sources, tokenizer, config.data)
    files = [_list_files(source) for source in config.data.train]
    return make_fingerprint(files, tokenizer, [], config.data) | {"documents": saved.get("documents")}


def _list_files(config: SourceConfig) -> tuple[str, list[str], dict]:
    """Name of a source, its files that have rows, in order, and what else tells its rows."""
    source, files, row = open_source(config), [], 0
    while row < len(source):
        file = _file_of(source, row)
        files.append(file)
        # The rows of a file stand together: where the next one begins is found without reading them all.
        key = lambda other, file=file: _file_of(source, other) != file
        row = bisect.bisect_left(range(len(source)), True, lo=row, key=key)
    return source.name, files, source.parser.identity


def _file_of(source: Source, row: int) -> str:
    try:
        return source.raw(row)[0].file
    except BadRow as error:
        return error.ref.file


def _compare_models(saved: dict | None, now: dict) -> list[str]:
    """``fingerprint_model`` then and now."""
    if saved is None:
        return []
    defaults = {"ranks": {}, "dora": False, "quantization": "none"}
    before, after = (defaults | (adapters or {"rank": 0}) for adapters in (saved.get("lora"), now.get("lora")))
    keys = {key: f"model.lora.{key}" for key in ("rank", "alpha", "targets", "ranks", "dora")}
    keys |= {"quantization": "model.quantization"}
    changes = [
        f"{name}: was {before[key]}, is {after[key]}"
        for key, name in keys.items()
        if key in before and key in after and before[key] != after[key]
    ]
    changes += _compare_new_tokens(saved.get("new_tokens") or {}, now.get("new_tokens") or {})
    files, files_now = saved["files"], now["files"]
    others = [name for name in sorted(files.keys() | files_now.keys()) if files.get(name) != files_now.get(name)]
    return changes + [f"model.path: other content of {shorten(others, 3)}"] * bool(others)


def _compare_new_tokens(before: dict, after: dict) -> list[str]:
    if before.get("count", 0) != after.get("count", 0):
        return [f"model.new_tokens: were {before.get('count', 0)}, are {after.get('count', 0)}"]
    if before.get("sha256") != after.get("sha256"):
        return ["model.new_tokens: other tokens, or in another order, or other texts that their rows start from"]
    keys = [key for key in before if before[key] != after.get(key)]
    return [f"model.new_tokens.{key}: was {before[key]}, is {after.get(key)}" for key in keys]


def _compare_optimizers(saved: dict, now: OptimizerConfig) -> list[str]:
    """The keys that give the optimizer's state other arrays; all others may change."""
    fields = [field.name for field in dataclasses.fields(OptimizerConfig)]
    before = OptimizerConfig(**{key: saved[key] for key in fields if key in saved})
    shape = describe_structure(before)
    if describe_structure(now) == shape:
        return []
    changed = [key for key in fields if getattr(before, key) != getattr(now, key)]
    alone = [
        key for key in changed if describe_structure(dataclasses.replace(before, **{key: getattr(now, key)})) != shape
    ]
    return [f"optimizer.{key}: was {getattr(before, key)!r}, is {getattr(now, key)!r}" for key in alone or changed]
