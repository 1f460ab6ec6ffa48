"""Why a checkpoint could not be read: it is damaged for good, or the machine failed and it may be whole.

Only the first may be moved out of the way. A checkpoint is taken for damaged when something names the damage (a
file that is missing, cut short, no JSON, not what its checksum says) and every file that is there can be read:
memory, disk and permissions give errors of their own, and anything else is not guessed at.
"""

import errno
import json
import os
import pathlib

# How TensorStore begins its messages, absl's names of status codes; exceptions carry nothing else to go by.
DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
MACHINE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")


class Damaged(ValueError):
    """Damage that postrain itself found."""


def is_damaged(path: pathlib.Path, error: BaseException) -> bool:
    """Whether ``error``, raised while the checkpoint folder ``path`` was read, proves that the folder is damaged."""
    causes = list_causes(error)
    return not any(map(_is_machine, causes)) and any(map(_is_damage, causes)) and _can_be_read(path)


def describe_cause(error: BaseException) -> str:
    """The first cause that is known to say something, else the innermost, on one line of at most 200 characters."""
    telling = [cause for cause in list_causes(error) if _is_machine(cause) or _is_damage(cause)]
    cause = (telling or list_causes(error)[-1:])[0]
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if isinstance(cause, Damaged) else text[:200]


def list_causes(error: BaseException) -> list[BaseException]:
    """``error`` and what it was raised from, outermost first: Orbax wraps whatever happens several times."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def is_out_of_memory(error: BaseException) -> bool:
    return any(isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e)[:2000] for e in list_causes(error))


def _is_machine(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno not in (None, errno.ENOENT)
    return isinstance(error, MemoryError) or str(error).startswith(MACHINE)


def _is_damage(error: BaseException) -> bool:
    if isinstance(error, ValueError) and str(error).startswith(DAMAGE):
        return True
    return isinstance(error, (Damaged, json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError))


def _can_be_read(path: pathlib.Path) -> bool:
    """Whether the folder is there and all its files open: Orbax reports some read errors as missing metadata."""
    try:
        for folder, _, names in os.walk(path, onerror=_raise):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    file.read(1)
                    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                    file.read(1)
    except OSError:
        return False
    return path.is_dir()


def _raise(error: OSError) -> None:
    raise error
