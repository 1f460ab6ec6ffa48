"""What saving costs: the share of time that a save takes of the training thread, and the speed of its checksums.

    python tests/benchmarks/save_stall.py --rounds 3            # prints a JSON line a run, then the medians
    python tests/benchmarks/save_stall.py --rounds 3 --write    # and writes them into docs/reliability.md

A run takes updates of SmolLM2-135M, the quickstart's model, begins a save and goes on until that is on disk. The stall
is the time that ``save`` holds the training thread; the share is of a minute, at one save a minute. What updates that
run beside the writing take longer is told too: on a CPU both want the same cores. Full fine-tuning saves float32
weights and Adam's moments, LoRA (rank 16) those of the adapters.
"""

import pathlib
import statistics
import tempfile
import time

import runner
import workloads

from postrain.hf.find_model import fetch_smollm2

STEPS, ROWS, LENGTH = 4, 1, 128
SIDES = {"full": 0, "lora": 16}  # rank of the adapters
A_MINUTE = 60.0
runner.PAGE = runner.PAGE.with_name("reliability.md")


def run_side(arguments) -> None:
    import jax
    import numpy as np

    from postrain.checkpoint.checkpointer import Checkpointer
    from postrain.checkpoint.integrity import verify_checksums
    from postrain.config import MeshConfig, resolve
    from postrain.recipes.sft import make_program
    from postrain.sharding import make_global_batch, make_mesh
    from postrain.training.model import load_model
    from postrain.training.step import init_train_state
    from postrain.types import Batch, RunRecord

    load, mesh, folder = workloads.Load(), make_mesh(MeshConfig()), fetch_smollm2()
    config = resolve(
        {
            "model": {"path": str(folder), "lora": {"rank": SIDES[arguments.side]}},
            "data": {"train": "none", "sequence_length": LENGTH, "batch_size": ROWS},
            "train": {"steps": 100},
        }
    )
    model = load_model(config, folder, mesh)
    program = make_program(config, model, mesh, 100)
    rng = jax.random.key(0)
    state = init_train_state(model.params, model.frozen, program.optimizer, rng, mesh=mesh)
    del model
    tokens = np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH) % 40_000
    arrays = {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)}
    arrays |= {"loss_mask": np.ones(tokens.shape, np.float32), "positions": np.tile(np.arange(LENGTH), (ROWS, 1))}
    batch = Batch(**make_global_batch({name: np.asarray(value) for name, value in arrays.items()}, mesh))

    def update(state):
        start = time.perf_counter()
        state, metrics = program.train_step(state, batch)
        float(metrics["train/loss"])
        return state, time.perf_counter() - start

    state, _ = update(state)
    alone, beside, stalls, saved = [], [], [], []
    with tempfile.TemporaryDirectory() as place, Checkpointer(place, config.checkpoint) as checkpointer:
        for step in range(1, 4):  # the first save sets things up
            for _ in range(STEPS):
                state, seconds = update(state)
                alone.append(seconds)
            start = time.perf_counter()
            checkpointer.save(RunRecord(step, {}, {}, {}, {}), state)
            stalls.append(time.perf_counter() - start)
            while not checkpointer._pending.done():
                state, seconds = update(state)
                beside.append(seconds)
            saved.append(time.perf_counter() - start)
        newest = pathlib.Path(place) / "3"
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        start = time.perf_counter()
        verify_checksums(newest)
        speed = size / (time.perf_counter() - start)
    usual = statistics.median(alone)
    longer = sum(max(0.0, seconds - usual) for seconds in beside) / len(stalls)
    workloads.emit(
        side=arguments.side,
        megabytes=round(size / 1e6, 1),
        stall_seconds=round(statistics.median(stalls), 4),
        longer_seconds=round(longer, 3),
        saved_after=round(statistics.median(saved), 2),
        update_seconds=round(usual, 3),
        checksum_megabytes_per_second=round(speed / 1e6),
        others_cpu_share=load.share(),
        versions=runner.find_versions("jax", "orbax-checkpoint"),
    )


def summarize(lines: dict[str, list[dict]]) -> tuple[str, list[runner.Bar]]:
    median = lambda side, key: statistics.median(run[key] for run in lines[side])
    heads = ("SmolLM2-135M", "MB", "training thread held, ms", "share at one save a minute", "on disk after, s")
    heads += ("updates beside it longer by, s", "an update, s", "checksums, MB/s", "CPU taken by others")
    table = [workloads.describe_machine(), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    bars = []
    for side, runs in lines.items():
        share = median(side, "stall_seconds") / A_MINUTE
        table.append(
            f"| {side} | {runs[0]['megabytes']:,.0f} | {1000 * median(side, 'stall_seconds'):.0f} | {share:.2%} "
            f"| {median(side, 'saved_after'):.1f} | {median(side, 'longer_seconds'):.2f} "
            f"| {median(side, 'update_seconds'):.2f} | {median(side, 'checksum_megabytes_per_second'):.0f} "
            f"| {max(run['others_cpu_share'] for run in runs):.1%} |"
        )
        bars.append(runner.Bar(f"{side}: share of the training thread", share, "<=", 0.01, "{:.2%}"))
    table += ["", f"{len(lines['full'])} interleaved rounds. {runner.describe_versions(lines)}"]
    return "\n".join(table), bars


if __name__ == "__main__":
    parser = runner.make_parser(__doc__)
    runner.run_in_turns(parser, "save_stall", SIDES, run_side, summarize, prepare=lambda folder: fetch_smollm2())
