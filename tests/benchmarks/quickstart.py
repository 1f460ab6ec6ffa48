"""The quickstart as the README runs it, for several seeds: what it learns, and in which time.

    python tests/benchmarks/quickstart.py --seeds 0 1            # prints a JSON line a run, then the table
    python tests/benchmarks/quickstart.py --seeds 0 1 --write    # and writes it into docs/benchmarks.md
    python tests/benchmarks/quickstart.py --variant fast --write # the three minutes
    python tests/benchmarks/quickstart.py --variant small        # two updates, to see that the script runs

Each run is ``postrain train --config=configs/quickstart.py`` in a process and a workdir of its own, compiling
anew, timed from start to end. A bar is met when the worst seed meets it.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import workloads
from runner import Bar, describe_versions, find_versions, make_parser, show

ROOT = pathlib.Path(__file__).parents[2]
BARS = {"": (0.80, 10), "fast": (0.60, 3), "small": (0.80, 10)}  # variant -> exact match after, minutes


def run_seed(seed: int, variant: str) -> dict:
    """One run of the command; its progress goes to standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = "configs/quickstart.py" + (f":{variant}" if variant else "")
        command = [sys.executable, "-m", "postrain.cli", "train", f"--config={config}", f"--workdir={folder}"]
        command += [f"--config.train.seed={seed}", f"--config.data.seed={seed}"]
        load, start = workloads.Load(), time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode
        minutes = (time.perf_counter() - start) / 60
        if code:
            raise SystemExit(f"{' '.join(command)} failed")
        learned = read_metrics(pathlib.Path(folder, "metrics.jsonl"))
    versions = find_versions("jax", "optax", "grain")
    return {"seed": seed, "minutes": minutes, "others_cpu_share": load.share(), "versions": versions, **learned}


def read_metrics(file: pathlib.Path) -> dict:
    """The first and the last evaluation of a run, ``"NAME before"`` and ``"NAME after"``, and its tokens a second."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    evaluations = [line for line in lines if "eval/loss" in line]
    found = {}
    for name in ("exact_match", "valid_json", "loss"):
        found[f"{name} before"], found[f"{name} after"] = (evaluations[i][f"eval/{name}"] for i in (0, -1))
    rates = [line["perf/tokens_per_second"] for line in lines if "perf/tokens_per_second" in line]
    return {**found, "updates": lines[-1]["step"], "tokens_per_second": statistics.median(rates)}


def summarize(runs: Sequence[dict], variant: str = "") -> tuple[str, list[Bar]]:
    heads = ("seed", "exact match", "valid JSON", "loss", "minutes", "tokens/s (median update)", "CPU taken by others")
    table = [workloads.describe_machine(), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        shares = (
            f"{run[f'{name} before']:.0%} -> {run[f'{name} after']:.0%}" for name in ("exact_match", "valid_json")
        )
        loss = f"{run['loss before']:.3f} -> {run['loss after']:.3f}"
        cells = (str(run["seed"]), *shares, loss, f"{run['minutes']:.1f}", f"{run['tokens_per_second']:.0f}")
        table.append(f"| {' | '.join(cells)} | {run['others_cpu_share']:.1%} |")
    what = f"variant {variant}, " if variant else ""
    table += ["", f"{what}{runs[0]['updates']} updates. {describe_versions({'postrain': list(runs)})}"]
    worst = lambda choose, key: choose(run[key] for run in runs)
    share, minutes = BARS[variant]
    bars = [
        Bar("exact match before", worst(max, "exact_match before"), "<", 0.05, "{:.0%}"),
        Bar("exact match after", worst(min, "exact_match after"), ">", share, "{:.0%}"),
        Bar("minutes", worst(max, "minutes"), "<=", minutes, "{:.1f}"),
    ]
    return "\n".join(table), bars


def main() -> None:
    parser = make_parser(__doc__, rounds=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variant", default="", choices=list(BARS), help="of configs/quickstart.py, or none")
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        runs.append(run_seed(seed, arguments.variant))
        workloads.emit(**runs[-1])
    section = f"quickstart_{arguments.variant}" if arguments.variant else "quickstart"
    show(section, *summarize(runs, arguments.variant), arguments.write)


if __name__ == "__main__":
    main()
