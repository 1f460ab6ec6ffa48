"""Every recipe of configs/models.py is a config that loads, for a published model; one is compiled and fits."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import torch
import transformers
from published_configs import CONFIGS, write_published_config

from postrain.config.load import load_config
from postrain.hf.config import read_config
from postrain.models.params import abstract_params, num_params

FILE = pathlib.Path(__file__).parents[2] / "configs" / "models.py"
spec = importlib.util.spec_from_file_location("models", FILE)
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


@pytest.mark.parametrize("name", models.RECIPES)
def test_a_recipe_loads(name):
    recipe, config = models.RECIPES[name], load_config(f"{FILE}:{name}", {"data.train": "unread"})
    assert config.model.path == recipe.model and recipe.model in CONFIGS
    assert config.model.lora.rank == recipe.rank


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sizes_are_read_as_transformers_reads_them(name, tmp_path):
    config = read_config(write_published_config(tmp_path, name))
    padding = (config.padded_vocab_size - config.vocab_size) * config.embed_size * (1 if config.tie_embeddings else 2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]().get_text_config())
    assert num_params(abstract_params(config)) - padding == model.num_parameters()


def test_a_recipe_fits_its_target(tmp_path):
    """Eight billion parameters on a node; tests/benchmarks/recipes.py compiles them all."""
    name = "qwen3-8b-h100"
    recipe = models.RECIPES[name]
    folder = write_published_config(tmp_path, recipe.model)
    words = [f"--config={FILE}:{name}", f"--target={recipe.target}", f"--config.model.path={folder}"]
    command = [sys.executable, "-m", "postrain.cli", "plan", *words, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] and report["compiled"] and report["target"]["name"] == recipe.target
    assert report["model"]["compute_dtype"] == "bfloat16" and report["bound"]["mfu"] > 0.4
