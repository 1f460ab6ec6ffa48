"""The slots: a cache of key and values with a row for each request in work, and what each row is asked.

The cache grows by need, in rows and in positions, and shrinks when a quarter would do. What rows are asked is kept on
the host, in arrays of one entry per row that go to the device with every call: a few hundred bytes.

Legend: B rows, V ids.
"""

import functools

import jax
import numpy as np

from postrain.models.cache import KVCache
from postrain.models.config import ModelConfig
from postrain.rollout import programs
from postrain.rollout.programs import bucket
from postrain.rollout.requests import Request
from postrain.rollout.sampling import Edits

GROWTH = 256  # new tokens that the cache of a row has room for at first


class Slots:
    """At most ``most`` rows, a multiple of ``shards``; no array at all until a request comes.

    ``split``: layers have caches of their own (``models.transformer.split_layers``). ``least``: rows, and positions
    of each, that there are from the first request on. ``device``: of the cache; None: the devices of the mesh.
    """

    def __init__(
        self, config: ModelConfig, *, most: int, least: tuple[int, int], shards: int, split: bool, device=None
    ):
        self.config, self.shards, self.split, self.device = config, shards, split, device
        self.least, self.least_length = min(least[0], most), bucket(least[1])
        self.most = most + -most % shards
        self.cache: KVCache | None = None
        self.occupants: list[Request | None] = []
        self.rows = programs.make_rows(0)

    @property
    def running(self) -> list[Request]:
        return [request for request in self.occupants if request is not None]

    @property
    def num_free(self) -> int:
        return self.most - len(self.running)

    def make_cache(self, rows: int, length: int) -> KVCache:
        cache = programs.make_cache(config=self.config, rows=rows, length=length, split=self.split)
        # On the device of the weights by name, as whatever is computed of them is: programs are compiled for either.
        return cache if self.device is None else jax.device_put(cache, self.device)

    def round_up(self, length: int) -> int:
        """Positions of a cache that holds ``length``: of a short list."""
        return max(bucket(length), self.least_length)

    def row_bytes(self, length: int) -> int:
        """Of the cache of one row with room for ``length`` positions."""
        config = self.config
        numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.round_up(length)
        return numbers * np.dtype(config.compute_dtype).itemsize

    # --- requests come and go ---

    def insert(self, requests: list[Request], small: KVCache | None, sources: list[int], waiting: int) -> None:
        """Gives each request a slot, whose cache is row ``sources[i]`` of ``small``; None: their contexts are empty.

        ``waiting``: requests that will need slots soon.
        """
        self._make_room(requests, waiting)
        free = [slot for slot, occupant in enumerate(self.occupants) if occupant is None]
        targets = free[: len(requests)]
        if small is not None:
            self.cache = programs.insert(self.cache, small, *as_moves(sources, targets, len(self.occupants)))
        for request, slot in zip(requests, targets, strict=True):
            self.occupants[slot], request.is_sound = request, False
            self._open_row(slot, request)

    def warm_up(self, small: KVCache) -> None:
        """Compiles what takes rows of ``small`` into the smallest cache of all rows, which is made."""
        if self.cache is None:
            self.cache, self.occupants = self.make_cache(self.most, self.round_up(1)), [None] * self.most
            self.rows = programs.make_rows(self.most)
            programs.extract(self.cache, np.int32(0), length=self.round_up(1))
        self.cache = programs.insert(self.cache, small, *as_moves([0], [0], self.most))

    def release(self, request: Request) -> None:
        """Frees the slot of a request, emptied where it may hold NaN: 0 times NaN would reach who has it next."""
        slot = self.occupants.index(request)
        if not request.is_sound:
            empty = self.make_cache(self.shards, self.cache.num_slots)
            self.cache = programs.insert(self.cache, empty, *as_moves([0], [slot], len(self.occupants)))
        self.occupants[slot] = None
        self.rows.remaining[slot] = 0

    def clear(self) -> None:
        self.cache, self.occupants = None, []

    def _open_row(self, slot: int, request: Request) -> None:
        rows, sampling = self.rows, request.sampling
        values = {
            "last": request.last,
            "positions": len(request.context),
            "remaining": request.remaining,
            "seeds": sampling.seed,
            "temperature": sampling.temperature,
        }
        for name, value in values.items():
            getattr(rows, name)[slot] = value
        rows.sample_ids[slot] = request.sample_id & 0xFFFFFFFF, request.sample_id >> 32
        rows.filters.top_k[slot], rows.filters.top_p[slot] = min(sampling.top_k, 2**31 - 1), sampling.top_p
        rows.filters.min_p[slot] = sampling.min_p
        rows.stop_ids[slot] = -1
        rows.stop_ids[slot, : len(sampling.stop_ids)] = sampling.stop_ids

    # --- room, by need ---

    def _count_rows(self, needed: int) -> int:
        """Rows of a cache for ``needed`` requests: of a short list, a multiple of the mesh's row shards."""
        rows = min(bucket(max(needed, self.least), 1), self.most)
        return rows + -rows % self.shards

    def _make_room(self, requests: list[Request], waiting: int) -> None:
        length = self.round_up(max(len(one.context) + 1 + min(one.remaining, GROWTH) for one in requests))
        rows = self._count_rows(min(len(self.running) + len(requests) + waiting, self.most))
        if self.cache is None:
            self.cache, self.occupants = self.make_cache(rows, length), [None] * rows
            self.rows = programs.make_rows(rows)
        elif rows > len(self.occupants) or length > self.cache.num_slots:
            self._resize(max(rows, len(self.occupants)), max(length, self.cache.num_slots))

    def make_room_for(self, steps: int) -> None:
        """Positions for ``steps`` more tokens of every row that is open."""
        open_rows = self.rows.remaining > 0
        last = self.rows.positions + 1
        needed = int((last + np.minimum(self.rows.remaining, steps))[open_rows].max())
        if needed > self.cache.num_slots:
            self._resize(len(self.occupants), self.round_up(needed))

    def shrink(self) -> None:
        """Gives room back where a quarter of the rows, or of the positions, would do."""
        running = self.running
        rows = self._count_rows(len(running))
        length = self.round_up(max(len(one.context) + 1 + min(one.remaining, GROWTH) for one in running))
        if 4 * rows <= len(self.occupants) or 4 * length <= self.cache.num_slots:
            self._resize(rows, min(length, self.cache.num_slots))

    def _resize(self, rows: int, length: int) -> None:
        """The requests in work in the first of ``rows`` slots."""
        taken = [slot for slot, request in enumerate(self.occupants) if request is not None]
        order = np.zeros(rows, np.int32)
        order[: len(taken)] = taken
        self.cache = programs.resize(self.cache, order, length=length)
        self.occupants = [self.occupants[slot] for slot in taken] + [None] * (rows - len(taken))
        self.rows = jax.tree.map(lambda x: x[order], self.rows)
        self.rows.remaining[len(taken) :] = 0

    def make_allowed(self, masks: dict[int, np.ndarray], always: bool = False) -> np.ndarray | None:
        """Bits of the ids that each row may choose, uint32 [B, words].

        ``masks``: those of rows with constraints, by handle (``choosable``). None where all rows may choose all, except
        ``always``.
        """
        if not masks and not always and not any(one.sampling.banned_ids for one in self.running):
            return None
        allowed = np.full((len(self.occupants), -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for slot, request in enumerate(self.occupants):
            if request is None:
                continue
            if request.handle in masks:
                allowed[slot] = masks[request.handle]
            elif request.sampling.banned_ids:
                allowed[slot] &= _allow_all_but(request.sampling.banned_ids, self.config.vocab_size)
        return allowed

    def choosable(self, request: Request) -> np.ndarray:
        """Of the ids that a request's constraint allows those that it may choose: bits as in ``make_allowed``.

        Where nothing but stop ids is left, they may come before ``min_new_tokens``: the constraint is the stronger.
        """
        sampling, size = request.sampling, self.config.vocab_size
        mask = request.constraint.allowed()
        if mask.shape != (-(-size // 32),) or mask.dtype != np.uint32:
            raise ValueError(f"a constraint for {size} ids gave {mask.shape} words of {mask.dtype}")
        if sampling.banned_ids:
            mask = mask & _allow_all_but(sampling.banned_ids, size)
        if sampling.stop_ids and len(request.tokens) < sampling.min_new_tokens:
            later = mask & _allow_all_but(sampling.stop_ids, size)
            mask = later if later.any() else mask
        return mask

    def make_edits(self, masks: dict[int, np.ndarray]) -> Edits:
        """The edits of every row, as they stand before the next token. ``masks``: as in ``make_allowed``."""
        shape = len(self.occupants), self.config.vocab_size
        floats = lambda value: np.full(shape[0], value, np.float32)
        ints = lambda: np.zeros(shape[0], np.int32)
        edits = Edits(
            bias_BV=np.zeros(shape, np.float32),
            counts_BV=np.zeros(shape, np.int32),
            prompt_BV=np.zeros(shape, bool),
            stops_BV=np.zeros(shape, bool),
            length=ints(),
            minimum=ints(),
            repetition=floats(1),
            presence=floats(0),
            frequency=floats(0),
        )
        for slot, request in enumerate(self.occupants):
            if request is None or not request.sampling.edits:
                continue
            sampling = request.sampling
            ids, biases = request.bias
            edits.bias_BV[slot, ids] = biases
            edits.counts_BV[slot] = np.bincount(request.tokens, minlength=shape[1])
            edits.prompt_BV[slot, request.prompt] = True
            if request.handle not in masks:  # which say themselves when stop ids may come
                edits.stops_BV[slot, list(sampling.stop_ids)] = True
            edits.length[slot], edits.minimum[slot] = len(request.tokens), sampling.min_new_tokens
            edits.repetition[slot] = sampling.repetition_penalty
            edits.presence[slot], edits.frequency[slot] = sampling.presence_penalty, sampling.frequency_penalty
        return edits


def as_moves(sources: list[int], targets: list[int], size: int) -> tuple[np.ndarray, np.ndarray, np.int32]:
    """Arguments of ``programs.insert``: int32 [size] twice, and how many of them count."""
    padded = np.zeros((2, max(size, len(sources))), np.int32)
    padded[0, : len(sources)], padded[1, : len(targets)] = sources, targets
    return padded[0], padded[1], np.int32(len(sources))


@functools.lru_cache(maxsize=16)
def _allow_all_but(banned_ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    allowed = np.ones(-(-vocab_size // 32) * 32, bool)
    allowed[list(banned_ids)] = False
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
