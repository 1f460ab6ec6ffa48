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
from postrain.data.files.storage import is_local, list_files
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError, shorten
from postrain.files import digest, write_whole
from postrain.hf.config import read_config
from postrain.training.session import Session
from postrain.training.teacher import count_shared_ids

MANIFEST, VERSION = "manifest.json", 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of taught rows is.

    Attributes:
      identity: what decides its bytes, as ``identify`` of ``postrain.training.teach`` gives it.
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
    """The manifest of a folder, None where it has none. Raises UserError for one that cannot be read."""
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, shards = values.pop("version"), values.pop("shards")
        manifest = Manifest(values, shards)
        _ = manifest.names, values["teacher"], values["vocabulary"], values["top_k"], values["temperature"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected the manifest of `postrain teach`, cannot be read as one ({type(error).__name__} {error})"
        ) from error
    if version != VERSION:
        raise UserError(f"{path}: written by another version of postrain: let `postrain teach` write the rows again")
    return manifest


def check_shard(folder: pathlib.Path, name: str, facts: dict[str, Any], whole: bool = True) -> str:
    """What is wrong with a shard that a manifest lists, in words, "" where nothing is. ``whole``: its hash too."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != facts["bytes"]:
        return f"{path} is torn: expected {facts['bytes']:,} bytes, found {size:,}"
    if whole and digest(path) != facts["sha256"]:
        return f"{path} is damaged: its content is not what the manifest says"
    return ""


def check_taught_rows(session: Session) -> dict[str, Any]:
    """Says which teacher wrote the rows of ``data.train`` and ``data.eval``; returns options for ``open_train_rows``.

    Raises UserError where they are not what the student and the config can learn from: see ``check_folder``. Rows
    without a manifest, of other tools, are taken as they are unless the config names a checksum.
    """
    config, told = session.config, {}
    vocab = count_shared_ids(session.tokenizer, read_config(session.model_folder))
    for source in (*config.data.train, *config.data.eval):
        folders: dict[str, list[str]] = {}
        for file in list_files(source.path) if source.path and is_local(source.path) else ():
            folders.setdefault(os.path.dirname(file.url), []).append(os.path.basename(file.url))
        manifests = {folder: read_manifest(folder) for folder in folders}
        if not manifests or None in manifests.values():
            where = source.path or source.name
            if config.distill.checksum:
                raise UserError(
                    f"config key 'distill.checksum': {where} has no {MANIFEST}, so nobody can tell its teacher: give "
                    "a folder that `postrain teach` has written, or leave the key out"
                )
            told[f"unknown: {where} has no {MANIFEST}"] = None
        for folder, manifest in manifests.items():
            if manifest is not None:
                check_folder(pathlib.Path(folder), manifest, folders[folder], config, session.tokenizer, vocab)
                of = manifest.identity
                told[f"{of['teacher']}, its {of['top_k']} likeliest of {of['vocab_size']:,} ids ({folder})"] = None
    for line in told:
        session.say(f"teacher     {line}")
    return {"check": functools.partial(check_size, top_k=config.distill.top_k)}


def check_size(arrays: Mapping[str, np.ndarray], top_k: int) -> None:
    """Of a numpy batch or document: raises UserError where it has another number of ids a token than ``top_k``."""
    if (size := arrays["teacher_ids"].shape[-1]) != top_k:
        raise UserError(f"config key 'distill.top_k' = {top_k}, but the rows have {size} ids a token: set it to that")


def check_folder(
    folder: pathlib.Path, manifest: Manifest, files: list[str], config: Config, tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Raises UserError for a folder of taught rows that a run of ``config`` cannot train on.

    That is one of another teacher than ``distill.checksum``, of another tokenizer than the student's, at another
    temperature than the loss's, of another K, or of ids that the student does not have; one that is not finished; one
    with a shard in ``files`` that is not as it was written. Of a stream, which may be larger than what can be read now,
    sizes are compared and not contents.
    """
    of, section, where = manifest.identity, config.distill, folder / MANIFEST
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
                f"config key 'distill.{name}' = {wanted}, but the rows of {folder} were taught with {of[name]}: set it "
                "to that, or teach again"
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
    for name in files:
        if name not in manifest.shards:
            raise UserError(f"{folder / name} is not listed in {where}: move it away")
        if wrong := check_shard(folder, name, manifest.shards[name], whole=not config.data.streaming):
            raise UserError(f"{wrong}: remove it and run the same `postrain teach` again, which writes what is missing")
