"""Rows of a config: those that a loop trains on, as a source of batches, and those that are held out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from postrain.config import Config
from postrain.data.batches.in_memory import ExampleSet, MemoryBatches, load_examples
from postrain.data.batches.open import TrainRows, join_positions
from postrain.data.batches.open import open_train_rows as open_batches
from postrain.data.batches.token_shift import assemble_row
from postrain.data.documents import AS_RENDERED, Document, Preparation, check_token_ids, layout_of, share_prompts
from postrain.errors import UserError
from postrain.models.attention.dispatch import sees_prefixes
from postrain.sharding import data_process, make_global_batch, mesh_context
from postrain.training.agreement import check_rows
from postrain.training.compatibility import check_total_steps
from postrain.training.model import find_vocab_size
from postrain.training.session import Session
from postrain.types import Batch, BatchFacts

HOST_ARRAYS = ("row_ids", "metadata")  # of a batch, what no device computes with
Extend = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # of a numpy batch: further arrays of it
Check = Callable[[Mapping[str, np.ndarray]], None]  # of a numpy batch that a recipe cannot train on; raises UserError


class Rows:
    """``data.train`` as a ``Source`` of batches on the devices.

    Attributes:
      fingerprint: of the data pipeline; a checkpoint of another one is refused.
      summary: what is known of the rows before training, several lines.
      lengths: slots of each document where all were rendered before training, else empty.
      rows_per_epoch: packed rows of the first epoch; 0 where nobody knows them, of a mixture or a stream.
      sample: a document to show.
      layout: the arrays of its batches besides those that all have.
      notes: lines about the rows for the report.
      documents: of rows in memory, all; of a stream none.
      example_set: of rows in memory, which come once an epoch, all documents; else None.
      extend: what a recipe adds to each batch.
    """

    extend: Extend | None = None

    def __init__(self, train_rows: TrainRows, mesh: Mesh, check: Check | None = None):
        self._batches, self._mesh, self._check, self._last = train_rows.batches, mesh, check, {}
        self.fingerprint, self.summary = train_rows.fingerprint, train_rows.summary
        self.lengths, self.sample, self.layout = train_rows.lengths, train_rows.sample, train_rows.layout
        self.documents = train_rows.example_set.examples if train_rows.example_set else []
        in_memory = isinstance(train_rows.batches, MemoryBatches)
        self.example_set = train_rows.example_set if in_memory else None
        self.rows_per_epoch: int = train_rows.batches.get_state()["epoch_rows"] if in_memory else 0
        self.notes = train_rows.notes

    def add_note(self, text: str) -> None:
        """Adds lines about the rows to the summary and the report; nothing for ""."""
        if text:
            self.summary, self.notes = f"{self.summary}\n{text}", [*self.notes, *text.splitlines()]

    def __next__(self) -> Batch:
        self._last = next(self._batches)
        if self._check is not None:
            try:
                self._check(self._last)
            except UserError as error:
                raise UserError(f"{error}; the batch is of rows {self.describe_last().name_rows()}") from None
        further = self.extend(self._last) if self.extend else {}
        return place_batch({**self._last, **further}, self._mesh)

    def describe_last(self) -> BatchFacts:
        last = self._last
        return BatchFacts(lambda: self._batches.describe_rows(last["row_ids"]), last)

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any] | None, step: int) -> None:
        if state is None:
            self._batches.start_anew(step)
        else:
            self._batches.set_state(state)

    def join_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return join_positions(states)

    def format_consumption(self, state: dict[str, Any]) -> list[str]:
        return self._batches.format_consumption(state)

    def num_steps(self, epochs: float) -> int:
        """Batches that show every document at least ``epochs`` times; known of rows in memory."""
        assert isinstance(self._batches, MemoryBatches)  # others need train.steps (config/rules.py)
        return self._batches.num_steps(epochs)

    def close(self) -> None:
        self._batches.close()


def shares_prompts(config: Config, mesh: Mesh | None = None) -> bool:
    """Whether the answers of a group share the computation of their prompt: ``data.share_prompts``, on these devices.

    Without a mesh, for a preview: on devices that run any back end.
    """
    if config.data.share_prompts != "auto":
        return config.data.share_prompts == "on"
    if mesh is None:
        return not config.model.attention.startswith("flash")
    with mesh_context(mesh):
        return sees_prefixes(config.model.attention)


def prepare_groups(config: Config, mesh: Mesh | None = None, preparation: Preparation = AS_RENDERED) -> Preparation:
    """``preparation`` of rows that become groups: their prompts are shared where ``shares_prompts`` says so."""
    return share_prompts(preparation) if shares_prompts(config, mesh) else preparation


def open_train_rows(
    session: Session, kind: str, check: Check | None = None, preparation: Preparation = AS_RENDERED
) -> Rows:
    """``data.train``, all of it of one kind. Rows in memory are read, rendered, checked and counted here.

    ``check``: what the recipe refuses besides; called with the arrays of each document in memory, and of each batch.
    ``preparation``: that the rendered documents go through.
    Raises UserError: a bad row, a token that the model has no row for, processes that found other rows.
    """
    config, rejected = session.config, session.workdir / "rejected.jsonl"
    process, processes = data_process(session.mesh)
    with session.watchdog.phase("data"):
        rows = open_batches(
            session.tokenizer,
            config.data,
            rejected,
            kind=kind,
            preparation=preparation,
            process_index=process,
            process_count=processes,
        )
    check_rows({"data.train": rows.fingerprint})
    rows.batches.check_token_ids(find_vocab_size(config, session.model_folder))
    check_documents(rows.example_set.examples if rows.example_set else (), check)
    return Rows(rows, session.mesh, check)


def open_eval_rows(
    session: Session, kind: str, check: Check | None = None, preparation: Preparation = AS_RENDERED
) -> ExampleSet | None:
    """``data.eval``, read, rendered and checked; None where the config has none. Raises as ``open_train_rows``."""
    config = session.config
    if not config.data.eval:
        return None
    rejected = session.workdir / "rejected.jsonl" if session.is_lead else None
    with session.watchdog.phase("data"):
        rows = load_examples(
            config.data.eval, session.tokenizer, config.data, rejected, kind=kind, preparation=preparation
        )
    check_rows({"data.eval": rows.fingerprint})
    check_token_ids(rows.examples, find_vocab_size(config, session.model_folder))
    check_documents(rows.examples, check)
    return rows


def format_plain_text(rows: Rows) -> str:
    """A line about rows whose prompts are text, of a stream as its first row is; "" without such rows.

    Whoever asks the trained model in another form asks it what it was not trained on, and nothing would show that.
    """
    documents = rows.documents or [rows.sample]
    plain = sum(document.sequences[0].form == "prompt" for document in documents)
    if not plain:
        return ""
    some = "" if plain == len(documents) else f", {plain:,} of {len(documents):,} rows,"
    return (
        f"prompts     text prompts{some} are trained as plain text, without the chat template: serve them with --raw "
        "(postrain generate, postrain score), or write messages"
    )


def find_form(rows: Rows) -> str:
    """ "messages" where all rows are conversations, "text" where none is; "" of both, and of a stream."""
    forms = {document.sequences[0].form for document in rows.documents}
    if forms == {"messages"}:
        return "messages"
    return "text" if forms and forms <= {"prompt", "text"} else ""


def check_documents(documents: Sequence[Document], check: Check | None) -> None:
    """Raises UserError naming the first row whose document ``check`` refuses."""
    if check is None:
        return
    for document in documents:
        arrays = assemble_row([document], document.slots, layout_of(document))
        try:
            check({name: array[None] for name, array in arrays.items()})
        except UserError as error:
            raise UserError(f"{document.ref}: {error}") from None


def count_steps(session: Session, rows: Rows) -> int:
    """Steps of the whole run: ``train.steps``, or as many as its epochs take.

    Raises UserError where the checkpoint in the workdir is already past them, or is of the last one and of a config
    that trains something else.
    """
    total = session.config.train.steps or rows.num_steps(session.config.train.epochs)
    check_total_steps(session.workdir / "checkpoints", total, session.config, rows.fingerprint)
    return total


def place_batch(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a batch -> the global batch on the devices of ``mesh``."""
    return Batch.from_arrays(make_global_batch({k: v for k, v in arrays.items() if k not in HOST_ARRAYS}, mesh))
