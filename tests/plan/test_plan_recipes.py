"""Each recipe's own step compiles for a TPU and for a GPU that are not here."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_plan import write_model
from tiny_models import make_tiny_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = ("preference.py", "reward.py", "distill.py", "weighted_sft.py:head")
TARGETS = ("v5e:2x2", "v6e:2x2", "h100:1x8")
RUN_ALL = """
import contextlib, io, json, sys
from postrain.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(words)
    print(json.dumps([code, printed.getvalue()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_recipe_is_planned(tmp_path, target):
    """Pairs share their prompts where the target's attention computes that, and a teacher is counted as frozen."""
    folder = write_model(tmp_path / "model")
    values = {"model.path": folder, "data.train": "none.jsonl", "data.sequence_length": 256, "data.batch_size": 16}
    values["model.lora.rank"] = 4
    words = [f"--target={target}", "--json", *(f"--config.{key}={value}" for key, value in values.items())]
    make_tiny_tokenizer(folder)  # which is compared with the teacher's
    own = {"distill.py": [f"--config.distill.teacher={folder}"]}
    commands = [["plan", f"--config=configs/{name}", *words, *own.get(name, [])] for name in RECIPES]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [code for code, _ in found] == [0] * len(RECIPES), result.stderr
    for name, (_, text) in zip(RECIPES, found, strict=True):
        report = json.loads(text)
        assert report["fits"] and report["compiled"] and report["memory"]["total"] > 0, name
        assert report["model"]["parameters_trained"] > 0 and 0 < report["bound"]["mfu"] <= 1, name
        frozen, whole = report["model"]["parameters_frozen"], json.loads(found[0][1])["model"]["parameters_frozen"]
        assert (frozen > 1.9 * whole) == (name == "distill.py"), name
        assert (report["flops"]["model_by_kind"]["unembedding"] == 0) == (name == "reward.py"), name
