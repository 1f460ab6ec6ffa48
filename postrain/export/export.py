"""From a train state to the folder that users take away.

What is written is read back and must give the logits of the weights in memory before it takes its place.
"""

import functools
import os
import pathlib
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from postrain.checkpoint.checkpointer import Checkpointer
from postrain.config import Config, MeshConfig, check_paths
from postrain.data.rendering.tokenizer import Tokenizer, load_run_tokenizer
from postrain.errors import UserError
from postrain.export.check import (
    check_logits,
    choose_load_dtype,
    compute_probe_logits,
    describe_rounding,
    find_dtypes,
    round_params,
)
from postrain.files import check_local
from postrain.hf.folders import check_replaceable, staged_folder
from postrain.hf.hub import locate_model
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_adapter, save_adapter
from postrain.hf.save import save_pretrained
from postrain.models.config import ModelConfig
from postrain.models.lora import merge_lora
from postrain.models.params import merge_params
from postrain.models.quantized import dequantize_params
from postrain.report.workdir import read_config
from postrain.sharding import make_mesh
from postrain.training.compatibility import check_record
from postrain.training.model import Model, load_model
from postrain.training.optimizer import make_optimizer
from postrain.training.session import Session
from postrain.training.step import abstract_train_state
from postrain.types import TrainState


def export_state(session: Session, state: TrainState, model: Model) -> None:
    """Writes the trained model to ``workdir/export`` as ``config.export`` says, and says what rounding it lost.

    Every process must call it. Raises UserError as ``write_export`` does.
    """
    config = session.config
    if config.export.format == "none":
        return
    with session.watchdog.phase("export"):
        note = write_export(
            session.workdir / "export",
            state,
            model,
            config,
            mesh=session.mesh,
            source_folder=session.model_folder,
            tokenizer=session.tokenizer,
        )
    if note:
        session.say(note)


def write_export(
    folder: str | os.PathLike,
    state: TrainState,
    model: Model,
    config: Config,
    *,
    mesh: Mesh,
    source_folder: str | os.PathLike,
    tokenizer: Tokenizer,
    format: str | None = None,
) -> str:
    """Writes the trained model, the moving average where the run keeps one, with the tokenizer of the run.

    Returns a line that says how much of the training the dtype of the files keeps, "" where it keeps all.

    ``format``: "merged", a Hugging Face folder with adapters added into their matrices, or "adapter", a PEFT folder;
    None: ``config.export.format``. ``source_folder`` is what the model was loaded from. Every process must call it.
    Raises UserError when the folder cannot be written, or when what was written gives other logits than the weights
    in memory: nothing is left then, and an older model in that place stays.
    """
    if os.path.realpath(folder) == os.path.realpath(source_folder):
        raise UserError(f"{folder}: is the folder that the model was loaded from: export to another one")
    params = state.params if state.ema is None else state.ema
    run = _Run(os.fspath(folder), config, model.config, mesh, source_folder, tokenizer)
    write = _write_adapter if (format or config.export.format) == "adapter" else _write_merged
    with staged_folder(folder, lead=jax.process_index() == 0) as staged:
        note = write(staged, params, state.frozen, run)
        if jax.process_count() > 1:  # not moved before every process has read it
            multihost_utils.sync_global_devices("export checked")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export in place")
    return note


class _Run(NamedTuple):
    """What an export needs besides the weights."""

    name: str  # in errors
    config: Config
    model_config: ModelConfig
    mesh: Mesh
    source_folder: str | os.PathLike
    tokenizer: Tokenizer


def _write_adapter(staged: pathlib.Path, params, frozen, run: _Run) -> str:
    """Writes the PEFT folder and checks it; float32, so there is nothing to tell."""
    # The base is the same on both sides: only the adapter can tell them apart.
    expected = compute_probe_logits(merge_params(params, frozen), run.model_config, run.mesh)
    save_adapter(
        staged,
        params,
        run.model_config,
        base_folder=run.source_folder,
        base_name=run.config.model.path,
        tokenizer=run.tokenizer,
    )
    config, adapter = load_adapter(staged, run.model_config, base_folder=run.source_folder, mesh=run.mesh)
    found = compute_probe_logits(merge_params(adapter, frozen), config, run.mesh)
    check_logits(found, expected, run.name, "the files'", "the trained model")
    return ""


def _write_merged(staged: pathlib.Path, params, frozen, run: _Run) -> str:
    """Writes the Hugging Face folder and checks it. Returns what there is to tell of its rounding."""
    base, source = frozen, run.source_folder
    if frozen:
        # The base that trained is rounded to the compute dtype, which must not reach the export. How it is quantised
        # must: the adapters are made for those numbers.
        kind, vocab_size = run.model_config.quantization, run.model_config.vocab_size
        _, base = load_pretrained(source, mesh=run.mesh, dtype="float32", vocab_size=vocab_size, quantization=kind)
    tree = merge_params(params, base)
    if frozen:
        expected = compute_probe_logits(tree, run.model_config, run.mesh)
        tree, base = None, dequantize_params(base, "float32")
        tree = _merge(base, params, run.model_config)
        found = compute_probe_logits(tree, run.model_config, run.mesh)
        check_logits(found, expected, run.name, "the merged weights'", "the base with its adapters")
    save_pretrained(
        staged, tree, run.model_config, source_folder=source, dtype=run.config.export.dtype, tokenizer=run.tokenizer
    )
    dtypes = find_dtypes(staged, run.model_config)
    if run.model_config.quantization == "none":
        note = describe_rounding(tree, source, dtypes, run.model_config, run.mesh)
    else:
        note = f"export      merged into the base as {run.model_config.quantization} has it, which is what was trained"
    tree, base = round_params(tree, dtypes), None
    expected = compute_probe_logits(tree, run.model_config, run.mesh)
    del tree
    config, loaded = load_pretrained(staged, mesh=run.mesh, dtype=choose_load_dtype(dtypes))
    found = compute_probe_logits(loaded, config, run.mesh)
    check_logits(found, expected, run.name, "the files'", "the trained weights")
    return note


def _merge(base: dict, adapters: dict, config: ModelConfig) -> dict:
    """``base`` with the adapters added, matrix by matrix in its own memory: ``base`` is used up."""
    if "lora_a" in adapters:
        return base | {"kernel": _merge_kernel(base["kernel"], adapters, config)}
    if "new_rows" in adapters:
        return base | {"embedding": _merge_rows(base["embedding"], adapters, config)}
    return {key: _merge(value, adapters[key], config) if key in adapters else value for key, value in base.items()}


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _merge_kernel(kernel, adapters, config):
    return merge_lora({"kernel": kernel} | adapters, config)["kernel"]


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _merge_rows(embedding, adapters, config):
    return merge_lora({"embedding": embedding} | adapters, config)["embedding"]


def export_workdir(
    workdir: str | os.PathLike, output: str | os.PathLike, format: str | None = None, step: int | None = None
) -> str:
    """Writes a checkpoint of a run, that of ``step`` or the newest; returns a line that says what was written."""
    check_local(workdir, "--workdir")
    check_local(output, "--output")
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    format = format or config.export.format
    if format == "none":
        raise UserError(f"{workdir}: the run's export.format is 'none': add --format merged or --format adapter")
    if format == "adapter" and not config.model.lora.rank:
        raise UserError(f"{workdir}: the run trained every parameter, there is no adapter: use --format merged")
    check_output(workdir, output)
    check_paths(config)
    mesh = make_mesh(MeshConfig(fsdp=-1))  # the devices that there are: they need not be those of the run
    folder = locate_model(config.model.path)
    tokenizer = load_run_tokenizer(config, folder)
    model = load_model(config, folder, mesh)
    optimizer, _ = make_optimizer(config.optimizer, 1)
    abstract = abstract_train_state(
        model.params, model.frozen, optimizer, mesh=mesh, ema=config.optimizer.ema_decay > 0
    )
    with Checkpointer(workdir / "checkpoints", config.checkpoint, read_only=True) as checkpointer:
        step = checkpointer.latest_step() if step is None else checkpointer.find_step(step)
        if step is None:
            raise UserError(f"{workdir}: no finished checkpoint in it, expected one in {workdir / 'checkpoints'}")
        check = lambda where, record: check_record(where, record, config, None, model.fingerprint, "be exported")
        restored = checkpointer.restore(abstract, check, step=step)
    state = restored.state.replace(frozen=model.frozen)
    model.params = None  # where the run started: not needed, and as large as the state
    note = write_export(
        output, state, model, config, mesh=mesh, source_folder=folder, tokenizer=tokenizer, format=format
    )
    return f"wrote step {step} of {workdir} to {output} ({format})" + (f"\n{note}" if note else "")


def check_output(workdir: pathlib.Path, output: str | os.PathLike) -> None:
    """Raises UserError when writing to ``output`` would put anything of the run at risk."""
    run, place = pathlib.Path(os.path.realpath(workdir)), pathlib.Path(os.path.realpath(output))
    if run.is_relative_to(place):
        raise UserError(f"--output {output}: is or contains the run {workdir}: choose another folder")
    if place.is_relative_to(run / "checkpoints"):
        raise UserError(f"--output {output}: lies among the checkpoints of {workdir}: choose another folder")
    check_replaceable(output)
