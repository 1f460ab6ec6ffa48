"""Training runs whose disk is full, or read-only, from an instant on; then it is mended and they are started again.

    python tests/faults/full_disks.py --every=8    # every eighth kind of write that a run makes
    python tests/faults/full_disks.py --every=1 --write  # all of them, and writes the figures into docs/reliability.md

The error comes from the call that Python makes (an audit hook raises it), which a test without a file system of its own
can do at any write; that of TensorStore is in tests/checkpoint/test_checkpoint.py, by a limit of the system.
Each run must end with an error of one line that names a path in the workdir, all checkpoints that have their name must
be whole, and started again it must end in the bytes of a run whose disk was never full. Prints a JSON object.
"""

import argparse
import errno
import functools
import importlib
import json
import os
import pathlib
import sys
import tempfile

import kills

WRITES = ("open", "mkdir", "rename", "fsync")


def run(values: dict, workdir: pathlib.Path, plan: dict) -> None:
    """As `postrain train` does: exit code 2 and one line for what the user can put right, 1 for other known errors."""
    kills.Instants(workdir, plan)
    cli, errors = importlib.import_module("postrain.cli"), importlib.import_module("postrain.errors")
    sys.unraisablehook = cli.report_unraisable
    try:
        importlib.import_module("postrain.recipes").train(values, workdir)
    except errors.UserError as error:
        raise SystemExit(cli._fail(str(error), 2)) from error
    except Exception as error:
        if (known := cli.explain(error)) is None:
            raise
        raise SystemExit(cli._fail(known, 1)) from error


def try_kind(trial: kills.Trial, plan: dict, expected: dict) -> str:
    """What is wrong with how a run took it, "" when nothing is."""
    from postrain.checkpoint.integrity import verify_checksums

    code = os.waitstatus_to_exitcode(kills.fork(functools.partial(run, trial.values, trial.folder, plan), trial.log))
    printed = trial.log.read_text()
    if code == 0:
        # What is only tidied up may fail in peace, where a line says so.
        return "" if os.strerror(plan["errno"]) in printed else "exit code 0 without a word"
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    if code not in (1, 2) or len(lines) != 1 or "Traceback" in printed:
        return f"exit code {code}, expected 1 or 2 and one line:\n{printed[-3000:]}"
    if str(trial.folder) not in lines[0]:
        return f"the error names no path of the workdir: {lines[0]}"
    for path in (trial.folder / "checkpoints").glob("*"):
        if path.name.isdigit():
            verify_checksums(path)
    if trial.start(None):
        return f"cannot go on:\n{trial.log.read_text()[-3000:]}"
    after = trial.describe()
    wrong = [key for key in sorted(expected.keys() | after.keys()) if expected.get(key) != after.get(key)]
    return f"ended in other bytes: {wrong}" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"write the figures into {kills.PAGE.name}")
    arguments = parser.parse_args()
    kills.warm_up()
    importlib.import_module("postrain.cli")
    found = {}
    with tempfile.TemporaryDirectory(prefix="full") as folder:
        folder = pathlib.Path(folder)
        values, [counts], expected = kills.make_reference(folder)
        kinds = sorted(kind for kind in counts if kind.split()[0] in WRITES)
        for index, kind in enumerate(kinds[:: arguments.every]):
            trial = kills.Trial(folder / f"run{index}", values)
            number = (counts[kind] + 1) // 2
            error = (errno.ENOSPC, errno.EROFS)[index % 2] if not kind.startswith("rename") else errno.EROFS
            plan = {"kind": kind, "number": number, "errno": error}
            found[f"{kind} ({number} of {counts[kind]}), {errno.errorcode[error]}"] = try_kind(trial, plan, expected)
            print(list(found.items())[-1], flush=True)
    print(json.dumps(found))
    if arguments.write:
        text = format_figures(found, len(kinds))
        importlib.import_module("workloads").write_section(kills.PAGE, "full_disks", text)


def format_figures(found: dict[str, str], kinds: int) -> str:
    right = sum(not wrong for wrong in found.values())
    full = sum(case.endswith("ENOSPC") for case in found)
    return (
        f"{len(found)} of {kinds} kinds of writes, on a disk that was full ({full}) or read-only ({len(found) - full}) "
        f"from one of them on: **{right}** of the runs ended with an error that names the place (or said what could "
        "not be tidied up), and went on to the bytes of an undisturbed one."
    )


if __name__ == "__main__":
    main()
