"""Does an export compute what the trained weights compute? One short row of tokens through both.

Exports have gone wrong unseen in many libraries: merges without effect, layers left out, transposed matrices. Rounding
to the file's dtype changes more than a small fine-tune does, so it is not part of any comparison: the merge is checked
before the weights are rounded, the files against the rounded weights.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from postrain.errors import UserError
from postrain.hf.config import read_config, read_family
from postrain.hf.load import make_reader, open_checked, place
from postrain.hf.tensors import DTYPES, TensorFiles
from postrain.hf.tree import list_entries, list_tensors
from postrain.models.config import ModelConfig
from postrain.models.transformer import compute_hidden, compute_logits
from postrain.sharding import mesh_context, num_row_shards, replicated, to_host
from postrain.trees import flatten, unflatten

LENGTH = 16  # tokens of a row
# Root mean square of the difference, in standard deviations of the logits: the order of float32 sums gives 1e-6 of it,
# a wrong tensor about 1.
TOLERANCE = 1e-3
Dtypes = dict[str, tuple[np.dtype, ...]]  # parameter's path -> the dtypes of its tensors in the files, one a layer


def compute_probe_logits(params: dict, config: ModelConfig, mesh: Mesh) -> np.ndarray:
    """float32 logits [B, 16, V] of fixed random tokens, computed in float32, on every host; B as few as ``mesh`` takes.

    Every other token is from the end of the vocabulary, where new tokens are. ``params``: the whole tree, with or
    without adapters.
    """
    rng, shape = np.random.default_rng(0), (num_row_shards(mesh), LENGTH)
    tokens = rng.integers(0, config.vocab_size, shape, np.int32)
    tokens[:, ::2] = config.vocab_size - 1 - rng.integers(0, min(config.vocab_size, LENGTH), shape, np.int32)[:, ::2]
    config = dataclasses.replace(config, compute_dtype="float32", remat="none", fp8=False)
    with jax.default_matmul_precision("highest"):  # float32 products on accelerators too
        logits = _make_probe(mesh, config)(params, tokens)
    return to_host(logits)


@functools.cache
def _make_probe(mesh: Mesh, config: ModelConfig):
    def probe(params, tokens_BT):
        positions_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BT.shape)
        with mesh_context(mesh):
            hidden = compute_hidden(params, config, tokens_BT, np.ones(tokens_BT.shape, np.int32), positions_BT)
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
    for tensor in list_tensors(config, read_family(folder)):
        if not tensor.expert:
            for entry in tensor.entries:
                found.setdefault(entry.param, []).append(DTYPES[infos[tensor.name].dtype])
    return {param: tuple(dtypes) for param, dtypes in found.items()}


def choose_load_dtype(dtypes: Dtypes) -> str:
    """The dtype in which a folder reads back unchanged: its own where it has a single one, else float32."""
    kinds = {_on_device(dtype).name for layers in dtypes.values() for dtype in layers}
    return kinds.pop() if len(kinds) == 1 else "float32"


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
    source_config = read_config(source_folder)  # its vocabulary may be smaller: new rows count as changed
    files, _ = open_checked(source_folder, source_config)
    entries = list_entries(config, read_family(source_folder))
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
