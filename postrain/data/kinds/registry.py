"""The kinds of data, by name: how a row of each is read, rendered and cut.

To add one: a pure function from row to example, one from examples to documents (``postrain.data.documents``), and a
line in KINDS. All sources of a data set are of one kind. Some kinds have several forms of row; the first row that has
the keys of one decides the form of its source.

A function of the user's in place of a kind gives rows of any registered form, or None to leave a row out.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from postrain.config import DataConfig, SourceConfig
from postrain.config.functions import PREFIX, identify_function
from postrain.data.documents import Document, Rendered, cut_end
from postrain.data.kinds import events, preference, prompts, teacher
from postrain.data.messages import SFT_FORMS, BadRow, RowRef, check_object, find_form, name_keys, parse_row
from postrain.data.rendering.render import render_many
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError

# Part of the data fingerprint: to be counted up whenever rows that are not of kind sft would give other documents.
KINDS_VERSION = 1

_ENOUGH = 1000  # rows that do not tell the form: a source is not read further for one


@dataclasses.dataclass(frozen=True)
class Kind:
    """How rows become documents.

    Attributes:
      forms: form of row -> the keys that tell it.
      parse: (row, form or "" where it has none, ref) -> example; raises BadRow.
      render: (examples, tokenizer, template_date=, default_system=) -> the documents of each, or why there are none.
      cut: (document, slots) -> what is left of it; None where part of a document is of no use.
      is_trained: whether a document without a trained token is left out.
      is_text: whether its tokens are a tokenizer's.
    """

    name: str
    forms: Mapping[str, tuple[str, ...]]
    parse: Callable[[dict, str, RowRef], Any]
    render: Callable[..., Iterator[list[Document] | BadRow]]
    cut: Callable[[Rendered, int], Rendered] | None
    is_trained: bool = True
    is_text: bool = True


def _parse_sft(raw: dict, form: str, ref: RowRef) -> Any:
    return parse_row(raw, form or "sft", ref)


def _render_parsed(examples: Iterable[Rendered], tokenizer: Any, **_: Any) -> Iterator[list[Document] | BadRow]:
    """For rows of ids, which are documents as soon as they are parsed."""
    return ([example] for example in examples)


SFT = Kind("sft", SFT_FORMS, _parse_sft, render_many, cut_end)
KINDS = {
    kind.name: kind
    for kind in (
        SFT,
        Kind("preference", preference.FORMS, preference.parse_preference, preference.render_preferences, None),
        Kind("kd", teacher.FORMS, teacher.parse_teacher_row, _render_parsed, cut_end),
        Kind("events", events.FORMS, events.parse_events, _render_parsed, events.keep_latest, is_text=False),
        Kind("prompts", prompts.FORMS, prompts.parse_prompt, prompts.render_prompts, None, is_trained=False),
    )
}  # fmt: skip
# Every form and its kind. Rows of several have a prompt: that alone is looked for last.
_FORMS = {form: keys for kind in KINDS.values() for form, keys in kind.forms.items()}
_KIND_OF = {form: kind for kind in KINDS.values() for form in kind.forms}


class RowParser:
    """Rows of one source -> examples.

    Attributes:
      kind: of the data; where a function decides, known once ``decide`` has met a row.
      form: of the rows; "" where none has told it, and then ``advice`` says what to do.
      expected: the kind in words.
      looked_at: how much of the source ``decide`` has read, in words.
      left_out: what to call the rows that the function leaves out; "" without a function.
      identity: what a data fingerprint says of it besides; {} for kind sft.
    """

    def __init__(self, config: SourceConfig):
        given = config.kind
        self.left_out, self._function, self._decided_by = "", None, None
        self.advice = "see docs/data.md for the kinds of rows"
        self.looked_at = "it"
        self.form = given if given in SFT_FORMS else ""
        self._told = bool(self.form)
        if callable(given):
            self._function, self.left_out = given, given.__qualname__
            self._allowed, self.kind, self.expected = _FORMS, SFT, "a known kind"
        elif given in KINDS or self.form:
            self.kind = _KIND_OF[given] if self.form else KINDS[given]
            self._allowed, self.expected = self.kind.forms, f"kind {given}"
        else:
            known = ", ".join([*KINDS, *SFT_FORMS])
            hint = ": config.json only names it; run with the config file" if given.startswith(PREFIX) else ""
            raise UserError(f"kind of source {config.path} must be one of {known}; found {given!r}{hint}")

    @property
    def identity(self) -> dict[str, Any]:
        told = {} if self.kind is SFT else {"kind": self.kind.name, "kinds_version": KINDS_VERSION}
        return told | ({"function": identify_function(self._function, "kind")} if self._function else {})

    def decide(self, rows: Iterable[tuple[RowRef, Any]]) -> None:
        """Finds the form in the first of the rows that has one, unless it is known; a BadRow stands for a bad one."""
        others, bad, untold = [], [], 0
        for ref, raw in () if self._told else rows:
            try:
                row = self._apply(ref, raw)
            except BadRow as e:
                bad = bad or [str(e)]
                row = e
            found = row if isinstance(row, dict) else {}
            if form := find_form(found, self._allowed):
                self.form, self.kind, self._decided_by = form, _KIND_OF[form], ref
                return
            if other := find_form(found, _FORMS):
                others = others or [f"{ref} {_format_kind(_KIND_OF[other])}"]
            untold += row is not None
            if untold == _ENOUGH:
                self.looked_at = f"its first {_ENOUGH:,}"
                break
        self.advice = next(iter([*others, *bad, self.advice]))

    def parse(self, ref: RowRef, raw: Any) -> Any:
        """The row's example, None where the function leaves it out. Raises BadRow."""
        row = self._apply(ref, raw)
        if row is None and self._function:
            return None
        try:
            row = check_object(row, ref)
            if not self.form or not all(key in row for key in _FORMS[self.form]):
                self._refuse_other(row, ref)
            return self.kind.parse(row, self.form, ref)
        except BadRow as e:
            if not self._function:
                raise
            advice = f"have {self.left_out} make rows of one kind" if e.advice else ""
            raise BadRow(ref, f"what {self.left_out} made of it: {e.reason}", advice) from None

    def _apply(self, ref: RowRef, raw: Any) -> Any:
        if isinstance(raw, BadRow):
            raise raw
        if not self._function:
            return raw
        try:
            return self._function(check_object(raw, ref))
        except BadRow:
            raise
        except (Exception, SystemExit) as e:  # whatever the user's own function makes of a row is told with the row
            raise BadRow(ref, f"{self.left_out}: {type(e).__name__}: {e}") from e

    def _refuse_other(self, row: dict, ref: RowRef) -> None:
        """Raises BadRow for a row of another form than the source's; a row of none is the kind's to refuse."""
        other = find_form(row, _FORMS)
        if not other or (self.form and other in prompts.FORMS):  # rows of many kinds have a prompt
            return
        kind, same = _KIND_OF[other], _KIND_OF[other] is self.kind
        expected, found = (self.form, other) if same else (self.kind.name, kind.name)
        if self._told:
            raise BadRow(ref, f"expected a row of the source's kind, {self.form}; found one of kind {found}")
        if self._decided_by is None:
            keys = ", or ".join(" and ".join(map(repr, keys)) for keys in self.kind.forms.values())
            reason = f"expected a row of {self.expected}, with the keys {keys}; found {name_keys(row)}"
            raise BadRow(ref, f"{reason}; it {_format_kind(kind)}")
        raise BadRow(
            ref,
            f"expected a row of kind {expected}, as the first at {self._decided_by}; found one of kind {found}",
            f"a source has one kind: put the {found} rows into a file of their own, and list both in the config",
        )


def _format_kind(kind: Kind) -> str:
    return f"is a row of kind {kind.name}: set kind='{kind.name}' for the source"


def find_kind(sources: Sequence[tuple[str, RowParser]], config: DataConfig, expected: str | None = None) -> Kind:
    """The one kind of all sources, (name, parser) each. ``expected``: the only one that the caller can use.

    Raises:
      UserError: two kinds, another than expected, or one that cannot be cut where the config says so.
    """
    (name, parser), *others = sources
    kind = parser.kind
    for other, another in others:
        if another.kind is not kind:
            raise UserError(
                f"source {name!r} is of kind {kind.name} and source {other!r} of kind {another.kind.name}: the sources "
                "of a data set are of one kind"
            )
    if expected is not None and kind.name != expected:
        raise UserError(
            f"source {name!r} has rows of kind {kind.name}, and the recipe reads rows of kind {expected}: give it such "
            "rows, or another recipe that kind"
        )
    if kind.cut is None and config.too_long == "truncate":
        raise UserError(
            f"config key 'data.too_long' = 'truncate': part of a row of kind {kind.name} is of no use (source "
            f"{name!r}): set it to 'drop' or 'error'"
        )
    return kind


def render_rows(
    kind: Kind, examples: Iterable[Any], tokenizer: Tokenizer | None, config: DataConfig
) -> Iterator[list[Document] | BadRow]:
    """The documents of each example, or why there are none."""
    options = {"template_date": config.template_date, "default_system": config.default_system}
    return kind.render(examples, tokenizer, **options)


def needs_tokenizer(sources: Sequence[SourceConfig]) -> bool:
    """Whether rows of these sources are text, as far as the config tells."""
    return any(not isinstance(s.kind, str) or s.kind not in KINDS or KINDS[s.kind].is_text for s in sources)
