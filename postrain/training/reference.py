"""Log-probabilities of the model that a run starts from, computed once and kept beside the run.

An objective that stays near a reference needs log p of every trained token under it, and nothing else of it. So the
reference runs over the rows once, before the first update, and no second model is in memory while another one trains.
"""

import hashlib
import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from postrain.cluster import processes
from postrain.data.batches.in_memory import ExampleSet, iter_eval_batches
from postrain.data.documents import Document, Group
from postrain.errors import UserError
from postrain.files import write_whole
from postrain.models.params import merge_params
from postrain.sharding import batch_sharding, data_process, mesh_context, replicated, to_host
from postrain.training.model import Forward, Model
from postrain.training.rows import Extend, place_batch
from postrain.training.session import Session

FIELD = "reference_logprobs"  # of batches, float32 [B, T]; 0 where nothing is trained


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
        for row, documents in zip(out, arrays["row_ids"], strict=True):
            start = 0
            for i in documents[documents >= 0]:
                own = values[ends[i] - rows.lengths[i] : ends[i]]
                row[start : start + len(own)] = own
                start += len(own)
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
        for row, documents in zip(found, arrays["row_ids"], strict=True):
            start = 0
            for i in documents[documents >= 0]:
                length = rows.lengths[i]
                values[ends[i] - length : ends[i]] = row[start : start + length]
                start += length
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
