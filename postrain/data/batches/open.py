"""``data.train`` as batches, in whichever of three ways the config asks for:

* rendered before training, each document once an epoch (``postrain.data.batches.in_memory``): all is known beforehand
* rendered before training, and mixed by weights while it goes on
* read while training goes on (``data.streaming``): nothing is known beforehand but names and sizes of files
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from postrain.config import DataConfig
from postrain.config.rules import has_mixture
from postrain.data.batches.epoch_order import permutation
from postrain.data.batches.fingerprint import describe_pipeline, name_files
from postrain.data.batches.in_memory import make_train_iterator
from postrain.data.batches.loading import ExampleSet, load_examples
from postrain.data.batches.packing import pack
from postrain.data.batches.report import DataReport, count
from postrain.data.batches.row_counts import RejectedLog
from postrain.data.batches.shard_reader import BlockReader, BlockSource, open_block_source
from postrain.data.batches.streamed import ShardedBatches
from postrain.data.documents import Document, Layout, SameLayout
from postrain.data.files.storage import StoredFile, is_local
from postrain.data.kinds.registry import find_kind
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.files import digest, spread

_SAMPLE = 1 << 16  # bytes of a local file's start, middle and end that tell whether it is the same


class Batches(Protocol):
    """An endless iterator with a position; see ``make_train_iterator`` and ``ShardedBatches``."""

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
    """

    batches: Batches
    fingerprint: dict
    summary: str
    lengths: np.ndarray
    sample: Document
    layout: Layout


def open_train_rows(
    tokenizer: Tokenizer | None,
    config: DataConfig,
    rejected_path: str | os.PathLike | None = None,
    *,
    kind: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainRows:
    """Opens ``config.train``. Raises UserError as ``load_examples``, ``open_block_source`` and ``ShardedBatches`` do.

    ``rejected_path``: a JSONL file for bad rows, where ``config.on_bad_row`` is "skip"; a stream's are written as they
    are met, those of process i > 0 to a file of its own beside it. ``kind``: the only one that the rows may be of.
    """
    mine = {"process_index": process_index, "process_count": process_count}
    if config.streaming:
        return _open_stream(tokenizer, config, rejected_path, kind, **mine)
    example_set = load_examples(
        config.train, tokenizer, config, rejected_path if process_index == 0 else None, kind=kind
    )
    make = _mix if has_mixture(config) else make_train_iterator
    batches = make(example_set, config, **mine)
    report, sample = str(example_set.report), example_set.examples[0]
    return TrainRows(batches, example_set.fingerprint, report, example_set.lengths, sample, example_set.layout)


def _mix(example_set: ExampleSet, config: DataConfig, **mine: int) -> ShardedBatches:
    """One shard, which every process runs whole: the documents are in memory anyway."""
    reports = example_set.report.sources
    ends = np.cumsum([report.documents for report in reports]).tolist()
    parts = [range(end - report.documents, end) for end, report in zip(ends, reports, strict=True)]
    rows = [len({example_set.examples[i].ref for i in part}) for part in parts]  # that something was kept of
    sizes = [report.tokens for report in reports] if config.mixture.by == "tokens" else rows
    make_readers = lambda shard: [_MemoryReader(example_set, part, i, config) for i, part in enumerate(parts)]
    names, layout = [report.name for report in reports], example_set.layout
    for source, part in zip(config.train, parts, strict=True):
        if not part:
            raise UserError(f"{source.path}: no row of it can be trained on, so it cannot be mixed: leave it out")
    return ShardedBatches(names, sizes, make_readers, config, layout=layout, shards=1, **mine)


class _MemoryReader:
    """A ``postrain.data.batches.shard.Reader`` of the documents ``part`` of an example set, shuffled in each epoch."""

    counts: dict[str, int] = {}  # said before training

    def __init__(self, example_set: ExampleSet, part: range, index: int, config: DataConfig):
        self._examples, self._part, self._index, self._config = example_set.examples, part, index, config
        self.seek([0, 0])

    def seek(self, position: list[int]) -> None:
        self.position = [position[0], min(position[1], len(self._part))]  # epoch, documents of it
        seed = self._config.seed, self.position[0], self._index, 3
        self._order = permutation(len(self._part), seed) if self._config.shuffle else range(len(self._part))

    def draw(self) -> tuple[int, list[Document]] | None:
        epoch, given = self.position
        if given == len(self._part):
            limit = self._config.train[self._index].max_epochs
            if not self._part or epoch + 1 == limit:
                return None
            self.seek([epoch + 1, 0])
            given = 0
        self.position = [self.position[0], given + 1]
        key = int(self._order[given])
        return key, [self._examples[self._part[key]]]

    def fetch(self, keys: Sequence[int]) -> list[list[Document]]:
        return [[self._examples[self._part[key]]] for key in keys]


def _open_stream(
    tokenizer: Tokenizer | None, config: DataConfig, rejected_path, kind: str | None, **mine: int
) -> TrainRows:
    sources = [open_block_source(source, config) for source in config.train]
    find_kind([(source.name, source.parser) for source in sources], config, kind)
    first = dataclasses.replace(_from_the_start(config), on_bad_row="skip")
    drawn = BlockReader(sources[0], 0, tokenizer, first, 0).draw()
    if drawn is None:
        raise UserError(f"{config.train[0].path}: no row of it can be trained on: `postrain preview` shows why")
    sample = drawn[1][0]
    same = SameLayout(sample)
    rejected = None
    if rejected_path is not None:
        path, process = pathlib.Path(rejected_path), mine["process_index"]
        rejected = RejectedLog(path.with_stem(f"{path.stem}-{process:05}") if process else path)

    def make_readers(shard: int) -> list[BlockReader]:
        return [BlockReader(s, i, tokenizer, config, shard, rejected, same) for i, s in enumerate(sources)]

    names, sizes = [source.name for source in sources], [source.bytes for source in sources]
    of_stream = {"layout": same.layout, "shards": config.stream.shards}
    batches = ShardedBatches(names, sizes, make_readers, config, **of_stream, **mine)
    fingerprint = fingerprint_stream(sources, tokenizer, config)
    return TrainRows(batches, fingerprint, _summarize(sources, config), np.zeros(0, np.int64), sample, same.layout)


def _from_the_start(config: DataConfig) -> DataConfig:
    """One shard, in the order of the files."""
    return dataclasses.replace(config, shuffle=False, stream=dataclasses.replace(config.stream, shards=1))


def sample_stream(tokenizer: Tokenizer | None, config: DataConfig) -> ExampleSet:
    """The first documents of each source of a stream, a packing window of them in all, as ``load_examples`` gives all.

    Raises UserError as ``open_block_source`` does, and where ``config`` has a bad row stop the run.
    """
    config = _from_the_start(config)
    examples: list[Document] = []
    reports, same = [], SameLayout()
    opened = [open_block_source(dataclasses.replace(source, max_epochs=1), config) for source in config.train]
    kind = find_kind([(source.name, source.parser) for source in opened], config)
    for index, source in enumerate(opened):
        stop = len(examples) + -(-config.packing_window // len(config.train))
        reader = BlockReader(source, index, tokenizer, config, 0, same=same)
        reports.append(reader.report)
        while len(examples) < stop and (drawn := reader.draw()):
            examples += drawn[1]
    if not examples:
        raise UserError(f"nothing to train on in the first rows of {', '.join(r.name for r in reports)}")
    example_set = ExampleSet(examples, DataReport(reports, config.sequence_length), {}, kind)
    rows = pack(example_set.lengths, config.sequence_length, window=config.packing_window, method=config.packing)
    example_set.report.packed_rows, example_set.report.used_slots = len(rows), int(example_set.lengths.sum())
    return example_set


def fingerprint_stream(sources: Sequence[BlockSource], tokenizer: Tokenizer | None, config: DataConfig) -> dict:
    """The pipeline, its files by what can be told without reading them."""
    described = []
    for source in sources:
        names = name_files([file.url for file in source.files])
        files = [{"name": n} | _describe(file) for n, file in zip(names, source.files, strict=True)]
        described.append({"name": source.name, "kind": source.parser.form, "files": files} | source.parser.identity)
    return describe_pipeline(described, tokenizer, config)


def _summarize(sources: Sequence[BlockSource], config: DataConfig) -> str:
    lines = [
        f"{source.name}: {count(len(source.files), 'file')}, {source.bytes / 2**20:,.1f} MiB, "
        f"{count(len(source.blocks), 'block')}, kind {source.parser.form}"
        for source in sources
    ]
    return "\n".join(
        [*lines, f"streamed in {count(config.stream.shards, 'shard')}: rows are checked when they are read"]
    )


def _describe(file: StoredFile) -> dict:
    """A local file by its size and three pieces, so that it may be copied; another by size and version."""
    if not is_local(file.url):
        return {"bytes": file.bytes, "version": file.version}
    return {"bytes": file.bytes, "sample": digest(file.url, spread(0, file.bytes, 3, _SAMPLE))}
