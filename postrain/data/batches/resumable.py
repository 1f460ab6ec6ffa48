"""The base of our own Grain datasets: elements that are read one after the other, from any saved position.

Grain's transformations save a position by the number of elements before it, or by the state of one parent. Here a
position also says where in which file reading stands, which epoch of a source it is, and where the window of
documents began that is packed at the moment.
"""

import abc
from collections.abc import Iterator
from typing import Any

import grain


class ResumableDataset(grain.IterDataset):
    """A ``grain.IterDataset`` described by one generator: what comes after a position, each element with the next one.

    Positions are JSON-able and are never changed once they were handed out.
    """

    @abc.abstractmethod
    def first_position(self) -> Any:
        """The position before the first element."""

    @abc.abstractmethod
    def read(self, position: Any) -> Iterator[tuple[Any, Any]]:
        """(position after it, element) of each element after ``position``. What it returns is the position at the end,
        None: that after the last element."""

    def __iter__(self) -> "ResumableIterator":
        return ResumableIterator(self)


class ResumableIterator(grain.DatasetIterator):
    """Reads a ``ResumableDataset``; nothing is read before the first element is asked for."""

    def __init__(self, dataset: ResumableDataset):
        super().__init__()
        self._dataset = dataset
        self.set_state(dataset.first_position())

    def __next__(self) -> Any:
        try:
            self._position, element = next(self._elements)
        except StopIteration as end:
            self._position = self._position if end.value is None else end.value
            raise
        return element

    def get_state(self) -> Any:
        """The position after the last element."""
        return self._position

    def set_state(self, state: Any) -> None:
        """Continues after the element after which ``state`` was taken."""
        self._position = state
        self._elements = self._dataset.read(state)
