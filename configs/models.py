"""Supervised fine-tuning of well-known models, each sized for a TPU slice or GPU nodes.

    postrain plan --config=configs/models.py:qwen3-8b-v5p --target=v5p:2x2x2
    postrain train --config=configs/models.py:qwen3-8b-v5p --workdir=runs/mine \
        --config.model.path=Qwen/Qwen3-8B --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

`model.path` is a folder, or a name on the Hugging Face hub; `plan` needs no more of it than config.json. RECIPES has a
line for each variant: its target, what trains, the batch. docs/plan.md says what each needs of its devices. Every
other key is that of configs/sft.py.
"""

from typing import NamedTuple

from ml_collections import ConfigDict


class Recipe(NamedTuple):
    """A batch is ``rows`` x ``length`` tokens; ``rank`` of the adapters, 0 trains everything."""

    model: str  # its name on the Hugging Face hub
    target: str  # of `postrain plan`
    rank: int
    rows: int
    length: int
    micro_batches: int = 1
    remat: str = "full"
    tensor: int = 1  # the rest of the devices is `mesh.fsdp`


RECIPES = {
    "qwen3-0.6b-v5e": Recipe("Qwen/Qwen3-0.6B", "v5e:2x2", 0, 16, 4096),
    "qwen3-0.6b-h100": Recipe("Qwen/Qwen3-0.6B", "h100:1x1", 0, 8, 4096),
    "qwen3-8b-v5p": Recipe("Qwen/Qwen3-8B", "v5p:2x2x2", 0, 32, 4096),
    "qwen3-8b-h100": Recipe("Qwen/Qwen3-8B", "h100:1x8", 0, 16, 4096),
    "qwen3-8b-lora-v5e": Recipe("Qwen/Qwen3-8B", "v5e:2x4", 32, 16, 4096),
    "qwen3-30b-a3b-v5p": Recipe("Qwen/Qwen3-30B-A3B", "v5p:2x4x4", 0, 64, 4096),
    "qwen3-30b-a3b-lora-h100": Recipe("Qwen/Qwen3-30B-A3B", "h100:1x8", 16, 16, 4096),
    "gemma-3-4b-v5e": Recipe("google/gemma-3-4b-it", "v5e:4x4", 0, 32, 4096),
    "gemma-3-4b-h100": Recipe("google/gemma-3-4b-it", "h100:1x8", 0, 16, 4096),
    "llama-3.1-8b-v5e": Recipe("meta-llama/Llama-3.1-8B-Instruct", "v5e:4x4", 0, 16, 4096),
    "llama-3.1-8b-h100": Recipe("meta-llama/Llama-3.1-8B-Instruct", "h100:1x8", 0, 16, 4096),
    "llama-3.1-70b-v5p": Recipe("meta-llama/Llama-3.1-70B-Instruct", "v5p:4x4x4", 0, 64, 4096),
    "llama-3.1-70b-lora-h100": Recipe("meta-llama/Llama-3.1-70B-Instruct", "h100:1x8", 32, 8, 4096),
    "gpt-oss-20b-v5p": Recipe("openai/gpt-oss-20b", "v5p:2x4x4", 0, 64, 4096),
    "gpt-oss-20b-lora-h100": Recipe("openai/gpt-oss-20b", "h100:1x8", 16, 16, 4096),
}


def get_config(arg: str = "qwen3-0.6b-h100") -> ConfigDict:
    if arg not in RECIPES:
        raise ValueError(f"no variant {arg!r}, there are {', '.join(RECIPES)}")
    recipe = RECIPES[arg]
    config = ConfigDict()
    config.recipe = "sft"
    config.data = {"train": [], "eval": [], "sequence_length": recipe.length, "batch_size": recipe.rows}
    config.model = {"path": recipe.model, "remat": recipe.remat}
    if recipe.rank:
        config.model.lora = {"rank": recipe.rank, "alpha": 2.0 * recipe.rank}
    config.mesh = {"tensor": recipe.tensor}
    config.optimizer = {
        "learning_rate": 2e-4 if recipe.rank else 1e-5,
        "schedule": "cosine",
        "warmup_steps": 20,  # of a run of hundreds; a shorter run has as many as it has steps
        "max_grad_norm": 1.0,
    }
    config.train = {"epochs": 2.0, "micro_batches": recipe.micro_batches}
    config.eval = {"every": 200}
    config.checkpoint = {"every": 200, "keep": 2}
    return config
