"""Repositories on the Hugging Face hub: their files in the cache of ``huggingface_hub``, its errors in one line.

A repository is named ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` (a branch, a tag or a commit). Cache, token and offline
mode are those of ``huggingface_hub`` (``HF_HOME``, ``hf auth login`` or ``HF_TOKEN``, ``HF_HUB_OFFLINE``,
``HF_ENDPOINT``); it locks each file, so that any number of processes may fetch the same repository. Nothing but the
files of ``SMALL_FILES`` and the weights that are asked for is fetched.
"""

import functools
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any

from postrain.errors import UserError, one_line

SMALL_FILES = (  # beside the weights: what is read of a model, an adapter or a tokenizer, or copied to its export
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "adapter_model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
LOG_IN = "run `hf auth login` or set HF_TOKEN"


@functools.cache
def fetch_small_files(name: str) -> pathlib.Path:
    """The folder of a model or tokenizer repository in the cache, with those of ``SMALL_FILES`` that it has.

    The folder's name is the commit at which the revision stood when this process first asked: a branch that moves
    later does not mix two commits. Raises UserError: no such repository or revision, no access to it, a hub that cannot
    be reached where the cache does not have the files, a cache that cannot be written.
    """
    return _download(name, name.partition("@")[2], SMALL_FILES)


def list_repository(name: str) -> frozenset[str]:
    """Names of all files of the repository, at the commit of ``fetch_small_files``, fetched or not.

    Where another version of ``huggingface_hub`` filled the cache, and the hub is out of reach, those that are there.
    """
    from huggingface_hub import errors, get_cached_repo_tree  # loads slowly

    folder = fetch_small_files(name)
    try:
        return frozenset(file.path for file in get_cached_repo_tree(name.partition("@")[0], revision=folder.name))
    except errors.CachedRepoTreeNotFoundError:
        return frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fetch_weights(name: str, files: Sequence[str]) -> pathlib.Path:
    """The folder of ``fetch_small_files``, with ``files`` in it. Raises UserError as that, or where one is missing."""
    folder = fetch_small_files(name)
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        what = missing[0] if len(missing) == 1 else f"{len(missing)} files of weights"
        print(f"fetching {what} of {name} at {folder.name} from the Hugging Face hub", file=sys.stderr, flush=True)
        _download(name, folder.name, missing)
    if absent := [file for file in missing if not (folder / file).exists()]:
        raise UserError(
            f"{name} on the Hugging Face hub has no {absent[0]}: expected weights as safetensors; give a repository "
            "that has them"
        )
    return folder


@functools.cache
def find_commit(fs, repo_type: str, repo: str, revision: str) -> str | None:
    """The commit of a revision when this process first asked; ``fs`` is a ``HfFileSystem``."""
    from huggingface_hub import HfApi  # loads slowly

    return HfApi(endpoint=fs.endpoint, token=fs.token).repo_info(repo, repo_type=repo_type, revision=revision).sha


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set: ``huggingface_hub`` then answers from its cache alone."""
    from huggingface_hub import constants  # loads slowly

    return constants.HF_HUB_OFFLINE


def cached_path(url: str) -> str:
    """The path in the cache of what an ``hf://`` URL names: a file, a folder or a glob.

    Raises UserError where the cache does not hold all files of that name, as the repository's listing there has them.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download  # loads slowly

    found = re.fullmatch(r"hf://(?:(dataset|space|model)s/)?([^/@]+/[^/@]+)(?:@([^/]+))?/?(.*)", url)
    if found is None:
        raise UserError(f"{url} cannot be read with HF_HUB_OFFLINE set: expected hf://datasets/OWNER/NAME/PATH")
    kind, repo, revision, path = found.groups()
    revision = revision and urllib.parse.unquote(revision)
    where: dict[str, Any] = {"repo_id": repo, "repo_type": kind, "revision": revision}
    try:
        get_cached_repo_tree(**where)  # without it nobody knows of files that are missing
        patterns = [path, f"{path.rstrip('/')}/*"] if path else None
        return f"{snapshot_download(**where, local_files_only=True, allow_patterns=patterns)}/{path}"
    except Exception as error:
        raise UserError(f"{url} cannot be read: {explain(error) or one_line(error)}") from error


def _download(name: str, revision: str, files: Sequence[str]) -> pathlib.Path:
    from huggingface_hub import constants, snapshot_download  # loads slowly

    try:
        folder = snapshot_download(name.partition("@")[0], revision=revision or None, allow_patterns=list(files))
    except Exception as error:  # of the hub, of the network, of the disk: the kinds are many
        reason = explain(error)
        if not reason and isinstance(error, OSError) and error.errno:
            cache = constants.HF_HUB_CACHE
            reason = f"the cache {cache} cannot be written ({error.strerror}): free some space, or set HF_HOME"
        reason = reason or f"the Hugging Face hub at {constants.ENDPOINT} failed ({one_line(error)}): try again later"
        raise UserError(f"{name} is not a folder here, and {reason}") from error
    return pathlib.Path(folder)


def explain(error: Exception) -> str | None:
    """What is wrong with a repository and what to do, for an error of ``huggingface_hub`` about it; else None."""
    from huggingface_hub import constants, errors  # loads slowly

    hub, cache = f"the Hugging Face hub at {constants.ENDPOINT}", f"the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, errors.GatedRepoError):
        return f"its repository on {hub} is gated: accept its terms on its page there, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} shows no repository of that name: check the name; for a private repository, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has no such revision of it: give a branch, a tag or a commit"
    if isinstance(error, errors.HFValidationError):
        return f"it cannot be a name on {hub} ({one_line(error)}): expected OWNER/NAME or OWNER/NAME@REVISION"
    absent = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError)
    if isinstance(error, absent):
        if constants.HF_HUB_OFFLINE:
            return f"{cache} does not hold it, and HF_HUB_OFFLINE is set: unset it, or first fetch it by `hf download`"
        cause = one_line(error.__cause__ or error)
        return f"{cache} does not hold it, and {hub} cannot be reached ({cause}): check the network, or give a path"
    return None
