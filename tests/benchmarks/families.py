"""Logits and gradients of every family against transformers in torch, into docs/models.md.

    python tests/benchmarks/families.py --write

Logits in float64, and in float32 beside torch's own float32 error; gradients in float32. Random models of odd sizes,
those of tests/hf/test_hf_parity.py and test_gradient_parity.py; SmolLM2 too with ``--model FOLDER``, by
``postrain verify``.
"""

import argparse
import importlib.metadata
import pathlib
import sys
import tempfile

import numpy as np
import workloads

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hf")]

import hf_compare  # noqa: E402
import test_gradient_parity as gradient_parity  # noqa: E402
import test_hf_parity as parity  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from postrain.hf.config import read_family  # noqa: E402
from postrain.hf.families import FAMILIES  # noqa: E402
from postrain.hf.load import load_pretrained  # noqa: E402
from postrain.hf.verify.compare import verify  # noqa: E402


def measure_logits() -> dict[str, list[list[float]]]:
    """Of every config of an architecture: ``hf_compare.measure``, over the reference's standard deviation."""
    found: dict[str, list[list[float]]] = {}
    for family, odd in parity.MODELS.values():
        with tempfile.TemporaryDirectory() as folder:
            folder = make_tiny_model(pathlib.Path(folder) / "model", family, **odd)
            config, params = load_pretrained(folder)
            ids = hf_compare.random_ids(config.vocab_size)
            found.setdefault(name_of(folder), []).append(hf_compare.measure(folder, params, config, ids))
    return found


def measure_gradients() -> dict[str, float]:
    """Largest difference of any tensor's gradient over that tensor's largest entry, by architecture."""
    found = {}
    for family, odd in gradient_parity.MODELS.values():
        with tempfile.TemporaryDirectory() as folder:
            folder = make_tiny_model(pathlib.Path(folder) / "model", family, **odd)
            documents = gradient_parity.make_documents(301)
            _, grads = gradient_parity.our_gradients(folder, documents)
            _, reference = gradient_parity.torch_gradients(folder, documents)
            pairs = ((grad, gradient_parity.find(reference, name)) for name, grad in grads.items())
            worst = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs if np.abs(b).max() > 0)
            found[name_of(folder)] = float(worst)
    return found


def name_of(folder) -> str:
    family = read_family(folder)
    return next(name for name, known in FAMILIES.items() if known is family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    parser.add_argument("--model", action="append", default=[], help="folder of a real model to verify too")
    arguments = parser.parse_args()
    logits, gradients = measure_logits(), measure_gradients()
    lines = [
        "| architecture | configs | logits in float64: largest difference, of their spread | in float32 | torch's "
        "float32 | gradients in float32 |",
        "|---|---|---|---|---|---|",
    ]
    row = lambda values: " | ".join(f"{max(column):.1e}" for column in zip(*values, strict=True))
    for name, values in logits.items():
        gradient = f"{gradients[name]:.1e}" if name in gradients else ""
        lines.append(f"| `{name}` | {len(values)} | {row(values)} | {gradient} |")
    for folder in arguments.model:
        found = verify(folder).comparisons
        values = [(c.relative, c.float32_error, c.reference_float32_error) for c in found]
        lines.append(f"| {pathlib.Path(folder).name} | the real weights | {row(values)} | |")
    used = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    table = "\n".join([*lines, "", f"On CPU, {used}."])
    print(table)
    if arguments.write:
        workloads.write_section(ROOT / "docs" / "models.md", "families", table)


if __name__ == "__main__":
    main()
