"""A shard's share of a source that is read while training goes on, block by block.

Epoch e: the source's blocks in a seeded order, dealt to the shards in turn, so that each block is read once by one
shard. A source that is small, or has fewer blocks than there are shards, is shared row by row: every shard reads all of
it and keeps every n-th row.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from postrain.config import DataConfig, SourceConfig
from postrain.data.batches.epoch_order import permutation
from postrain.data.batches.report import SourceReport
from postrain.data.batches.row_counts import RejectedLog, RowPolicy
from postrain.data.documents import Document, SameLayout
from postrain.data.files.formats import Block, list_blocks, read_block
from postrain.data.files.storage import StorageOptions, StoredFile, list_files, source_name
from postrain.data.kinds.registry import RowParser, render_rows
from postrain.data.messages import BadRow, RowRef
from postrain.data.rendering.render import BATCH
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError

_LEAST_BLOCKS = 16  # of a shard, where files can be divided: with fewer, some shards would have much more than others
_SHARED_BYTES = 64 << 20  # of a source so small that every shard reads all of it, and keeps its share of the rows
_EMPTY_EPOCHS = 3  # in a row without a document: a shard with such a share of a source has none of it
_LEAST_ROWS = 1000  # data.max_bad_fraction is of so many rows at first


@dataclasses.dataclass(frozen=True)
class BlockSource:
    """A source of ``data.train`` in blocks."""

    name: str
    parser: RowParser
    files: list[StoredFile]
    blocks: list[Block]
    max_epochs: int  # 0: no limit
    options: StorageOptions

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def open_block_source(source: SourceConfig, config: DataConfig) -> BlockSource:
    """Lists the files of a source and their blocks, and reads up to the first row that tells the kind.

    Raises:
      UserError: no such files, a storage that does not answer, a file that cannot be read, no row.
    """
    stream = config.stream
    options = StorageOptions(cache_folder=stream.cache_folder, cache_bytes=int(stream.cache_gibibytes * 2**30))
    files = list_files(source.path, options)
    enough = sum(file.bytes for file in files) // (_LEAST_BLOCKS * stream.shards)
    blocks = list_blocks(files, max(min(stream.block_mebibytes << 20, enough), 1 << 16), options)
    if not blocks:
        raise UserError(f"{source.path} has no rows: its {len(files)} files are empty")
    name = source.name or source_name(source.path)
    parser = RowParser(source)
    parser.decide(row for block in blocks for row in _raw_rows(block, name, options))
    if not parser.form:
        raise UserError(f"{source.path}: no row of {parser.expected} in {parser.looked_at}: {parser.advice}")
    return BlockSource(name, parser, files, blocks, source.max_epochs, options)


def _raw_rows(block: Block, name: str, options: StorageOptions) -> Iterator[tuple[RowRef, Any]]:
    rows = read_block(block, name, options)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except BadRow as e:
            yield e.ref, e


class BlockReader:
    """A ``shard.Reader``: the rows of ``source``, the ``index``-th of the config, that are ``shard``'s."""

    def __init__(
        self,
        source: BlockSource,
        index: int,
        tokenizer: Tokenizer | None,
        config: DataConfig,
        shard: int,
        rejected: RejectedLog | None = None,
        same: SameLayout | None = None,
    ):
        self._source, self._index, self._tokenizer, self._config = source, index, tokenizer, config
        self._shard, self._shards = shard, config.stream.shards
        same = same or SameLayout()
        kind, report = source.parser.kind, SourceReport(source.name, left_out_by=source.parser.left_out)
        self._policy = RowPolicy(report, config, kind, same, least_rows=_LEAST_ROWS, rejected=rejected)
        self._uncounted = RowPolicy(SourceReport(source.name), config, kind, same)
        self.seek({"epoch": 0, "block": 0, "row": 0, "empty": 0, "counts": report.counts})

    @property
    def report(self) -> SourceReport:
        """What became of the rows of this shard's first epoch, as far as they were read."""
        return self._policy.report

    @property
    def counts(self) -> dict[str, int]:
        """Of ``report``, up to ``position``."""
        return self.position["counts"]

    def seek(self, position: dict[str, Any]) -> None:
        self.position = dict(position)
        self._ready: collections.deque[tuple[dict, Any, list[Document]]] = collections.deque()
        self._rows = self._read(position["epoch"], position["block"], position["row"])
        # The share of bad rows is judged after a resume as without one, and so is a share without a document.
        self.report.counts = position["counts"]
        self._whole, self._kept, self._empty = position["row"] == position["block"] == 0, False, position["empty"]

    def draw(self) -> tuple[Any, list[Document]] | None:
        while not self._ready:
            if not self._read_some():
                return None
        self.position, key, documents = self._ready.popleft()
        return key, documents

    def _read_some(self) -> bool:
        """Renders the next rows of an epoch. Whether there may be more: not after some epochs without a document."""
        rows, ended = [], False
        for row in self._rows:
            ended = isinstance(row, int)
            rows += [] if ended else [row]
            if ended or len(rows) == BATCH:
                break
        for (place, key, _), documents in zip(rows, self._render([row for *_, row in rows]), strict=True):
            kept = self._keep(documents, first_epoch=place["epoch"] == 0)
            if kept:
                self._ready.append((place | {"empty": 0, "counts": self.report.counts}, key, kept))
                self._kept = True
        if ended:
            self._empty = 0 if self._kept or not self._whole else self._empty + 1
            self._whole, self._kept = True, False
            if not self._ready:
                place = {"epoch": row + 1, "block": 0, "row": 0}
                self.position = place | {"empty": self._empty, "counts": self.report.counts}
        return bool(rows or ended) and self._empty < _EMPTY_EPOCHS

    def _keep(self, documents: list[Document] | BadRow | None, first_epoch: bool) -> list[Document]:
        """As the policy says; counted in the first epoch, after which the rows are known."""
        if not first_epoch:
            kept = [] if documents is None else self._uncounted.fit(documents)
            return [] if isinstance(kept, BadRow) else kept
        self.report.rows += 1
        self.report.left_out += documents is None
        return [] if documents is None else self._policy.keep(documents)

    def fetch(self, keys: Sequence[tuple[int, int]]) -> list[list[Document]]:
        wanted: dict[int, set[int]] = {}
        for block, row in keys:
            wanted.setdefault(block, set()).add(row)
        found = {}
        for block, rows in wanted.items():
            examples = self._examples(block)
            parsed = {i: row for i, row in zip(range(max(rows) + 1), examples, strict=False) if i in rows}
            for i, documents in zip(parsed, self._render(list(parsed.values())), strict=True):
                found[block, i] = self._uncounted.keep(documents)
        return [found[tuple(key)] for key in keys]

    def _read(self, epoch: int, block: int, row: int) -> Iterator[tuple[dict, tuple[int, int], Any] | int]:
        """Rows from a position on, each with the position after it and its key; at the end of each epoch its number."""
        limit = self._source.max_epochs
        while not limit or epoch < limit:
            blocks, shared = self._share(epoch)
            for ordinal in range(block, len(blocks)):
                for i, example in enumerate(self._examples(blocks[ordinal])):
                    if i < row or (shared and (i + blocks[ordinal]) % self._shards != self._shard):
                        continue
                    yield {"epoch": epoch, "block": ordinal, "row": i + 1}, (blocks[ordinal], i), example
                row = 0
            yield epoch
            epoch, block = epoch + 1, 0

    def _share(self, epoch: int) -> tuple[list[int], bool]:
        """This shard's blocks in an epoch, and whether it shares them with all shards, row by row."""
        count = len(self._source.blocks)
        order = permutation(count, (self._config.seed, epoch, self._index, 2)) if self._config.shuffle else range(count)
        shared = count < self._shards or self._source.bytes < _SHARED_BYTES
        return [int(block) for block in (order if shared else order[self._shard :: self._shards])], shared

    def _examples(self, block: int) -> Iterator[Any]:
        """Example, BadRow or None (left out) of each row."""
        rows = read_block(self._source.blocks[block], self._source.name, self._source.options)
        while True:
            try:
                yield self._source.parser.parse(*next(rows))
            except StopIteration:
                return
            except BadRow as e:
                yield e

    def _render(self, rows: list[Any]) -> Iterator[list[Document] | BadRow | None]:
        examples = [row for row in rows if not isinstance(row, BadRow | None)]
        rendered = render_rows(self._source.parser.kind, examples, self._tokenizer, self._config)
        return (row if isinstance(row, BadRow | None) else next(rendered) for row in rows)
