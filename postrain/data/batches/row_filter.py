"""What becomes of each row: kept, left out for its length or as a bad one. Every outcome is counted, none is silent.

``RowFilter`` applies ``data.too_long``, ``data.on_bad_row`` and ``data.max_bad_fraction``. ``RowCounts`` counts the
outcomes of one source; ``DataReport`` prints those of all sources.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from postrain.config import DataConfig
from postrain.data.bad_row import BadRow
from postrain.data.documents import AS_RENDERED, Document, Preparation, Rendered, SameLayout, split_text
from postrain.data.kinds.registry import Kind, RenderedRow
from postrain.data.row_keys import DATA_KEYS, find_near_key
from postrain.errors import UserError
from postrain.files import read_jsonl

_NAMES_KEPT, _NAMES_SHOWN, _LONGEST_NAME = 200, 20, 60  # of the keys of a source that are not read
_MANY = 0.05  # the share of documents left out for their length that a line of its own tells
_OTHER = ""  # stands for those beyond


def count(number: int, noun: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


@dataclasses.dataclass
class RowCounts:
    """Counts of one source. Rows go in; documents (training sequences) come out.

    Attributes:
      rows: rows of the source.
      documents: training sequences that are kept.
      tokens: tokens of these documents.
      trained: tokens of them that are trained on (that carry loss).
      too_long: documents left out for their length.
      truncated: documents cut to the length; kept.
      untrained: documents left out because nothing to train on was left of them after the cut.
      split: rows that gave more than one document, because serving would see their turns separately, or because they
        are longer than a row and ``data.too_long`` is "split".
      skipped: bad rows left out (``data.on_bad_row = "skip"``).
      longest: tokens of the longest document, before anything was left out or cut.
      left_out: rows that the source's own function left out.
      left_out_by: the name of that function.
      unread: key that was not read -> rows that have it, of those that could be parsed.
    """

    name: str
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: int = 0
    truncated: int = 0
    untrained: int = 0
    split: int = 0
    skipped: int = 0
    longest: int = 0
    left_out: int = 0
    left_out_by: str = ""
    unread: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All counts by name, for a position; ``unread`` where there are any."""
        numbers = {name: getattr(self, name) for name in COUNTS}
        return numbers | ({"unread": dict(self.unread)} if self.unread else {})

    def set(self, counts: Mapping[str, Any]) -> None:
        """Takes the counts of ``to_json``."""
        for name in COUNTS:
            setattr(self, name, counts[name])
        self.unread = dict(counts.get("unread", {}))

    def add_unread(self, names: Iterable[str], rows: int = 1) -> None:
        """Counts ``rows`` rows with these keys. Beyond some hundred names (keys that are ids) all others are one."""
        for name in names:
            name = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."
            name = name if name in self.unread or len(self.unread) < _NAMES_KEPT else _OTHER
            self.unread[name] = self.unread.get(name, 0) + rows

    def format_unread(self) -> str:
        """ "source 'x': keys that were not read: 'difficulty' (120 rows), messages[].foo (3 rows)"; "" without any.

        A key that looks like a misspelt one of the row's text is followed by that one.
        """
        if not self.unread:
            return ""
        names = sorted((name for name in self.unread if name != _OTHER), key=lambda name: (-self.unread[name], name))
        shown = []
        for name in names[:_NAMES_SHOWN]:
            near = find_near_key(name, DATA_KEYS)
            guess = f"; did you mean {near!r}?" if near not in ("", name) else ""
            # A name with control characters, or halves of surrogate pairs, is printed escaped.
            escaped = repr(name)[1:-1] if "[]" in name else repr(name)
            shown.append(f"{escaped} ({count(self.unread[name], 'row')}{guess})")
        more = len(names) - len(shown)
        if more or _OTHER in self.unread:
            shown.append(f"and {more:,}{' or more' * (_OTHER in self.unread)} others")
        return f"source {self.name!r}: keys that were not read: {', '.join(shown)}"

    def format_losses(self) -> str:
        """ "of 120 rows 76 too long (...), 4 bad", or empty where nothing was left out or cut."""
        longest = f"(data.sequence_length; the longest has {count(self.longest, 'token')})"
        losses = {
            f"documents too long {longest}": self.too_long,
            f"documents truncated {longest}": self.truncated,
            "documents with nothing to train on left": self.untrained,
            "rows bad (rejected.jsonl)": self.skipped,
            f"rows left out by {self.left_out_by or 'a function'}": self.left_out,
        }
        found = ", ".join(f"{number:,} {what}" for what, number in losses.items() if number)
        return f"of {count(self.rows, 'row')} {found}" if found else ""


COUNTS = tuple(field.name for field in dataclasses.fields(RowCounts) if field.type is int)


def add_up(name: str, parts: Iterable[Mapping[str, Any]], left_out_by: str = "") -> RowCounts:
    """The sum of ``parts``, each of them from ``RowCounts.to_json``."""
    parts = list(parts)
    total = {c: sum(part[c] for part in parts) for c in COUNTS}
    total["longest"] = max((part["longest"] for part in parts), default=0)
    counts = RowCounts(name, left_out_by=left_out_by, **total)
    for part in parts:
        for key, rows in part.get("unread", {}).items():
            counts.add_unread([key], rows)
    return counts


class RowFilter:
    """What is trained of each row of one source.

    Args:
      counts: where the outcomes are counted. None: of rows that were counted before (in another epoch, or before a
        resume); their bad rows are left out without a word.
      layout: the arrays that all documents must have.
      judged_from: the share of bad rows is that of so many rows at least: a run does not stop because one of its first
        rows is bad. Infinite: ``check_share`` judges.
      preparation: its ``each`` is applied to every document; its ``keys`` must have been read.
      log: takes the bad rows as they are met. Without one they are collected in ``rejected``.
    """

    def __init__(
        self,
        counts: RowCounts | None,
        config: DataConfig,
        kind: Kind,
        layout: SameLayout,
        *,
        preparation: Preparation = AS_RENDERED,
        judged_from: float = 0,
        log: "RejectedLog | None" = None,
    ):
        self.counts, self.rejected = counts or RowCounts(""), []
        self._counted, self._config, self._kind, self._layout = counts is not None, config, kind, layout
        self._each, self._judged_from, self._log = preparation.each, judged_from, log
        self.keys = preparation.keys

    def keep(self, row: RenderedRow) -> list[Document]:
        """The documents to train on.

        Raises:
          UserError: bad rows are not allowed, or exceed ``data.max_bad_fraction``; a document is too long where
            ``data.too_long`` is "error".
        """
        counts, documents = self.counts, row.documents
        counts.rows += 1
        if row.unread:
            counts.add_unread(row.unread)
        if documents is None:
            counts.left_out += 1
            return []
        try:
            if isinstance(documents, BadRow):
                raise documents
            if self._each is not None:
                documents = [self._each(document) for document in documents]
            if self._config.too_long == "split":
                documents = [part for document in documents for part in self._split(document)]
            fitted = [document for document in map(self._fit, documents) if document is not None]
            for document in fitted:
                self._layout.check(document)
        except BadRow as bad:
            if self._counted:
                self._reject(bad)
            return []
        counts.split += len(documents) > 1
        counts.truncated += sum(sequence.truncated for document in fitted for sequence in document.sequences)
        counts.documents += len(fitted)
        counts.tokens += sum(d.num_tokens for d in fitted)
        counts.trained += sum(d.num_trained for d in fitted)
        return fitted

    def check_share(self, bad: BadRow, rows: float | None = None) -> None:
        """Raises UserError where more than ``data.max_bad_fraction`` of ``rows`` (default: those counted) are bad.

        ``bad``: the last of them, to be named.
        """
        allowed, counts = self._config.max_bad_fraction, self.counts
        if counts.skipped > allowed * (counts.rows if rows is None else rows):
            raise UserError(
                f"source {counts.name!r}: {count(counts.skipped, 'bad row')} of {counts.rows:,}, more than "
                f"data.max_bad_fraction = {allowed} allows; the last one is {bad}"
            )

    def _reject(self, bad: BadRow) -> None:
        if self._config.on_bad_row == "error":
            if bad.advice:
                raise bad
            raise BadRow(bad.ref, f"{bad.reason} (data.on_bad_row = 'skip' would leave such rows out)")
        if self._log is None:
            self.rejected.append(bad)
        else:
            self._log.write(bad)
        self.counts.skipped += 1
        self.check_share(bad, max(self.counts.rows, self._judged_from))

    def _split(self, document: Document) -> list[Rendered]:
        """A text in parts that fit, itself where it does; ``find_kind`` has refused other kinds of rows."""
        assert isinstance(document, Rendered)
        self.counts.longest = max(self.counts.longest, document.num_tokens)
        limit = self._config.sequence_length
        return split_text(document, limit) if document.slots > limit else [document]

    def _fit(self, document: Document) -> Document | None:
        """The document, cut or left out (None) if it takes more than ``sequence_length`` slots."""
        counts, limit = self.counts, self._config.sequence_length
        length, slots = document.num_tokens, document.slots
        counts.longest = max(counts.longest, length)
        if slots > limit:
            if self._config.too_long == "error":
                raise UserError(
                    f"{document.ref}: the document has {count(length, 'token')}, data.sequence_length = {limit} takes "
                    f"up to {limit + length - slots}: raise it, or set data.too_long to 'drop'"
                    + (" or 'truncate'" if self._kind.cut else "")
                )
            if self._config.too_long == "drop":
                counts.too_long += 1
                return None
            # find_kind has refused "truncate" for kinds that cannot be cut, groups among them.
            assert self._kind.cut is not None and isinstance(document, Rendered)
            document = self._kind.cut(document, limit)
        if self._kind.is_trained and not document.num_trained:
            counts.untrained += 1
            return None
        return document


class RejectedLog:
    """rejected.jsonl of a stream: each bad row once, however often it is met (in other epochs, after a resume)."""

    def __init__(self, path: pathlib.Path):
        self._path, known = path, read_jsonl(path, drop_torn=True) if path.exists() else []
        self._known = {(e.get("file"), e.get("line"), e.get("byte", 0)) for _, e in known}
        self._begun = False

    def write(self, bad: BadRow) -> None:
        """Adds a line, unless the row is there."""
        place = (bad.ref.file, bad.ref.line, bad.ref.byte)
        if place in self._known:
            return
        self._known.add(place)
        where = {"line": bad.ref.line} if bad.ref.line else {"line": 0, "byte": bad.ref.byte}
        entry = {"file": bad.ref.file, **where, "reason": bad.reason}
        with open(self._path, "ab+") as file:
            if not self._begun:  # a full disk, or a kill, may have cut off the last line
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._begun = True


@dataclasses.dataclass
class DataReport:
    """A set of sources, and how well their documents fill the rows of the first epoch.

    Attributes:
      sources: the counts of each.
      sequence_length: slots of a row.
      packed_rows: rows of the first epoch.
      used_slots: slots of these that hold a document; the rest is padding.
      saved_slots: slots that prompts would take more if each answer had its own.
      fitting_shared: documents that would then be too long.
      template_switches: answers by the switch of the chat template that their prompts were rendered with, as
        "enable_thinking=False", where such a prompt differs from the template's default.
      loss_weights: source -> ``loss_weight``, of those that have another one than 1.
    """

    sources: list[RowCounts]
    sequence_length: int = 0
    packed_rows: int = 0
    used_slots: int = 0
    saved_slots: int = 0
    fitting_shared: int = 0
    template_switches: dict[str, int] = dataclasses.field(default_factory=dict)
    loss_weights: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> RowCounts:
        """All sources together."""
        return add_up("total", [source.to_json() for source in self.sources])

    def table(self) -> list[tuple[str, ...]]:
        """The counts as text: a header, a line for each source and, of several, their total."""
        header = (
            "source", "rows", "documents", "tokens", "trained", "share",
            "too long", "truncated", "nothing to train", "several documents", "bad", "longest",
        )  # fmt: skip
        lines = self.sources + ([self.total] if len(self.sources) > 1 else [])
        cells = [
            (
                s.name, f"{s.rows:,}", f"{s.documents:,}", f"{s.tokens:,}", f"{s.trained:,}",
                f"{s.trained / max(s.tokens, 1):.1%}",
                *(f"{n:,}" for n in (s.too_long, s.truncated, s.untrained, s.split, s.skipped, s.longest)),
            )
            for s in lines
        ]  # fmt: skip
        if self.loss_weights:
            weights = ["loss weight", *(f"{self.loss_weights.get(source.name, 1):g}" for source in self.sources), ""]
            return [(*row, weight) for row, weight in zip([header, *cells], weights, strict=False)]
        return [header, *cells]

    def __str__(self) -> str:
        cells = self.table()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([*lines, *self.format_notes()])

    def format_notes(self) -> list[str]:
        """How many rows there are and how much of them is used. Then a line for each switch of the chat template that
        answers were trained after, as serving must set it too, for each source that lost many documents to the length,
        and for each function of a source that left rows out."""
        slots = self.packed_rows * self.sequence_length
        fill = self.used_slots / slots if slots else 0.0
        packing = (
            f"packing: {count(self.packed_rows, 'row')} of {count(self.sequence_length, 'token')}, "
            f"{fill:.2%} filled, {1 - fill:.2%} padding"
        )
        switches = [
            f"{count(number, 'answer')} trained after {switch}: serve with it "
            f"(postrain generate --thinking {'off' if switch.endswith('False') else 'on'})"
            for switch, number in self.template_switches.items()
        ]
        lengths = [
            f"source {source.name!r}: {source.too_long:,} of {count(source.too_long + source.documents, 'document')} "
            f"left out, longer than data.sequence_length = {self.sequence_length} (the longest has "
            f"{count(source.longest, 'token')})"
            for source in self.sources
            if source.too_long > _MANY * (source.too_long + source.documents)
        ]
        functions = [
            f"{source.name}: {count(source.left_out, 'row')} of {source.rows:,} left out by {source.left_out_by}"
            for source in self.sources
            if source.left_out
        ]
        return [packing, *self.format_shared(), *switches, *lengths, *functions, *self.format_unread()]

    def format_use(self) -> list[str]:
        """For each source a line about the documents that every epoch has of it."""
        return [
            f"{source.name}: {count(source.documents, 'document')} an epoch, of {count(source.rows, 'row')}"
            + (f", loss weight {self.loss_weights[source.name]:g}" if source.name in self.loss_weights else "")
            for source in self.sources
        ]

    def format_shared(self) -> list[str]:
        """A line about prompts that answers share, where they do."""
        if not self.saved_slots:
            return []
        share = self.saved_slots / (self.used_slots + self.saved_slots)
        line = (
            f"shared prompts: {count(self.saved_slots, 'slot')} saved, {share:.1%} of those that the answers would "
            "take with a prompt each"
        )
        if self.fitting_shared:
            line += (
                f"; {count(self.fitting_shared, 'document')} would be too long so, and left out where prompts are not "
                "shared (data.share_prompts)"
            )
        return [line]

    def format_unread(self) -> list[str]:
        """For each source with keys that were not read a line with their counts."""
        return [line for source in self.sources if (line := source.format_unread())]
