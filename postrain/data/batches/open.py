"""``data.train`` as batches, in whichever of three ways the config asks for:

* rendered before training, each document once an epoch (``in_memory``): all is known beforehand
* rendered before training, and mixed by weights while it goes on
* read while training goes on (``data.streaming``): only names and sizes of files are known beforehand

Every stage is a Grain dataset, and Grain's own transformations may stand between any two:

    stage            element                     streamed                    in memory
    source           Row                         Source.shard_rows           Source.rows
    render           documents of a row          RenderedRows                load_examples
    epochs           documents of a row          Epochs                      EpochOrder; of a mixture Epochs
    mix, pack        documents of a packed row   Shard                       EpochOrder; of a mixture Shard
    batch            arrays                      ShardBatches                EpochOrder.batch(...).map(...)
    prefetch         arrays                      Grain's                     Grain's
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.config.rules import has_mixture
from postrain.data.batches.fingerprint import fingerprint_stream
from postrain.data.batches.in_memory import ExampleSet, MemoryBatches, load_examples, mix_examples
from postrain.data.batches.packing import pack
from postrain.data.batches.resumable import Epochs, RenderedRows
from postrain.data.batches.row_filter import DataReport, RejectedLog, RowCounts, RowFilter, count
from postrain.data.batches.source import Source, list_loss_weights, open_source
from postrain.data.batches.streamed import ShardedBatches
from postrain.data.documents import (
    AS_RENDERED,
    Document,
    Layout,
    Preparation,
    SameLayout,
    count_fitting_shared,
    count_saved_slots,
)
from postrain.data.kinds.registry import find_kind
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError

_LEAST_ROWS = 1000  # data.max_bad_fraction is of so many rows at first


class Batches(Protocol):
    """An endless iterator with a position; see ``MemoryBatches`` and ``ShardedBatches``."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def start_anew(self, update: int) -> None: ...
    def check_token_ids(self, vocab_size: int) -> None: ...
    def describe_rows(self, row_ids: np.ndarray) -> str: ...
    def format_consumption(self, position: dict[str, Any]) -> list[str]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainRows:
    """What a recipe needs of ``data.train``.

    Attributes:
      batches: of this process.
      fingerprint: JSON-able; see ``postrain.data.batches.fingerprint``.
      summary: what is known of the rows, to print before training.
      lengths: slots of each document where all were rendered before training, else empty.
      sample: a document to show.
      layout: the arrays that batches have besides those that all have.
      example_set: all of them where they were rendered before training, else None.
      notes: lines about the rows for the report, besides what ``batches`` says of their consumption.
    """

    batches: Batches
    fingerprint: dict
    summary: str
    lengths: np.ndarray
    sample: Document
    layout: Layout
    example_set: ExampleSet | None = None
    notes: Sequence[str] = ()


def open_train_rows(
    tokenizer: Tokenizer | None,
    config: DataConfig,
    rejected_path: str | os.PathLike | None = None,
    *,
    kind: str | None = None,
    preparation: Preparation = AS_RENDERED,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainRows:
    """Opens ``config.train``. Raises UserError as ``load_examples``, ``open_source`` and ``ShardedBatches`` do.

    ``rejected_path``: a JSONL file for bad rows, where ``config.on_bad_row`` is "skip"; a stream's are written as they
    are met, those of process i > 0 to a file of its own beside it. ``kind``: the only one that the rows may be of.
    ``preparation``: that the rendered documents go through.
    """
    process = {"process_index": process_index, "process_count": process_count}
    if config.streaming:
        return _open_stream(tokenizer, config, rejected_path, kind, preparation, **process)
    # Of several processes one writes the bad rows: all read the same.
    own_path = rejected_path if process_index == 0 else None
    example_set = load_examples(config.train, tokenizer, config, own_path, kind=kind, preparation=preparation)
    open_batches = mix_examples if has_mixture(config) else MemoryBatches
    return TrainRows(
        batches=open_batches(example_set, config, **process),
        fingerprint=example_set.fingerprint,
        summary=str(example_set.report),
        lengths=example_set.lengths,
        sample=example_set.examples[0],
        layout=example_set.layout,
        example_set=example_set,
        notes=[*example_set.report.format_shared(), *example_set.report.format_unread()],
    )


def join_positions(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of a run out of those of its processes, which differ only by the shards that each has."""
    shards = {number: state for position in positions for number, state in position.get("shards", {}).items()}
    return positions[0] | ({"shards": shards} if shards else {})


def read_documents(
    source: Source,
    tokenizer: Tokenizer | None,
    config: DataConfig,
    layout: SameLayout,
    *,
    preparation: Preparation = AS_RENDERED,
    shard: int = 0,
    counts: RowCounts | None = None,
    log: RejectedLog | None = None,
) -> grain.IterDataset:
    """The documents of one shard's rows of a source, epoch after epoch: the documents of a row are an element.

    ``counts``: where the rows of the first epoch are counted; later ones are the same. ``log``: of their bad rows.
    """

    def open_epoch(epoch: int) -> grain.IterDataset:
        counted = counts if epoch == 0 else None
        row_filter = RowFilter(
            counted, config, source.parser.kind, layout, preparation=preparation, judged_from=_LEAST_ROWS, log=log
        )
        return RenderedRows(source.shard_rows(epoch, shard), source.parser, tokenizer, config, row_filter)

    return Epochs(open_epoch, source.config.max_epochs)


def _open_stream(
    tokenizer: Tokenizer | None,
    config: DataConfig,
    rejected_path,
    kind: str | None,
    preparation: Preparation,
    **process: int,
) -> TrainRows:
    sources = [open_source(source, config, index) for index, source in enumerate(config.train)]
    find_kind([(source.name, source.parser) for source in sources], config, kind)
    if preparation.together is not None:
        raise UserError(
            f"config key 'data.streaming' = True: to train {preparation.name} all rows must be known beforehand: "
            "set it to False"
        )
    layout, log = SameLayout(), None
    sample = _first_document(sources[0], tokenizer, config, layout, preparation)
    assert layout.layout is not None  # the sample's
    if rejected_path is not None:
        path, index = pathlib.Path(rejected_path), process["process_index"]
        log = RejectedLog(path.with_stem(f"{path.stem}-{index:05}") if index else path)

    def open_shard(shard: int, counts: Sequence[RowCounts] | None) -> list[grain.IterDataset]:
        uncounted: list[RowCounts | None] = [None] * len(sources)
        return [
            read_documents(
                source, tokenizer, config, layout, preparation=preparation, shard=shard, counts=of_source, log=log
            )
            for source, of_source in zip(sources, counts or uncounted, strict=True)
        ]

    names, sizes = [source.name for source in sources], [source.size for source in sources]
    shards, lines = config.stream.shards, [source.format_summary() for source in sources]
    lines += [f"{name}: loss weight {weight:g}" for name, weight in list_loss_weights(sources).items()]
    return TrainRows(
        batches=ShardedBatches(names, sizes, open_shard, config, layout=layout.layout, shards=shards, **process),
        fingerprint=fingerprint_stream(sources, tokenizer, config, preparation),
        summary="\n".join([*lines, f"streamed in {count(shards, 'shard')}: rows are checked when they are read"]),
        lengths=np.zeros(0, np.int64),
        sample=sample,
        layout=layout.layout,
    )


def _first_document(
    source: Source, tokenizer: Tokenizer | None, config: DataConfig, layout: SameLayout, preparation: Preparation
) -> Document:
    row_filter = RowFilter(None, config, source.parser.kind, layout, preparation=preparation)
    for row in source.rows():
        (rendered,) = source.parser.render([row], tokenizer, config, row_filter.keys)
        if kept := row_filter.keep(rendered):
            return kept[0]
    raise UserError(f"{source.where}: no row of it can be trained on: `postrain preview` shows why")


def sample_stream(
    tokenizer: Tokenizer | None,
    config: DataConfig,
    *,
    kind: str | None = None,
    preparation: Preparation = AS_RENDERED,
) -> ExampleSet:
    """The first documents of each source of a stream, a packing window of them in all, as ``load_examples`` gives all.

    Raises UserError as ``open_source`` does, and where ``config`` has a bad row stop the run.
    """
    once = tuple(dataclasses.replace(source, max_epochs=1) for source in config.train)
    # One shard, in the order of the files.
    one = dataclasses.replace(config.stream, shards=1)
    config = dataclasses.replace(config, train=once, shuffle=False, stream=one)
    sources = [open_source(source, config, index) for index, source in enumerate(config.train)]
    found = find_kind([(source.name, source.parser) for source in sources], config, kind)
    examples: list[Document] = []
    reports, layout = [], SameLayout()
    for source in sources:
        stop = len(examples) + -(-config.packing_window // len(sources))
        counts = RowCounts(source.name, left_out_by=source.parser.left_out)
        for documents in read_documents(source, tokenizer, config, layout, preparation=preparation, counts=counts):
            examples += documents
            if len(examples) >= stop:
                break
        reports.append(counts)
    if not examples:
        raise UserError(f"nothing to train on in the first rows of {', '.join(r.name for r in reports)}")
    report = DataReport(reports, config.sequence_length, loss_weights=list_loss_weights(sources))
    example_set = ExampleSet(examples, report, {}, found)
    rows = pack(example_set.lengths, config.sequence_length, window=config.packing_window, method=config.packing)
    report = example_set.report
    report.packed_rows, report.used_slots = len(rows), int(example_set.lengths.sum())
    report.saved_slots = count_saved_slots(examples)
    report.fitting_shared = count_fitting_shared(examples, config.sequence_length)
    return example_set
