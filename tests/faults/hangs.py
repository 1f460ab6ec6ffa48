"""Training runs that really hang, each in another phase, and what their watchdog made of it.

    python tests/faults/hangs.py FOLDER    # of sft_runs.make_inputs; prints a JSON object

A run hangs on a FIFO: in an open() that waits for another end that never comes, as with storage that does not answer.
"""

import functools
import importlib
import json
import os
import pathlib
import signal
import sys
import tempfile

import kills

TIMEOUT = 4.0


def block_call(module: str, name: str, number: int, fifo: pathlib.Path) -> None:
    """The ``number``th call of a function opens the FIFO first."""
    owner = importlib.import_module(module)
    call, calls = getattr(owner, name), []

    def blocked(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            fifo.read_bytes()
        return call(*arguments, **options)

    setattr(owner, name, blocked)


def block_step(fifo: pathlib.Path) -> None:
    """The loss of the third step is computed by a device that does not answer."""
    import jax

    sft = importlib.import_module("postrain.recipes.sft")
    make_loss, steps = sft.make_sft_loss, []

    def wait():
        steps.append(1)
        if len(steps) == 3:
            fifo.read_bytes()

    def make_blocked(*arguments, **options):
        loss_fn = make_loss(*arguments, **options)

        def compute(*rows):
            jax.debug.callback(wait)
            return loss_fn(*rows)

        return compute

    sft.make_sft_loss = make_blocked


CASES = {  # what blocks, and the phase that it is to be named by
    "rows": ("data", lambda fifo: block_call("postrain.training.rows", "load_examples", 1, fifo)),
    "evaluator": ("run", lambda fifo: block_call("postrain.data.batches.in_memory", "_assemble_batch", 1, fifo)),
    "data worker": ("data", lambda fifo: block_call("postrain.data.batches.in_memory", "_assemble_batch", 9, fifo)),
    "device": ("step", block_step),
    "save": ("checkpoint", lambda fifo: block_call("postrain.checkpoint.checkpointer", "write_checksums", 2, fifo)),
    "evaluation": ("evaluation", lambda fifo: block_call("postrain.training.evaluate", "compute_eval_loss", 2, fifo)),
    "export": ("export", lambda fifo: block_call("postrain.export", "check_logits", 1, fifo)),
}


def run(values: dict, workdir: pathlib.Path, block, fifo: pathlib.Path) -> None:
    block(fifo)
    importlib.import_module("postrain.recipes").train(values, workdir)


def run_beside_a_stopped(values: dict, workdir: pathlib.Path, index: int, port: int) -> None:
    """One of two processes; the second is stopped (SIGSTOP) before its third step."""
    rows = importlib.import_module("postrain.training.rows").Rows
    next_batch, steps = rows.__next__, []

    def stopped(*arguments):
        steps.append(1)
        if index == 1 and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return next_batch(*arguments)

    rows.__next__ = stopped
    kills.run_one_of(2, values, workdir, None, None, index, port)


def describe(phase: str, status: int, log: pathlib.Path, stacks: pathlib.Path) -> dict:
    code, stacks = os.waitstatus_to_exitcode(status), stacks.read_text() if stacks.exists() else ""
    return {"phase": phase, "code": code, "printed": log.read_text(), "stacks": stacks}


def main(inputs: pathlib.Path) -> None:
    kills.warm_up()
    found = {}
    with tempfile.TemporaryDirectory(prefix="hangs") as folder:
        folder = pathlib.Path(folder)
        output = folder / "values.json"
        kills.fork(lambda: output.write_text(json.dumps(kills.make_values(inputs))), folder / "values.log")
        values = json.loads(output.read_text())
        values["train"] |= {"steps": 8, "hang_timeout": TIMEOUT}
        values["checkpoint"]["every"], values["eval"]["every"] = 2, 6
        fifo = folder / "fifo"
        os.mkfifo(fifo)
        for name, (phase, block) in CASES.items():
            workdir, log = folder / name, folder / f"{name}.log"
            status = kills.fork(functools.partial(run, values, workdir, block, fifo), log)
            found[name] = describe(phase, status, log, workdir / "hang.txt")
        workdir, log = folder / "partner", folder / "partner.log"
        output.unlink()
        kills.fork(lambda: output.write_text(json.dumps(kills.make_values(inputs, "2"))), folder / "values.log")
        values = json.loads(output.read_text())
        values["train"]["hang_timeout"] = 4 * TIMEOUT  # the partner is awaited in its start, too
        status, _ = kills.fork_all(functools.partial(run_beside_a_stopped, values, workdir), log, 2)
        found["partner"] = describe("step", status, log, workdir / "hang.0.txt")
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
