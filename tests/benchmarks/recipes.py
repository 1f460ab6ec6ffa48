"""`postrain plan` for every recipe of configs/models.py at its target, into docs/plan.md.

    python tests/benchmarks/recipes.py --write [--only NAME ...]    (the other lines stay)

Compiles real steps of models of up to 70 billion parameters: minutes each, on any machine.
"""

import argparse
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import workloads

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from published_configs import write_published_config  # noqa: E402

FILE = ROOT / "configs" / "models.py"
PAGE = ROOT / "docs" / "plan.md"
GIB = 2**30
HEADER = (
    "| recipe | target | trains | rows x tokens | a device needs | of | bound of MFU | limited by |\n"
    "|---|---|---|---|---|---|---|---|"
)


def load_recipes() -> dict:
    spec = importlib.util.spec_from_file_location("models", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RECIPES


def read_table() -> dict[str, str]:
    """Recipe -> its line in the page."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", PAGE.read_text("utf-8"), re.MULTILINE)}


def plan(name: str, recipe) -> dict:
    """The JSON report, of a folder with config.json alone."""
    with tempfile.TemporaryDirectory() as made:
        folder = write_published_config(made, recipe.folder)
        words = [f"--config={FILE}:{name}", f"--target={recipe.target}", f"--config.model.path={folder}", "--json"]
        result = subprocess.run([sys.executable, "-m", "postrain.cli", "plan", *words], capture_output=True, text=True)
    if not result.stdout:
        raise SystemExit(f"{name}: {result.stderr[-2000:]}")
    return json.loads(result.stdout)


def describe(name: str, recipe, report: dict) -> str:
    needs, usable = report["memory"]["total"] / GIB, report["target"]["usable_bytes"] / GIB
    trains = f"adapters, rank {recipe.rank}" if recipe.rank else "everything"
    bound = report["bound"]
    speed = f"{bound['mfu']:.0%} | {bound['limited_by']}" if bound else " | "
    fits = "" if report["fits"] else ", **does not fit**"
    rows = f"{recipe.rows} x {recipe.length}"
    return f"| `{name}` | `{recipe.target}` | {trains} | {rows} | {needs:.1f} GiB{fits} | {usable:.1f} | {speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/plan.md")
    parser.add_argument("--only", nargs="+", help="these recipes")
    arguments = parser.parse_args()
    recipes, missed = load_recipes(), []
    lines = {name: line for name, line in read_table().items() if name in recipes}
    for name in arguments.only or recipes:
        report = plan(name, recipes[name])
        lines[name] = describe(name, recipes[name], report)
        print(lines[name], flush=True)
        if not report["fits"]:
            missed.append(name)
            print(json.dumps(report["advice"]), flush=True)
        if arguments.write:
            known = [lines[name] for name in recipes if name in lines]
            workloads.write_section(PAGE, "recipes", "\n".join([HEADER, *known]))
    if missed:
        raise SystemExit(f"do not fit: {', '.join(missed)}")


if __name__ == "__main__":
    main()
