"""What rows become: sequences of tokens, alone or in groups that share a row of a batch, and the arrays they bring."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from postrain.data.bad_row import BadRow, RowRef
from postrain.errors import UserError

_ID_ARRAYS = ("tokens", "targets", "teacher_ids")  # of a batch, those that hold ids of the vocabulary


class Field(NamedTuple):
    """An array of a sequence besides its tokens: ``values`` [L, ...], one entry for each token.

    ``of``: what entry t is about. "token": it is read together with token t. "target": it is about the prediction of
    token t, as the loss mask is, and stands where token t is the target. "sequence": all entries are the same and about
    the whole sequence, such as its score; they stand in all slots that are the sequence's own.
    """

    name: str
    values: np.ndarray
    of: Literal["token", "target", "sequence"]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One sequence, of its own in what it sees: a segment of a packed row.

    Attributes:
      tokens: int32 [L].
      loss_mask: bool [L]; ``loss_mask[t]``: token ``t`` is itself to be produced by the model (not shifted).
        Never true at ``t = 0``, which nothing predicts; true somewhere, but in prompts.
      ref: the row that it comes from.
      truncated: it was cut to the length (``data.too_long``); of text the end, and with it part of its last answer.
      template_switches: for each answer the switch of the template that its prompt was rendered with, as
        "enable_thinking=False", where that differs from the default prompt, else ""; empty where all are "".
      fields: further arrays.
      reads_last: its last token is read too, not only predicted: of a prompt, whose answer begins after it, and where a
        head reads the hidden state there.
      metadata: what else the row says, for whoever scores what is generated; None but for prompts, and for what is
        yet to be prepared.
      weight: how much each of its trained tokens counts beside those of other rows; 0: it is not trained on.
      weights: float32 [L], factors of ``weight`` for single tokens, above 0; None: all are 1.
      form: what of a row it was rendered from: "messages", through the chat template; without one a "prompt" and an
        answer that are text, or a "text" alone; "" where the row was ids, or is a prompt.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    ref: RowRef
    truncated: bool = False
    template_switches: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()
    reads_last: bool = False
    metadata: dict[str, Any] | None = None
    weight: float = 1.0
    weights: np.ndarray | None = None
    form: Literal["messages", "prompt", "text", ""] = ""

    @property
    def sequences(self) -> tuple["Rendered", ...]:
        return (self,)

    @property
    def slots(self) -> int:
        """Slots of a packed row that it takes: a last token that is only predicted, never read, takes none."""
        return len(self.tokens) - 1 + self.reads_last

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        return int(self.loss_mask[1:].sum()) if self.weight else 0


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences of one row that share a row of the batch: the answers to one prompt, each with its ``scores``.

    Attributes:
      sequences: in the order of the row.
      shared_slots: of their common beginning, which is laid out once, before the rest of each; None: every sequence is
        laid out whole.
    """

    sequences: tuple[Rendered, ...]
    shared_slots: int | None = None

    @property
    def ref(self) -> RowRef:
        return self.sequences[0].ref

    @property
    def template_switches(self) -> tuple[str, ...]:
        return tuple(switch for sequence in self.sequences for switch in sequence.template_switches)

    @property
    def slots(self) -> int:
        return sum(sequence.slots for sequence in self.sequences) - self.saved_slots

    @property
    def saved_slots(self) -> int:
        """Slots that the common beginning would take more if every sequence had its own."""
        return (len(self.sequences) - 1) * (self.shared_slots or 0)

    @property
    def num_tokens(self) -> int:
        """Of all sequences, whether or not some are laid out once."""
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def num_trained(self) -> int:
        return sum(sequence.num_trained for sequence in self.sequences)


Document = Rendered | Group  # what packing places: never split, never in two rows


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What a recipe makes of rendered documents before they are packed.

    Attributes:
      name: of it, with whatever it was made from: part of the data fingerprint.
      each: of every document, before its length is judged.
      together: of all documents of a data set in memory, in their order: as many, or those that are left, none of
        which takes more than ``sequence_length`` slots.
      keys: of rows, read besides those of their kind: documents bring them as ``metadata``, None where a row has none.
    """

    name: str = ""
    each: Callable[[Document], Document] | None = None
    together: Callable[[list[Document]], list[Document]] | None = None
    keys: tuple[str, ...] = ()


AS_RENDERED = Preparation()


def share_prompts(preparation: Preparation = AS_RENDERED) -> Preparation:
    """``preparation``, and after it groups share what their sequences have in common before the first trained token."""

    def each(document: Document) -> Document:
        document = preparation.each(document) if preparation.each else document
        if isinstance(document, Rendered):
            return document
        return dataclasses.replace(document, shared_slots=count_shared_slots(document.sequences))

    name = f"{preparation.name}, with shared prompts" if preparation.name else "with shared prompts"
    return dataclasses.replace(preparation, name=name, each=each)


def count_shared_slots(sequences: Sequence[Rendered]) -> int:
    """Slots of the longest beginning that all sequences read alike and that trains nothing.

    Its last token is left to each sequence, which predicts its own first token from it. So a sequence keeps a slot or
    more, and no slot has two targets.
    """
    first = sequences[0]
    untrained = [int(s.loss_mask.argmax()) if s.loss_mask.any() else len(s.tokens) for s in sequences]
    limit = min(*untrained, *(sequence.slots for sequence in sequences))
    same = np.ones(limit, bool)
    for other in sequences[1:]:
        same &= first.tokens[:limit] == other.tokens[:limit]
        for mine, theirs in zip(first.fields, other.fields, strict=True):
            if mine.of == "token":
                same &= (mine.values[:limit] == theirs.values[:limit]).reshape(limit, -1).all(1)
    return max((limit if same.all() else int(same.argmin())) - 1, 0)


def count_saved_slots(documents: Iterable[Document]) -> int:
    """Slots that these documents would take more if every sequence had the beginning of its group itself."""
    return sum(document.saved_slots for document in documents if isinstance(document, Group))


def count_fitting_shared(documents: Iterable[Document], slots: int) -> int:
    """Groups that fit in ``slots`` slots because their sequences share a beginning."""
    groups = (document for document in documents if isinstance(document, Group))
    return sum(group.slots + group.saved_slots > slots for group in groups)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What batches of a data set have besides the arrays that all have.

    Attributes:
      arrays: name -> dtype and shape of an entry.
      has_metadata: whether the documents bring ``metadata``.
    """

    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    has_metadata: bool = False

    def __str__(self) -> str:
        named = (f"{name} of {shape[0]} a token" if shape else name for name, (_, shape) in self.arrays.items())
        return ", ".join(named) or "no further arrays"


NO_LAYOUT = Layout()
# Of batches whose groups share their prompts: the slots of the row that a token sees before its own segment, from the
# one to the one before the other; equal where there are none.
SHARED_ARRAYS = {name: (np.dtype(np.int32), ()) for name in ("prefix_starts", "prefix_ends")}


def layout_of(document: Document) -> Layout:
    """The layout of a data set with such documents."""
    first, shares = document.sequences[0], isinstance(document, Group) and document.shared_slots is not None
    if not first.fields and first.metadata is None and not shares:
        return NO_LAYOUT
    arrays = {field.name: (field.values.dtype, field.values.shape[1:]) for field in first.fields}
    if isinstance(document, Group):
        arrays["group_ids"] = np.dtype(np.int32), ()
    return Layout(arrays | (SHARED_ARRAYS if shares else {}), first.metadata is not None)


class SameLayout:
    """Holds the documents of a data set to one layout: that of ``first``, or of the first one that is checked."""

    def __init__(self, first: Document | None = None):
        self.layout = None if first is None else layout_of(first)
        self._ref = None if first is None else first.ref

    def check(self, document: Document) -> None:
        """Raises BadRow for a document with other arrays than the first."""
        layout = layout_of(document)
        if self.layout is None:
            self.layout, self._ref = layout, document.ref
        elif layout is not self.layout and layout != self.layout:
            raise BadRow(document.ref, f"expected {self.layout}, as at {self._ref}; found {layout}")


def _take(document: Rendered, start: int, stop: int) -> Rendered:
    """The document with its tokens ``start:stop`` alone, and what stands beside them."""
    weights = None if document.weights is None else document.weights[start:stop]
    fields = tuple(field._replace(values=field.values[start:stop]) for field in document.fields)
    tokens, loss_mask = document.tokens[start:stop], document.loss_mask[start:stop]
    return dataclasses.replace(document, tokens=tokens, loss_mask=loss_mask, fields=fields, weights=weights)


def cut_end(document: Rendered, slots: int) -> Rendered:
    """The beginning of a document, ``slots`` long."""
    cut = _take(document, 0, slots + 1 - document.reads_last)
    answers = int((cut.loss_mask[1:] & ~cut.loss_mask[:-1]).sum())  # those that still begin
    return dataclasses.replace(cut, truncated=True, template_switches=document.template_switches[:answers])


def split_text(document: Rendered, slots: int) -> list[Rendered]:
    """A text in parts of up to ``slots`` slots, each beginning with the token that the one before ended with.

    That token is trained in the earlier part and only read in the later one, so every token is trained as often as in
    the whole: nothing predicts the first token of a part.
    """
    assert not document.reads_last
    parts = [_take(document, start, start + slots + 1) for start in range(0, len(document.tokens) - 1, slots)]
    later = [dataclasses.replace(part, loss_mask=part.loss_mask & (np.arange(part.num_tokens) > 0)) for part in parts]
    return [parts[0], *later[1:]]


def largest_id(batch: Mapping[str, np.ndarray]) -> int:
    """Of the vocabulary, in a batch or row."""
    return max(int(batch[name].max()) for name in _ID_ARRAYS if name in batch)


def check_token_ids(documents: Iterable[Document], vocab_size: int) -> None:
    """Raises UserError naming the first row with a token that a model of ``vocab_size`` has no embedding for."""
    for document in documents:
        for sequence in document.sequences:
            ids = {"tokens": sequence.tokens} | {field.name: field.values for field in sequence.fields}
            if (largest := largest_id(ids)) >= vocab_size:
                raise UserError(
                    f"{document.ref}: token id {largest} is outside the model's vocabulary of {vocab_size}: "
                    "model.tokenizer must be the model's own tokenizer, and ids in rows must be of its vocabulary"
                )
