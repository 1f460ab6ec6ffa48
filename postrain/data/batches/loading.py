"""Sources -> rendered documents in memory: bad rows, too long ones, counts.

Nothing is left out silently. Every row ends in exactly one of these ways, and each is counted per source: it is
kept (as one document, or split into several), it is bad (``data.on_bad_row``), or it is too long
(``data.too_long``).
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from postrain.config import DataConfig, SourceConfig
from postrain.data.batches.epoch_order import RowPlan
from postrain.data.batches.fingerprint import make_fingerprint
from postrain.data.batches.report import DataReport, SourceReport, count
from postrain.data.batches.row_counts import RowPolicy
from postrain.data.batches.source import Source, open_source
from postrain.data.documents import Document, Layout, SameLayout, layout_of
from postrain.data.kinds.registry import SFT, Kind, find_kind, render_rows
from postrain.data.messages import BadRow
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.files import read_jsonl, write_whole


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Rendered documents of one or more sources.

    Attributes:
      examples: the documents, in the order of the sources; each but prompts has at least one trained token that is
        predicted from another, and takes at most ``sequence_length`` slots.
      report: what became of the rows.
      fingerprint: JSON-able; see ``postrain.data.batches.fingerprint``.
      kind: of all rows.
    """

    examples: list[Document]
    report: DataReport
    fingerprint: dict
    kind: Kind = SFT

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
) -> ExampleSet:
    """Reads and renders all rows of ``sources`` (usually ``config.train`` or ``config.eval``).

    Args:
      tokenizer: from ``load_tokenizer``; None where ``needs_tokenizer`` says that no row is text.
      rejected_path: a JSONL file for bad rows, ``{"file", "line", "reason"}``, where ``config.on_bad_row`` is
        "skip". Lines about other files that stand there already are kept, so train and eval can share it. Of
        several processes, give it to one.
      kind: the only one that the rows may be of; None: any.

    Raises:
      UserError: a source that cannot be read; a bad or too long row where the config says so, naming file and
        line; a larger share of bad rows than ``config.max_bad_fraction``; nothing left to train on.
    """
    examples: list[Document] = []
    opened = [open_source(source) for source in sources]
    found = find_kind([(source.name, source.parser) for source in opened], config, kind) if opened else SFT
    same = SameLayout()
    loaders = [_SourceLoader(source, tokenizer, config, same) for source in opened]
    try:
        for loader in loaders:
            examples += loader.load()
    finally:  # also when the run stops: the reasons are what its user needs then
        if rejected_path is not None:
            _write_rejected(pathlib.Path(rejected_path), loaders)
    asked = collections.Counter(how for example in examples for how in example.asked if how)
    report = DataReport([loader.policy.report for loader in loaders], config.sequence_length, asked=dict(asked))
    if not examples:
        raise UserError(_describe_empty(report, config))
    files = [(loader.source.name, list(loader.files), loader.source.parser.identity) for loader in loaders]
    example_set = ExampleSet(examples, report, make_fingerprint(files, tokenizer, examples, config), found)
    report.packed_rows = len(RowPlan(example_set.lengths, config).rows_of_epoch(0))
    report.used_slots = int(example_set.lengths.sum())
    return example_set


class _SourceLoader:
    """One source's rows through the policies, counted.

    Attributes:
      policy: with the counts and the bad rows left out.
      files: the files that rows came from, in order (as a dict without values).
    """

    def __init__(self, source: Source, tokenizer: Tokenizer | None, config: DataConfig, same: SameLayout):
        self.source, self.tokenizer, self.config = source, tokenizer, config
        report = SourceReport(source.name, rows=len(source), left_out_by=source.parser.left_out)
        self.policy = RowPolicy(report, config, source.parser.kind, same)
        self.files: dict[str, None] = {}

    def load(self) -> list[Document]:
        rendered = render_rows(self.source.parser.kind, self._read(), self.tokenizer, self.config)
        return [kept for documents in rendered for kept in self.policy.keep(documents)]

    def _read(self) -> Iterator[Any]:
        for i in range(len(self.source)):
            try:
                ref, raw = self.source.raw(i)
                self.files[ref.file] = None
                example = self.source.parser.parse(ref, raw)
            except BadRow as e:
                self.files[e.ref.file] = None
                self.policy.reject(e)
                continue
            if example is None:
                self.policy.report.left_out += 1
                continue
            yield example


def _describe_empty(report: DataReport, config: DataConfig) -> str:
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


def _write_rejected(path: pathlib.Path, loaders: list[_SourceLoader]) -> None:
    """Replaces the lines about the files that were read, so that a resume or a second call does not repeat them."""
    files = {file for loader in loaders for file in loader.files}
    rejected = sorted(
        (bad for loader in loaders for bad in loader.policy.rejected), key=lambda b: (b.ref.file, b.ref.line)
    )
    known = [entry for _, entry in read_jsonl(path, drop_torn=True)] if path.exists() else []
    entries = [entry for entry in known if entry.get("file") not in files]
    entries += [{"file": bad.ref.file, "line": bad.ref.line, "reason": bad.reason} for bad in rejected]
    if entries or path.exists():
        write_whole(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
