"""From a train state to the folder that users take away."""

import json
import os
import pathlib

import jax

from postrain.compute.build import Model, load_model
from postrain.compute.checkpoint import Checkpointer, fingerprint_model
from postrain.compute.optimizer import make_optimizer
from postrain.compute.step import abstract_train_state
from postrain.compute.workdir import read_config
from postrain.config import MeshConfig
from postrain.errors import UserError
from postrain.hf.fetch import locate_model
from postrain.hf.peft import save_adapter
from postrain.hf.save import save_pretrained
from postrain.models.params import merge_lora, merge_params
from postrain.sharding import make_mesh
from postrain.types import TrainState


def export_state(
    folder: str | os.PathLike,
    state: TrainState,
    model: Model,
    *,
    source_folder: str | os.PathLike,
    format: str,
    dtype: str,
) -> None:
    """Writes the trained model; the moving average where the run keeps one.

    ``format``: "merged", a Hugging Face folder with adapters added into their matrices, or "adapter", a PEFT folder.
    ``source_folder`` is what the model was loaded from. Raises UserError when the folder cannot be written.
    """
    params = state.params if state.ema is None else state.ema
    if format == "adapter":
        save_adapter(folder, params, model.config, base_folder=source_folder)
        return
    tree = merge_params(params, state.frozen)
    if model.config.lora is not None:
        tree = jax.jit(lambda tree: merge_lora(tree, model.config))(tree)
    save_pretrained(folder, tree, model.config, source_folder=source_folder, dtype=dtype)


def export_workdir(
    workdir: str | os.PathLike, output: str | os.PathLike, format: str | None = None, step: int | None = None
) -> str:
    """Writes a checkpoint of a run, that of ``step`` or the newest; returns a line that says what was written."""
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    format = format or config.export.format
    if format == "none":
        raise UserError(f"{workdir}: the run's export.format is 'none': add --format merged or --format adapter")
    if format == "adapter" and not config.model.lora.rank:
        raise UserError(f"{workdir}: the run trained every parameter, there is no adapter: use --format merged")
    mesh = make_mesh(MeshConfig(fsdp=-1))  # the devices that there are: they need not be those of the run
    folder = locate_model(config.model.path)
    model = load_model(config, folder, mesh)
    optimizer, _ = make_optimizer(config.optimizer, 1 + config.optimizer.warmup_steps + config.optimizer.decay_steps)
    abstract = abstract_train_state(
        model.params, model.frozen, optimizer, mesh=mesh, ema=config.optimizer.ema_decay > 0
    )
    with Checkpointer(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpointer:
        step = checkpointer.latest_step() if step is None else checkpointer.find_step(step)
        if step is None:
            raise UserError(f"{workdir}: no finished checkpoint in it, expected one in {workdir / 'checkpoints'}")
        saved = json.loads((workdir / "checkpoints" / str(step) / "run" / "data.json").read_text(encoding="utf-8"))
        restored = checkpointer.restore(
            abstract, fingerprint=saved["fingerprint"], base_fingerprint=fingerprint_base(model, folder), step=step
        )
    state = restored.state.replace(frozen=model.frozen)
    export_state(output, state, model, source_folder=folder, format=format, dtype=config.export.dtype)
    return f"wrote step {step} of {workdir} to {output} ({format})"


def fingerprint_base(model: Model, folder: str | os.PathLike) -> dict | None:
    """Of the model folder and the adapters: what checkpoints hold only a part of, or its training result."""
    return fingerprint_model(folder, model.config.lora)
