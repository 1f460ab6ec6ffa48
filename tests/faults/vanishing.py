"""Streamed training runs whose object store is killed, for good or for a while, or whose cache is damaged.

Prints a JSON object.

python tests/faults/vanishing.py
"""

import functools
import importlib
import itertools
import json
import os
import pathlib
import tempfile
import time

import bad_reads
import full_disks
import kills
import store

UPDATE = 5  # of which the store has gone
TRIES = {"gone": (4, 0.1), "back": (12, 0.2)}  # and seconds before the second: how long a run waits for the store


def run(values: dict, workdir: pathlib.Path, tries: tuple, gone: pathlib.Path) -> None:
    """At an update it has ``gone`` made, and goes on when that is empty no more."""
    reader = importlib.import_module("postrain.data.batches.source")
    rows = importlib.import_module("postrain.training.rows").Rows
    reader.StorageOptions = functools.partial(reader.StorageOptions, tries=tries[0], first_wait=tries[1])
    next_batch, calls = rows.__next__, []

    def next_or_wait(*arguments):
        calls.append(1)
        if len(calls) == UPDATE:
            gone.touch()
            while not gone.stat().st_size:
                time.sleep(0.01)
        return next_batch(*arguments)

    rows.__next__ = next_or_wait
    full_disks.run(values, workdir, None)


def try_case(name: str, trial: kills.Trial, source: store.Store) -> dict:
    gone = trial.folder.parent / f"{name}.gone"
    child = kills.start(functools.partial(run, trial.values, trial.folder, TRIES[name], gone), trial.log)
    deadline = time.monotonic() + kills.LIMIT
    while not gone.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    source.kill()
    gone.write_text("gone")
    if name == "back":
        while "try 1 of" not in trial.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        source.start()
    status, _ = kills.wait([child], trial.log)
    found = {"code": os.waitstatus_to_exitcode(status), "printed": trial.log.read_text()}
    found["saved"] = sorted(int(path.name) for path in (trial.folder / "checkpoints").iterdir())
    if name == "gone":
        source.start()
        if trial.start(None):
            raise SystemExit(trial.log.read_text())
    return found


def list_differences(found: dict, expected: dict) -> list[str]:
    return sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))


def damage_cache(folder: pathlib.Path) -> int:
    """Every piece of the cache, each in another way; returns how many there are."""
    pieces = sorted(folder.glob("*.piece"))
    for piece, damage in zip(pieces, itertools.cycle(bad_reads.DAMAGES.values())):
        damage(piece)
    return len(pieces)


def main() -> None:
    kills.warm_up("streamed")
    importlib.import_module("postrain.cli")
    found = {}
    with tempfile.TemporaryDirectory(prefix="vanishing") as folder:
        folder = pathlib.Path(folder)
        values, _, expected = kills.make_reference(folder, "streamed")
        source = store.Store(folder / "inputs" / "store")
        try:
            trial = kills.Trial(folder / "cache damaged", values)
            pieces = damage_cache(folder / kills.CACHE)
            if trial.start(None):
                raise SystemExit(trial.log.read_text())
            found["cache damaged"] = {"pieces": pieces, "differs": list_differences(trial.describe(), expected)}
            for name in TRIES:
                trial = kills.Trial(folder / name, values)
                found[name] = try_case(name, trial, source)
                found[name]["differs"] = list_differences(trial.describe(), expected)
        finally:
            source.kill()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
