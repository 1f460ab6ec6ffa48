"""A teacher: a frozen model of another folder, on the devices of the one that learns from it."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from postrain.checkpoint.record import fingerprint_model
from postrain.config import Config, DistillSection, ModelSection
from postrain.data.documents import AS_RENDERED, Document, Preparation, Rendered
from postrain.data.rendering.tokenizer import Tokenizer, compare_vocabularies, load_tokenizer
from postrain.errors import UserError
from postrain.hf.find_model import locate_model
from postrain.hf.load import load_pretrained
from postrain.models.attention.dispatch import check_backend
from postrain.models.config import ModelConfig
from postrain.models.params import frozen_specs, name_broken, num_params, param_specs, shapes_of
from postrain.training.model import TEACHER, Model, configure, place_abstract
from postrain.training.session import Session, format_backends
from postrain.types import TrainState


class Teacher(NamedTuple):
    """A model whose distribution is learned from."""

    config: ModelConfig
    params: Any  # in the compute dtype, or quantised
    checksum: str  # of its weights, config.json and quantisation

    def row_options(self, tokens: str = "trained") -> dict[str, Any]:
        """For ``open_train_rows`` and ``open_eval_rows``: rows are another run's where the teacher is another one.

        ``tokens``: of a row, that are learned, as ``distill.tokens`` has it.
        """
        check = functools.partial(check_ids, vocab_size=self.config.vocab_size)
        chosen, towards = choose_tokens(tokens), f"towards teacher {self.checksum}"
        name = f"{towards}, {chosen.name}" if chosen.name else towards
        return {"check": check, "preparation": dataclasses.replace(chosen, name=name)}


def choose_tokens(tokens: str) -> Preparation:
    """What ``distill.tokens`` makes of rows: with "all" the teacher's word on the prompt is learned as well."""
    return Preparation("all tokens", each=train_all) if tokens == "all" else AS_RENDERED


def train_all(document: Document) -> Document:
    """A sequence with every token trained but the first, which nothing predicts."""
    assert isinstance(document, Rendered)
    return dataclasses.replace(document, loss_mask=np.arange(len(document.tokens)) > 0)


def open_teacher(session: Session) -> Teacher:
    """``load_teacher`` of a run, which says what it has loaded."""
    teacher, top_k = load_teacher(session.config, session.tokenizer, session.mesh), session.config.distill.top_k
    numbers = num_params(shapes_of(param_specs(teacher.config)))
    kind = teacher.config.quantization if teacher.config.quantization != "none" else teacher.config.compute_dtype
    session.say(f"teacher     {session.config.distill.teacher}: {numbers:,} parameters, {kind}, {teacher.checksum}")
    if top_k != DistillSection().top_k:
        session.say(f"not read    distill.top_k = {top_k}: a teacher beside the student gives all ids")
    for line in [*format_backends(teacher.config, session.mesh), *check_teacher_backend(teacher.config)]:
        session.say(f"teacher's {line}")
    return teacher


def check_teacher_backend(config: ModelConfig) -> list[str]:
    """Lines of ``check_backend``. Raises UserError as that does."""
    with _of_teacher():
        return [f"attention   {checked}"] if (checked := check_backend(config)) else []


@contextlib.contextmanager
def _of_teacher() -> Iterator[None]:
    """Says of mistakes in the block that they are the teacher's: their words are of the keys of a student."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config key 'distill.teacher': {error}") from error


def configure_teacher(config: Config, folder: str | os.PathLike, mesh: Mesh) -> ModelConfig:
    """The model of ``distill.teacher``, whose folder this is: it computes as the student does, without its adapters."""
    student = config.model
    section = ModelSection(
        path=config.distill.teacher,
        compute_dtype=student.compute_dtype,
        attention=student.attention,
        attention_chunk=student.attention_chunk,
        quantization=config.distill.quantization,
    )
    with _of_teacher():
        found, _, _ = configure(dataclasses.replace(config, model=section), folder, mesh)
    return found


def load_teacher(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> Teacher:
    """``distill.teacher``, frozen, laid out over ``mesh``.

    Raises UserError as load_pretrained does, where its tokenizer is not ``tokenizer``, the student's, and where a
    weight is not finite.
    """
    with _of_teacher():
        folder = locate_model(config.distill.teacher)
        own = load_tokenizer(folder)
    check_tokenizer(own, tokenizer)
    model_config = configure_teacher(config, folder, mesh)
    dtype, kind = model_config.compute_dtype, model_config.quantization
    with _of_teacher():
        _, params = load_pretrained(folder, mesh=mesh, dtype=dtype, quantization=kind)
    if broken := name_broken(params):
        raise UserError(f"config key 'distill.teacher': {folder}: {broken} holds numbers that are not finite")
    return Teacher(model_config, params, digest_teacher(folder, kind))


def check_tokenizer(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises UserError where ids of the student's tokenizer do not mean the same to the teacher."""
    if difference := compare_vocabularies(student, teacher):
        raise UserError(
            f"config key 'distill.teacher': its tokenizer is not the student's: {difference}: take a teacher with the "
            "student's vocabulary, or a student with the teacher's"
        )


def digest_teacher(folder: str | os.PathLike, quantization: str) -> str:
    """32 hexadecimal digits that stand for what the teacher computes, wherever its folder is."""
    files = fingerprint_model(folder)["files"]
    del files["generation_config.json"]  # which says how it is sampled from
    return hashlib.sha256(json.dumps([files, quantization], sort_keys=True).encode()).hexdigest()[:32]


def count_shared_ids(tokenizer: Tokenizer, student: ModelConfig, teacher: ModelConfig | None = None) -> int:
    """Ids that the tokenizer and the models have; the rows of models after them are padding."""
    return min(tokenizer.vocab_size, student.vocab_size, (teacher or student).vocab_size)


def add_teacher(model: Model, config: ModelConfig, params: Any) -> Model:
    """``model`` with a teacher beside its frozen parameters: the train state then holds it, unsaved."""
    return dataclasses.replace(model, frozen=model.frozen | {TEACHER: params}, teacher=config)


def abstract_teacher(config: Config, mesh: Mesh) -> tuple[ModelConfig, Any]:
    """The configuration and shapes of ``distill.teacher``; no weights are read."""
    with _of_teacher():
        folder = locate_model(config.distill.teacher, weights=False)
    found = configure_teacher(config, folder, mesh)
    return found, place_abstract(frozen_specs(found), found.compute_dtype, mesh)


def without_teacher(state: TrainState) -> TrainState:
    """The state of the student alone."""
    return state.replace(frozen={name: tree for name, tree in state.frozen.items() if name != TEACHER})


def check_ids(arrays: Mapping[str, np.ndarray], vocab_size: int) -> None:
    """Of a numpy batch or document: raises UserError for a token that a teacher of ``vocab_size`` has no row for."""
    if (largest := np.max(arrays["tokens"])) >= vocab_size:
        raise UserError(f"token id {largest} is outside the teacher's vocabulary of {vocab_size}")
