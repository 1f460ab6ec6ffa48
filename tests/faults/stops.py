"""Training runs that get a SIGTERM at a named place, and are started again. Prints a JSON object.

python tests/faults/stops.py
"""

import functools
import importlib
import json
import os
import pathlib
import signal
import tempfile
import time

import kills


def signal_call(module: str, name: str, number: int, times: int = 1, stuck: bool = False) -> None:
    """The ``number``th call of a function sends SIGTERM to its own process first; ``stuck``: later, from inside."""
    owner = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    call, calls = getattr(owner, name), []

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) == number and stuck:
            time.sleep(1.0)  # until the batches before this one are used up
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(STUCK)
        elif len(calls) == number:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return call(*arguments, **options)

    setattr(owner, name, signalled)


STUCK = 300.0  # seconds
PLACES = {
    "batch": ("postrain.data.batches.in_memory", "_assemble_batch", 5, 1, True),
    "rows": ("postrain.training.rows", "load_examples", 1),
    "compile": ("postrain.training.program", "make_train_step", 1),
    "first evaluation": ("postrain.rollout.answers", "answer_questions", 1),
    "wait": ("postrain.training.rows", "Rows.__next__", 3),
    "update": ("postrain.training.loop", "Loop.finish_step", 3),
    "evaluation": ("postrain.rollout.answers", "answer_questions", 2),
    "save": ("postrain.checkpoint.checkpointer", "write_checksums", 1),
    "last evaluation": ("postrain.training.evaluate", "compute_eval_loss", 3),
    "export": ("postrain.export", "check_logits", 1),
    "twice": ("postrain.training.loop", "Loop.finish_step", 4, 2),
}


def run(values: dict, workdir: pathlib.Path, place: tuple | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if place:
        signal_call(*place)
    importlib.import_module("postrain.recipes").train(values, workdir)


def main() -> None:
    kills.warm_up()
    found = {}
    with tempfile.TemporaryDirectory(prefix="stops") as folder:
        folder = pathlib.Path(folder)
        (folder / "inputs").mkdir()
        kills.fork(lambda: kills.make_inputs(folder / "inputs"), folder / "inputs.log")
        output = folder / "values.json"
        kills.fork(lambda: output.write_text(json.dumps(kills.make_values(folder / "inputs"))), folder / "values.log")
        values = json.loads(output.read_text())
        values["train"]["steps"] = 6
        values["checkpoint"] |= {"every": 2, "asynchronous": False}
        values["eval"] |= {"every": 4, "before": True}
        reference = kills.Trial(folder / "reference", values)
        if reference.start(None):
            raise SystemExit(reference.log.read_text())
        expected = reference.describe()
        for name, place in PLACES.items():
            trial = kills.Trial(folder / name, values)
            began = time.monotonic()
            status = kills.fork(functools.partial(run, values, trial.folder, place), trial.log)
            checkpoints = trial.folder / "checkpoints"
            found[name] = {
                "code": os.waitstatus_to_exitcode(status),
                "saved": sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else [],
                "printed": trial.log.read_text(),
                "seconds": time.monotonic() - began,
            }
            if trial.start(None):
                raise SystemExit(trial.log.read_text())
            after = trial.describe()
            # Which of the older checkpoints are left depends on when a signal made the run save.
            keys = (expected.keys() | after.keys()) - {"checkpoints"}
            found[name]["differs"] = sorted(key for key in keys if expected.get(key) != after.get(key))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
