"""`postrain teach`: the likeliest next tokens of a teacher for every trained token of a data set, as rows of kind kd.

Rows are rendered as training would, and with each token the K ids that are the teacher's likeliest (``distill.top_k``)
are written to shards of Parquet, which the recipe reads. A shard is computed by itself, from batches that depend on
nothing else: so a command that is killed goes on with the shard it was at, and ends in the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from postrain.config import Config, DistillSection
from postrain.config.rules import has_mixture
from postrain.data.batches.fingerprint import compare_fingerprints
from postrain.data.batches.in_memory import ExampleSet, iter_eval_batches, load_examples
from postrain.data.documents import Rendered, check_token_ids
from postrain.data.other_tools import LEAST_WEIGHT, MOST_WEIGHT
from postrain.data.rendering.tokenizer import Tokenizer, load_run_tokenizer
from postrain.errors import UserError, shorten
from postrain.files import check_local, lock, write_whole
from postrain.hf.config import read_config
from postrain.hf.find_model import locate_model
from postrain.objectives.distill import keep_ids
from postrain.sharding import batch_sharding, make_mesh, mesh_context, replicated, to_host
from postrain.training.model import Forward
from postrain.training.rows import place_batch
from postrain.training.session import format_backends
from postrain.training.teaching.manifest import MANIFEST, Manifest, check_shard, format_low_mass, read_manifest
from postrain.training.teaching.teacher import (
    Teacher,
    check_teacher_backend,
    choose_tokens,
    count_shared_ids,
    load_teacher,
)

DTYPES: dict[str, type[np.floating]] = {"float32": np.float32, "float16": np.float16}
ROW_GROUP = 64  # rows that are read together
REJECTED = "_rejected.jsonl"  # bad rows that were left out; no data of the folder, by its name
_ORDER = ("seed", "shuffle")  # keys of ``data`` that decide nothing: rows are written in the order of their files


class Likeliest(NamedTuple):
    """The likeliest ids at each token of a document, given those before it: zeros where it is not trained."""

    ids: np.ndarray  # int32 [L, K]
    logprobs: np.ndarray  # float32 [L, K], the likeliest first


def teach(
    config: Config,
    output: str | os.PathLike,
    *,
    dtype: str = "float32",
    shard_rows: int = 512,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Writes ``config.data.train``, with the likeliest tokens of ``distill.teacher``, to the folder ``output``.

    Args:
      dtype: of the log-probabilities, of DTYPES. Those of float16 are rounded down, so that they sum to 1 at most.
      shard_rows: documents of a shard, all of which are in memory.

    Raises UserError: no teacher, or one of another tokenizer; keys that teach does not read; rows as ``load_examples``
    has it, or with weights that a row of kind kd cannot have; a folder that holds something else, or what another
    teacher or other rows have made; one that another process is writing.
    """
    folder = pathlib.Path(output)
    check_teach_keys(config)
    check_local(folder, "--output")
    model_folder, mesh = locate_model(config.model.path, weights=False), make_mesh(config.mesh)
    tokenizer = load_run_tokenizer(config, model_folder)
    with _hold(folder):
        teacher = load_teacher(config, tokenizer, mesh)
        vocab_size = count_shared_ids(tokenizer, read_config(model_folder), teacher.config)
        if config.distill.top_k > vocab_size:
            raise UserError(f"config key 'distill.top_k' = {config.distill.top_k}: there are only {vocab_size:,} ids")
        rows, examples = _read_rows(config, tokenizer, teacher, folder, say)
        identity = identify(config, teacher, tokenizer, rows, vocab_size, dtype, shard_rows)
        manifest = _resume(folder, Manifest(identity, {}))
        say(f"teacher     {teacher.checksum}, {config.distill.top_k} of {vocab_size:,} ids a token")
        for line in [*format_backends(teacher.config, mesh), *check_teacher_backend(teacher.config)]:
            say(line)
        run, masses = make_teacher_step(config, teacher, mesh, vocab_size), []
        for number, name in enumerate(manifest.names):
            if name in manifest.shards:
                continue
            part = examples[number * shard_rows : (number + 1) * shard_rows]
            found = compute_shard(run, dataclasses.replace(rows, examples=list(part)), config, mesh)
            content, mass = encode_shard(part, found, DTYPES[dtype]), list_masses(part, found)
            masses.append(mass)
            write_whole(folder / name, content)
            facts = {"rows": len(part), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            listed = manifest.shards | {name: facts}
            manifest = Manifest(identity, {name: listed[name] for name in manifest.names if name in listed})
            manifest.write(folder)
            say(f"{name}  {len(part):,} rows, {len(content):,} bytes, {mass.mean():.1%} of the probability")
        if masses and (warning := format_low_mass(float(np.concatenate(masses).mean()), config.distill.top_k)):
            say(warning)
    return manifest


def _read_rows(
    config: Config, tokenizer: Tokenizer, teacher: Teacher, folder: pathlib.Path, say: Callable[[str], None]
) -> tuple[ExampleSet, list[Rendered]]:
    """The rows and their documents, which are checked; ``say`` is told what was read. Raises as ``teach`` does."""
    rejected: pathlib.Path | None = folder / REJECTED
    if (folder / MANIFEST).exists():
        rejected = None  # the rows of a manifest have their file of bad ones already: no others are written beside them
    else:
        (folder / REJECTED).unlink(missing_ok=True)  # of rows that were read before, of which nothing came
    preparation = choose_tokens(config.distill.tokens)
    rows = load_examples(config.data.train, tokenizer, config.data, rejected, kind="sft", preparation=preparation)
    examples = [one for one in rows.examples if isinstance(one, Rendered)]  # all of them, of this kind
    check_token_ids(rows.examples, teacher.config.vocab_size)
    check_weights(examples)
    say(str(rows.report))
    if unread := list_unread(config):
        say(f"not read    {unread}: by training on these rows")
    if rows.report.total.skipped:
        say(f"rejected    {rows.report.total.skipped:,} bad rows: {folder / REJECTED}")
    return rows, examples


def check_teach_keys(config: Config) -> None:
    """Raises UserError where there is no teacher, or shares of sources, which `postrain teach` cannot write."""
    if config.recipe != "distill" or not config.distill.teacher:
        raise UserError("config key 'distill.teacher' is empty: name the folder of the teacher (and recipe 'distill')")
    if has_mixture(config.data):
        raise UserError(
            "config key 'data.train': `postrain teach` writes every row once, and weights, 'max_epochs' and "
            "'data.mixture' are read when the rows are trained on: leave them out here, and give them to "
            "`postrain train`, with a folder for each source"
        )


def list_unread(config: Config) -> str:
    """Keys that are set, and that only training reads: the rows are for any loss."""
    section, default = config.distill, DistillSection()
    keys = [key for key in ("loss", "beta", "skew", "nll_coef") if getattr(section, key) != getattr(default, key)]
    return ", ".join(f"distill.{key}" for key in keys)


def check_weights(rows: Sequence[Rendered]) -> None:
    """Raises UserError for a weight, a product of row and source, that reading the row again would refuse."""
    for row in rows:
        if not LEAST_WEIGHT <= row.weight <= MOST_WEIGHT:
            raise UserError(
                f"{row.ref}: its weight times its source's 'loss_weight' is {row.weight:g}, expected {LEAST_WEIGHT:g} "
                f"to {MOST_WEIGHT:g}: scale the weights of the rows, or the source's"
            )


def identify(
    config: Config,
    teacher: Teacher,
    tokenizer: Tokenizer,
    rows: ExampleSet,
    vocab_size: int,
    dtype: str,
    shard_rows: int,
) -> dict[str, Any]:
    """What decides the bytes of the folder, for its manifest."""
    data = {key: value for key, value in rows.fingerprint["data"].items() if key not in _ORDER}
    return {
        "teacher": teacher.checksum,
        "compute_dtype": teacher.config.compute_dtype,
        "vocabulary": tokenizer.digest_vocabulary(),
        "vocab_size": vocab_size,
        "data": json.loads(json.dumps(rows.fingerprint | {"data": data})),  # as it is read again
        "top_k": config.distill.top_k,
        "temperature": config.distill.temperature,
        "dtype": dtype,
        "rows": len(rows.examples),
        "shard_rows": shard_rows,
    }


@contextlib.contextmanager
def _hold(folder: pathlib.Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone."""
    is_own = lambda name: name[0] == "." or name == REJECTED or name.endswith(".partial")  # what a kill may leave
    if folder.is_dir() and not (folder / MANIFEST).exists() and not all(is_own(p.name) for p in folder.iterdir()):
        raise UserError(f"--output {folder} holds files and no {MANIFEST}: expected a new folder, or one of `teach`")
    try:
        with lock(folder / ".lock", wait=False):
            yield
    except BlockingIOError as error:
        raise UserError(f"--output {folder}: another process is writing it: wait for it") from error
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): choose another place") from error


def _resume(folder: pathlib.Path, new: Manifest) -> Manifest:
    """``new`` with the shards that are there, whole, of the same rows and teacher; written where there was none."""
    old = read_manifest(folder)
    if old is None:
        new.write(folder)
        return new
    changes = [
        f"{key} was {old.identity[key]!s:.40}, is {value!s:.40}"
        for key, value in new.identity.items()
        if key != "data" and old.identity[key] != value
    ]
    changes += compare_fingerprints(old.identity["data"], new.identity["data"])
    if changes:
        raise UserError(
            f"{folder / MANIFEST}: the rows there are others ({shorten(changes, 4, '; ')}): use another --output, or "
            "remove it"
        )

    def is_whole(name: str, facts: dict[str, Any]) -> bool:
        path = folder / name
        return not check_shard(str(path), path.stat().st_size if path.is_file() else None, facts)

    return Manifest(new.identity, {name: facts for name, facts in old.shards.items() if is_whole(name, facts)})


def make_teacher_step(config: Config, teacher: Teacher, mesh, vocab_size: int) -> Callable:
    """Jitted ``batch -> (ids int32 [B, T, K], log-probabilities float32 [B, T, K])`` of the targets, where trained."""
    forward, section = Forward(teacher.config, chunk=config.model.loss_chunk), config.distill

    def of_chunk(logits, rows, shared):
        log_p = jax.nn.log_softmax(keep_ids(logits, vocab_size) / section.temperature)
        values, ids = jax.lax.top_k(log_p, section.top_k)
        return ids, values.astype(jnp.float32)

    def step(params, batch):
        with mesh_context(mesh):
            return forward.map_logits(params, batch, of_chunk)[0]

    run = jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
    return lambda batch: run(teacher.params, batch)


def compute_shard(run: Callable, rows: ExampleSet, config: Config, mesh) -> list[Likeliest]:
    """The likeliest ids of the teacher in each of ``rows``. Raises UserError where log p is not finite."""
    size = config.distill.top_k
    found = [
        Likeliest(np.zeros((row.num_tokens, size), np.int32), np.zeros((row.num_tokens, size), np.float32))
        for row in rows.examples
    ]
    for arrays in iter_eval_batches(rows, config.data):
        ids, logprobs = (to_host(x) for x in run(place_batch(arrays, mesh)))
        for b, documents in enumerate(arrays["row_ids"]):
            start = 0
            for i in documents[documents >= 0]:
                stop = start + rows.examples[i].slots  # a slot holds the distribution of the token after it
                found[i].ids[1:], found[i].logprobs[1:] = ids[b, start:stop], logprobs[b, start:stop]
                start = stop
    for row, (_, logprobs) in zip(rows.examples, found, strict=True):
        if not np.isfinite(logprobs).all():
            raise UserError(f"{row.ref}: the teacher's log p is not finite: check it with `postrain verify`")
    return found


def list_masses(rows: Sequence[Rendered], likeliest: Sequence[Likeliest]) -> np.ndarray:
    """The teacher's probability of the K ids at each trained token of the rows, float64 [N]."""
    pairs = zip(rows, likeliest, strict=True)
    masses = [np.exp(found.logprobs[row.loss_mask], dtype=np.float64).sum(1) for row, found in pairs]
    return np.concatenate(masses)


def encode_shard(rows: Sequence[Rendered], likeliest: Sequence[Likeliest], dtype: type[np.floating]) -> bytes:
    """Rows of kind kd as a Parquet file, the same bytes each time."""

    def to_table(arrays: Sequence[np.ndarray]) -> pa.Array:
        ends, flat = np.cumsum([0, *map(len, arrays)]), np.concatenate(arrays)
        return pa.ListArray.from_arrays(
            pa.array(ends, pa.int32()), pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        )

    logprobs = [found.logprobs for found in likeliest]
    if dtype is np.float16:
        logprobs = [round_down(values) for values in logprobs]
    columns = {
        "tokens": pa.array([row.tokens.astype(np.int32) for row in rows], pa.list_(pa.int32())),
        "loss_mask": pa.array([row.loss_mask.astype(np.int8) for row in rows], pa.list_(pa.int8())),
        "top_ids": to_table([found.ids for found in likeliest]),
        "top_logprobs": to_table(logprobs),
        "weight": pa.array([row.weight for row in rows], pa.float64()),
    }
    if any(row.weights is not None for row in rows):
        columns["weights"] = pa.array([row.weights for row in rows], pa.list_(pa.float32()))
    file = io.BytesIO()
    options = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False}
    pq.write_table(pa.table(columns), file, row_group_size=ROW_GROUP, **options)
    return file.getvalue()


def round_down(values: np.ndarray) -> np.ndarray:
    """In float16, at most ``values``; those below all its numbers are the least of them: their probability is 0."""
    least = np.finfo(np.float16).min
    near = np.maximum(values, least).astype(np.float16)
    return np.where(near > values, np.nextafter(near, least), near)
