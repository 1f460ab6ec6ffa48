"""Folders of rows of kind kd that `postrain teach` has written: shards, and a manifest that says what they are.

The manifest is written anew after each shard, with the shard's size and hash. So a shard that it does not list is not
there yet, and one that it lists and that is not as it says was damaged later.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from postrain.config import Config
from postrain.data.files.storage import StoredFile, is_local, list_files, read_if_there
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError, shorten
from postrain.files import digest, write_whole
from postrain.hf.config import read_config
from postrain.training.session import Session
from postrain.training.teaching.teacher import count_shared_ids

MANIFEST, VERSION = "manifest.json", 2
LOW_MASS = 0.9  # of the teacher's probability; where the K ids have less, much of what it says is left out
# What a manifest says of all rows: of numbers, which are above 0, and of others their type.
_TEXTS = ("teacher", "compute_dtype", "vocabulary", "dtype")
_COUNTS = ("vocab_size", "top_k", "rows", "shard_rows")
_OF_SHARD = {"rows": int, "bytes": int, "sha256": str}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of a teacher's rows is.

    Attributes:
      identity: what decides its bytes, as ``identify`` of ``postrain.training.teaching.teach`` gives it.
      shards: file -> ``{"rows", "bytes", "sha256"}`` of those that are there, in order.
    """

    identity: dict[str, Any]
    shards: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Of the shards that the whole folder has."""
        count = -(-self.identity["rows"] // self.identity["shard_rows"])
        return [f"rows-{i:05}-of-{count:05}.parquet" for i in range(count)]

    def write(self, folder: pathlib.Path) -> None:
        values = {"version": VERSION, **self.identity, "shards": self.shards}
        write_whole(folder / MANIFEST, json.dumps(values, indent=1) + "\n")


def read_manifest(folder: str | os.PathLike) -> Manifest | None:
    """The manifest of a folder, here or in a store; None where it has none.

    Raises UserError for one that cannot be read, or that does not say what a manifest says.
    """
    head, chain, rest = os.fspath(folder).partition("::")  # of zip://FOLDER::file:///ARCHIVE.zip
    url = f"{head}{'' if head.endswith('/') else '/'}{MANIFEST}{chain}{rest}"
    content = read_if_there(url)
    if content is None:
        return None
    try:
        values = json.loads(content)
        version, wrong = values.get("version"), ""
    except (ValueError, AttributeError) as error:
        version, wrong = None, f"{type(error).__name__}: {error}"
    if not wrong and isinstance(version, int) and version != VERSION:
        raise UserError(
            f"{url}: written by another version of postrain: let `postrain teach` write the rows to another folder"
        )
    if wrong := wrong or _find_wrong(values):
        raise UserError(f"{url}: expected the manifest of `postrain teach`, cannot be read as one: {wrong}")
    shards = values.pop("shards")
    del values["version"]
    return Manifest(values, shards)


def _find_wrong(values: dict[str, Any]) -> str:
    """Which key of a manifest is not as ``Manifest.write`` writes it, "" where all are."""
    is_count = lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0
    temperature = values.get("temperature")
    found = {
        "version": is_count(values.get("version")),
        **{key: isinstance(values.get(key), str) for key in _TEXTS},
        **{key: is_count(values.get(key)) for key in _COUNTS},
        "temperature": isinstance(temperature, int | float) and 0 < temperature < float("inf"),
        "data": isinstance(values.get("data"), dict),
        "shards": isinstance(values.get("shards"), dict),
    }
    if wrong := [key for key, is_right in found.items() if not is_right]:
        return f"{wrong[0]!r} is {values.get(wrong[0], 'missing')!r:.40}"
    for name, facts in values["shards"].items():
        is_right = isinstance(facts, dict) and all(isinstance(facts.get(k), kind) for k, kind in _OF_SHARD.items())
        if not is_right:
            return f"'shards' says of {name!r:.40} {facts!r:.40}, expected {', '.join(_OF_SHARD)}"
    return ""


def check_shard(path: str, size: int | None, facts: dict[str, Any], whole: bool = True) -> str:
    """What is wrong with a shard that a manifest lists, in words, "" where nothing is.

    ``size``: bytes of the file; None: it is not there. ``whole``: its hash is compared too, of a file of this machine.
    """
    if size is None:
        return f"{path} is missing"
    if size != facts["bytes"]:
        return f"{path} is torn: expected {facts['bytes']:,} bytes, found {size:,}"
    if whole and digest(path) != facts["sha256"]:
        return f"{path} is damaged: its content is not what the manifest says"
    return ""


def format_low_mass(mass: float, top_k: int) -> str:
    """A warning where the ``top_k`` ids of a token have, in the mean, less than LOW_MASS of the probability, or ""."""
    if mass >= LOW_MASS:
        return ""
    return (
        f"warning     the {top_k} ids of a token have {mass:.1%} of the teacher's probability in the mean: much of "
        "what it says is left out: let `postrain teach` write the rows with a higher distill.top_k"
    )


def check_teacher_rows(session: Session) -> tuple[dict[str, Any], int | None, list[str]]:
    """Says which teacher wrote the rows of ``data.train`` and ``data.eval``.

    Returns options for ``open_train_rows``; how many ids of the vocabulary that teacher had, None where no manifest
    says it; and the lines that were said. Raises UserError where the rows are not what the student and the config can
    learn from: see ``check_folder``. Rows without a manifest, of other tools, are taken as they are unless the config
    names a checksum.
    """
    config = session.config
    vocab_size = count_shared_ids(session.tokenizer, read_config(session.model_folder))
    lines: dict[str, None] = {}
    sizes: dict[int, str] = {}  # number of the teacher's ids -> a folder of such rows
    for source in (*config.data.train, *config.data.eval):
        folders: dict[str, list[StoredFile]] = {}
        for file in list_files(source.path) if source.path else ():
            folders.setdefault(folder_of(file.url), []).append(file)
        manifests = {folder: read_manifest(folder) for folder in folders}
        if not manifests or None in manifests.values():
            where = source.path or source.name
            if config.distill.checksum:
                raise UserError(
                    f"config key 'distill.checksum': {where} has no {MANIFEST}, so nobody can tell its teacher: give "
                    "a folder that `postrain teach` has written, or leave the key out"
                )
            lines[f"unknown: {where} has no {MANIFEST}"] = None
        for folder, manifest in manifests.items():
            if manifest is not None:
                check_folder(folder, manifest, folders[folder], config, session.tokenizer, vocab_size)
                of = manifest.identity
                sizes[of["vocab_size"]] = folder
                lines[f"{of['teacher']}, its {of['top_k']} likeliest of {of['vocab_size']:,} ids ({folder})"] = None
    if len(sizes) > 1:
        listed = " and ".join(f"{size:,} ids ({folder})" for size, folder in sizes.items())
        raise UserError(f"the rows are of teachers with {listed}: their rest is not the same: train on one of them")
    said = [f"teacher     {line}" for line in lines]
    for line in said:
        session.say(line)
    known = next(iter(sizes), None)
    check = functools.partial(check_ids, top_k=config.distill.top_k, vocab_size=min(known or vocab_size, vocab_size))
    return {"check": check}, known, said


def folder_of(url: str) -> str:
    head, chain, rest = url.partition("::")
    folder = head.rpartition("/")[0]
    return (f"{folder}/" if folder.endswith(":/") else folder) + chain + rest  # zip:// is the root of an archive


def check_ids(arrays: Mapping[str, np.ndarray], top_k: int, vocab_size: int) -> None:
    """Of a numpy batch or document: raises UserError where it has another number of ids a token than ``top_k``, or one
    that the tokenizer and the student do not have: what is behind ``vocab_size`` is padding, without probability."""
    ids = arrays["teacher_ids"]
    if (size := ids.shape[-1]) != top_k:
        raise UserError(f"config key 'distill.top_k' = {top_k}, but the rows have {size} ids a token: set it to that")
    if (largest := ids.max()) >= vocab_size:  # 0 where nothing is trained
        raise UserError(
            f"top_ids has id {largest}, and tokenizer, student and teacher share {vocab_size:,} ids: leave the padding "
            "of the teacher's vocabulary out of its distribution"
        )


def check_folder(
    folder: str, manifest: Manifest, files: list[StoredFile], config: Config, tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Raises UserError for a folder of a teacher's rows that a run of ``config`` cannot train on.

    That is one of another teacher than ``distill.checksum``, of another tokenizer than the student's, at another
    temperature than the loss's, of another K, or of ids that the student does not have; one that is not finished; one
    with a shard in ``files`` that is not as it was written. Of a stream, which may be larger than what can be read now,
    and of a store, sizes are compared and not contents.
    """
    of, section, where = manifest.identity, config.distill, f"{folder}/{MANIFEST}"
    if section.checksum and of["teacher"] != section.checksum:
        raise UserError(f"{where}: the rows are of teacher {of['teacher']}; 'distill.checksum' is {section.checksum}")
    if of["vocabulary"] != tokenizer.digest_vocabulary():
        raise UserError(
            f"{where}: the rows were made with another tokenizer than the student's, in {tokenizer.folder}: other "
            "tokens or merges: teach with a student of this vocabulary"
        )
    for name, wanted in (("temperature", section.temperature), ("top_k", section.top_k)):
        if of[name] != wanted:
            raise UserError(
                f"config key 'distill.{name}' = {wanted}, but the rows of {folder} were written with {of[name]}: set "
                "it to that, or let `postrain teach` write them again"
            )
    if of["vocab_size"] > vocab_size:
        raise UserError(
            f"{where}: the rows are of {of['vocab_size']:,} ids, and the student has {vocab_size:,} of them: teach "
            "with this student"
        )
    if missing := [name for name in manifest.names if name not in manifest.shards]:
        raise UserError(
            f"{where}: {len(missing)} of {len(manifest.names)} shards are not written yet ({shorten(missing, 3)}): run "
            "the same `postrain teach` again, which goes on"
        )
    for file in files:
        name = file.url.partition("::")[0].rpartition("/")[2]
        if name not in manifest.shards:
            raise UserError(f"{file.url} is not listed in {where}: move it away")
        whole = is_local(file.url) and not config.data.streaming
        if wrong := check_shard(file.url, file.bytes, manifest.shards[name], whole):
            raise UserError(f"{wrong}: remove it and run the same `postrain teach` again, which writes what is missing")
