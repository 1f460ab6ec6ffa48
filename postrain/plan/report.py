"""The report of ``postrain plan``: typed facts about one training step, as JSON and as text (``report.txt.j2``)."""

import dataclasses
import functools
import math
from typing import Any

import jinja2

from postrain.models.flops import format_count

KIBI = 1024
LABELS = {  # of the fields of Memory, in the order of the report
    "parameters_trained": "parameters, trained",
    "parameters_frozen": "parameters, frozen",
    "optimizer": "optimizer state",
    "average": "moving average",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "activations, temporaries",
    "outputs": "metrics",
    "padding": "padding of layouts",
    "program": "program",
}


@dataclasses.dataclass(frozen=True)
class TargetFacts:
    """The devices that the step was compiled for. What is not published about a device is None."""

    name: str  # as in --target, "v5e:4x4"
    devices: int
    hosts: int
    kind: str  # of a device, as JAX calls it
    usable_bytes: int  # of a device's memory
    usable_why: str
    peak_flops: float | None  # dense bfloat16 operations per second of a device
    memory: int | None  # bytes of a device
    memory_bandwidth: float | None  # bytes per second of a device
    link_bandwidth: float | None  # bytes per second that a device can send to its slice or node
    network_bandwidth: float | None  # bytes per second that a device can send to other nodes
    source: str | None  # of these figures


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The model that trains."""

    parameters_trained: int
    parameters_frozen: int
    compute_dtype: str
    remat: str


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """One update's batch, on all devices."""

    rows: int
    sequence_length: int
    micro_batches: int
    tokens: int  # rows x sequence_length


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device by kind. "gradients" and "activations" together are the compiler's temporaries."""

    parameters_trained: int
    parameters_frozen: int
    optimizer: int
    average: int
    batch: int
    gradients: int  # float32 sums, which exist at the end of the backward pass
    activations: int
    outputs: int = 0
    padding: int = 0  # that layouts add to the arguments
    program: int = 0  # the code itself

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a step on all devices together."""

    model: float  # by the formula of perf/mfu, for full rows of one document each
    model_by_kind: dict[str, float]
    executed: float  # a lower bound of what is carried out, recomputation included
    compiler: float | None  # XLA's count, which takes the body of each loop once; None where it has none


@dataclasses.dataclass(frozen=True)
class CollectiveFacts:
    """The collectives of one kind in a step; bytes of one device."""

    times: int
    payload_bytes: int
    received_bytes: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """The roofline: the shortest time that a step can take, and what follows from it."""

    seconds: dict[str, float]  # "compute", "memory", "interconnect"; the step takes the longest of them
    memory_bytes_moved: int  # of one device
    network_seconds: float  # the part of "interconnect" between nodes
    step_seconds: float
    limited_by: str  # a key of ``seconds``
    mfu: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A change of the config that was tried because the step does not fit."""

    change: dict[str, Any]  # config key -> value
    needed: int  # bytes of one device
    compiled: bool  # False: inputs and gradients alone are too large, so nothing was compiled
    fits: bool


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """What one training step needs of a target."""

    target: TargetFacts
    mesh: dict[str, int]  # axes longer than 1
    model: ModelFacts
    batch: BatchSizes
    memory: Memory
    fits: bool
    compiled: bool  # False: the compiler refused the step because it needs too much memory
    flops: Flops
    collectives: dict[str, CollectiveFacts] | None  # by kind; None where the compiler refused the step
    uncounted_collectives: int | None  # those in loops of unknown length, counted once
    bound: Bound | None  # None on a CPU, of which no peaks are published
    advice: list[Attempt]
    notes: list[str]
    compile_seconds: float

    def to_dict(self) -> dict[str, Any]:
        facts = dataclasses.asdict(self)
        facts["memory"]["total"] = self.memory.total
        return facts

    def format_misfit(self) -> str:
        """One line: by how much it does not fit, and the first change that makes it fit."""
        line = f"does not fit on {self.target.name}: {_format_excess(self)}"
        good = [attempt for attempt in self.advice if attempt.fits]
        return line + (f"; fits with {format_change(good[0].change)}" if good else "")

    def __str__(self) -> str:
        # Devices of this kind that the best change needs if memory splits evenly, where no change fits.
        devices_needed = None
        if self.advice and not self.advice[-1].fits:
            least = min(attempt.needed for attempt in self.advice)
            devices_needed = math.ceil(self.target.devices * least / self.target.usable_bytes)
        return _load_template().render(
            {name: getattr(self, name) for name in self.__dataclass_fields__},
            excess=_format_excess(self),
            memory_lines=[(label, getattr(self.memory, kind)) for kind, label in LABELS.items()],
            devices_needed=devices_needed,
        )


def format_bytes(count: float) -> str:
    """``12.34 GiB``, or MiB or KiB where that says more."""
    for size, unit in ((KIBI**3, "GiB"), (KIBI**2, "MiB")):
        if abs(count) >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count / KIBI:,.2f} KiB"


def format_change(change: dict[str, Any]) -> str:
    """``model.remat=full, train.micro_batches=4``."""
    return ", ".join(f"{key}={value}" for key, value in change.items())


def _format_excess(report: PlanReport) -> str:
    usable, needed = report.target.usable_bytes, report.memory.total
    return f"a device needs {format_bytes(needed)} of {format_bytes(usable)}, {format_bytes(needed - usable)} too much"


@functools.cache
def _load_template() -> jinja2.Template:
    loader = jinja2.PackageLoader("postrain.plan", package_path="")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "bytes": format_bytes,
        "change": format_change,
        "flops": format_count,
        "number": lambda count: f"{count:,.0f}",
        "gigabytes": lambda rate: f"{rate / 1e9:,.0f} GB/s",
    }
    return environment.get_template("report.txt.j2")
