"""Weights by rewards against plain fine-tuning on logged answers of mixed quality, with noisy rewards, for three seeds.

    python tests/benchmarks/weighted.py            # prints a table
    python tests/benchmarks/weighted.py --write    # and writes it into docs/weighted_sft.md

A question names a colour, and the right answer is that colour. The service that answered gave the right one in 35% of
the rows and "red" in the others, so most logged answers to most questions are wrong. The reward is 1 for a right answer
and 0 for another, with noise of standard deviation 0.5 and, of each of 30 members, an offset of its own with standard
deviation 2: some rate everything high. A tiny model is trained from random weights on 600 such rows; what counts is the
share of 60 held-out questions that it answers rightly. Each run takes some ten seconds.

A head (``sft.weights.baseline=head``) can only expect what the question tells, so it has a table of its own: of four
members, whose names the questions begin with.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

import numpy as np
import workloads
from runner import Bar, describe_bars

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "weighted_sft.md"
NAMES = ("ann", "bob", "cyd", "dee")
WORDS = ("red", "blue", "green", "grey", "pink", "gold")
SEEDS = (0, 1, 2)
MODES = {
    "none": {"mode": "none"},
    "exp": {"mode": "exp", "temperature": 0.5},
    "advantage": {"mode": "advantage", "baseline": "member", "temperature": 0.5},
}
NAMED_MODES = {
    "exp": MODES["exp"],
    "advantage": MODES["advantage"],
    "head": {"mode": "advantage", "baseline": "head", "temperature": 0.5},
    "head 1": {"mode": "advantage", "baseline": "head", "temperature": 0.5, "head_coef": 1.0},
}
SAID = {
    "advantage": "`advantage` over the member's mean",
    "head": "`advantage` over a head, `head_coef` 0.1",
    "head 1": "`advantage` over a head, `head_coef` 1",
}


def write_rows(folder: pathlib.Path, seed: int, named: bool) -> None:
    """``train.jsonl``, logged; ``eval.jsonl``, right answers to other questions."""
    rng, members = np.random.default_rng(seed), len(NAMES) if named else 30
    offsets, logged = rng.normal(0, 2.0, members), []
    name = lambda member: f"{NAMES[member]} " if named else ""
    for _ in range(600):
        word, member = WORDS[rng.integers(6)], int(rng.integers(members))
        answer = word if rng.random() < 0.35 else "red"
        reward = (answer == word) + rng.normal(0, 0.5) + offsets[member]
        asked = f"{name(member)}{rng.integers(1000)} {word}"
        logged.append(converse(asked, answer) | {"reward": reward, "member": member})
    held_out = [converse(f"{name(i % members)}{1000 + i} {WORDS[i % 6]}", WORDS[i % 6]) for i in range(60)]
    for name, rows in (("train", logged), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def converse(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run(seed: int, weights: dict, named: bool = False) -> float:
    """The share of held-out questions answered rightly after training."""
    from tiny_models import make_tiny_model

    import postrain

    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        make_tiny_model(folder / "model", "llama", vocab_size=301, seed=seed)
        write_rows(folder, seed, named)
        data = {"train": f"{folder}/train.jsonl", "eval": f"{folder}/eval.jsonl", "sequence_length": 128, "seed": seed}
        values = {
            "model": {"path": f"{folder}/model"},
            "data": data | {"batch_size": 4},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20},
            "train": {"steps": 250, "log_every": 50, "seed": seed},
            "eval": {"before": False, "generate_rows": 60, "max_new_tokens": 8},
            "export": {"format": "none"},
            "sft": {"weights": weights},
        }
        if weights.get("baseline") == "head":
            values["optimizer"]["head_learning_rate"] = 1e-2
        return postrain.train(values, folder / "run")["eval/exact_match"]


def summarize(found: dict[str, list[float]], leads: dict[str, str]) -> tuple[str, list[Bar]]:
    """A table of the modes, and bars: ``leads`` says which mode is to be ahead of which."""
    lines = ["| `sft.weights.mode` | right, median of three seeds | lowest - highest |", "|---|---|---|"]
    for mode, shares in found.items():
        named, span = SAID.get(mode, f"`{mode}`"), f"{min(shares):.0%} - {max(shares):.0%}"
        lines.append(f"| {named} | {statistics.median(shares):.0%} | {span} |")
    bars = []
    for mode, base in leads.items():
        lead = min(a - b for a, b in zip(found[mode], found[base], strict=True))
        bars.append(Bar(f"lead of {mode} over {base}, worst seed", lead, ">", 0.0))
    return "\n".join(lines), bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/weighted_sft.md")
    args = parser.parse_args()
    all_bars = []
    ahead = {"exp": "none", "advantage": "none"}
    for section, modes, leads in (("weighted", MODES, ahead), ("weighted_head", NAMED_MODES, {"head": "exp"})):
        named = section == "weighted_head"
        found = {mode: [run(seed, weights, named) for seed in SEEDS] for mode, weights in modes.items()}
        table, bars = summarize(found, leads)
        text = f"{table}\n\n{describe_bars(bars)}"
        print(text)
        if args.write:
            workloads.write_section(PAGE, section, text)
        all_bars += bars
    if not all(bar.met for bar in all_bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
