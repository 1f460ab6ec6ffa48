"""What became of every row: counted per source, printed before training, never silent."""

import dataclasses
from collections.abc import Iterable, Mapping


def count(number: int, noun: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


@dataclasses.dataclass
class SourceReport:
    """Counts of one source. Rows go in; documents (training sequences) come out.

    Attributes:
      rows: rows of the source.
      documents: training sequences that are kept.
      tokens: tokens of these documents.
      trained: tokens of them that are trained on (that carry loss).
      too_long: documents left out for their length.
      truncated: documents cut to the length; kept.
      untrained: documents left out because nothing to train on was left of them after the cut.
      split: rows that gave more than one document, because serving would see their turns separately.
      skipped: bad rows left out (``data.on_bad_row = "skip"``).
      longest: tokens of the longest document, before anything was left out or cut.
      left_out: rows that the source's own function left out.
      left_out_by: the name of that function.
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

    @property
    def counts(self) -> dict[str, int]:
        """All that is counted, by name; may be set."""
        return {name: getattr(self, name) for name in COUNTS}

    @counts.setter
    def counts(self, counts: Mapping[str, int]) -> None:
        for name in COUNTS:
            setattr(self, name, counts[name])

    def describe_losses(self) -> str:
        """ "of 120 rows 76 too long (...), 4 bad", or empty where nothing was left out or cut."""
        by = self.left_out_by or "a function"
        longest = f"(data.sequence_length; the longest has {count(self.longest, 'token')})"
        said = {
            f"documents too long {longest}": self.too_long,
            f"documents truncated {longest}": self.truncated,
            "documents with nothing to train on left": self.untrained,
            "rows bad (rejected.jsonl)": self.skipped,
            f"rows left out by {by}": self.left_out,
        }
        found = ", ".join(f"{number:,} {what}" for what, number in said.items() if number)
        return f"of {count(self.rows, 'row')} {found}" if found else ""

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens of the kept documents; 0 when there are none."""
        return self.trained / self.tokens if self.tokens else 0.0


# Names of the counts of a SourceReport.
COUNTS = tuple(field.name for field in dataclasses.fields(SourceReport) if field.type is int)


def add_up(name: str, parts: Iterable[Mapping[str, int]], left_out_by: str = "") -> SourceReport:
    """The report of all ``parts``, each the ``counts`` of one."""
    parts = list(parts)
    total = {c: sum(part[c] for part in parts) for c in COUNTS}
    total["longest"] = max((part["longest"] for part in parts), default=0)
    return SourceReport(name, left_out_by=left_out_by, **total)


@dataclasses.dataclass
class DataReport:
    """A set of sources, and how well their documents fill the rows of the first epoch.

    Attributes:
      sources: one report for each.
      sequence_length: slots of a row.
      packed_rows: rows of the first epoch.
      used_slots: slots of these that hold a document; the rest is padding.
      asked: answers by the switch of the chat template that their prompts were rendered with, as
        "enable_thinking=False", where such a prompt differs from the template's default.
    """

    sources: list[SourceReport]
    sequence_length: int = 0
    packed_rows: int = 0
    used_slots: int = 0
    asked: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> SourceReport:
        """All sources together."""
        return add_up("total", [source.counts for source in self.sources])

    @property
    def fill(self) -> float:
        """Useful slots over all slots of the packed rows; 1 less this is the padding."""
        slots = self.packed_rows * self.sequence_length
        return self.used_slots / slots if slots else 0.0

    def table(self) -> list[tuple[str, ...]]:
        """The counts as text: a header, a line for each source and, of several, their total."""
        header = (
            "source", "rows", "documents", "tokens", "trained", "share",
            "too long", "truncated", "untrained", "split", "skipped", "longest",
        )  # fmt: skip
        lines = self.sources + ([self.total] if len(self.sources) > 1 else [])
        return [header] + [
            (
                s.name, f"{s.rows:,}", f"{s.documents:,}", f"{s.tokens:,}", f"{s.trained:,}", f"{s.trained_share:.1%}",
                *(f"{n:,}" for n in (s.too_long, s.truncated, s.untrained, s.split, s.skipped, s.longest)),
            )
            for s in lines
        ]  # fmt: skip

    def __str__(self) -> str:
        cells = self.table()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([*lines, self.describe_packing(), *self.describe_more()])

    def describe_more(self) -> list[str]:
        """Lines for what is said only where it is so."""
        return [*self.describe_asking(), *self.describe_left_out()]

    def describe_left_out(self) -> list[str]:
        """A line for each function of a source that left rows out."""
        return [
            f"{source.name}: {count(source.left_out, 'row')} of {source.rows:,} left out by {source.left_out_by}"
            for source in self.sources
            if source.left_out
        ]

    def describe_asking(self) -> list[str]:
        """A line for each switch of the chat template that answers were trained after: serving must set it too."""
        return [
            f"{count(number, 'answer')} trained after {how}: serve with it "
            f"(postrain generate --thinking {'off' if how.endswith('False') else 'on'})"
            for how, number in self.asked.items()
        ]

    def describe_packing(self) -> str:
        """One line: rows, their length, and how much of them is used."""
        return (
            f"packing: {count(self.packed_rows, 'row')} of {count(self.sequence_length, 'token')}, "
            f"{self.fill:.2%} filled, {1 - self.fill:.2%} padding"
        )
