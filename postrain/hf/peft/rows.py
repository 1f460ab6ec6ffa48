"""Rows of new tokens in a PEFT folder: its ``trainable_token_indices``, whole rows in the place of the base's.

The form that is right where embeddings are tied too: `peft` puts the rows into the table once, and the projection onto
the vocabulary sees them, whereas whole tables in the file (``save_embedding_layers``) are two copies that no longer are
one. The base must have the rows: `peft.AutoPeftModelForCausalLM` adds them by the folder's tokenizer.
"""

import os
import pathlib
from typing import Any

from postrain.errors import UserError
from postrain.hf.config import ADAPTER_FILE
from postrain.hf.tensors import read_json
from postrain.models.config import ModelConfig, NewRows

KEY = "trainable_token_indices"
MODULES = {"embed": "model.embed_tokens", "unembed": "lm_head"}
SUFFIX = ".token_adapter.trainable_tokens_delta"


def row_tensors(config: ModelConfig, prefix: str) -> dict[str, str]:
    """{name in the file: path in the tree} of the rows of ``config.new_rows``."""
    if config.new_rows is None:
        return {}
    tables = ("embed",) if config.tie_embeddings else ("embed", "unembed")
    return {f"{prefix}{MODULES[table]}{SUFFIX}": f"{table}.new_rows" for table in tables}


def describe_rows(config: ModelConfig) -> dict[str, Any]:
    """The key of adapter_config.json that says which rows they are, {} where there are none."""
    if config.new_rows is None:
        return {}
    ids = list(range(config.new_rows.first, config.new_rows.first + config.new_rows.count))
    tables = ("embed",) if config.tie_embeddings else ("embed", "unembed")
    return {KEY: {MODULES[table].rpartition(".")[2]: ids for table in tables}}


def read_rows(raw: dict, config: ModelConfig, where: str | os.PathLike) -> NewRows | None:
    """The rows that the content ``raw`` of adapter_config.json names; None where it names none.

    Raises UserError unless they are consecutive, and the same for all tables of ``config``.
    """
    by_module = _read_ids(raw, where)
    if by_module is None:
        return None
    expected = {"embed_tokens"} if config.tie_embeddings else {"embed_tokens", "lm_head"}
    lists = list(by_module.values())
    ids = lists[0] if lists else []
    whole = ids and all(other == ids for other in lists) and ids == list(range(ids[0], ids[0] + len(ids)))
    if set(by_module) != expected or not whole:
        raise UserError(
            f"{where}: {KEY} names {', '.join(map(str, by_module)) or 'nothing'}, expected consecutive ids for each of "
            f"{', '.join(sorted(expected))}: other rows are not supported"
        )
    return NewRows(ids[0], len(ids))


def needed_vocabulary(adapter: pathlib.Path | None) -> int:
    """Rows that the base of an adapter must have, 0 where any number will do."""
    by_module = None if adapter is None else _read_ids(read_json(adapter / ADAPTER_FILE), adapter / ADAPTER_FILE)
    return 1 + max((i for ids in (by_module or {}).values() for i in ids), default=-1)


def _read_ids(raw: dict, where: str | os.PathLike) -> dict[str, list[int]] | None:
    """The token ids of each module; None where the key is absent. Raises UserError for values that are not ids."""
    stated = raw.get(KEY)
    if stated is None:
        return None
    by_module = stated if isinstance(stated, dict) else {"embed_tokens": stated}
    for ids in by_module.values():
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{where}: {KEY} is {str(stated)[:60]}, expected lists of token ids: save it again")
    return by_module
