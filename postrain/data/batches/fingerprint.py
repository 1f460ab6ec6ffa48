"""What decides the rows that training sees, written down, so that a resume can refuse a changed pipeline.

The hash of the rendered documents alone would tell *that* something changed; the rest is there to tell *what*.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from postrain.config import DataConfig
from postrain.config.rules import has_mixture
from postrain.data.batches.epoch_order import PLAN_VERSION
from postrain.data.batches.packing import PACKING_VERSION
from postrain.data.batches.shard import SHARD_VERSION
from postrain.data.batches.source import FileSource, Source, open_source
from postrain.data.documents import AS_RENDERED, Document, Group, Preparation
from postrain.data.files.storage import StoredFile, is_local, list_files
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.files import digest, spread

# Words of a ``Preparation.name`` -> the key of the config by which documents are prepared so.
_PREPARED_BY = {
    "towards teacher": "distill.teacher",
    "with weights of mode": "sft.weights",
    "with mismatched answers": "preference.loss",
    "with their last token read": "reward.loss",
}
_SAMPLE = 1 << 16  # bytes of a local file's start, middle and end that tell whether it is the same
# Keys of the config that decide which rows come when.
_KEYS = (
    "sequence_length", "batch_size", "packing", "packing_window", "too_long", "on_bad_row", "shuffle", "seed",
    "template_date", "default_system",
)  # fmt: skip


def fingerprint_rows(
    sources: Sequence[Source],
    files: Sequence[list[str]],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    examples: Iterable[Document],
    preparation: Preparation = AS_RENDERED,
) -> dict:
    """A JSON-able description of rows in memory.

    Args:
      files: of each source those that have rows, in order.
      tokenizer: None where no row is text.
      examples: the documents, in order.
      preparation: that they went through.
    """
    described = [
        {"name": source.name, "files": _file_facts(of_source if isinstance(source, FileSource) else [])}
        | source.identity
        for source, of_source in zip(sources, files, strict=True)
    ]
    return _pipeline_facts(described, tokenizer, config, preparation) | {"documents": hash_documents(examples)}


def fingerprint_stream(
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    preparation: Preparation = AS_RENDERED,
) -> dict:
    """A JSON-able description of a stream, its files by what can be told without reading them."""
    described = []
    for source in sources:
        files = source.files if isinstance(source, FileSource) else []
        names = name_files([file.url for file in files])
        facts = [{"name": name} | _stored_facts(file) for name, file in zip(names, files, strict=True)]
        described.append({"name": source.name, "kind": source.parser.form, "files": facts} | source.identity)
    return _pipeline_facts(described, tokenizer, config, preparation)


def fingerprint_config(tokenizer: Tokenizer | None, config: DataConfig) -> dict:
    """The fingerprint of ``config.train`` as it would be made now, but without the hash of documents in memory.

    Raises UserError as ``open_source`` does.
    """
    sources = [open_source(source, config, index) for index, source in enumerate(config.train)]
    if config.streaming:
        return fingerprint_stream(sources, tokenizer, config)
    fingerprint = fingerprint_rows(sources, [source.list_row_files() for source in sources], tokenizer, config, [])
    del fingerprint["documents"]
    return fingerprint


def _pipeline_facts(
    sources: list[dict], tokenizer: Tokenizer | None, config: DataConfig, preparation: Preparation
) -> dict:
    """What decides the rows, but for the rows themselves; ``sources`` as ``{"name", "files": [{"name", ...}]}``."""
    facts = {
        "data": {key: getattr(config, key) for key in _KEYS} | _mixture_facts(config) | _label_facts(config),
        "sources": sources,
        "tokenizer": tokenizer and tokenizer.fingerprint(),
        "chat_template": tokenizer and hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "versions": {"packing": PACKING_VERSION, "plan": PLAN_VERSION}
        | ({"shard": SHARD_VERSION} if config.streaming or has_mixture(config) else {}),
    }
    return facts | ({"preparation": preparation.name} if preparation.name else {})


def _label_facts(config: DataConfig) -> dict:
    names = {"label_names": list(config.label_names)} if config.label_names else {}
    return names | ({"label_numbers": True} if config.label_numbers else {})


def _mixture_facts(config: DataConfig) -> dict:
    """Keys that say nothing at their defaults stay out, so that they count only where they are used."""
    mixture = {
        "weights": [source.weight for source in config.train],
        "max_epochs": [source.max_epochs for source in config.train],
        "phases": [[phase.step, list(phase.weights)] for phase in config.mixture.phases],
        "temperature": config.mixture.temperature,
        "by": config.mixture.by,
    }
    used = config.streaming or has_mixture(config)
    described = {f"mixture.{key}": value for key, value in mixture.items()} if used else {}
    if config.streaming:
        described |= {"stream.shards": config.stream.shards, "stream.block_mebibytes": config.stream.block_mebibytes}
    return described


def hash_documents(examples: Iterable[Document]) -> str:
    """Hash over tokens, loss masks and whatever else the documents bring, in order."""
    hashed = hashlib.blake2b(digest_size=20)
    for example in examples:
        if isinstance(example, Group):
            hashed.update(b"group" + len(example.sequences).to_bytes(8, "little"))
        for sequence in example.sequences:
            hashed.update(len(sequence.tokens).to_bytes(8, "little"))
            hashed.update(np.ascontiguousarray(sequence.tokens, "<i4").data)
            hashed.update(np.packbits(sequence.loss_mask).data)
            for name, values, _ in sequence.fields:
                hashed.update(
                    name.encode() + np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
                )
            if sequence.weight != 1:
                hashed.update(b"weight" + np.float64(sequence.weight).astype("<f8").tobytes())
            if sequence.weights is not None:
                hashed.update(b"weights" + np.ascontiguousarray(sequence.weights, "<f4").tobytes())
            if sequence.metadata is not None:
                hashed.update(json.dumps(sequence.metadata, sort_keys=True).encode())
    return hashed.hexdigest()


def digest_change(old: dict, new: dict) -> str:
    """Stands for the change from one fingerprint to another, for ``data.accept_change``.

    The documents, and what a recipe's own source adds, count where nothing else tells the change: they are known only
    when all rows have been rendered.
    """
    known = ("data", "sources", "tokenizer", "chat_template", "versions", "preparation")
    pair = [{key: value for key, value in print_.items() if key in known} for print_ in (old, new)]
    if pair[0] == pair[1]:
        pair = [old, new]
    return hashlib.sha256(json.dumps(pair, sort_keys=True).encode()).hexdigest()[:12]


def compare_fingerprints(old: dict, new: dict) -> list[str]:
    """What changed between two fingerprints, one readable phrase each; empty: nothing did.

    Parts that one of them lacks (it was written by another version) count as changed, not as an error.
    """
    changes = [f"data.{key}: was {was!r}, is {now!r}" for key, was, now in _differences(old, new, "data")]
    changes += _compare_sources(old.get("sources", []), new.get("sources", []))
    if old.get("chat_template") != new.get("chat_template"):
        changes.append("the chat template is another one")
    elif old.get("tokenizer") != new.get("tokenizer"):
        changes.append("the tokenizer (or the code that renders with it) is another one")
    if old.get("preparation") != new.get("preparation"):
        changes.append(_compare_preparations(old.get("preparation", ""), new.get("preparation", "")))
    for part, was, now in _differences(old, new, "versions"):
        changes.append(f"the {part} code is another version: was {was}, is {now}")
    if old != new and not changes:
        functions = [source["function"] for source in new.get("sources", []) if "function" in source]
        cause = f"{' or '.join(functions)} does not give the same twice, or " if functions else ""
        changes.append(
            f"the same files and settings give other tokens or loss masks: {cause}the rendering code changed"
        )
    return changes


def _compare_preparations(was: str, now: str) -> str:
    """Names of preparations then and now, different ones, and by which keys of the config that is."""
    text, shared = f"documents were trained {was or 'as rendered'}, are {now or 'as rendered'}", "with shared prompts"
    keys = [repr(key) for words, key in _PREPARED_BY.items() if words in was or words in now]
    if (shared in was) != (shared in now):
        keys.append(f"'data.share_prompts', which was {'on' if shared in was else 'off'} then")
    return text + (f" (config key {' and '.join(keys)})" if keys else "")


def _differences(old: dict, new: dict, part: str) -> list[tuple]:
    was, now = old.get(part, {}), new.get(part, {})
    both = [(key, was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys())]
    return [(key, before, after) for key, before, after in both if before != after]


def _compare_sources(old: list[dict], new: list[dict]) -> list[str]:
    was, now = ([s["name"] for s in sources] for sources in (old, new))
    if was != now:
        return [f"sources: were {', '.join(was)}; are {', '.join(now)}"]
    changes = []
    for before, after in zip(old, new, strict=True):
        if before.get("kind") != after.get("kind"):
            changes.append(f"source {before['name']!r}: kind was {before.get('kind')}, is {after.get('kind')}")
        if before.get("loss_weight", 1.0) != after.get("loss_weight", 1.0):
            weights = (source.get("loss_weight", 1.0) for source in (before, after))
            changes.append("source {!r}: loss_weight was {:g}, is {:g}".format(before["name"], *weights))
        if before.get("function") != after.get("function"):
            changes.append(
                f"source {before['name']!r}: rows went through {before.get('function', 'no function')}, now "
                f"{after.get('function', 'no function')}"
            )
        if before.get("dataset") != after.get("dataset") or before.get("length") != after.get("length"):
            origins = (
                f"{s.get('dataset', 'files')}" + (f" of {s['length']:,} rows" if "length" in s else "")
                for s in (before, after)
            )
            changes.append("source {!r}: rows came from {}, now from {}".format(before["name"], *origins))
        files_before, files_after = ({f["name"]: f for f in s["files"]} for s in (before, after))
        where = f"source {before['name']!r}: file"
        changes += [f"{where} {n} is gone" for n in files_before if n not in files_after]
        changes += [f"{where} {n} is new" for n in files_after if n not in files_before]
        for name in files_before.keys() & files_after.keys():
            a, b = files_before[name], files_after[name]
            if a != b:
                sizes = f": was {a['bytes']:,} bytes, is {b['bytes']:,}" if a["bytes"] != b["bytes"] else ""
                changes.append(f"{where} {name} has other content{sizes}")
        if not changes and before["files"] != after["files"]:
            changes.append(f"source {before['name']!r}: its files come in another order")
    return changes


def _file_facts(files: list[str]) -> list[dict]:
    """By name, size and content (elsewhere: version): a folder may move, its files may not change."""
    facts = []
    for name, file in zip(name_files(files), files, strict=True):
        if is_local(file):
            facts.append({"name": name, "bytes": os.path.getsize(file), "sha256": digest(file)})
        else:
            (stored,) = list_files(file)
            facts.append({"name": name, "bytes": stored.bytes, "version": stored.version})
    return facts


def _stored_facts(file: StoredFile) -> dict:
    """A local file by its size and three pieces, so that it may be copied; another by size and version."""
    if not is_local(file.url):
        return {"bytes": file.bytes, "version": file.version}
    return {"bytes": file.bytes, "sample": digest(file.url, spread(0, file.bytes, 3, _SAMPLE))}


def name_files(urls: Sequence[str]) -> list[str]:
    """Names from the folder on that all of them are in."""
    urls = [os.path.abspath(url) if is_local(url) else url for url in urls]
    folder = os.path.commonprefix([url.rpartition("/")[0] + "/" for url in urls])
    return [url[folder.rfind("/") + 1 :] for url in urls]
