"""The model that a run starts from, for objectives that stay near it.

They need log p of every trained token under it, and nothing else of it. So the reference runs over the rows once,
before the first update, and no second model is in memory while another one trains: ``add_reference_logprobs``. Where
the rows are not known before, what trains is also held as it was at the start: ``hold_reference``.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from postrain.cluster import processes
from postrain.data.batches.in_memory import ExampleSet, iter_documents, iter_eval_batches
from postrain.data.documents import Document, Group
from postrain.errors import UserError
from postrain.files import write_whole
from postrain.models.lora import drop_adapters
from postrain.models.params import merge_params
from postrain.sharding import batch_sharding, data_process, mesh_context, replicated, to_host
from postrain.training.model import Forward, Model
from postrain.training.rows import Extend, place_batch
from postrain.training.session import Session

FIELD = "reference_logprobs"  # of batches, float32 [B, T]; 0 where nothing is trained
HELD = "reference"  # in the frozen parameters: those that train, as they were at the start


def hold_reference(model: Model) -> Model:
    """``model``, which may be abstract, with a copy of its ``params`` frozen as HELD; itself where it has one.

    Adapters are left out: they are new, as a run starts from a whole model, and have no effect yet. Matrices that are
    rounded to the compute dtype wherever they are used are held in it. So the reference is the very model that training
    starts from.
    """
    if HELD in model.frozen:
        return model

    def describe(path, leaf):
        names = [key.key for key in path]
        is_rounded = names[-1] in ("kernel", "embedding") and "router" not in names
        dtype = jnp.dtype(model.config.compute_dtype) if is_rounded else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    params = drop_adapters(model.params)
    held = jax.tree_util.tree_map_with_path(describe, params)
    if not isinstance(jax.tree.leaves(model.params)[0], jax.ShapeDtypeStruct):
        copy = lambda tree: jax.tree.map(lambda x, like: jnp.copy(x).astype(like.dtype), tree, held)
        held = jax.jit(copy, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, held))(params)
    return dataclasses.replace(model, frozen=model.frozen | {HELD: held})


def take_reference(params: dict) -> dict:
    """The tree of the reference out of that of a model from ``hold_reference``: what does not train is shared."""

    def put(tree: dict, held: dict) -> dict:
        inside = lambda key: put(tree[key], held[key]) if isinstance(held[key], dict) else held[key]
        return {key: inside(key) if key in held else value for key, value in tree.items()}

    own = drop_adapters({key: value for key, value in params.items() if key != HELD})
    return put(own, params[HELD])


def add_reference_logprobs(session: Session, model: Model, forward: Forward, rows: ExampleSet) -> Extend:
    """What gives a batch of ``rows`` the array FIELD: log p of its targets under ``model`` as it is now.

    They are read from ``workdir/reference``, or computed and written there: the file's name stands for the starting
    model, its arithmetic and the documents, so another model or other rows have another file. Every process must call
    this, before the model's ``params`` pass to a loop. Raises UserError where the file cannot be written.
    """
    name = _digest(json.dumps([model.fingerprint, str(model.config)], sort_keys=True), rows.examples)
    path = session.workdir / "reference" / f"{name}.npy"
    ends = np.cumsum(rows.lengths)
    values = _read(path, ends[-1])
    everywhere = all(processes.gather(values is not None))
    if values is None or not everywhere:  # a pass that all take part in, whoever sees the file
        session.say(f"reference   log p of {len(rows.examples):,} documents under the starting model, once")
        with processes.stop_all_on_error(), session.watchdog.phase("evaluation"):
            values = _compute(session, model, forward, rows, ends)
            if session.is_lead:
                file = io.BytesIO()
                np.save(file, values)
                write_whole(path, file.getvalue())
            processes.barrier()

    def extend(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = np.zeros(arrays["tokens"].shape, np.float32)
        for i, place in iter_documents(arrays["row_ids"], rows.lengths):
            out[place] = values[ends[i] - rows.lengths[i] : ends[i]]
        return {FIELD: out}

    return extend


def _compute(session: Session, model: Model, forward: Forward, rows: ExampleSet, ends: np.ndarray) -> np.ndarray:
    """float32: of every slot of every document, one after the other."""
    mesh, data = session.mesh, session.config.data
    process, count = data_process(mesh)
    local = data.batch_size // count
    own = slice(process * local, (process + 1) * local)

    def logprobs(params, frozen, batch):
        with mesh_context(mesh):
            return forward.logprobs(merge_params(params, frozen), batch)[0].logprobs.astype(np.float32)

    sharding = batch_sharding(mesh)
    run = jax.jit(logprobs, in_shardings=(None, None, sharding), out_shardings=replicated(mesh))
    values = np.zeros(ends[-1], np.float32)
    for arrays in iter_eval_batches(rows, data):
        found = to_host(run(model.params, model.frozen, place_batch({k: v[own] for k, v in arrays.items()}, mesh)))
        for i, place in iter_documents(arrays["row_ids"], rows.lengths):
            values[ends[i] - rows.lengths[i] : ends[i]] = found[place]
    if not np.isfinite(values).all():
        bad = next(row for row, end in zip(rows.examples, ends, strict=True) if not np.isfinite(values[:end]).all())
        raise UserError(f"{bad.ref}: log p under the starting model is not finite: check it with `postrain verify`")
    return values


def _read(path: pathlib.Path, size: np.int64) -> np.ndarray | None:
    """The values of a file; None where there is none, or one of another size, as a broken disk leaves it."""
    try:
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (size,) and values.dtype == np.float32 else None


def _digest(model: str, documents: Sequence[Document]) -> str:
    found = hashlib.sha256(model.encode())
    for document in documents:
        if isinstance(document, Group) and document.shared_slots is not None:  # the values stand in other slots
            found.update(np.int64(-1 - document.shared_slots).tobytes())
        for sequence in document.sequences:
            found.update(np.int64(len(sequence.tokens)).tobytes())
            found.update(sequence.tokens.astype(np.int32).tobytes())
            found.update(np.packbits(sequence.loss_mask).tobytes())
    return found.hexdigest()[:32]
