"""The order of rows in the epochs.

Epoch e is: a seeded permutation of all documents, packed in windows, and the rows shuffled
(``EpochOrder``). The epochs' rows follow each other without a gap, and update i takes the rows ``[i * B, (i + 1) * B)``
of that stream, whatever the number of processes. So every update has a full batch, and every document comes exactly
once in every epoch: an update may hold the last rows of one epoch and the first of the next.

The shuffles sort numbers drawn from Philox, whose streams numpy promises never to change; ``Generator``'s own
``permutation`` carries no such promise, and a resume under another numpy must give the same rows.
"""

import collections
import math
import threading

import grain
import numpy as np

from postrain.config import DataConfig
from postrain.data.batches.packing import pack

# Part of the data fingerprint, to be counted up whenever the same documents would come in another order.
PLAN_VERSION = 1

_ORDER_KEYS = ("sequence_length", "packing", "packing_window", "shuffle", "seed")  # of the config, that decide the rows
_ENDLESS = 2**62  # Grain wants a length
_KEPT_EPOCHS = 4  # rows of so many epochs are kept; a small set may pass several epochs in one batch


class EpochOrder(grain.MapDataset):
    """The endless stream of rows: element i is the indices of the documents in row i, int [n].

    Not Grain's own ``shuffle``, ``repeat`` and packing, because every document must come once an epoch, epochs follow
    each other within a batch, and any row must be found without those before it.

    Args:
      lengths: int [N], slots of each document.
      config: ``sequence_length``, ``packing``, ``packing_window``, ``shuffle`` and ``seed`` are used.
      known: another order of the same documents; epochs that it has packed are not packed again.
    """

    def __init__(self, lengths: np.ndarray, config: DataConfig, known: "EpochOrder | None" = None):
        super().__init__()
        self._lengths = np.asarray(lengths, np.int64)
        self._config = config
        self._starts = {0: 0}  # epoch -> its first row in the stream, as far as known
        self._rows: collections.OrderedDict[int, list[np.ndarray]] = collections.OrderedDict()
        self._lock = threading.RLock()  # the prefetch thread and the training loop both call
        if known is not None and all(getattr(known._config, key) == getattr(config, key) for key in _ORDER_KEYS):
            self._rows.update(known._rows)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        with self._lock:
            epoch = self.epoch_at(index)
            return self.rows_of_epoch(epoch)[index - self._starts[epoch]]

    def rows_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, in order: for each the indices of its documents."""
        config = self._config
        with self._lock:
            if epoch not in self._rows:
                order = np.arange(self._lengths.size)
                if config.shuffle:
                    order = permutation(order.size, (config.seed, epoch, 0))
                rows = pack(
                    self._lengths[order], config.sequence_length, window=config.packing_window, method=config.packing
                )
                if config.shuffle:
                    rows = [rows[i] for i in permutation(len(rows), (config.seed, epoch, 1))]
                else:  # rows by their first document: as near to the order of the source as packing allows
                    rows.sort(key=lambda documents: int(documents[0]))
                self._rows[epoch] = [order[documents] for documents in rows]
                while len(self._rows) > _KEPT_EPOCHS:
                    self._rows.popitem(last=False)
            self._rows.move_to_end(epoch)
            return self._rows[epoch]

    def first_row(self, epoch: int) -> int:
        """Where in the stream an epoch begins. Epochs may have different numbers of rows, so those before count."""
        with self._lock:
            known = max(e for e in self._starts if e <= epoch)
            for e in range(known, epoch):
                self._starts[e + 1] = self._starts[e] + len(self.rows_of_epoch(e))
            return self._starts[epoch]

    def epoch_at(self, row: int) -> int:
        """The epoch that a row of the stream belongs to."""
        with self._lock:
            epoch = max(e for e, first in self._starts.items() if first <= row)
            while self.first_row(epoch + 1) <= row:
                epoch += 1
            return epoch

    def set_first_row(self, epoch: int, row: int) -> None:
        """Says where an epoch begins, so that a resume need not pack all the epochs before it again."""
        with self._lock:
            self._starts = {0: 0, epoch: row}

    def num_rows(self, epochs: float) -> int:
        """Rows of the stream that cover so many epochs, a part of an epoch rounded up."""
        whole = math.floor(epochs)
        part = math.ceil((epochs - whole) * len(self.rows_of_epoch(whole))) if epochs > whole else 0
        return self.first_row(whole) + part


def permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    """int [size]: 0 to size - 1 in an order that ``seed`` alone decides."""
    bits = np.random.Philox(np.random.SeedSequence([part % 2**64 for part in seed]))
    return np.argsort(bits.random_raw(size), kind="stable")
