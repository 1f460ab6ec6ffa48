"""A model whose vocabulary grows: how many rows it gets, and what they start as."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from postrain.config import Config
from postrain.data.rendering.new_tokens import NewTokens
from postrain.data.rendering.tokenizer import load_run_tokenizer
from postrain.errors import UserError
from postrain.models.config import ModelConfig, NewRows
from postrain.models.params import ParamSpec, axes_of, shapes_of
from postrain.models.quantized import as_array, shape_of
from postrain.sharding import named_shardings


def find_new_tokens(config: Config, folder: str | os.PathLike, vocab_size: int) -> NewTokens | None:
    """The tokens that a run adds to the model in ``folder``, None where it adds none.

    Raises UserError as load_run_tokenizer does, and where a row is to start as that of a token without one:
    ``vocab_size`` rows are there.
    """
    section = config.model.new_tokens
    if not (section.tokens or section.file):
        return None
    new = load_run_tokenizer(config, folder).new_tokens
    assert new is not None  # the section names some
    for text, ids in zip(new.texts, new.start_ids, strict=True):
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"new tokens: {text!r} is to start as the mean of tokens {list(ids)}, but the model has rows up to "
                f"{vocab_size - 1}: give it another text"
            )
    return new


def grow_config(model_config: ModelConfig, new: NewTokens | None, *, frozen: bool) -> ModelConfig:
    """``model_config`` with rows for ``new``, which train beside the table where the base is ``frozen``."""
    if new is None:
        return model_config
    rows = find_rows(new, model_config.vocab_size)
    vocab_size = max(model_config.vocab_size, new.stop)
    return dataclasses.replace(model_config, vocab_size=vocab_size, new_rows=rows if frozen else None)


def find_rows(new: NewTokens, vocab_size: int) -> NewRows:
    """The rows that ``new`` needs. Ids before them for which the model has none get one too: no row may be zero, which
    would be a likelier token than most."""
    first = min(new.first, vocab_size)
    return NewRows(first, new.stop - first)


def start_rows(base: dict, new: NewTokens, rows: NewRows, mesh: Mesh) -> dict:
    """float32 rows [count, D] for each table of ``base``, as ``new_row_specs`` has them: means of old rows."""
    spec = {"": ParamSpec((rows.count, shape_of(base["embed"]["embedding"])[1]), (None, "embed"))}
    sharding = named_shardings(axes_of(spec), mesh, shapes_of(spec))[""]
    skipped = new.first - rows.first  # rows before those of the tokens
    pairs = [(i + skipped, old) for i, ids in enumerate(new.start_ids) for old in ids]
    index, ids = np.asarray(pairs, np.int32).reshape(-1, 2).T
    start = jax.jit(functools.partial(_mean_rows, rows=rows), out_shardings=sharding)
    tables = [name for name in ("embed", "unembed") if name in base]
    return {name: {"new_rows": start(base[name]["embedding"], index, ids)} for name in tables}


def _mean_rows(table_VD, index, ids, *, rows: NewRows):
    """Row i is the mean of the rows ``ids[index == i]``, or of all before ``rows.first`` where there are none."""
    table_VD = as_array(table_VD, jnp.float32)
    mean = table_VD[: rows.first].mean(0)
    sums = jnp.zeros((rows.count, table_VD.shape[1])).at[index].add(table_VD[ids])
    counts = jnp.zeros((rows.count, 1)).at[index].add(1)
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), mean)


def write_rows(base: dict, started: dict, rows: NewRows) -> dict:
    """``base`` with the rows in its tables, each table in its own memory: ``base`` is used up."""

    def write(table, new):
        put = lambda table, new: jax.lax.dynamic_update_slice_in_dim(table, new.astype(table.dtype), rows.first, axis=0)
        return jax.jit(put, donate_argnums=0, out_shardings=table.sharding)(table, new)

    written = {name: {"embedding": write(base[name]["embedding"], p["new_rows"])} for name, p in started.items()}
    return base | written
