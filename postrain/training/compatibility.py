"""Whether a run can continue from the checkpoint in its workdir: with the same recipe, data, model and optimizer.

``check_resumable`` knows the newest checkpoint's record and the files that the config names now, and so refuses before
any row is rendered and the model is loaded. ``check_record`` compares once more when they are, with the rendered
documents.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp

from postrain.checkpoint.integrity import verify_checksums
from postrain.checkpoint.record import RunRecord, fingerprint_model, parse_record
from postrain.config import Config, OptimizerConfig, to_dict
from postrain.data.batches.fingerprint import compare_fingerprints, digest_change, fingerprint_config
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError, shorten
from postrain.sharding import to_host
from postrain.training.model import make_heads, make_lora_config
from postrain.training.optimizer import make_schedule, state_structure
from postrain.trees import flatten

_SHOWN = 8  # changes in one message
# Keys whose change a resume does not mention: they decide how the work is done or what is shown of it, not its result.
# ``data.eval`` is not among them: with other rows, evaluations before and after differ.
HARMLESS: tuple[str, ...] = ("mesh.", "trackers.", "checkpoint.", "export.", "train.log_every", "train.micro_batches")
HARMLESS += ("train.hang_timeout", "data.accept_change", "data.prefetch")
HARMLESS += ("eval.every", "eval.before", "eval.batch_size")
# Keys that a finished run may change besides: what they name is compared by its content, or they decide what is
# measured and how the work is done, not what was trained.
_OF_NO_UPDATE: tuple[str, ...] = ("train.steps", "train.epochs")
_OF_NO_UPDATE += ("data.", "eval.", "model.path", "model.tokenizer", "model.new_tokens.file", "distill.teacher")
_OF_NO_UPDATE += ("distill.quantization", "distill.checksum", "distill.top_k", "train.count_moved")
_OF_NO_UPDATE += ("model.attention", "model.remat", "model.loss_chunk")


def check_resumable(checkpoints: pathlib.Path, config: Config, tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Raises UserError naming everything because of which the run in ``checkpoints`` cannot continue with ``config``,
    or the finished export that a new run would replace.

    Args:
        tokenizer: the one that ``config`` names now.
        folder: of the model that ``config`` names now.
    """
    place, record = _read_newest(checkpoints)
    if record is None or place is None:
        export = checkpoints.parent / "export"
        if config.export.format != "none" and export.exists():
            raise UserError(
                f"{checkpoints.parent} has the export of a finished run, and no checkpoint to go on from: a new run "
                f"would replace it: use another workdir, or move {export} away"
            )
        return
    section, lora, heads = config.model, make_lora_config(config.model.lora), make_heads(config)
    model = fingerprint_model(folder, lora, section.new_tokens, section.quantization, heads)
    # The data as far as the config and its files tell, the rest as it was saved: the documents are not known yet, nor
    # what the recipe makes of them. A code of accepted changes stands for all of them, so it is judged by
    # ``check_record`` when they are known.
    saved, data = record.data_fingerprint, None
    if not config.data.accept_change:
        known = {"documents": saved.get("documents")} if not config.data.streaming else {}
        now = fingerprint_config(tokenizer, config.data) | known
        data = saved | {key: value for key, value in now.items() if key in saved}
    check_record(place, record, config, data, model)


def check_record(
    place: pathlib.Path, record: RunRecord, config: Config, data: dict | None, model: dict | None, action: str = "go on"
) -> None:
    """Raises UserError where a run with ``config`` cannot continue from the checkpoint ``place``, naming every reason.

    Args:
        record: of the checkpoint.
        data: fingerprint of the data pipeline now; None where only the weights are wanted.
        model: fingerprint of the model now.
        action: what cannot be done, for the message.
    """
    models = _compare_models(record.model_fingerprint, model)
    datas, code = [], ""
    if data is not None:
        datas, code = compare_fingerprints(record.data_fingerprint, data), digest_change(record.data_fingerprint, data)
        if code == config.data.accept_change:
            datas = []
        if any(change.startswith("model.new_tokens") for change in models):  # which make it another tokenizer
            datas = [change for change in datas if not change.startswith("the tokenizer")]
    recipe = record.config["recipe"]
    recipes = [f"recipe: was {recipe!r}, is {config.recipe!r}"] if recipe != config.recipe else []
    changes = [*recipes, *datas, *models, *_compare_optimizers(record.config["optimizer"], config.optimizer)]
    if not changes:
        return
    wrong = ""
    if datas and config.data.accept_change:
        wrong = f" (data.accept_change = {config.data.accept_change!r} is the code of another change)"
    ways = ["change it back", "use another workdir"]
    if len(changes) == len(datas):  # another recipe, other weights or another optimizer are another run
        ways.append(f"start the changed data anew at step {record.step} by --config.data.accept_change={code}")
    raise UserError(
        f"{place}: the run cannot {action}: this has changed: {shorten(changes, _SHOWN, '; ')}{wrong}: "
        f"{', or '.join(ways)}"
    )


def check_total_steps(checkpoints: pathlib.Path, total_steps: int, config: Config, data: dict) -> None:
    """Raises UserError when the run in ``checkpoints`` has done more than ``total_steps``, or exactly as many with
    other values of keys that decide what is trained, or with other data (fingerprint ``data``); and where it cannot go
    on with these data.

    The model of an earlier step cannot be made from it, and its own is of another length of training. Of a finished run
    no update would have the new values, which its config.json and report would then show.
    """
    place, record = _read_newest(checkpoints)
    if record is None or place is None:
        return
    check_record(place, record, config, data, record.model_fingerprint)  # which was compared before
    if record.step == total_steps:
        changed = [one for one in _list_changes(record, config) if not one[0].startswith(_OF_NO_UPDATE)]
        before = [f"{key} = {old!r}" for key, old, _ in changed]
        after = [repr(new) for *_, new in changed]
        if config.data.accept_change and compare_fingerprints(record.data_fingerprint, data):  # else refused as such
            before, after = [*before, "other data"], [*after, "these data"]
        if before:
            raise UserError(
                f"{place}: this run is finished: {total_steps:,} steps with {shorten(before, _SHOWN)}; nothing is left "
                f"to train with {shorten(after, _SHOWN)}: use another workdir, or raise train.steps (or train.epochs)"
            )
    if record.step > total_steps:
        raise UserError(
            f"{place}: the run already is at step {record.step}, past the {total_steps} that train.steps (or "
            "train.epochs) asks for: ask for at least as many, take the model of a checkpoint with `postrain export "
            "--step`, or use another workdir"
        )


def format_config_changes(record: RunRecord, config: Config, held_out: dict | None) -> str:
    """Differences of the config, and of the held-out rows, from the checkpoint's that affect results; "" without any.

    ``held_out``: fingerprint of the held-out rows; None: there are none.
    """
    changed = [f"{key} {before!r} -> {after!r}" for key, before, after in _list_changes(record, config)]
    if record.held_out_fingerprint and held_out:
        differences = compare_fingerprints(record.held_out_fingerprint, held_out)
        changed += [f"held out: {difference}" for difference in differences]
    return f"; changed since: {', '.join(changed)}" if changed else ""


def _list_changes(record: RunRecord, config: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of the keys that affect results."""
    # A record of an older version lacks newer keys, which then had no other value than their default.
    before, after = flatten(to_dict(Config())) | flatten(record.config), flatten(to_dict(config))
    harmless = HARMLESS
    if config.sft.noise:  # it is drawn for each micro-batch
        harmless = tuple(key for key in harmless if key != "train.micro_batches")
    return [
        (key, before[key], after[key]) for key in after if before[key] != after[key] and not key.startswith(harmless)
    ]


def format_rate_jump(record: RunRecord, config: OptimizerConfig, total_updates: int, update: int) -> str:
    """A line with both learning rates where update ``update`` (from 0) has another one than the run had planned for it.

    A longer run, or other rows, stretch the schedule: a run that ended at a rate of 0 would go on at half of the peak.
    ``total_updates``: of the whole run now. "" where the rate is the same, or nobody knows what was planned.
    """
    if not record.total_updates:
        return ""
    planned = make_schedule(_saved_optimizer(record.config["optimizer"]), record.total_updates)
    before, now = (float(to_host(rate(jnp.int32(update)))) for rate in (planned, make_schedule(config, total_updates)))
    if math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-6 * config.learning_rate):
        return ""
    return (
        f"the learning rate jumps at step {record.step + 1}: to {now:.3g}, by the schedule of {total_updates:,} "
        f"updates, where {before:.3g} was planned, by that of {record.total_updates:,}"
    )


def _read_newest(checkpoints: pathlib.Path) -> tuple[pathlib.Path, RunRecord] | tuple[None, None]:
    """The newest checkpoint that can be read. Damaged ones are for restore to report."""
    steps = [path for path in checkpoints.glob("*") if path.name.isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
        try:
            verify_checksums(path, ["run/data.json"])
            values = json.loads((path / "run" / "data.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path, parse_record(path, values)
    return None, None


def _compare_models(saved: dict | None, now: dict | None) -> list[str]:
    """``fingerprint_model`` then and now."""
    if saved is None:
        return []
    assert now is not None  # only abstract models have none
    defaults = {"ranks": {}, "dora": False, "quantization": "none"}
    before, after = (defaults | (adapters or {"rank": 0}) for adapters in (saved.get("lora"), now.get("lora")))
    keys = {key: f"model.lora.{key}" for key in ("rank", "alpha", "targets", "ranks", "dora")}
    keys |= {"quantization": "model.quantization"}
    changes = [
        f"{name}: was {before[key]}, is {after[key]}"
        for key, name in keys.items()
        if key in before and key in after and before[key] != after[key]
    ]
    if saved.get("heads") and saved["heads"] != now.get("heads", []):  # older checkpoints do not say
        changes.append(f"heads: were {_name_heads(saved['heads'])}, are {_name_heads(now.get('heads', []))}")
    changes += _compare_new_tokens(saved.get("new_tokens") or {}, now.get("new_tokens") or {})
    files, files_now = saved["files"], now["files"]
    others = [name for name in sorted(files.keys() | files_now.keys()) if files.get(name) != files_now.get(name)]
    return changes + ([f"model.path: other content of {shorten(others, 3)}"] if others else [])


def _name_heads(heads: list[dict]) -> str:
    named = (", ".join(f"{key} {value}" for key, value in head.items()) for head in heads)
    return " and ".join(f"({one})" for one in named) or "none"


def _compare_new_tokens(before: dict, after: dict) -> list[str]:
    if before.get("count", 0) != after.get("count", 0):
        return [f"model.new_tokens: were {before.get('count', 0)}, are {after.get('count', 0)}"]
    if before.get("sha256") != after.get("sha256"):
        return ["model.new_tokens: other tokens, or in another order, or other texts that their rows start from"]
    keys = [key for key in before if before[key] != after.get(key)]
    return [f"model.new_tokens.{key}: was {before[key]}, is {after.get(key)}" for key in keys]


def _saved_optimizer(saved: dict) -> OptimizerConfig:
    """The section of a checkpoint's config."""
    fields = [field.name for field in dataclasses.fields(OptimizerConfig)]
    return OptimizerConfig(**{key: saved[key] for key in fields if key in saved})


def _compare_optimizers(saved: dict, now: OptimizerConfig) -> list[str]:
    """The keys that give the optimizer's state other arrays; all others may change."""
    fields = [field.name for field in dataclasses.fields(OptimizerConfig)]
    before = _saved_optimizer(saved)
    shape = state_structure(before)
    if state_structure(now) == shape:
        return []
    changed = [key for key in fields if getattr(before, key) != getattr(now, key)]
    alone = [
        key for key in changed if state_structure(dataclasses.replace(before, **{key: getattr(now, key)})) != shape
    ]
    return [f"optimizer.{key}: was {getattr(before, key)!r}, is {getattr(now, key)!r}" for key in alone or changed]
