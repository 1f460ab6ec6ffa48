"""What a generated text may be: a JSON schema, a regular expression, a list of choices, a grammar, a trie of ids.

``compile.py`` makes constraints on text, ``trie.py`` those on sequences of ids. Whoever generates asks a
``Constraint`` which ids may come next, and tells it which one came.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from postrain.errors import UserError


class Constraint(Protocol):
    """What one generated sequence may go on with. One object per sequence, used from its first token to its last.

    ``allowed()`` is called before each token and ``advance(token)`` after it, until ``is_done()``.
    """

    def allowed(self) -> np.ndarray:
        """The ids that may come next: uint32 [ceil(vocab / 32)], bit i of word j set for id 32 * j + i.

        Stop ids are among them where the text may end. Ids that are no tokens never are. Empty once ``is_done()``.
        """
        ...

    def advance(self, token: int) -> None:
        """Takes the next id. Raises ValueError where it is not allowed."""
        ...

    def is_done(self) -> bool:
        """Whether the sequence has ended, so that nothing may follow: by a stop id, or at the end of a trie's path."""
        ...


ConstraintFactory = Callable[[], Constraint]


class WrongConstraint(UserError):
    """A constraint that cannot be kept. ``kind``: "json_schema", "regex", "choice", "grammar", "trie" ..."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def pack_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids below ``vocab_size`` -> the words of ``Constraint.allowed``, uint32 [ceil(vocab_size / 32)]."""
    flags = np.zeros(-(-vocab_size // 32) * 32, bool)
    flags[ids] = True
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def unpack_ids(words: np.ndarray) -> np.ndarray:
    """The words of ``Constraint.allowed`` -> ids in ascending order, int64 [n]."""
    return np.flatnonzero(np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), bitorder="little"))
