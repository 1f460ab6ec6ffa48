"""From a train state to the folder that users take away.

What is written is read back and must give the logits of the weights in memory before it takes its place, or of a
classifier the scores: does an export compute what the trained weights compute? One short row of tokens goes through
both. Exports have gone wrong unseen in many libraries: merges without effect, layers left out, transposed matrices.
Rounding to the file's dtype changes more than a small fine-tune does, so it is not part of any comparison: the merge is
checked before the weights are rounded, the files against the rounded weights.
"""

import dataclasses
import functools
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from postrain.checkpoint.checkpointer import Checkpointer
from postrain.config import Config, MeshConfig, check_paths
from postrain.data.rendering.tokenizer import Tokenizer, load_run_tokenizer
from postrain.errors import UserError
from postrain.files import check_local
from postrain.hf.classifier import SCORE, load_trunk, open_trunk, read_trunk, save_classifier
from postrain.hf.find_model import locate_model
from postrain.hf.folders import check_replaceable, staged_folder
from postrain.hf.load import load_pretrained, make_reader, place
from postrain.hf.peft.adapter import load_adapter, save_adapter
from postrain.hf.save import save_pretrained
from postrain.hf.tensors import DTYPES, TensorFiles
from postrain.hf.tree import list_entries, list_tensors
from postrain.models.config import ModelConfig
from postrain.models.heads import HeadConfig, apply_head
from postrain.models.lora import merge_lora
from postrain.models.params import merge_params
from postrain.models.quantized import dequantize_params
from postrain.models.transformer import compute_hidden, compute_logits
from postrain.report.workdir import read_config
from postrain.sharding import make_mesh, mesh_context, num_row_shards, replicated, to_host
from postrain.training.compatibility import check_record
from postrain.training.model import Model, is_classifier, load_model, name_classes
from postrain.training.optimizer import make_optimizer
from postrain.training.reference import HELD
from postrain.training.session import Session
from postrain.training.step import abstract_train_state
from postrain.trees import flatten, unflatten
from postrain.types import TrainState

LENGTH = 16  # tokens of a row
# Root mean square of the difference, in standard deviations of the logits: the order of float32 sums gives 1e-6 of it,
# a wrong tensor about 1.
TOLERANCE = 1e-3
Dtypes = dict[str, tuple[np.dtype, ...]]  # parameter's path -> the dtypes of its tensors in the files, one a layer


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

    Returns lines that say how much of the training the files do not keep, by their dtype or as a head, "" where they
    keep all.

    ``format``: "merged", a Hugging Face folder with adapters added into their matrices, or "adapter", a PEFT folder;
    None: ``config.export.format``. ``source_folder``: the model was loaded from it. Every process must call this.
    Raises UserError when the folder cannot be written, or when the written files give other logits than the weights in
    memory: they are deleted then, and an older model in that place stays.
    """
    if os.path.realpath(folder) == os.path.realpath(source_folder):
        raise UserError(f"{folder}: is the folder that the model was loaded from: export to another one")
    params = state.params if state.ema is None else state.ema
    frozen = {key: value for key, value in state.frozen.items() if key != HELD}
    heads, left_out = model.heads, ""
    if heads and model.projects:  # a language model's folder has no place for them, and generating needs none
        names, heads = ", ".join(head.name for head in heads), ()
        params = {key: value for key, value in params.items() if key != "heads"}
        left_out = f"export      without the head {names!r}, which stays in the checkpoints"
    trained_on = (model.fingerprint or {}).get("trained_on", "")
    target = _Target(os.fspath(folder), config, model.config, mesh, source_folder, tokenizer, heads, trained_on)
    write = _write_adapter if (format or config.export.format) == "adapter" else _write_merged
    with staged_folder(folder, lead=jax.process_index() == 0) as staged:
        note = write(staged, params, frozen, target)
        if jax.process_count() > 1:  # not moved before every process has read it
            multihost_utils.sync_global_devices("export checked")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export in place")
    return "\n".join(filter(None, (note, left_out)))


class _Target(NamedTuple):
    """Where an export goes and what it is made of, without the weights."""

    name: str  # of the folder, in errors
    config: Config
    model_config: ModelConfig
    mesh: Mesh
    source_folder: str | os.PathLike
    tokenizer: Tokenizer
    heads: tuple[HeadConfig, ...]
    trained_on: str  # of a classifier, as ``hf.classifier.Trunk`` has it


def _write_adapter(staged: pathlib.Path, params, frozen, target: _Target) -> str:
    """Writes the PEFT folder and checks it. Returns "": the files are float32, nothing is rounded."""
    # The base is the same on both sides: only the adapter can tell them apart.
    expected = compute_probe_logits(merge_params(params, frozen), target.model_config, target.mesh)
    save_adapter(
        staged,
        params,
        target.model_config,
        base_folder=target.source_folder,
        base_name=target.config.model.path,
        tokenizer=target.tokenizer,
    )
    config, adapter = load_adapter(staged, target.model_config, base_folder=target.source_folder, mesh=target.mesh)
    found = compute_probe_logits(merge_params(adapter, frozen), config, target.mesh)
    check_logits(found, expected, target.name, "the files'", "the trained model")
    return ""


def _write_merged(staged: pathlib.Path, params, frozen, target: _Target) -> str:
    """Writes the Hugging Face folder and checks it. Returns a line about its rounding, "" where nothing is lost."""
    base, source, heads = frozen, target.source_folder, target.heads
    load = load_trunk if heads else load_pretrained
    compute = functools.partial(compute_probe_logits, config=target.model_config, mesh=target.mesh, heads=heads)
    if frozen:
        # The frozen base is rounded to the compute dtype, which must not reach the export. Its quantisation must: the
        # adapters were trained on those numbers.
        kind, vocab_size = target.model_config.quantization, target.model_config.vocab_size
        _, base = load(source, mesh=target.mesh, dtype="float32", vocab_size=vocab_size, quantization=kind)
        base.pop("heads", None)  # of a classifier: they have been trained on
    tree = merge_params(params, base)
    if frozen:
        expected = compute(tree)
        trained_heads = {"heads": params["heads"]} if heads else {}
        tree, base = None, dequantize_params(base, "float32")
        tree = _merge(base, params, target.model_config) | trained_heads
        found = compute(tree)
        check_logits(found, expected, target.name, "the merged weights'", "the base with its adapters")
    options = {"source_folder": source, "dtype": target.config.export.dtype, "tokenizer": target.tokenizer}
    if heads:
        head = dataclasses.replace(heads[0], position="last")
        named = {"labels": name_classes(target.config), "trained_on": target.trained_on}
        save_classifier(staged, tree, target.model_config, head, **named, **options)
    else:
        save_pretrained(staged, tree, target.model_config, **options)
    dtypes = find_dtypes(staged, target.model_config)
    if target.model_config.quantization == "none":
        note = format_rounding(tree, source, dtypes, target.model_config, target.mesh)
    else:
        kind = target.model_config.quantization
        note = f"export      merged into the base as {kind} holds it, with which the adapters were trained"
    tree, base = round_params(tree, dtypes), None
    expected = compute(tree)
    del tree
    # In the dtype in which the folder reads back unchanged: its own where it has a single one, else float32.
    kinds = {_on_device(dtype).name for layers in dtypes.values() for dtype in layers}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"
    config, loaded = load(staged, mesh=target.mesh, dtype=dtype)
    found = compute_probe_logits(loaded, config, target.mesh, heads)
    check_logits(found, expected, target.name, "the files'", "the trained weights")
    return note


def _merge(base: dict, adapters: dict, config: ModelConfig) -> dict:
    """``base`` with the adapters added, matrix by matrix in its own memory: ``base`` is used up."""
    for adapter, name in (("lora_a", "kernel"), ("new_rows", "embedding")):
        if adapter in adapters:
            return base | {name: _merge_array(name, base[name], adapters, config)}
    return {key: _merge(value, adapters[key], config) if key in adapters else value for key, value in base.items()}


@functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=1)
def _merge_array(name, array, adapters, config):
    return merge_lora({name: array} | adapters, config)[name]


def export_workdir(
    workdir: str | os.PathLike, output: str | os.PathLike, format: str | None = None, step: int | None = None
) -> str:
    """Writes a checkpoint of a run, that of ``step`` or the newest; returns a line about it."""
    check_local(workdir, "--workdir")
    check_local(output, "--output")
    workdir = pathlib.Path(workdir)
    config = read_config(workdir)
    format = format or config.export.format
    if format == "none":
        raise UserError(f"{workdir}: the run's export.format is 'none': add --format merged or --format adapter")
    if format == "adapter" and is_classifier(config):
        raise UserError(f"{workdir}: a reward model is exported whole, with its head: use --format merged")
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
    model.fingerprint = restored.record.model_fingerprint  # with the form of the rows
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


# Does the export compute what the weights do?


def compute_probe_logits(
    params: dict, config: ModelConfig, mesh: Mesh, heads: tuple[HeadConfig, ...] = ()
) -> np.ndarray:
    """float32 logits [B, 16, V] of fixed random tokens, computed in float32, on every host; B as few as ``mesh`` takes.

    With ``heads`` the outputs [B, 16, K] of the only one, in place of logits.
    Every other token is from the end of the vocabulary, where new tokens are. ``params``: the whole tree, with or
    without adapters.
    """
    rng, shape = np.random.default_rng(0), (num_row_shards(mesh), LENGTH)
    tokens = rng.integers(0, config.vocab_size, shape, np.int32)
    tokens[:, ::2] = config.vocab_size - 1 - rng.integers(0, min(config.vocab_size, LENGTH), shape, np.int32)[:, ::2]
    config = dataclasses.replace(config, compute_dtype="float32", remat="none", fp8=False)
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        logits = _make_probe(mesh, config, heads)(params, tokens)
    return to_host(logits)


@functools.cache
def _make_probe(mesh: Mesh, config: ModelConfig, heads: tuple[HeadConfig, ...]):
    def probe(params, tokens_BT):
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
        with mesh_context(mesh):
            hidden = compute_hidden(params, config, tokens_BT, np.ones(tokens_BT.shape, np.int32), positions_BT)
            if heads:
                return apply_head(params, heads[0], hidden)
            return compute_logits(params, config, hidden)[..., : config.vocab_size]

    return jax.jit(probe, out_shardings=replicated(mesh))


def check_logits(found: np.ndarray, expected: np.ndarray, name: str, owner: str, reference: str) -> None:
    """Raises UserError unless the logits are equal up to the order of float32 sums.

    ``owner`` and ``reference``: whose logits ``found`` and ``expected`` are; ``name``: of the export, in the message.
    """
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    error, scale = float(np.sqrt(np.mean((found - expected) ** 2))), float(expected.std())
    if not error <= TOLERANCE * scale:
        raise UserError(
            f"{name}: {owner} logits differ from those of {reference} by {error / (scale or 1):.1e} of their spread, "
            f"expected at most {TOLERANCE:g}: the export was deleted"
        )


def find_dtypes(folder: str | os.PathLike, config: ModelConfig) -> Dtypes:
    """The dtypes in a Hugging Face folder; all experts of a layer are assumed to have the same."""
    infos, found = TensorFiles(folder).infos, {}
    trunk = read_trunk(folder)
    if trunk.labels:
        found[SCORE.param] = [DTYPES[infos[SCORE.name].dtype]]
    for tensor in list_tensors(config, trunk.family):
        if not tensor.expert:
            for entry in tensor.entries:
                found.setdefault(entry.param, []).append(DTYPES[infos[tensor.name].dtype])
    return {param: tuple(dtypes) for param, dtypes in found.items()}


def round_params(params: dict, dtypes: Dtypes) -> dict:
    """``params`` as the files hold them, each in its files' dtype, or in float32 where its layers have several."""
    return unflatten({path: _round(leaf, dtypes[path]) for path, leaf in flatten(params).items()})


def _round(leaf: jax.Array, dtypes: tuple[np.dtype, ...]) -> jax.Array:
    """Not jitted: XLA may leave out a rounding whose result goes straight back to float32."""
    if len(set(dtypes)) == 1:
        return leaf.astype(_on_device(dtypes[0]))
    rounded = leaf.astype(jnp.float32)
    for dtype in sorted(set(dtypes), key=str):
        own = np.array([other == dtype for other in dtypes]).reshape(-1, *[1] * (leaf.ndim - 1))
        rounded = jnp.where(own, leaf.astype(_on_device(dtype)).astype(jnp.float32), rounded)
    return rounded


def _on_device(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def format_rounding(params: dict, source_folder: str | os.PathLike, dtypes: Dtypes, config: ModelConfig, mesh) -> str:
    """A line about the share of changed weights that stay changed in the files' dtypes; "" where all changed ones do.

    A weight that moved by less than half the distance between two numbers of a dtype is rounded back to its old value:
    bfloat16 has 8 bits of precision, so at the learning rates of full fine-tuning that happens to most weights. Every
    process must call this.
    """
    narrow = sorted({dtype.name for kinds in dtypes.values() for dtype in kinds if dtype.itemsize < 4})
    if not narrow:
        return ""
    files, trunk = open_trunk(source_folder)
    source_config = trunk.config  # its vocabulary may be smaller: new rows count as changed
    entries = list_entries(config, trunk.family)
    leaves, num_changed, num_preserved = flatten(params), 0, 0
    for entry, spec in entries:
        leaf, read = leaves[entry.param], make_reader(files, entry, spec, source_config, np.dtype(np.float32))
        # One layer at a time: the whole source need not fit in memory beside the trained weights.
        rows = 1 if entry.per_layer else spec.shape[0]
        one = dataclasses.replace(spec, shape=(rows, *spec.shape[1:]))
        for layer, dtype in enumerate(dtypes[entry.param]):
            source = place(functools.partial(_read_rows, read, layer, rows), one, mesh)
            trained = jax.lax.dynamic_slice_in_dim(leaf, layer, rows)
            moved = trained != source
            num_changed += _count(moved)
            num_preserved += _count(moved & (_round(trained, (dtype,)) != _round(source, (dtype,))))
    if num_preserved == num_changed:
        return ""
    verb = "keeps" if len(narrow) == 1 else "keep"
    share = f"{num_preserved / num_changed:.1%}"
    line = f"export      {' and '.join(narrow)} {verb} the update in {share} of the changed weights"
    return line + (": export.dtype=float32 would keep it in all" if num_preserved < num_changed / 2 else "")


def _read_rows(read, first: int, rows: int, index: tuple[slice, ...]) -> np.ndarray:
    """``read`` of an index into the ``rows`` rows from ``first``."""
    start, stop, _ = index[0].indices(rows)
    return read((slice(first + start, first + stop), *index[1:]))


def _count(mask: jax.Array) -> int:
    """Of true entries. Counted row by row: a matrix may have more entries than int32 holds."""
    return int(to_host(jnp.count_nonzero(mask, axis=tuple(range(2, mask.ndim)))).sum(dtype=np.int64))
