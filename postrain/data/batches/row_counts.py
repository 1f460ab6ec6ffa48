"""What becomes of a row: kept, left out for its length or as a bad one; each way is counted, none is silent."""

import json
import pathlib

from postrain.config import DataConfig
from postrain.data.batches.report import SourceReport, count
from postrain.data.documents import Document, SameLayout
from postrain.data.kinds.registry import Kind
from postrain.data.messages import BadRow
from postrain.errors import UserError
from postrain.files import read_jsonl


class RowPolicy:
    """``data.too_long``, ``data.on_bad_row`` and ``data.max_bad_fraction`` on the rows of one source.

    Attributes:
      report: the counts; what ``rows`` says is up to the caller.
      rejected: bad rows left out.
    """

    def __init__(
        self,
        report: SourceReport,
        config: DataConfig,
        kind: Kind,
        same: SameLayout,
        *,
        least_rows: int = 0,
        rejected: "RejectedLog | None" = None,
    ):
        """``same``: the arrays that all documents have that are kept.

        ``least_rows``: the share of bad rows is that of so many, as long as fewer are known.

        ``rejected``: bad rows are written there as they are met, and not kept.
        """
        self.report, self.config, self.kind, self.rejected = report, config, kind, []
        self._same, self._least_rows, self._log = same, least_rows, rejected

    def keep(self, documents: list[Document] | BadRow) -> list[Document]:
        """What is trained of a row as ``render_rows`` gives it, counted. Raises UserError as the config says."""
        kept, report = self.fit(documents), self.report
        if isinstance(kept, BadRow):
            self.reject(kept)
            return []
        report.split += len(documents) > 1
        report.truncated += sum(sequence.truncated for document in kept for sequence in document.sequences)
        report.documents += len(kept)
        report.tokens += sum(d.num_tokens for d in kept)
        report.trained += sum(d.num_trained for d in kept)
        return kept

    def fit(self, documents: list[Document] | BadRow) -> list[Document] | BadRow:
        """What is left of a row for its length, all with the arrays of the first document that was kept."""
        if isinstance(documents, BadRow):
            return documents
        kept = [fitted for fitted in map(self._fit, documents) if fitted is not None]
        try:
            for document in kept:
                self._same.check(document)
        except BadRow as e:
            return e
        return kept

    def reject(self, bad: BadRow) -> None:
        """Leaves a bad row out. Raises UserError where the config has none of it, or of so many."""
        if self.config.on_bad_row == "error":
            if bad.advice:
                raise bad
            raise BadRow(bad.ref, f"{bad.reason} (data.on_bad_row = 'skip' would leave such rows out)")
        if self._log is None:
            self.rejected.append(bad)
        else:
            self._log.write(bad)
        self.report.skipped += 1
        allowed = self.config.max_bad_fraction
        if self.report.skipped > allowed * max(self.report.rows, self._least_rows):
            raise UserError(
                f"source {self.report.name!r}: {count(self.report.skipped, 'bad row')} of {self.report.rows:,}, more "
                f"than data.max_bad_fraction = {allowed} allows; the last one is {bad}"
            )

    def _fit(self, document: Document) -> Document | None:
        """The document, cut or left out (None) if it takes more than ``sequence_length`` slots."""
        report, limit = self.report, self.config.sequence_length
        length, slots = document.num_tokens, document.slots
        report.longest = max(report.longest, length)
        if slots > limit:
            if self.config.too_long == "error":
                raise UserError(
                    f"{document.ref}: the document has {count(length, 'token')}, data.sequence_length = {limit} takes "
                    f"up to {limit + length - slots}: raise it, or set data.too_long to 'drop'"
                    + (" or 'truncate'" if self.kind.cut else "")
                )
            if self.config.too_long == "drop":
                report.too_long += 1
                return None
            document = self.kind.cut(document, limit)
        if self.kind.is_trained and not document.num_trained:
            report.untrained += 1
            return None
        return document


class RejectedLog:
    """rejected.jsonl of a stream: each bad row once, however often it is met (in other epochs, after a resume)."""

    def __init__(self, path: pathlib.Path):
        self._path, known = path, read_jsonl(path, drop_torn=True) if path.exists() else []
        self._known = {(e.get("file"), e.get("line"), e.get("byte", 0)) for _, e in known}
        self._begun = False

    def write(self, bad: BadRow) -> None:
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
