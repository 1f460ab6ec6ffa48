"""Model folders: each appears whole or not at all, and the small files beside the weights that make one usable."""

import contextlib
import fnmatch
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from postrain.data.rendering.template import TemplateRefusal
from postrain.data.rendering.tokenizer import PROBE, PROBE_DATE, NewTokens, Tokenizer
from postrain.errors import UserError
from postrain.files import check_local, lock
from postrain.hf.config import ADAPTER_FILE, CONFIG_FILE
from postrain.hf.tensors import read_json

# One of these files makes a folder a model's or an adapter's, which a new export may replace.
MODEL_MARKS = (CONFIG_FILE, ADAPTER_FILE)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PARTIAL, UNCHECKED = ".partial", ".unchecked"  # suffixes of the hidden folders in which models are prepared
NEW, OLD = "new", "old"  # in a hidden folder: the model that will take the final name, the model that had it before
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
# Copied byte by byte where the source has them.
MODEL_SIDE_FILES = (GENERATION_FILE, "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    "tokenizer.model",
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
SIDE_FOLDERS = ("additional_chat_templates",)
TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json", *SIDE_FOLDERS)
SIDE_FILES = MODEL_SIDE_FILES + TOKENIZER_FILES + TEMPLATE_FILES


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    An older model folder of that name is then replaced (see check_replaceable). On any exception the temporary folder
    is deleted and ``folder`` stays as it was. Raises UserError when ``folder`` is a file, or a folder that holds
    anything but a model; when another process is writing it; and when writing fails (a full disk, a read-only place).
    """
    check_local(folder, "folder")
    folder = pathlib.Path(os.path.abspath(folder))
    check_replaceable(folder)
    try:
        with _hold(folder, PARTIAL) as temporary:
            temporary.mkdir()
            yield temporary
    except OSError as error:
        reason = error.strerror or error
        advice = "free space or choose another place"
        raise UserError(f"{folder}: could not be written ({reason}), nothing was left: {advice}") from error


@contextlib.contextmanager
def staged_folder(folder: str | os.PathLike, *, lead: bool = True) -> Iterator[pathlib.Path]:
    """Yields the path of a folder to write and check, which takes the name ``folder`` when the block ends well.

    For a check in which several processes take part. The path is the same in each; the process with ``lead`` moves the
    folder to its name. On any exception the new folder is deleted, and ``folder`` stays as it was.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    check_replaceable(folder)
    if not lead:
        yield _place(folder, UNCHECKED) / NEW
        return
    try:
        with _hold(folder, UNCHECKED) as temporary:
            yield temporary
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: could not be written ({reason}): choose another place") from error


def clear_leftovers(folder: str | os.PathLike) -> None:
    """Removes the hidden folders of killed processes that were writing ``folder``; one in use by a live process stays.

    An old model that such a process had already moved out of the way is put back.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    for suffix in (PARTIAL, UNCHECKED):
        if _place(folder, suffix).is_dir():
            with contextlib.suppress(OSError, UserError), _hold(folder, suffix, replace=False):
                pass


def _place(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    return folder.parent / f".{folder.name}{suffix}"


@contextlib.contextmanager
def _hold(folder: pathlib.Path, suffix: str, replace: bool = True) -> Iterator[pathlib.Path]:
    """A path in an empty, locked, hidden folder beside ``folder``; with ``replace`` what the block makes there takes
    the name ``folder`` when the block ends well.

    The hidden folder is removed when the block ends, however it does. Its name is fixed, so that the next process finds
    what a killed one left; the system has released that one's lock. Raises UserError when another process holds it, and
    OSError.
    """
    place = _place(folder, suffix)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(place, wait=False, folder=True))
        except BlockingIOError as error:
            advice = "wait for it, or choose another place"
            raise UserError(f"{folder}: another process is writing it: {advice}") from error
        _put_back(folder, place)
        for left in place.iterdir():
            shutil.rmtree(left)
        try:
            yield place / NEW
            if replace and folder.exists():
                folder.rename(place / OLD)  # from where ``_put_back`` can restore it
            if replace:
                (place / NEW).rename(folder)
        finally:
            with contextlib.suppress(OSError):  # an old model that cannot be put back is not deleted
                _put_back(folder, place)
                shutil.rmtree(place, ignore_errors=True)


def check_replaceable(folder: str | os.PathLike) -> None:
    """Raises UserError unless ``folder`` is absent, empty, or holds a model or an adapter and nothing else.

    And unless it can be written: beside it, where the new model is made before it takes the name.
    """
    folder = pathlib.Path(folder)
    parents = pathlib.Path(os.path.abspath(folder)).parents
    parent = next((parent for parent in parents if os.path.lexists(parent)), pathlib.Path("/"))
    if folder.is_dir() and (os.path.ismount(folder) or not os.access(parent, os.W_OK | os.X_OK)):
        why = "is a mount point" if os.path.ismount(folder) else f"{parent} is not writable"
        raise UserError(
            f"{folder}: cannot be replaced by a whole model ({why}): give a folder inside it, as {folder / 'model'}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be made, {parent} is not a writable folder: choose another place")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder to write, found a file: choose another name")
    found = {path.name: path for path in sorted(folder.iterdir())}
    # A lone config.json may be anything's, a run's for one.
    model = set(found).intersection(MODEL_MARKS) and any(_is_weights(name) for name in found)
    if found and not model:
        raise UserError(f"{folder}: holds files that do not belong to a model: choose another name")
    for name, path in found.items():
        known = name in (*MODEL_MARKS, *SIDE_FILES) or _is_weights(name)
        if not known or path.is_dir() != (name in SIDE_FOLDERS):
            raise UserError(f"{folder}: holds {name}, which is not part of a model: choose another name")


def _is_weights(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)


def _put_back(folder: pathlib.Path, place: pathlib.Path) -> None:
    if (place / OLD).exists() and not folder.exists():
        (place / OLD).rename(folder)


# --- tokenizer, chat template, stop set, licence ---


def copy_side_files(source_folder: str | os.PathLike, folder: pathlib.Path, tokenizer: Tokenizer | None = None) -> None:
    """Copies the side files of ``source_folder``; with ``tokenizer``, that of a run, its files take their place.

    Tokenizer files then come from the tokenizer's folder, the one chat template is the run's, and every file that
    names stop tokens names the trained one (see ``_write_stop_tokens``).
    """
    source_folder = pathlib.Path(source_folder)
    copied = [(source_folder, SIDE_FILES)]
    if tokenizer is not None:
        copied = [(source_folder, MODEL_SIDE_FILES), (tokenizer.folder, TOKENIZER_FILES)]
    for source, name in [(source, name) for source, names in copied for name in names]:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if tokenizer is None:
        return
    if tokenizer.new_tokens is not None:
        _write_new_tokens(folder, tokenizer.new_tokens)

    # The template where every reader of the folder finds it, as the only one: some readers prefer that of the
    # tokenizer's config, and of several named ones another than the run's.
    template = tokenizer.chat_template
    if template:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    file = folder / TOKENIZER_CONFIG
    if file.exists():
        raw = read_json(file)
        if raw.get("chat_template", template) != template:
            del raw["chat_template"]
            _write_json(file, raw)

    _write_stop_tokens(folder, tokenizer)


def _write_stop_tokens(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Has a server that reads one file of ``folder`` alone stop at the token that ended the trained answers.

    generation_config.json gets all of the run's stop tokens, config.json too where it lacks the trained one, and the
    tokenizer's files, which name a single one, get that. What says so already stays as it is.
    """
    end, stops = find_answer_end(tokenizer), sorted(tokenizer.stop_ids)
    trained = tokenizer.fast.token_to_id(end) if end else tokenizer.eos_id
    needed = {GENERATION_FILE: stops, CONFIG_FILE: stops if trained is None else [trained]}
    if not (folder / CONFIG_FILE).exists():  # the folder of an adapter
        del needed[CONFIG_FILE]
    for name, ids in needed.items():
        raw = read_json(folder / name) if (folder / name).exists() else {}
        stated = raw.get("eos_token_id")
        stated = stated if isinstance(stated, list) else [stated]
        if stops and not (all(i in stated for i in ids) and all(i in stops for i in stated)):
            _write_json(folder / name, raw | {"eos_token_id": stops})
    own = tokenizer.special_tokens.get("eos_token")
    # A template that writes its ``eos_token`` elsewhere would make other prompts with another one.
    if not end or end == own or re.search(r"\beos_token\b", tokenizer.chat_template):
        return
    for file in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS):
        raw = read_json(file) if file.exists() else {}
        if file.name == TOKENIZER_CONFIG or "eos_token" in raw:
            _write_json(file, raw | {"eos_token": end})


def find_answer_end(tokenizer: Tokenizer) -> str:
    """The stop token that the chat template writes after an answer, "" where it writes none."""
    if tokenizer.template is None:
        return ""
    answer = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.template.render(answer, template_date=PROBE_DATE, add_generation_prompt=False)
    except TemplateRefusal:
        return ""
    _, written, tail = text.rpartition(PROBE)
    stop = tokenizer.stop_pattern.search(tail) if written else None
    return stop[0] if stop else ""


def write_pad_token(folder: pathlib.Path, token: str) -> None:
    """Has the tokenizer in ``folder`` pad with ``token``."""
    for file in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS):
        raw = read_json(file) if file.exists() else {}
        if raw.get("pad_token") != token and (file.name == TOKENIZER_CONFIG or "pad_token" in raw):
            _write_json(file, raw | {"pad_token": token})


def _write_new_tokens(folder: pathlib.Path, new: NewTokens) -> None:
    """The tokenizer's files with the new tokens, everything else in them as it was."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": new.special}
    added = {new.first + i: {"content": text, **flags} for i, text in enumerate(new.texts)}
    file = folder / TOKENIZER_FILE
    raw = read_json(file)
    raw["added_tokens"] = raw.get("added_tokens", []) + [{"id": i, **token} for i, token in added.items()]
    _write_json(file, raw)
    # Older versions of transformers read these two, where they are, before tokenizer.json.
    file = folder / TOKENIZER_CONFIG
    raw = read_json(file) if file.exists() else {}
    if "added_tokens_decoder" in raw:
        raw["added_tokens_decoder"] |= {str(i): token for i, token in added.items()}
        _write_json(file, raw)
    file = folder / ADDED_TOKENS
    if file.exists():
        _write_json(file, read_json(file) | {token["content"]: i for i, token in added.items()})


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
