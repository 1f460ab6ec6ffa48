"""A lane's share of a source that is read while training goes on, block by block.

Epoch e: the source's blocks in a seeded order, dealt to the lanes in turn, so that each block is read once by one
lane. Where there are fewer blocks than lanes, a block is shared: of its rows each lane keeps every n-th.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from postrain.config import DataConfig, SourceConfig
from postrain.data.blocks import Block, list_blocks, read_block
from postrain.data.plan import permutation
from postrain.data.policy import RejectedLog, RowPolicy
from postrain.data.rendering import BATCH, Rendered, render_many
from postrain.data.report import SourceReport
from postrain.data.schema import BadRow, Example, RowRef, has_kind, parse_row, row_kind
from postrain.data.storage import StorageOptions, StoredFile, list_files
from postrain.data.tokenizer import Tokenizer
from postrain.errors import UserError

_LEAST_BLOCKS = 16  # of a lane, where files can be divided: with fewer, some lanes would have much more than others
_LEAST_ROWS = 1000  # data.max_bad_fraction is of so many rows at first


@dataclasses.dataclass(frozen=True)
class BlockSource:
    """A source of ``data.train`` in blocks."""

    name: str
    kind: str
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
    enough = sum(file.bytes for file in files) // (_LEAST_BLOCKS * stream.lanes)
    blocks = list_blocks(files, max(min(stream.block_mebibytes << 20, enough), 1 << 16), options)
    name = source.name or files[0].url.rstrip("/").rpartition("/")[2].partition(".")[0]
    kind = source.kind if source.kind != "auto" else _find_kind(name, source.path, blocks, options)
    return BlockSource(name, kind, files, blocks, source.max_epochs, options)


def _find_kind(name: str, path: str, blocks: Sequence[Block], options: StorageOptions) -> str:
    for block in blocks:
        rows = read_block(block, name, options)
        while True:
            try:
                _, raw = next(rows)
            except StopIteration:
                break
            except BadRow:
                continue
            if isinstance(raw, dict) and (kind := row_kind(raw)):
                return kind
    raise UserError(f"{path}: no row of a known kind in it: see docs/data.md for the kinds of rows")


class BlockReader:
    """A ``postrain.data.lane.Reader``: the rows of ``source``, the ``index``-th of the config, that are ``lane``'s."""

    def __init__(
        self,
        source: BlockSource,
        index: int,
        tokenizer: Tokenizer,
        config: DataConfig,
        lane: int,
        rejected: RejectedLog | None = None,
    ):
        self._source, self._index, self._tokenizer, self._config = source, index, tokenizer, config
        self._lane = lane
        self._policy = RowPolicy(SourceReport(source.name), config, least_rows=_LEAST_ROWS, rejected=rejected)
        self.seek({"epoch": 0, "block": 0, "row": 0})

    @property
    def report(self) -> SourceReport:
        """What became of the rows read so far."""
        return self._policy.report

    def seek(self, position: dict[str, int]) -> None:
        self.position = dict(position)
        self._ready: collections.deque[tuple[dict, Any, list[Rendered]]] = collections.deque()
        self._rows = self._read(**position)

    def draw(self) -> tuple[Any, list[Rendered]] | None:
        while not self._ready:
            rows = list(itertools.islice(self._rows, BATCH))
            if not rows:
                return None
            self._policy.report.rows += len(rows)
            for (place, key, _), documents in zip(rows, self._render([row for *_, row in rows]), strict=True):
                if kept := self._policy.keep(documents):
                    self._ready.append((place, key, kept))
        self.position, key, documents = self._ready.popleft()
        return key, documents

    def fetch(self, keys: Sequence[tuple[int, int]]) -> list[list[Rendered]]:
        wanted: dict[int, set[int]] = {}
        for block, row in keys:
            wanted.setdefault(block, set()).add(row)
        found = {}
        policy = RowPolicy(SourceReport(""), self._config, least_rows=_LEAST_ROWS)  # these rows were counted before
        for block, rows in wanted.items():
            examples = self._examples(block)
            parsed = {i: row for i, row in zip(range(max(rows) + 1), examples, strict=False) if i in rows}
            for i, documents in zip(parsed, self._render(list(parsed.values())), strict=True):
                found[block, i] = policy.keep(documents)
        return [found[tuple(key)] for key in keys]

    def _read(self, epoch: int, block: int, row: int) -> Iterator[tuple[dict, tuple[int, int], Example | BadRow]]:
        """Rows from a position on, each with the position after it and its key."""
        limit = self._source.max_epochs
        while not limit or epoch < limit:
            blocks, step, offset = self._share(epoch)
            empty = block == 0 and row == 0
            for ordinal in range(block, len(blocks)):
                for i, example in enumerate(self._examples(blocks[ordinal])):
                    if i < row or i % step != offset:
                        continue
                    empty = False
                    yield {"epoch": epoch, "block": ordinal, "row": i + 1}, (blocks[ordinal], i), example
                row = 0
            if empty:
                return
            epoch, block = epoch + 1, 0

    def _share(self, epoch: int) -> tuple[list[int], int, int]:
        """This lane's blocks in an epoch, and of their rows i those with i % step == offset."""
        count, lanes = len(self._source.blocks), self._config.stream.lanes
        if count < lanes:
            block = self._lane % count
            return [block], len(range(block, lanes, count)), self._lane // count
        order = permutation(count, (self._config.seed, epoch, self._index, 2)) if self._config.shuffle else range(count)
        return [int(block) for block in order[self._lane :: lanes]], 1, 0

    def _examples(self, block: int) -> Iterator[Example | BadRow]:
        rows = read_block(self._source.blocks[block], self._source.name, self._source.options)
        while True:
            try:
                ref, raw = next(rows)
                yield self._parse(ref, raw)
            except StopIteration:
                return
            except BadRow as e:
                yield e

    def _parse(self, ref: RowRef, raw: Any) -> Example:
        kind = self._source.kind
        if isinstance(raw, dict) and not has_kind(raw, kind) and (other := row_kind(raw)):
            raise BadRow(ref, f"expected a row of the source's kind, {kind}; found one of kind {other}")
        return parse_row(raw, kind, ref)

    def _render(self, rows: list[Example | BadRow]) -> Iterator[list[Rendered] | BadRow]:
        config = self._config
        rendered = render_many(
            [row for row in rows if not isinstance(row, BadRow)],
            self._tokenizer,
            template_date=config.template_date,
            default_system=config.default_system,
        )
        return (row if isinstance(row, BadRow) else next(rendered) for row in rows)
