"""Registry of the kinds of data: how a row of each is parsed, rendered and cut.

To add one: a pure function from row to example, one from examples to documents (``postrain.data.documents``), and a
line in KINDS. All sources of a data set are of one kind. Some kinds have several forms of row: the first row with the
keys of a form decides the form of its source.

In place of a kind a source may have a function of the user's, which returns rows of any registered form, or None to
leave a row out.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from postrain.config import DataConfig, SourceConfig, format_reader
from postrain.config.functions import PREFIX, identify_function
from postrain.data.bad_row import FUNCTION_ADVICE, BadRow, RowRef, name_keys
from postrain.data.documents import Document, Rendered, cut_end
from postrain.data.kinds import events, labelled, preference, prompts, stepwise, teacher
from postrain.data.messages import SFT_FORMS, Example, check_object, find_form, find_forms, parse_row
from postrain.data.rendering.render import render_many
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.data.row_keys import find_near_key
from postrain.errors import UserError

_ENOUGH = 1000  # rows without a known form, after which ``decide`` gives up on a source


@dataclasses.dataclass(frozen=True)
class Kind:
    """How rows become documents.

    Attributes:
      forms: form of row -> the keys by which it is recognised.
      parse: (row, form or "" where it is unknown, ref, unread) -> example; adds the keys of the row that it does not
        read to the set ``unread``; raises BadRow.
      render: (examples, tokenizer, and of the config ``options``) -> the documents of each example, or its BadRow.
      cut: (document, slots) -> the document cut to length; None where part of a document cannot be used.
      is_trained: whether documents without a trained token are left out.
      is_weighted: whether rows count by ``weight``, and by the ``loss_weight`` of their source.
      is_text: whether its tokens are those of a tokenizer.
      options: the keys of ``DataConfig`` by which it is rendered.
      version: part of the data fingerprint (but for kind sft, whose code is the tokenizer's): bump it when a code
        change makes other documents of the same rows.
    """

    name: str
    forms: Mapping[str, tuple[str, ...]]
    parse: Callable[[dict, str, RowRef, set[str]], Any]
    render: Callable[..., Iterator[Sequence[Document] | BadRow]]
    cut: Callable[[Rendered, int], Rendered] | None
    is_trained: bool = True
    is_weighted: bool = False
    is_text: bool = True
    options: tuple[str, ...] = ("template_date", "default_system")
    version: int = 1


class RenderedRow(NamedTuple):
    """What a row became: its documents, its BadRow, or None where the source's function left it out.

    ``unread``: the names of its keys that were not read.
    """

    documents: Sequence[Document] | BadRow | None
    unread: Sequence[str] = ()


def _parse_sft(raw: dict, form: str, ref: RowRef, unread: set[str]) -> Any:
    return parse_row(raw, form or "sft", ref, unread)


def _render_sft(examples: Iterable[Example], *args: Any, **options: Any) -> Iterator[list[Rendered] | BadRow]:
    """The sequences of each row, with its weight."""
    examples, rendered = itertools.tee(examples)
    for example, result in zip(examples, render_many(rendered, *args, **options), strict=True):
        if example.weight != 1 and not isinstance(result, BadRow):
            result = [dataclasses.replace(one, weight=example.weight) for one in result]
        yield result


def _render_parsed(examples: Iterable[Rendered], tokenizer: Any, **_: Any) -> Iterator[list[Document] | BadRow]:
    """For rows of ids, which are documents as soon as they are parsed."""
    return ([example] for example in examples)


SFT = Kind("sft", SFT_FORMS, _parse_sft, _render_sft, cut_end, is_weighted=True)
KINDS = {
    kind.name: kind
    for kind in (
        SFT,
        Kind("preference", preference.FORMS, preference.parse_preference, preference.render_preferences, None),
        Kind(
            "labelled", labelled.FORMS, labelled.parse_labelled, labelled.render_labelled, None,
            options=("label_names", "label_numbers", "template_date", "default_system"),
        ),
        # 2: the first step is encoded after the special token that the prompt ends with.
        Kind("stepwise", stepwise.FORMS, stepwise.parse_steps, stepwise.render_steps, None, version=2),
        Kind("kd", teacher.FORMS, teacher.parse_teacher_row, _render_parsed, cut_end, is_weighted=True),
        Kind("events", events.FORMS, events.parse_events, _render_parsed, events.keep_latest, is_text=False),
        Kind("prompts", prompts.FORMS, prompts.parse_prompt, prompts.render_prompts, None, is_trained=False),
    )
}  # fmt: skip
# Every form and its kind. Rows of several kinds have a prompt, so kind prompts is tried last.
_FORMS = {form: keys for kind in KINDS.values() for form, keys in kind.forms.items()}
_KIND_OF = {form: kind for kind in KINDS.values() for form in kind.forms}


class RowParser:
    """Rows of one source -> examples.

    Attributes:
      kind: the kind of the data; with a function, known once ``decide`` has met a row.
      form: the form of the rows; "" where it is unknown, and then ``advice`` says what to do.
      expected: the kind in words.
      looked_at: how much of the source ``decide`` has read, in words.
      left_out: the name of the user's function, which may leave rows out; "" without a function.
      loss_weight: of the source.
      identity: the part of a data fingerprint of kind, function and ``loss_weight``; {} for kind sft alone.
    """

    def __init__(self, config: SourceConfig):
        declared = config.kind
        self.left_out, self._function, self.loss_weight = "", None, config.loss_weight
        self._decided_by: RowRef | None = None
        self._allowed: Mapping[str, tuple[str, ...]] = _FORMS
        self.advice = "see docs/data.md for the kinds of rows"
        self.looked_at = "it"
        self.form: str = declared if declared in SFT_FORMS else ""
        self._is_declared = bool(self.form)
        if callable(declared):
            self._function, self.left_out = declared, declared.__qualname__
            self.kind, self.expected = SFT, "a known kind"
        elif declared in KINDS or self.form:
            self.kind = _KIND_OF[declared] if self.form else KINDS[declared]
            self._allowed, self.expected = self.kind.forms, f"kind {declared}"
        else:
            known = ", ".join([*KINDS, *SFT_FORMS])
            hint = ": config.json only names it; run with the config file" if declared.startswith(PREFIX) else ""
            raise UserError(f"kind of source {config.path} must be one of {known}; found {declared!r}{hint}")

    @property
    def identity(self) -> dict[str, Any]:
        kind = {} if self.kind is SFT else {"kind": self.kind.name, "kinds_version": self.kind.version}
        weight = {"loss_weight": self.loss_weight} if self.loss_weight != 1 else {}
        return kind | weight | ({"function": identify_function(self._function, "kind")} if self._function else {})

    def decide(self, rows: Iterable[tuple[RowRef, Any]]) -> None:
        """Finds the form, unless the config declares it, by the first row that has one. A bad row may be its BadRow."""
        other_kinds, bad, shapes, undecided = [], [], [], 0
        for ref, raw in () if self._is_declared else rows:
            try:
                row = self._apply(ref, raw)
                if row is not None:
                    check_object(row, ref)
            except BadRow as e:
                bad = bad or [str(e)]
                row = e
            found = row if isinstance(row, dict) else {}
            if form := find_form(found, self._allowed):
                self._check_one_form(found, ref)
                self.form, self.kind, self._decided_by = form, _KIND_OF[form], ref
                return
            if other := self._find_other_form(found):
                other_kinds = other_kinds or [f"{ref} {_format_kind(_KIND_OF[other], self.kind)}"]
            if found and not shapes:
                shapes = [f"{self.advice}; {ref} has the keys {name_keys(found)}: {FUNCTION_ADVICE}"]
            undecided += row is not None
            if undecided == _ENOUGH:
                self.looked_at = f"its first {_ENOUGH:,}"
                break
        self.advice = next(iter([*other_kinds, *bad, *shapes, self.advice]))

    def parse(self, ref: RowRef, raw: Any, unread: set[str] | None = None, beside: dict | None = None) -> Any:
        """The example of a row; None where the function leaves it out. Raises BadRow.

        ``unread`` takes the keys that are not read: of what a function returned, where there is one. ``beside`` gets,
        for each of its keys, the row's value; they count as read.
        """
        row = self._apply(ref, raw)
        if row is None and self._function:
            return None
        try:
            row = check_object(row, ref)
            if not self.form or any(row.get(key) is None for key in _FORMS[self.form]):
                self._refuse_other(row, ref)
            unread = set() if unread is None else unread
            example = self.kind.parse(row, self.form, ref, unread)
            if beside:
                _check_beside(row, beside, ref)
                beside |= {key: row.get(key) for key in beside}
                unread.difference_update(beside)
            return example
        except BadRow as e:
            if not self._function:
                raise
            advice = f"have {self.left_out} make rows of one kind" if e.advice else ""
            raise BadRow(ref, f"what {self.left_out} made of it: {e.reason}", advice) from None

    def render(
        self,
        rows: Iterable[tuple[RowRef, Any]],
        tokenizer: Tokenizer | None,
        config: DataConfig,
        keys: Sequence[str] = (),
    ) -> Iterator[RenderedRow]:
        """What each row becomes. All are parsed first, as it is several times as fast to render many together.

        ``keys``: of rows, that their documents are to have as ``metadata``.
        """
        parsed: list[Any] = []
        not_read: list[Sequence[str]] = []
        values: list[dict] = []
        for ref, raw in rows:
            unread: set[str] = set()
            values.append(dict.fromkeys(keys))
            try:
                parsed.append(self.parse(ref, raw, unread, values[-1]))
            except BadRow as e:
                parsed.append(e)
                unread = set()
            not_read.append(sorted(unread) if unread else ())
        examples = [example for example in parsed if not isinstance(example, BadRow | None)]
        options = {key: getattr(config, key) for key in self.kind.options}
        rendered = self.kind.render(examples, tokenizer, **options)
        return (
            RenderedRow(example if isinstance(example, BadRow | None) else self._add(next(rendered), beside), unread)
            for example, unread, beside in zip(parsed, not_read, values, strict=True)
        )

    def _add(self, documents: Sequence[Document] | BadRow, beside: dict) -> Sequence[Document] | BadRow:
        """The documents of a row with the source's ``loss_weight``, and with ``beside`` as metadata."""
        factor = self.loss_weight
        if isinstance(documents, BadRow) or (factor == 1 and not beside):
            return documents
        added = []
        for document in documents:
            assert isinstance(document, Rendered)  # of a kind that is weighted: find_kind refuses others
            added.append(dataclasses.replace(document, metadata=beside or None, weight=document.weight * factor))
        return added

    def _apply(self, ref: RowRef, raw: Any) -> Any:
        if isinstance(raw, BadRow):
            raise raw
        if not self._function:
            return raw
        try:
            return self._function(check_object(raw, ref))
        except BadRow:
            raise
        except (Exception, SystemExit) as e:  # any error of the user's function names its row
            raise BadRow(ref, f"{self.left_out}: {type(e).__name__}: {e}") from e

    def _check_one_form(self, row: dict, ref: RowRef) -> None:
        """Raises BadRow for a row of two forms of a kind: one of them would be trained, and the other one dropped.

        Text beside another form is taken as that form rendered by a template, which some tables have.
        """
        forms = [form for form in find_forms(row, self._allowed) if form not in ("text", "labelled_text")]
        if len(forms) > 1 and len({_KIND_OF[form].name for form in forms}) == 1:
            keys = " and of ".join(" and ".join(map(repr, _FORMS[form])) for form in forms)
            advice = f"have {self.left_out} return one of them" if self.left_out else ""
            if not advice and all(form in SFT_FORMS for form in forms):
                advice = f"say which with kind={' or kind='.join(map(repr, forms))} for the source"
            raise BadRow(
                ref, f"the row is one of {keys}, and only one of them is trained", advice or "take the other keys out"
            )

    def _find_other_form(self, row: dict) -> str:
        """The form that a row has instead of the source's; empty where it has none, or only lacks a key of its own."""
        form = find_form(row, _FORMS)
        if form == self.form or (self.kind.name == "labelled" and form in SFT_FORMS):  # which lacks its label
            return ""
        if form in prompts.FORMS:  # rows of many kinds have a prompt
            own = {key for keys in self.kind.forms.values() for key in keys} - {"prompt"}
            misspelt = any(find_near_key(str(key), tuple(sorted(own))) for key in row)
            return "" if self.form or misspelt or not own.isdisjoint(row) else form
        return form

    def _refuse_other(self, row: dict, ref: RowRef) -> None:
        """Raises BadRow for a row of another form than the source's; a row of no form is refused by ``Kind.parse``."""
        other = self._find_other_form(row)
        if not other:
            return
        kind, same = _KIND_OF[other], _KIND_OF[other] is self.kind
        expected, found = (self.form, other) if same else (self.kind.name, kind.name)
        if self._is_declared:
            raise BadRow(ref, f"expected a row of the source's kind, {self.form}; found one of kind {found}")
        if self._decided_by is None:
            keys = ", or ".join(" and ".join(map(repr, keys)) for keys in self.kind.forms.values())
            reason = f"expected a row of {self.expected}, with the keys {keys}; found {name_keys(row)}"
            raise BadRow(ref, f"{reason}; it {_format_kind(kind, self.kind)}")
        raise BadRow(
            ref,
            f"expected a row of kind {expected}, as the first at {self._decided_by}; found one of kind {found}",
            f"a source has one kind: put the {found} rows into a file of their own, and list both in the config",
        )


def _check_beside(row: dict, wanted: Iterable[str], ref: RowRef) -> None:
    """Raises BadRow for a key that is a misspelt one of those without which a row is refused."""
    needed = tuple(key for key in wanted if key in ("reward", "propensity") and row.get(key) is None)
    for key in row if needed else ():
        if near := find_near_key(str(key), needed):
            raise BadRow(ref, f"unknown key {key!r:.60}; did you mean {near!r}?")


def _format_kind(kind: Kind, wanted: Kind) -> str:
    """What to do with a row of another kind than the recipe reads."""
    if reader := format_reader(kind.name, wanted.name):
        return f"is a row of kind {kind.name}, for {reader}"
    return f"is a row of kind {kind.name}: set kind='{kind.name}' for the source"


def find_kind(sources: Sequence[tuple[str, RowParser]], config: DataConfig, expected: str | None = None) -> Kind:
    """The one kind of all sources, each (name, parser). ``expected``: the only kind that the recipe reads.

    Raises:
      UserError: two kinds, a kind other than ``expected``, one that cannot be cut where the config says so, or that
        has no weights of rows where a source has one.
    """
    (name, parser), *others = sources
    kind = parser.kind
    for other, other_parser in others:
        if other_parser.kind is not kind:
            raise UserError(
                f"source {name!r} is of kind {kind.name} and source {other!r} of kind {other_parser.kind.name}: the "
                "sources of a data set are of one kind"
            )
    if expected is not None and kind.name != expected:
        reader = format_reader(kind.name, expected)
        advice = f"they are for {reader}" if reader else "give it rows of that kind, or use another recipe"
        if kind.name == "labelled" and expected == "sft" and parser.left_out:
            advice = f"have {parser.left_out} take 'label' out of them, or use another recipe"
        raise UserError(
            f"source {name!r} has rows of kind {kind.name}, and the recipe reads rows of kind {expected}: {advice}"
        )
    if kind.cut is None and config.too_long == "truncate":
        raise UserError(
            f"config key 'data.too_long' = 'truncate': part of a row of kind {kind.name} cannot be used (source "
            f"{name!r}): set it to 'drop' or 'error'"
        )
    for source, of_source in sources:
        if config.too_long == "split" and (kind is not SFT or of_source.form not in ("text", "")):
            raise UserError(
                f"config key 'data.too_long' = 'split' is for plain text, and source {source!r} has rows of kind "
                f"{of_source.form if kind is SFT else kind.name}: a later part would have lost what it answers: set it "
                "to 'drop', " + ("'truncate' or 'error'" if kind.cut else "or 'error'")
            )
        if of_source.loss_weight != 1 and not kind.is_weighted:
            raise UserError(
                f"config key 'loss_weight' of source {source!r}: rows of kind {kind.name} all count the same: leave it "
                "out, or give the source a 'weight', its share of the rows"
            )
    return kind


def needs_tokenizer(sources: Sequence[SourceConfig]) -> bool:
    """Whether rows of these sources may be text, by the config alone."""
    return any(not isinstance(s.kind, str) or s.kind not in KINDS or KINDS[s.kind].is_text for s in sources)
