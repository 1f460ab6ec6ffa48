"""A student of six layers, distilled and fine-tuned by itself, in as many steps on the same rows.

    python tests/benchmarks/distill.py --teacher runs/quickstart/export --seeds 0 1 2    # a table
    python tests/benchmarks/distill.py --teacher DIR --rows 400 --steps 60               # smaller
    python tests/benchmarks/distill.py --teacher DIR --keys temperature=2.0 nll_coef=0.25  # of section distill

The teacher is the model that the quickstart trains, the student six of its layers, its rows those of the quickstart.
Both arms train every parameter from the same start with the same settings; one by recipe sft, the other by recipe
distill on what `postrain teach` has written of the same rows. Says -log p and exact match of held-out requests.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "configs" / "data"
LAYERS = (0, 6, 12, 18, 24, 29)
ARMS = ("sft", "distill")


def run(*words) -> None:
    command = [sys.executable, "-m", "postrain.cli", *map(str, words)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def prepare(teacher: str, folder: pathlib.Path, count: int, keys: list[str]) -> dict[str, dict[str, pathlib.Path]]:
    """The student, and the rows of each arm: ``{arm: {"train": ..., "eval": ...}}``."""
    from postrain.hf.save import save_layers

    save_layers(teacher, folder / "student", LAYERS)
    rows: dict[str, dict[str, pathlib.Path]] = {arm: {} for arm in ARMS}
    for split, name, kept in (("train", "quickstart_train", count), ("eval", "quickstart_test", None)):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:kept]
        rows["sft"][split], rows["distill"][split] = folder / f"{split}.jsonl", folder / f"taught_{split}"
        rows["sft"][split].write_text("".join(lines), encoding="utf-8")
        words = ["--config=configs/quickstart.py", *keys, f"--config.distill.teacher={teacher}"]
        words += [f"--config.model.path={folder / 'student'}", f"--config.data.train={rows['sft'][split]}"]
        run(
            "teach",
            *words,
            f"--output={rows['distill'][split]}",
            "--config.data.eval=",
            "--config.eval.generate_rows=0",
        )
    return rows


def train(workdir: pathlib.Path, rows: dict[str, pathlib.Path], seed: int, steps: int, words: list[str]) -> dict:
    """The last evaluation of a run."""
    words = ["train", "--config=configs/quickstart.py", f"--workdir={workdir}", *words]
    words += [f"--config.data.{split}={path}" for split, path in rows.items()]
    words += [
        f"--config.model.path={workdir.parent / 'student'}",
        "--config.model.lora.rank=0",
        "--config.export.format=none",
    ]
    words += [f"--config.train.steps={steps}", f"--config.train.seed={seed}", f"--config.data.seed={seed}"]
    words += ["--config.eval.every=0", "--config.eval.before=false", "--config.checkpoint.every=0"]
    words += ["--config.export.format=none"]
    run(*words)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/loss" in line][-1]
    return {"nll": last.get("eval/nll", last["eval/loss"]), "exact match": last["eval/exact_match"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the export of the quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1300)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of both arms")
    parser.add_argument("--keys", nargs="*", default=[], help="KEY=VALUE of section distill")
    arguments = parser.parse_args()
    keys = ["--config.recipe=distill", *(f"--config.distill.{key}" for key in arguments.keys)]
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        rows = prepare(os.path.abspath(arguments.teacher), folder, arguments.rows, keys)
        print("| arm | seed | -log p | exact match |\n|---|---|---|---|", flush=True)
        for arm in ARMS:
            found = []
            for seed in arguments.seeds:
                words = [f"--config.optimizer.learning_rate={arguments.rate}", *(keys if arm == "distill" else ())]
                found.append(train(folder / f"{arm}_{seed}", rows[arm], seed, arguments.steps, words))
                print(f"| {arm} | {seed} | {found[-1]['nll']:.4f} | {found[-1]['exact match']:.1%} |", flush=True)
            means = [statistics.mean(one[name] for one in found) for name in ("nll", "exact match")]
            print(f"| {arm} | mean | {means[0]:.4f} | {means[1]:.1%} |", flush=True)


if __name__ == "__main__":
    main()
