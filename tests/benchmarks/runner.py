"""Sides measured in turns, each run a process of its own, the medians written into docs/benchmarks.md.

A benchmark gives ``run_side``, which does the work of one side and emits one JSON line, and ``summarize``, which makes
a table of all lines and holds them against its bars; one that is missed makes the command fail. What disturbs the
machine meets both sides alike, and neither warms anything up for the other.
"""

import argparse
import importlib.metadata
import json
import operator
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import workloads

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md"


class Bar(NamedTuple):
    """What a figure must reach.

    Attributes:
        what: it measures, as in "useful tokens/s beside TRL packed".
        value: what was measured.
        relation: of the value to the limit: one of ">=", ">", "<=", "<".
        limit: the bar.
        form: how both are written, a format of ``str.format``.
    """

    what: str
    value: float
    relation: str
    limit: float
    form: str = "{:.2f}"

    @property
    def met(self) -> bool:
        """A value that is not a number meets nothing."""
        return RELATIONS[self.relation](self.value, self.limit)

    def __str__(self) -> str:
        value, limit = (self.form.format(number) for number in (self.value, self.limit))
        return f"{self.what} {value} ({self.relation} {limit}): **{'met' if self.met else 'missed'}**"


RELATIONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def describe_bars(bars: Sequence[Bar]) -> str:
    """One line: each bar, met or missed."""
    return "Bars: " + ("; ".join(map(str, bars)) if bars else "none, these figures are for comparison") + "."


def make_parser(description: str, *, rounds: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the figures into docs/benchmarks.md")
    return parser


def show(section: str, text: str, bars: Sequence[Bar], write: bool) -> None:
    """Prints the figures and their bars, and puts them into their section of the page where that is asked for.

    Raises SystemExit, code 1, when a bar is missed.
    """
    text = f"{text}\n\n{describe_bars(bars)}"
    print(text, flush=True)
    if write:
        workloads.write_section(PAGE, section, text)
    if not all(bar.met for bar in bars):
        raise SystemExit(1)


def run_in_turns(
    parser: argparse.ArgumentParser,
    section: str,
    sides: Iterable[str],
    run_side: Callable[[argparse.Namespace], None],
    summarize: Callable[[dict[str, list[dict]]], tuple[str, Sequence[Bar]]],
    prepare: Callable[[str], None] = workloads.write_tiny_model,
) -> None:
    """The main of a benchmark: in a process that was given ``--side`` that side, else all sides, ``--rounds`` times.

    ``run_side`` finds the side and the folder that ``prepare`` filled in ``arguments.side`` and ``arguments.model``,
    beside every option of the command; ``summarize`` is given the emitted lines by side, in the order of the rounds.
    """
    parser.add_argument("--side", choices=list(sides), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments)
        return
    lines = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for _ in range(arguments.rounds):
            for side, of_side in lines.items():
                of_side.append(_run([*sys.argv, "--side", side, "--model", folder]))
                print(json.dumps(of_side[-1]), flush=True)
    show(section, *summarize(lines), arguments.write)


def _run(command: list[str]) -> dict:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def find_versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def describe_versions(lines: dict[str, list[dict]]) -> str:
    """The ``versions`` of all sides, as one sentence."""
    used = {name: number for runs in lines.values() for run in runs for name, number in run["versions"].items()}
    return ", ".join(f"{name} {number}" for name, number in sorted(used.items())) + "."
