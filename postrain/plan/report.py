"""The report of ``postrain plan``, as text and as JSON."""

import dataclasses
import math
from typing import Any

from postrain.training.flops import format_count

KIBI = 1024
LABELS = {
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
    "total": "total",
}


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """What one training step needs of a target. Sizes in bytes of one device, operations of all devices."""

    target: dict  # name, devices, hosts, kind, usable_bytes, usable_why, and the published figures of the chip
    mesh: dict[str, int]  # axes longer than 1
    model: dict  # parameters_trained, parameters_frozen, compute_dtype, remat
    batch: dict  # rows, sequence_length, micro_batches, tokens
    memory: dict[str, int]  # by kind, "total" is their sum
    fits: bool
    compiled: bool  # False: the compiler refused, for want of memory
    flops: dict  # model, model_by_kind, executed, compiler
    collectives: dict[str, dict] | None  # by kind: times, payload_bytes, received_bytes of each device in a step
    uncounted_collectives: int | None  # those in loops of unknown length, counted once
    bound: dict | None  # the roofline; None on a CPU, of which no peaks are published
    advice: list[dict]  # what was tried when it did not fit
    notes: list[str]
    compile_seconds: float

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def describe_misfit(self) -> str:
        """One line: by how much it does not fit, and the first change that makes it fit."""
        usable, needed = self.target["usable_bytes"], self.memory["total"]
        line = (
            f"does not fit on {self.target['name']}: a device needs {gib(needed)} of {gib(usable)}, "
            f"{gib(needed - usable)} too much"
        )
        good = [one for one in self.advice if one["fits"]]
        return line + (f"; fits with {describe_change(good[0]['change'])}" if good else "")

    def __str__(self) -> str:
        parts = (self._head(), self._memory(), self._fit(), self._flops(), self._collectives(), self._bound())
        return "\n".join(line for part in parts for line in part)

    def _head(self) -> list[str]:
        target, batch, model = self.target, self.batch, self.model
        axes = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one device"
        hosts = f", {target['hosts']} hosts" if target["hosts"] > 1 else ""
        return [
            f"target      {target['name']}: {target['devices']} x {target['kind']}{hosts}, mesh {axes}",
            *(f"            {note}" for note in self.notes),
            f"model       {model['parameters_trained']:,} parameters trained, {model['parameters_frozen']:,} frozen, "
            f"{model['compute_dtype']}, remat {model['remat']}",
            f"batch       {batch['rows']} rows x {batch['sequence_length']} tokens = {batch['tokens']:,} a step, in "
            f"{batch['micro_batches']} micro-batch{'es' * (batch['micro_batches'] > 1)}",
            f"compiled    in {self.compile_seconds:.0f} s",
        ]

    def _memory(self) -> list[str]:
        lines = ["memory      of each device"]
        for kind, label in LABELS.items():
            size = self.memory[kind]
            if size or kind == "total":
                lines.append(f"  {label:<26}{gib(size):>12}")
        return lines

    def _fit(self) -> list[str]:
        usable, why = self.target["usable_bytes"], self.target["usable_why"]
        if self.fits:
            return [f"fits        yes, {gib(usable - self.memory['total'])} of {gib(usable)} are left ({why})"]
        refused = "" if self.compiled else "; the compiler refuses it"
        lines = [f"fits        NO: {self.describe_misfit().partition(': ')[2].partition(';')[0]} ({why}){refused}"]
        return lines + [f"            {line}" for line in describe_advice(self.advice, usable, self.target["devices"])]

    def _flops(self) -> list[str]:
        flops = self.flops
        kinds = {name: count / flops["model"] for name, count in flops["model_by_kind"].items() if count}
        lines = [
            f"{format_count(flops['model'])} a step by the formula of perf/mfu: "
            + ", ".join(f"{name} {share:.0%}" for name, share in kinds.items()),
            f"{format_count(flops['executed'])} carried out at least, recomputation included",
            "of full rows with one document each; shorter documents need fewer",
        ]
        if flops["compiler"]:
            lines.append(f"{format_count(flops['compiler'])} counted by the compiler, each loop's body once")
        return [f"{'' if i else 'FLOPs':<12}{line}" for i, line in enumerate(lines)]

    def _collectives(self) -> list[str]:
        if self.collectives is None:
            return []
        lines = ["collectives of a step, bytes that each device receives"]
        for kind, count in self.collectives.items():
            lines.append(f"  {kind:<26}{gib(count['received_bytes']):>12}  in {count['times']:,}")
        if not self.collectives:
            lines = ["collectives none"]
        if self.uncounted_collectives:
            lines.append(f"  {self.uncounted_collectives} in loops of unknown length, counted once")
        return lines

    def _bound(self) -> list[str]:
        bound, target = self.bound, self.target
        if bound is None:
            return [] if not self.compiled else ["MFU         no bound: nothing is published about this CPU"]
        seconds = ", ".join(f"{name} {value * 1e3:.4g} ms" for name, value in bound["seconds"].items())
        figures = (
            f"{target['peak_flops'] / 1e12:.0f} TFLOP/s, memory {target['memory_bandwidth'] / 1e9:,.0f} GB/s, "
            f"links {target['link_bandwidth'] / 1e9:,.0f} GB/s"
        )
        if target["network_bandwidth"] and target["hosts"] > 1:
            figures += f", network {target['network_bandwidth'] / 1e9:,.0f} GB/s"
        return [
            f"MFU         {bound['mfu']:.1%} at most, {bound['tokens_per_second']:,.0f} tokens/s, limited by "
            f"{bound['limited_by']}",
            f"            a step takes at least: {seconds}",
            f"            from {figures} of a device ({target['source']})",
        ]


def gib(count: float) -> str:
    """``12.34 GiB``, or MiB or KiB where that says more."""
    for size, unit in ((KIBI**3, "GiB"), (KIBI**2, "MiB")):
        if abs(count) >= size / 10:
            return f"{count / size:,.2f} {unit}"
    return f"{count / KIBI:,.2f} KiB"


def describe_change(change: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in change.items())


def describe_advice(advice: list[dict], usable: int, devices: int) -> list[str]:
    """A line for each change that was tried."""
    lines = []
    for one in advice:
        size = gib(one["needed"])
        if one["fits"]:
            verdict = f"fits, {size}"
        elif one["compiled"]:
            verdict = f"does not, {size}"
        else:
            verdict = f"cannot, what the step is given and its gradients take {size}"
        lines.append(f"{describe_change(one['change'])}: {verdict}")
    if advice and not advice[-1]["fits"]:
        least = min(one["needed"] for one in advice)
        more = math.ceil(devices * least / usable)
        lines.append(f"nothing tried fits: take more devices (about {more} of these) or ones with more memory")
    return lines
