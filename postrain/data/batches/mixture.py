"""Which source the next row comes from: shares that hold at every moment, not only on average.

The next row is of the source that has the least of what is its due, drawn over weight: weighted fair queueing (Demers,
Keshav, Shenker 1989). Nothing is drawn at random, so after any number of rows each source has its share up to one row,
and a resume needs no more than the amounts. Weights may change at given updates; from there on the new shares hold.
"""

import dataclasses
from collections.abc import Collection, Sequence

from postrain.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """``weights`` of the sources, which add up to 1, from update ``step`` (from 1) on."""

    step: int
    weights: tuple[float, ...]


def make_phases(config: DataConfig, sizes: Sequence[float]) -> list[Phase]:
    """The phases of ``config``, the first from update 1; ``sizes`` of the sources, of whatever is counted.

    Sources without weights have those of their sizes, to the power of 1 / ``mixture.temperature``.
    """
    given = [source.weight for source in config.train]
    if any(given):
        first = given
    else:
        largest = max(sizes)
        first = [(size / largest) ** (1 / config.mixture.temperature) for size in sizes]
    phases = [Phase(1, tuple(first))]
    phases += [Phase(phase.step, phase.weights) for phase in config.mixture.phases]
    return [Phase(phase.step, tuple(w / sum(phase.weights) for w in phase.weights)) for phase in phases]


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """Index of the phase that update ``step`` belongs to."""
    return max(i for i, phase in enumerate(phases) if phase.step <= step)


def choose(phase: Phase, drawn: Sequence[float], available: Collection[int]) -> int:
    """The source to draw from next; -1 where none of ``available`` has a weight. ``drawn`` so far, in this phase."""
    due = [(drawn[i] / phase.weights[i], i) for i in available if phase.weights[i] > 0]
    return min(due)[1] if due else -1
