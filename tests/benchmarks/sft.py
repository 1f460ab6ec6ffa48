"""Useful tokens a second of full supervised fine-tuning, side by side with TRL on the same model and rows.

    python tests/benchmarks/sft.py --rounds 3            # prints a JSON line a run, then the medians
    python tests/benchmarks/sft.py --rounds 3 --write    # and writes them into docs/benchmarks.md

Each run is a process of its own; the sides take turns. A useful token is a token of a document, not padding.
float32 on CPU, AdamW, 8 rows of up to 1,024 tokens an update. TRL's best packed setting computes one packed row
at a time; its default pads 8 documents to the longest. ``--micro-batches`` splits postrain's update.
"""

import os
import statistics
import tempfile
import time

import workloads
from runner import Bar, describe_versions, find_versions, make_parser, run_in_turns

ROWS, LENGTH, LEARNING_RATE = 8, 1024, 1e-3
SIDES = {"postrain": 12, "trl_packed": 5, "trl_padded": 10}  # updates of a run
WARM_UP = 2


def make_step(folder: str, steps: int, micro_batches: int):
    """The train step of the tiny model and its first state."""
    import jax

    from postrain.config import OptimizerConfig
    from postrain.hf.load import load_pretrained
    from postrain.objectives.sft import make_sft_loss
    from postrain.training.model import Forward
    from postrain.training.optimizer import make_optimizer
    from postrain.training.step import init_train_state, make_train_step

    config, params = load_pretrained(folder)
    loss_fn = make_sft_loss(Forward(config, chunk=1024).nll)
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"), steps)
    train_step = make_train_step(loss_fn, optimizer, micro_batches=micro_batches)
    return train_step, init_train_state(params, {}, optimizer, jax.random.key(0))


def make_batches(documents, length: int, rows: int, packing: str = "best_fit"):
    """The endless batches of pairs of tokens and masks, and the documents."""
    from postrain.config import DataConfig
    from postrain.data.bad_row import RowRef
    from postrain.data.batches.in_memory import ExampleSet, MemoryBatches
    from postrain.data.batches.row_filter import DataReport
    from postrain.data.rendering.render import Rendered

    examples = [Rendered(t, m, RowRef("workload", "workload", i)) for i, (t, m) in enumerate(documents)]
    config = DataConfig(sequence_length=length, batch_size=rows, packing=packing)
    return MemoryBatches(ExampleSet(examples, DataReport([]), {}), config), examples


def run_postrain(folder: str, steps: int, micro_batches: int) -> dict:
    import numpy as np

    from postrain.types import Batch

    train_step, state = make_step(folder, steps, micro_batches)
    batches, examples = make_batches(workloads.sft_documents(1024, LENGTH), LENGTH, ROWS)
    tokens, seconds, losses = [], [], []
    for _ in range(steps):
        start = time.perf_counter()  # the wait for data counts
        arrays = next(batches)
        row_ids = arrays.pop("row_ids")
        state, metrics = train_step(state, Batch(**arrays))
        losses.append(float(metrics["train/loss"]))
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(len(examples[i].tokens) for i in np.unique(row_ids[row_ids >= 0])))
    used = find_versions("jax", "optax", "grain")
    return {"tokens": tokens, "seconds": seconds, "losses": losses, "micro_batches": micro_batches, "versions": used}


def run_trl(folder: str, steps: int, packing: bool) -> dict:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    rows = [
        {"input_ids": t.tolist(), "labels": [int(i) if trained else -100 for i, trained in zip(t, m, strict=True)]}
        for t, m in workloads.sft_documents(1024, LENGTH)
    ]
    begins, ends = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begins.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    micro = 1 if packing else ROWS
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=ROWS // micro,
            max_steps=steps,
            max_length=LENGTH,
            packing=packing,
            packing_strategy="bfd",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dataset = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
        )
        trainer.train()
    taken = trainer.train_dataset["input_ids"]
    tokens = [sum(len(ids) for ids in taken[i * ROWS : (i + 1) * ROWS]) for i in range(steps)]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds = [end - begin for begin, end in zip(begins, ends, strict=True)]
    used = find_versions("trl", "transformers", "torch")
    return {
        "tokens": tokens,
        "seconds": seconds,
        "losses": losses,
        "micro_batches": arguments.gradient_accumulation_steps,
        "versions": used,
    }


def run_side(arguments) -> None:
    load, side = workloads.Load(), arguments.side
    if side == "postrain":
        result = run_postrain(arguments.model, SIDES[side], arguments.micro_batches)
    else:
        result = run_trl(arguments.model, SIDES[side], packing=side == "trl_packed")
    counted = slice(WARM_UP, None)
    workloads.emit(
        side=side,
        micro_batches=result["micro_batches"],
        tokens_per_second=round(sum(result["tokens"][counted]) / sum(result["seconds"][counted]), 1),
        median_step_seconds=round(statistics.median(result["seconds"][counted]), 3),
        tokens_per_step=round(statistics.mean(result["tokens"][counted])),
        first_loss=round(result["losses"][0], 4),
        peak_rss_gib=workloads.peak_rss_gib(),
        others_cpu_share=load.share(),
        versions=result["versions"],
    )


def summarize(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    median = lambda side, key: statistics.median(run[key] for run in lines[side])
    heads = ("", "useful tokens/s (median)", "lowest - highest", "seconds a step", "micro-batches")
    heads += ("peak memory, GiB", "CPU taken by others")
    table = [workloads.describe_machine(), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for side, runs in lines.items():
        rates = [run["tokens_per_second"] for run in runs]
        table.append(
            f"| {side} | {statistics.median(rates):.0f} | {min(rates):.0f} - {max(rates):.0f} "
            f"| {median(side, 'median_step_seconds'):.2f} | {runs[0]['micro_batches']} "
            f"| {max(run['peak_rss_gib'] for run in runs):.2f} | {max(run['others_cpu_share'] for run in runs):.1%} |"
        )
    ratios = {side: median("postrain", "tokens_per_second") / median(side, "tokens_per_second") for side in SIDES}
    table += [
        "",
        f"postrain / TRL packed: **{ratios['trl_packed']:.2f}x**, postrain / TRL padded: "
        f"{ratios['trl_padded']:.2f}x; {len(lines['postrain'])} interleaved rounds. {describe_versions(lines)}",
    ]
    peak = {side: max(run["peak_rss_gib"] for run in runs) for side, runs in lines.items()}
    bars = [Bar("useful tokens/s over TRL packed", ratios["trl_packed"], ">=", 3.5, "{:.2f}x")]
    bars += [
        Bar(f"peak memory beside {side}'s", peak["postrain"], "<", peak[side], "{:.2f} GiB")
        for side in SIDES
        if side != "postrain"
    ]
    return "\n".join(table), bars


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--micro-batches", type=int, default=2, help="parts of an update on postrain's side")
    run_in_turns(parser, "sft", SIDES, run_side, summarize)
