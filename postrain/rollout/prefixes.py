"""Keys and values of prompts that were computed before: what prompts begin with is computed once.

An entry is the cache of one row, of all the positions of its ids. It is found by the version of the weights and a
chain of hashes, one for each BLOCK of ids from the first on, or by the hash of all its ids, and its ids are compared:
a prompt takes over as many positions as the two begin with alike. Entries that were not used for longest go first when
all together hold more than ``max_bytes``. One that is not finite is never found: of NaN anywhere in a piece of
a prompt, attention makes NaN everywhere in it.
"""

import collections
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from postrain.models.cache import KVCache
from postrain.sharding import to_host

BLOCK = 16


class Prefix(NamedTuple):
    ids: np.ndarray  # int32 [N]
    cache: KVCache  # of one row, N positions or more
    keys: tuple[bytes, ...]
    is_finite: jax.Array | bool  # on the device until someone asks, so that nothing waits for it

    @property
    def num_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))


class PrefixStore:
    """``find`` and ``put`` for the weights of one version at a time; ``clear`` at every new one."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._entries: collections.OrderedDict[bytes, Prefix] = collections.OrderedDict()  # by the hash of all ids
        self._index: dict[bytes, bytes] = {}  # hash of the first ids -> the entry's

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._entries.values())

    def find(self, version: int, ids: np.ndarray) -> tuple[int, KVCache | None]:
        """(positions that need not be computed, a row that holds them): the longest beginning that is here."""
        for key in reversed(list(_hash_beginnings(version, ids))):
            entry = self._entries.get(self._index.get(key, b""))
            if entry is not None and to_host(entry.is_finite):
                self._entries.move_to_end(entry.keys[-1])
                return count_common(entry.ids, ids), entry.cache
        return 0, None

    def has(self, version: int, ids: np.ndarray) -> bool:
        """Whether there is an entry of these ids."""
        *_, key = _hash_beginnings(version, ids)
        return key in self._entries

    def put(self, version: int, ids: np.ndarray, cache: KVCache, is_finite: jax.Array | bool) -> None:
        """Keeps the row ``cache``, which holds ``ids``, unless they are here already or it is too large."""
        keys = tuple(_hash_beginnings(version, ids))
        entry = Prefix(ids.copy(), cache, keys, is_finite)
        if not keys or keys[-1] in self._entries or entry.num_bytes > self.max_bytes:
            return
        self._entries[keys[-1]] = entry
        self.num_bytes += entry.num_bytes
        self._index.update(dict.fromkeys(keys, keys[-1]))
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
            for key in oldest.keys:
                if self._index.get(key) == oldest.keys[-1]:
                    del self._index[key]

    def clear(self) -> None:
        self._entries.clear()
        self._index.clear()
        self.num_bytes = 0


def count_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids the two begin with alike."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


def _hash_beginnings(version: int, ids: np.ndarray) -> Iterator[bytes]:
    """Of each whole block the hash of the ids up to its end, and last that of all ids; nothing for no ids."""
    digest = hashlib.blake2b(str(version).encode(), digest_size=16).digest()
    data, size = ids.astype("<i4").tobytes(), 4 * BLOCK
    for start in range(0, len(data), size):
        digest = hashlib.blake2b(digest + data[start : start + size], digest_size=16).digest()
        yield digest
