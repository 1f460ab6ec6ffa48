"""Generated tokens a second, side by side with transformers' ``generate`` on the same model and prompts.

    python tests/benchmarks/engine.py --rounds 3            # prints a JSON line a run, then the medians
    python tests/benchmarks/engine.py --rounds 3 --write    # and writes them into docs/benchmarks.md

Each run is a process of its own; the sides take turns. 16 prompts of 32 tokens, 128 new tokens each, no stop id,
float32 on CPU. A run generates WARM_UP times unmeasured (compilation), then REPEATS times, once in each way of
choosing tokens: greedy, from the whole distribution, with top-p.
"""

import os
import statistics
import time

import numpy as np
import workloads
from runner import Bar, describe_versions, find_versions, make_parser, run_in_turns

ROWS, PROMPT, NEW = 16, 32, 128
WARM_UP, REPEATS = 1, 5
SIDES = ("postrain", "transformers")
WAYS = {"greedy": (0.0, 1.0), "sampled": (1.0, 1.0), "top_p": (1.0, 0.9)}  # temperature, top_p


def make_postrain(folder: str, prompts: np.ndarray):
    from postrain.hf.load import load_pretrained
    from postrain.rollout.engine import Engine
    from postrain.rollout.requests import SamplingParams

    config, params = load_pretrained(folder)
    engine, rows = Engine(params, config, slots=ROWS), prompts.tolist()

    def run(temperature: float, top_p: float, seed: int) -> int:
        sampling = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=NEW, seed=seed)
        return sum(len(completion.tokens) for completion in engine.generate(rows, sampling))

    return run, find_versions("jax")


def make_transformers(folder: str, prompts: np.ndarray):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor(prompts).long()
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "pad_token_id": workloads.PAD_ID}

    def run(temperature: float, top_p: float, seed: int) -> int:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
        how = how if temperature > 0 else {"do_sample": False}
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **how)
        return out[:, PROMPT:].numel()

    return run, find_versions("torch", "transformers")


def run_side(arguments) -> None:
    load, side = workloads.Load(), arguments.side
    prompts = workloads.draw_ids(np.random.default_rng(77), ROWS * PROMPT).reshape(ROWS, PROMPT)
    run, used = (make_postrain if side == "postrain" else make_transformers)(arguments.model, prompts)
    rates = {}
    for way, options in WAYS.items():
        seconds = []
        for seed in range(WARM_UP + REPEATS):
            start = time.perf_counter()
            generated = run(*options, seed)
            seconds.append(time.perf_counter() - start)
            if generated != ROWS * NEW:
                raise SystemExit(f"{side} generated {generated} tokens instead of {ROWS * NEW}")
        rates[way] = round(ROWS * NEW / statistics.median(seconds[WARM_UP:]), 1)
    workloads.emit(
        side=side,
        tokens_per_second=rates,
        peak_rss_gib=workloads.peak_rss_gib(),
        others_cpu_share=load.share(),
        versions=used,
    )


def summarize(lines: dict[str, list[dict]]) -> tuple[str, list[Bar]]:
    rates = {
        side: {way: [run["tokens_per_second"][way] for run in runs] for way in WAYS} for side, runs in lines.items()
    }
    table = [
        workloads.describe_machine(),
        "",
        "| tokens/s: median (lowest - highest) | " + " | ".join(WAYS) + " | peak memory, GiB | CPU taken by others |",
        "|---|" + "---|" * (len(WAYS) + 2),
    ]
    for side, runs in lines.items():
        cells = [f"{statistics.median(r):.0f} ({min(r):.0f} - {max(r):.0f})" for r in rates[side].values()]
        memory = max(run["peak_rss_gib"] for run in runs)
        others = max(run["others_cpu_share"] for run in runs)
        table.append(f"| {side} | {' | '.join(cells)} | {memory:.2f} | {others:.1%} |")
    median = {side: {way: statistics.median(r) for way, r in of_side.items()} for side, of_side in rates.items()}
    ratios = ", ".join(f"{way} **{median['postrain'][way] / median['transformers'][way]:.2f}x**" for way in WAYS)
    rounds = f"{len(lines['postrain'])} interleaved rounds"
    table += ["", f"postrain / transformers: {ratios}; {rounds}. {describe_versions(lines)}"]
    return "\n".join(table), []


if __name__ == "__main__":
    run_in_turns(make_parser(__doc__), "generate", SIDES, run_side, summarize)
