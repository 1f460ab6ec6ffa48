"""Bytes that a compiled program sends between devices, read from its optimised HLO text.

A loop's body is multiplied by the loop's trip count where the program says it: in the annotation that XLA's CPU and
GPU compilers leave, else in a condition that compares the counter with a constant (JAX's loops count from 0 by 1). A
loop whose length depends on the data counts once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. ``payload``: bytes of the whole, unsplit value that it is about, on one device."""

    kind: str
    payload: int
    groups: tuple[tuple[int, ...], ...]  # positions in the mesh's flat order that exchange data with each other
    times: int  # in one run of the program

    @property
    def group_size(self) -> int:
        return max(len(group) for group in self.groups)

    @property
    def received(self) -> float:
        """Bytes that each device has to receive in one run of the program, by the best algorithm there is."""
        others = (self.group_size - 1) / self.group_size
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.times * self.payload * share


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    type: str
    op: str
    rest: str  # operands and attributes


def read_collectives(text: str, num_devices: int) -> tuple[list[Collective], int]:
    """The collectives of an optimised HLO module, and how many of them are in loops of unknown length."""
    # The lines of every computation, and the name of the one that the program starts in.
    computations: dict[str, list[_Line]] = {}
    entry = ""
    for row in text.splitlines():
        if row[:1] in ("%", "E") and row.endswith("{"):
            name = row.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            entry = name if row.startswith("ENTRY") else entry
            lines = computations.setdefault(name, [])
        elif match := _INSTRUCTION.match(row):
            lines.append(_Line(*match.groups()))
    found, unknown = [], 0
    for name, times, known in _walk(computations, entry, 1, True):
        for computation, line in _inlined(computations, name):
            kind, lines = line.op.removesuffix("-start"), computations[computation]
            if kind not in KINDS:
                continue
            # The TPU compiler writes an asynchronous collective into every fusion that runs meanwhile; the first one
            # starts it.
            if "chain_id=" in line.rest and not any("AsyncCollectiveStart" in other.rest for other in lines):
                continue
            types = {other.name: other.type for other in lines}
            size = sum(_size_of(types[operand]) for operand in _operands(line.rest))
            groups = _read_groups(line.rest, num_devices)
            if kind == "all-gather":
                size *= max(len(group) for group in groups)
            if computation.startswith("all-reduce-scatter"):  # how the TPU compiler writes a reduce-scatter
                kind = "reduce-scatter"
            if max(len(group) for group in groups) > 1:
                found.append(Collective(kind, size, groups, times))
                unknown += not known
    return found, unknown


def _inlined(computations, name: str) -> Iterator[tuple[str, _Line]]:
    """The instructions of a computation and of the fusions and asynchronous wrappers in it."""
    for line in computations[name]:
        yield name, line
        if line.op in ("fusion", "async-start"):
            for called in _called(line):
                yield from _inlined(computations, called)


def _walk(computations, name: str, times: int, known: bool) -> Iterator[tuple[str, int, bool]]:
    """Every run of a computation: how often, and whether that is known."""
    yield name, times, known
    for _, line in _inlined(computations, name):
        if line.op == "while":
            count = _trip_count(computations, line)
            for called in _called(line):
                yield from _walk(computations, called, times * (count or 1), known and count is not None)
        elif line.op in ("call", "conditional"):
            for called in _called(line):
                yield from _walk(computations, called, times, known)


def _called(line: _Line) -> list[str]:
    return [name.lstrip("%") for group in _CALLED.findall(line.rest) for name in re.findall(r"%?[\w.-]+", group)]


def _trip_count(computations, line: _Line) -> int | None:
    """Of a while loop: annotated, or read from ``counter < constant`` in its condition."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
        return int(match[1])
    condition, body = (
        {line.name: line for line in computations[_attribute(line, name)]} for name in ("condition", "body")
    )
    root = list(condition.values())[-1]
    if root.op != "compare" or "direction=LT" not in root.rest:
        return None
    counter, limit = _operands(root.rest)
    limit, index = _constant(condition, limit), _attribute(condition[counter], "index")
    if limit is None or index is None:
        return None
    update = list(body.values())[-1]
    new = body.get(_operands(update.rest)[int(index)]) if update.op == "tuple" else None
    steps = [_constant(body, name) for name in _operands(new.rest)] if new and new.op == "add" else []
    step = next((value for value in steps if value), 1)
    return math.ceil(limit / step)


def _attribute(line: _Line, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.-]+)", line.rest)
    return match[1] if match else None


def _constant(lines: dict[str, _Line], name: str) -> int | None:
    line = lines.get(name)
    while line and line.op in ("copy", "bitcast", "convert"):
        line = lines.get(_operands(line.rest)[0])
    match = re.match(r"(\d+)\)", line.rest) if line and line.op == "constant" else None
    return int(match[1]) if match else None


def _operands(rest: str) -> list[str]:
    """Names up to the parenthesis that closes the operands; attributes follow it."""
    depth, end = 1, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = i
            break
    return re.findall(r"%([\w.-]+)", rest[:end])


@functools.cache
def _size_of(kind: str) -> int:
    """Bytes of an array or tuple type, without the padding of its layout."""
    total = 0
    for dtype, sizes in _ARRAY.findall(kind):
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


@functools.cache
def _groups_of_pairs(pairs: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in pair.split(",")) for pair in re.findall(r"\{([\d, ]+)\}", pairs))


def _read_groups(rest: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The three forms of replica groups, and the pairs of a permutation."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return _groups_of_pairs(match[1] + "}")
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return _groups_of_pairs(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, source, order = (tuple(int(i) for i in part.split(",")) if part else None for part in match.groups())
        ids = np.arange(math.prod(source)).reshape(source)
        ids = (ids if order is None else ids.transpose(order)).reshape(shape)
    elif match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        # 'a'=2,'b'=4 and 'b' or 'b':(2)2, the part of axis b of size 2 after its first 2.
        mesh, axes = match.groups()
        flat = []  # the dimensions, cut where a group takes a part of one: size, whether groups run along it
        for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
            before, whole = 1, int(size)
            found = re.findall(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", axes)
            for start, part in sorted((int(start), int(part)) if part else (1, whole) for start, part in found):
                flat += [(start // before, False), (part, True)]
                before = start * part
            flat.append((whole // before, False))
        inside = [i for i, (_, used) in enumerate(flat) if used]
        outside = [i for i, (_, used) in enumerate(flat) if not used]
        sizes = [size for size, _ in flat]
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(outside + inside)
        ids = ids.reshape(-1, math.prod(sizes[i] for i in inside))
    else:
        return (tuple(range(num_devices)),)
    return tuple(tuple(int(i) for i in row) for row in ids.reshape(-1, ids.shape[-1]))
