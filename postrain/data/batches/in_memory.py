"""Rows in memory: every row is rendered, checked and counted before training, each document then comes once an epoch.

``load_examples`` reads and renders all rows, so that bad ones, too long ones and the share of trained tokens are known
before the first update. ``MemoryBatches`` packs them anew in each epoch, ``mix_examples`` mixes sources by weights, and
``make_eval_batches`` has every document once.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from postrain.config import DataConfig, SourceConfig
from postrain.data.bad_row import BadRow
from postrain.data.batches.epoch_order import EpochOrder, permutation
from postrain.data.batches.fingerprint import fingerprint_rows
from postrain.data.batches.packing import pack
from postrain.data.batches.resumable import Epochs
from postrain.data.batches.row_filter import DataReport, RowCounts, RowFilter, count
from postrain.data.batches.source import Source, list_loss_weights, open_source
from postrain.data.batches.streamed import ShardedBatches
from postrain.data.batches.token_shift import assemble_batch
from postrain.data.documents import (
    AS_RENDERED,
    Document,
    Layout,
    Preparation,
    SameLayout,
    check_token_ids,
    count_fitting_shared,
    count_saved_slots,
    layout_of,
)
from postrain.data.kinds.registry import SFT, Kind, find_kind
from postrain.data.rendering.render import BATCH
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError, shorten
from postrain.files import read_jsonl, write_whole

# Loading


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Rendered documents of one or more sources.

    Attributes:
      examples: the documents, in the order of the sources; each but prompts has at least one trained token that is
        predicted from another, and takes at most ``sequence_length`` slots.
      report: the counts of rows.
      fingerprint: JSON-able; see ``postrain.data.batches.fingerprint``.
      kind: of all rows.
      order: of the rows, packed, where they come once an epoch.
    """

    examples: list[Document]
    report: DataReport
    fingerprint: dict
    kind: Kind = SFT
    order: EpochOrder | None = None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: slots that each document takes, of text its tokens less one."""
        return np.array([document.slots for document in self.examples], np.int64)

    @functools.cached_property
    def layout(self) -> Layout:
        """The arrays of its batches."""
        return layout_of(self.examples[0])


def load_examples(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    rejected_path: str | os.PathLike | None = None,
    *,
    kind: str | None = None,
    preparation: Preparation = AS_RENDERED,
) -> ExampleSet:
    """Reads and renders all rows of ``sources`` (usually ``config.train`` or ``config.eval``).

    Args:
      tokenizer: from ``load_tokenizer``; None where ``needs_tokenizer`` says that no row is text.
      rejected_path: a JSONL file for bad rows, ``{"file", "line", "reason"}``, where ``config.on_bad_row`` is
        "skip". Lines about other files that stand there already are kept, so train and eval can share it. Of
        several processes, give it to one.
      kind: the only one that the rows may be of; None: any.
      preparation: that the rendered documents go through.

    Raises:
      UserError: a source that cannot be read; a bad or too long row where the config says so, naming file and
        line; a larger share of bad rows than ``config.max_bad_fraction``; nothing left to train on.
    """
    in_memory = dataclasses.replace(config, streaming=False)
    opened = [open_source(source, in_memory, index) for index, source in enumerate(sources)]
    found = find_kind([(source.name, source.parser) for source in opened], config, kind) if opened else SFT
    layout, filters = SameLayout(), []
    for source in opened:
        counts = RowCounts(source.name, left_out_by=source.parser.left_out)
        # The share of bad rows is judged when all rows of a source are known.
        filters.append(
            RowFilter(counts, config, source.parser.kind, layout, preparation=preparation, judged_from=math.inf)
        )
    examples: list[Document] = []
    files: list[dict[str, None]] = [{} for _ in opened]  # that the rows of each source came from, in order
    try:
        for source, row_filter, of_source in zip(opened, filters, files, strict=True):
            examples += _render_source(source, tokenizer, config, row_filter, of_source)
    finally:  # also when the run stops: the reasons are what its user needs then
        if rejected_path is not None:
            rejected = [bad for row_filter in filters for bad in row_filter.rejected]
            _write_rejected(pathlib.Path(rejected_path), rejected, {file for of_source in files for file in of_source})
    report = DataReport([row_filter.counts for row_filter in filters], config.sequence_length)
    report.loss_weights = list_loss_weights(opened)
    if not examples:
        raise UserError(_format_empty(report, config))
    switches = (switch for example in examples for switch in example.template_switches if switch)
    report.template_switches = dict(collections.Counter(switches))
    if preparation.together is not None:
        examples = preparation.together(examples)
    fingerprint = fingerprint_rows(opened, list(map(list, files)), tokenizer, config, examples, preparation)
    order = EpochOrder(np.array([document.slots for document in examples], np.int64), config)
    example_set = ExampleSet(examples, report, fingerprint, found, order)
    report.packed_rows, report.used_slots = len(order.rows_of_epoch(0)), int(example_set.lengths.sum())
    report.saved_slots = count_saved_slots(examples)
    report.fitting_shared = count_fitting_shared(examples, config.sequence_length)
    return example_set


def _render_source(
    source: Source, tokenizer: Tokenizer | None, config: DataConfig, row_filter: RowFilter, files: dict[str, None]
) -> list[Document]:
    """The documents of a source that ``row_filter`` keeps; adds the files that its rows come from, in order."""
    documents: list[Document] = []
    rows = source.rows()
    while batch := list(itertools.islice(rows, BATCH)):
        files |= dict.fromkeys(row.ref.file for row in batch)
        for rendered in source.parser.render(batch, tokenizer, config, row_filter.keys):
            documents += row_filter.keep(rendered)
    if row_filter.rejected:
        row_filter.check_share(row_filter.rejected[-1])
    return documents


def _format_empty(report: DataReport, config: DataConfig) -> str:
    total = report.total
    where = ", ".join(s.name for s in report.sources) or "no source given"
    reasons = {
        "bad (see rejected.jsonl)": total.skipped,
        f"too long for data.sequence_length = {config.sequence_length} (the longest has {total.longest:,} tokens)":
            total.too_long,
        "left with nothing to train on after truncation": total.untrained,
        f"left out by {', '.join(s.left_out_by for s in report.sources if s.left_out)}": total.left_out,
    }  # fmt: skip
    found = "; ".join(f"{n} {why}" for why, n in reasons.items() if n)
    return f"nothing to train on in {where}: {count(total.rows, 'row')}" + (f", {found}" if found else "")


def _write_rejected(path: pathlib.Path, rejected: list[BadRow], files: set[str]) -> None:
    """Replaces the lines about the files that were read, so that a resume or a second call does not repeat them."""
    rejected = sorted(rejected, key=lambda bad: (bad.ref.file, bad.ref.line))
    known = [entry for _, entry in read_jsonl(path, drop_torn=True)] if path.exists() else []
    entries = [entry for entry in known if entry.get("file") not in files]
    entries += [{"file": bad.ref.file, "line": bad.ref.line, "reason": bad.reason} for bad in rejected]
    if entries or path.exists():
        write_whole(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


# Training batches


class MemoryBatches:
    """Endless training batches: epoch after epoch, each document once in each, in an order of its own.

    Each batch is a dict of numpy arrays, T = ``config.sequence_length``, B_local = ``config.batch_size`` over
    ``process_count``: ``tokens``, ``targets``, ``segment_ids``, ``positions`` int32 [B_local, T], ``loss_mask``
    float32 [B_local, T], and ``row_ids`` int32 [B_local, S], the indices into ``example_set.examples`` of each
    row's documents, -1 where a row has fewer. Besides the arrays of ``example_set.layout`` and, of prompts,
    ``metadata``, a list of dicts for each row. Processes take consecutive parts of the same global batch.

    ``get_state()`` is the position after the last batch that was handed out, however many were prepared ahead.
    It counts global batches, so it may be restored with another number of processes.

    Raises:
      UserError: the batch does not divide among the processes.
    """

    def __init__(self, example_set: ExampleSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1):
        if config.batch_size % process_count:
            raise UserError(
                f"data.batch_size must be a multiple of the {process_count} processes; found {config.batch_size}"
            )
        self._example_set, self._config = example_set, config
        # Of its own, as its position is; what is packed already is not packed again.
        self._order = EpochOrder(example_set.lengths, config, known=example_set.order)
        local = config.batch_size // process_count
        own_rows = slice(process_index * local, (process_index + 1) * local)
        rows = self._order.batch(config.batch_size, batch_fn=list)
        batches = rows.map(lambda rows: _assemble_batch(example_set, rows[own_rows], config.sequence_length))
        # One thread: assembling a batch is far quicker than a step, and more threads would contend for the GIL.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
        self._batches = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "MemoryBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position: a small dict of plain integers, for JSON."""
        position = self._batches.get_state()
        epoch = self._order.epoch_at(position["next_index"] * self._config.batch_size)
        rows = len(self._order.rows_of_epoch(epoch))
        return {"grain": position, "epoch": epoch, "epoch_first_row": self._order.first_row(epoch), "epoch_rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch after which ``state`` was taken, with the very same batches.

        The example set and the config must be the same: compare fingerprints first.
        """
        self._order.set_first_row(state["epoch"], state["epoch_first_row"])
        self._batches.set_state(state["grain"])

    def start_anew(self, update: int) -> None:
        """Begins with the first epoch after ``update`` updates of the run."""
        self._order.set_first_row(0, update * self._config.batch_size)
        self._batches.set_state(self._batches.get_state() | {"next_index": update})

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises UserError naming the first row with a token that a model of ``vocab_size`` has no embedding for."""
        check_token_ids(self._example_set.examples, vocab_size)

    def describe_rows(self, row_ids: np.ndarray) -> str:
        """``file:line, file:line, ...`` of the documents in ``row_ids`` (any shape, -1 is skipped), each row once."""
        examples = self._example_set.examples
        return shorten(list(dict.fromkeys(str(examples[i].ref) for i in np.ravel(row_ids) if i >= 0)), 16)

    def format_consumption(self, position: dict[str, Any]) -> list[str]:
        """Nothing: every document comes once an epoch."""
        return []

    def num_steps(self, epochs: float) -> int:
        """The smallest number of updates that shows every document at least ``epochs`` times."""
        return math.ceil(self._order.num_rows(epochs) / self._config.batch_size)

    def close(self) -> None:
        """Ends the background thread."""
        self._batches.close()


def mix_examples(example_set: ExampleSet, config: DataConfig, *, process_index: int, process_count: int):
    """Endless batches of ``config.mixture``: ``ShardedBatches`` of one shard, which every process runs whole, as the
    documents are in memory anyway. Raises UserError where a source has no document."""
    reports = example_set.report.sources
    ends = np.cumsum([report.documents for report in reports]).tolist()
    parts = [range(end - report.documents, end) for end, report in zip(ends, reports, strict=True)]
    for source, part in zip(config.train, parts, strict=True):
        if not part:
            name = source.path or source.name
            raise UserError(f"{name}: no row of it can be trained on, so it cannot be mixed: leave it out")
    # Rows of the sources that something was kept of, or their tokens.
    rows = [len({example_set.examples[i].ref for i in part}) for part in parts]
    sizes = [report.tokens for report in reports] if config.mixture.by == "tokens" else rows

    def open_epoch(index: int, epoch: int) -> grain.IterDataset:
        """The documents of a source, shuffled."""
        part, order = parts[index], range(len(parts[index]))
        if config.shuffle:
            order = permutation(len(part), (config.seed, epoch, index, 3)).tolist()
        documents = grain.MapDataset.source(order).map(lambda i: [example_set.examples[part[i]]])
        return documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def open_sources(shard: int, counts: Sequence[RowCounts] | None) -> list[grain.IterDataset]:
        return [
            Epochs(functools.partial(open_epoch, index), source.max_epochs) for index, source in enumerate(config.train)
        ]

    processes = {"process_index": process_index, "process_count": process_count}
    names = [report.name for report in reports]
    return ShardedBatches(names, sizes, open_sources, config, layout=example_set.layout, shards=1, **processes)


# Evaluation batches


def make_eval_batches(
    example_set: ExampleSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> list[dict[str, np.ndarray]]:
    """See ``iter_eval_batches``."""
    return list(iter_eval_batches(example_set, config, process_index=process_index, process_count=process_count))


def iter_eval_batches(
    example_set: ExampleSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every document once, packed in the order of the sources, as batches of one shape like the training ones.

    The last batch is filled up with empty rows: ``segment_ids`` and ``loss_mask`` 0, ``row_ids`` -1. They carry
    no weight, so sums and counts over the batches are exact.

    Raises:
      UserError: the batch does not divide among the processes.
    """
    size = config.batch_size
    if size % process_count:
        raise UserError(f"an evaluation batch of {size} rows does not divide among {process_count} processes")
    rows = pack(example_set.lengths, config.sequence_length, window=config.packing_window, method=config.packing)
    rows.sort(key=lambda documents: int(documents[0]))
    rows += [np.zeros(0, np.int64)] * (-len(rows) % size)
    local = size // process_count
    for start in range(process_index * local, len(rows), size):
        yield _assemble_batch(example_set, rows[start : start + local], config.sequence_length)


def iter_documents(row_ids: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, tuple[int, slice]]]:
    """Of each document of a batch its index among the examples, and its place: its slots in an array [B, T, ...].

    ``row_ids``: of the batch, int32 [B, S]; ``lengths``: of all examples, in slots.
    """
    for row, documents in enumerate(row_ids):
        start = 0
        for i in documents[documents >= 0].tolist():
            yield i, (row, slice(start, start + lengths[i]))
            start += lengths[i]


def _assemble_batch(example_set: ExampleSet, rows: Sequence[np.ndarray], sequence_length: int) -> dict[str, np.ndarray]:
    examples = example_set.examples
    batch = assemble_batch(
        [[examples[i] for i in documents] for documents in rows], sequence_length, example_set.layout
    )
    row_ids = np.full((len(rows), max(1, *map(len, rows))), -1, np.int32)
    for row, documents in zip(row_ids, rows, strict=True):
        row[: len(documents)] = documents
    return batch | {"row_ids": row_ids}
