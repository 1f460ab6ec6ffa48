"""Training runs whose files are missing, cut, flipped or unreadable: new runs, and runs that go on from a checkpoint.

    python tests/faults/bad_reads.py --write     # every file that a run reads x every damage
    python tests/faults/bad_reads.py --every=9   # every ninth of them

A run must end with one line that names the file, or in the bytes of a run without the damage. A flipped bit in what a
new run is given, a weight or a letter of a row, makes another model or another row, which nobody can know; such a run
may end well too, and is counted apart. A run that goes on compares all that it was given with what it had.

No permission keeps root from reading: "loop" (a link to itself) cannot be opened, "EIO" (a link to /proc/self/mem,
whose first page is mapped nowhere) opens, and gives an error when it is read. Prints a JSON object.
"""

import argparse
import collections
import functools
import importlib
import json
import os
import pathlib
import random
import shutil
import tempfile

import full_disks
import kills

FLIPS = 4  # of each file
STEPS, EVERY = 6, 2
CHECKPOINT = "checkpoints/4"
WRITTEN = ("config.json", "metrics.jsonl", "samples.jsonl")  # in the workdir
REPORTS = {"metrics", "samples.jsonl", "files"}  # of what a run leaves, these alone may differ, where a line says so
RESULTS = {
    "named": "an error that names the file",
    "same bytes": "the same bytes",
    "told": "goes on, a line names the file",
    "not known": "cannot be known",
}
OPTIONAL = ("generation_config.json",)  # a new run needs none
TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # a resume tells them by what they are
PLAIN = (".jinja", ".jsonl")  # half of such a text is one, too, where the cut is between two rows


def flip(path: pathlib.Path, number: int) -> None:
    content, draw = bytearray(path.read_bytes()), random.Random(f"{path.name} {number}")
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def link(path: pathlib.Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "loop": lambda path: link(path, path.name),
    "EIO": lambda path: link(path, "/proc/self/mem"),
} | {f"flip {number}": functools.partial(flip, number=number) for number in range(1, FLIPS + 1)}


def make_inputs(folder: pathlib.Path) -> None:
    import sft_runs
    from tiny_models import make_tiny_model

    make_tiny_model(folder / "model", "llama", max_shard_size="120KB")
    sft_runs.write_rows(folder / "train.jsonl", 2 * STEPS)
    sft_runs.write_rows(folder / "eval.jsonl", 3, first=40)


def make_values(folder: pathlib.Path) -> dict:
    values = kills.make_values(folder)
    values["train"] = {"steps": STEPS}
    values["checkpoint"] |= {"every": EVERY, "keep": 3}  # so that there is one before that of step 4
    values["eval"]["every"] = EVERY
    values["trackers"] = {}
    return values


def list_given(inputs: pathlib.Path) -> list[str]:
    """What a run is given: base model, tokenizer, rows; of the weights' files the first and the last."""
    names = sorted(str(path.relative_to(inputs)) for path in inputs.rglob("*") if path.is_file())
    shards = [name for name in names if name.endswith(".safetensors")]
    return [name for name in names if name not in shards[1:-1]]


def list_read(workdir: pathlib.Path) -> list[str]:
    """Files of the newest checkpoint that a resume reads: one of each kind, the largest of the arrays'."""
    files = [path for path in (workdir / CHECKPOINT).rglob("*") if path.is_file() and path.stat().st_size]
    largest = {}
    for path in sorted(files, key=lambda path: path.stat().st_size):
        largest[path.name if path.parent.name != "d" else "d"] = str(path.relative_to(workdir))
    return sorted(largest.values())


class Case:
    """A copy of the inputs, and for a run that goes on of its workdir, in which a file is damaged."""

    def __init__(self, folder: pathlib.Path, values: dict, resumes: bool):
        # Both are always in the same place: the config that a checkpoint holds names it.
        self.inputs, self.trial = folder / "inputs", kills.Trial(folder / "run", values)
        for name in ("inputs", "run"):
            shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "whole", self.inputs)
        if resumes:
            shutil.copytree(folder / "stopped", self.trial.folder)
        self.trial.log.unlink(missing_ok=True)

    def judge(self, path: pathlib.Path, expected: dict, known: bool) -> str:
        """ "named", "same bytes", or "not known"; else what is wrong. ``known``: the damage can be."""
        work = functools.partial(full_disks.run, self.trial.values, self.trial.folder, None)
        code = os.waitstatus_to_exitcode(kills.fork(work, self.trial.log))
        printed = self.trial.log.read_text()
        for aside in (self.trial.folder / "checkpoints").glob("*.unreadable"):  # the one before it was used
            if path.name not in printed:
                return f"{path.name} is not named:\n{printed[-3000:]}"
            shutil.rmtree(aside)
        if code == 0:
            after = self.trial.describe()
            wrong = [key for key in sorted(expected.keys() | after.keys()) if expected.get(key) != after.get(key)]
            if not wrong:
                return "same bytes"
            said = set(wrong) <= REPORTS and f"{path}: not as the checkpoint saw it" in printed
            return "told" if said else f"ended well, but for {wrong[:5]}" if known else "not known"
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        if code not in (1, 2) or len(lines) != 1 or "Traceback" in printed:
            return f"exit code {code}, expected 1 or 2 and one line:\n{printed[-3000:]}"
        names = {path.name, str(path.parent)} | (
            {"the tokenizer", "the chat template"} if path.name in TEXTS else set()
        )
        if any(name in lines[0] for name in names):
            return "named"
        return "not known" if not known else f"the error does not name {path.name}: {lines[0]}"


def make_reference(folder: pathlib.Path) -> tuple[dict, dict]:
    """Config values and what an undamaged run leaves; ``whole/`` and ``stopped/`` are what each case begins with."""
    output = folder / "values.json"
    (folder / "whole").mkdir()
    kills.fork(lambda: make_inputs(folder / "whole"), folder / "inputs.log")
    kills.fork(lambda: output.write_text(json.dumps(make_values(folder / "inputs"))), folder / "inputs.log")
    values = json.loads(output.read_text())
    case = Case(folder, values, resumes=False)
    if case.trial.start(None):
        raise SystemExit(case.trial.log.read_text())
    expected = case.trial.describe()
    shutil.copytree(case.trial.folder, folder / "stopped")
    for name in (f"checkpoints/{STEPS}", "export"):
        shutil.rmtree(folder / "stopped" / name)
    (folder / "stopped" / "report.html").unlink()
    return values, expected


def list_cases(folder: pathlib.Path) -> list[tuple[str, str, str]]:
    """(a new run's or one's that goes on, file, damage)."""
    given = [f"inputs/{name}" for name in list_given(folder / "whole")]
    names = given + [f"run/{name}" for name in (*WRITTEN, *list_read(folder / "stopped"))]
    cases = [("new", name, damage) for name in given for damage in DAMAGES]
    return cases + [("goes on", name, damage) for name in names for damage in DAMAGES]


def is_known(start: str, name: str, damage: str) -> bool:
    """Whether somebody can know of this damage."""
    if start == "new":
        optional = name.endswith(OPTIONAL) and damage in ("missing", "loop")
        return not (damage.startswith("flip") or optional or (name.endswith(PLAIN) and damage == "cut"))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--write", action="store_true", help=f"write the figures into {kills.PAGE.name}")
    arguments = parser.parse_args()
    kills.warm_up()
    importlib.import_module("postrain.cli")
    found = {}
    with tempfile.TemporaryDirectory(prefix="reads") as folder:
        folder = pathlib.Path(folder)
        values, expected = make_reference(folder)
        cases = [case for case in list_cases(folder) if arguments.only in ", ".join(case)]
        for start, name, damage in cases[:: arguments.every]:
            case = Case(folder, values, resumes=start == "goes on")
            DAMAGES[damage](folder / name)
            found[f"{start}, {name}, {damage}"] = case.judge(folder / name, expected, is_known(start, name, damage))
            print(list(found.items())[-1], flush=True)
    print(json.dumps(found))
    if arguments.write:
        importlib.import_module("workloads").write_section(kills.PAGE, "bad_reads", format_figures(found))


def format_figures(found: dict[str, str]) -> str:
    table = collections.defaultdict(collections.Counter)
    for case, result in found.items():
        start, _, damage = case.split(", ")
        kind = "flipped bit" if damage.startswith("flip") else damage
        table[start, kind][result if result in RESULTS else "wrong"] += 1
    columns = [*RESULTS, "wrong"]
    rows = [f"| {' | '.join(key)} | {' | '.join(str(table[key][column]) for column in columns)} |" for key in table]
    head = f"| run | damage | {' | '.join(RESULTS.values())} | **wrong** |"
    return "\n".join([f"{len(found)} cases.", "", head, "|---" * (2 + len(columns)) + "|", *rows])


if __name__ == "__main__":
    main()
