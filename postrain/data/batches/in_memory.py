"""Sources -> rendered documents -> packed batches, with a position that can be saved and restored exactly.

``load_examples`` renders every row once, before training, so that every bad row, every too long one and the
share of trained tokens is known before the first update. ``make_train_iterator`` then reads the rows that
``plan.RowPlan`` lays out, through Grain, which assembles the coming batches in a background thread.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.data.batches.epoch_order import RowPlan
from postrain.data.batches.loading import ExampleSet, load_examples
from postrain.data.batches.packing import assemble_batch, pack
from postrain.data.documents import check_token_ids
from postrain.errors import UserError, shorten

__all__ = ["ExampleSet", "TrainIterator", "describe_rows", "load_examples", "make_eval_batches", "make_train_iterator"]

_ENDLESS = 2**62  # Grain wants a length


class TrainIterator:
    """Endless batches, see ``make_train_iterator``.

    ``get_state()`` is the position after the last batch that was handed out, however many were prepared ahead.
    It counts global batches, so it may be restored with another number of processes.
    """

    def __init__(self, example_set: ExampleSet, config: DataConfig, process_index: int, process_count: int):
        self._example_set, self._config = example_set, config
        self._plan = RowPlan(example_set.lengths, config)
        batches = _Batches(example_set, self._plan, config, process_index, process_count)
        # One thread: assembling a batch is far quicker than a step, and more threads would contend for the GIL.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
        self._batches = iter(grain.MapDataset.source(batches).to_iter_dataset(options))

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position: a small dict of plain integers, for JSON."""
        position = self._batches.get_state()
        epoch = self._plan.epoch_at(position["next_index"] * self._config.batch_size)
        rows = len(self._plan.rows_of_epoch(epoch))
        return {"grain": position, "epoch": epoch, "epoch_first_row": self._plan.first_row(epoch), "epoch_rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch after which ``state`` was taken, with the very same batches.

        The example set and the config must be the same: compare fingerprints first.
        """
        self._plan.set_first_row(state["epoch"], state["epoch_first_row"])
        self._batches.set_state(state["grain"])

    def start_anew(self, update: int) -> None:
        """Begins with epoch 0 after ``update`` updates of the run."""
        self._plan.set_first_row(0, update * self._config.batch_size)
        self._batches.set_state(self._batches.get_state() | {"next_index": update})

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises UserError naming the first row with a token that a model of ``vocab_size`` has no embedding for."""
        check_token_ids(self._example_set.examples, vocab_size)

    def describe_rows(self, row_ids: np.ndarray) -> str:
        """``file:line, file:line, ...`` of the documents in ``row_ids``, see ``describe_rows``."""
        return describe_rows(self._example_set, row_ids)

    def format_consumption(self, position: dict[str, Any]) -> list[str]:
        """Nothing: every document comes once an epoch."""
        return []

    def num_steps(self, epochs: float) -> int:
        """The smallest number of updates that shows every document at least ``epochs`` times."""
        return math.ceil(self._plan.num_rows(epochs) / self._config.batch_size)

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """Random access to this process' share of global batch i: what Grain reads from."""

    example_set: ExampleSet
    plan: RowPlan
    config: DataConfig
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        size = self.config.batch_size
        local = size // self.process_count
        rows = self.plan.rows(index * size, (index + 1) * size)
        rows = rows[self.process_index * local : (self.process_index + 1) * local]
        return _assemble_batch(self.example_set, rows, self.config.sequence_length)


def make_train_iterator(
    example_set: ExampleSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """Endless training batches: epoch after epoch, each document once in each, in an order of its own.

    Each batch is a dict of numpy arrays, T = ``config.sequence_length``, B_local = ``config.batch_size`` over
    ``process_count``: ``tokens``, ``targets``, ``segment_ids``, ``positions`` int32 [B_local, T], ``loss_mask``
    float32 [B_local, T], and ``row_ids`` int32 [B_local, S], the indices into ``example_set.examples`` of each
    row's documents, -1 where a row has fewer. Besides the arrays of ``example_set.layout`` and, of prompts,
    ``metadata``, a list of dicts for each row. Processes take consecutive parts of the same global batch.

    Raises:
      UserError: the batch does not divide among the processes.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"data.batch_size must be a multiple of the {process_count} processes; found {config.batch_size}"
        )
    return TrainIterator(example_set, config, process_index, process_count)


def make_eval_batches(
    example_set: ExampleSet,
    config: DataConfig,
    batch_size: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> list[dict[str, np.ndarray]]:
    """Every document once, packed in the order of the sources, as batches of one shape like the training ones.

    The last batch is filled up with empty rows: ``segment_ids`` and ``loss_mask`` 0, ``row_ids`` -1. They carry
    no weight, so sums and counts over the batches are exact.

    Raises:
      UserError: the batch does not divide among the processes.
    """
    size = batch_size or config.batch_size
    if size % process_count:
        raise UserError(f"an evaluation batch of {size} rows does not divide among {process_count} processes")
    rows = pack(example_set.lengths, config.sequence_length, window=config.packing_window, method=config.packing)
    rows.sort(key=lambda documents: int(documents[0]))
    rows += [np.zeros(0, np.int64)] * (-len(rows) % size)
    local = size // process_count
    starts = range(process_index * local, len(rows), size)
    return [_assemble_batch(example_set, rows[s : s + local], config.sequence_length) for s in starts]


def _assemble_batch(example_set: ExampleSet, rows: Sequence[np.ndarray], sequence_length: int) -> dict[str, np.ndarray]:
    examples = example_set.examples
    batch = assemble_batch(
        [[examples[i] for i in documents] for documents in rows], sequence_length, example_set.layout
    )
    row_ids = np.full((len(rows), max(1, *map(len, rows))), -1, np.int32)
    for row, documents in zip(row_ids, rows, strict=True):
        row[: len(documents)] = documents
    return batch | {"row_ids": row_ids}


def describe_rows(example_set: ExampleSet, row_ids: np.ndarray, limit: int = 16) -> str:
    """``file:line, file:line, ...`` of the documents in ``row_ids`` (any shape, -1 is skipped), each row once."""
    refs = dict.fromkeys(str(example_set.examples[i].ref) for i in np.ravel(row_ids) if i >= 0)
    return shorten(refs, limit)
