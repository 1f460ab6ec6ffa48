"""The sides of a benchmark take turns, see the command's options, and their lines become a table."""

import json
import pathlib
import subprocess
import sys

BENCHMARK = """
import pathlib, sys
sys.path.insert(0, {here!r})
import workloads
from runner import describe_versions, find_versions, make_parser, run_in_turns

def prepare(folder):
    pathlib.Path(folder, "count").write_text("0")

def run_side(arguments):
    count = pathlib.Path(arguments.model, "count")
    count.write_text(str(int(count.read_text()) + 1))
    if arguments.fail == arguments.side:
        raise ValueError("no such luck")
    print("noise")
    turn, versions = int(count.read_text()), find_versions("numpy")
    workloads.emit(side=arguments.side, turn=turn, size=arguments.size, versions=versions)

def summarize(lines):
    return str({{side: [run["turn"] for run in runs] for side, runs in lines.items()}}) + describe_versions(lines)

parser = make_parser("a test")
parser.add_argument("--size", type=int, default=1)
parser.add_argument("--fail")
run_in_turns(parser, "none", ("a", "b"), run_side, summarize, prepare)
"""


def run(folder, *words):
    file = folder / "benchmark.py"
    file.write_text(BENCHMARK.format(here=str(pathlib.Path(__file__).parent)))
    return subprocess.run([sys.executable, file, *words], capture_output=True, text=True)


def test_sides_take_turns(tmp_path):
    *lines, table = run(tmp_path, "--rounds=2", "--size=7").stdout.splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["side"], run["turn"], run["size"]) for run in runs] == [
        ("a", 1, 7), ("b", 2, 7), ("a", 3, 7), ("b", 4, 7)
    ]  # fmt: skip
    assert table.startswith("{'a': [1, 3], 'b': [2, 4]}numpy ")


def test_a_side_that_fails_is_shown(tmp_path):
    result = run(tmp_path, "--fail=b")
    assert result.returncode == 1 and "--side b" in result.stderr and "no such luck" in result.stderr
