"""Supervised fine-tuning of a Hugging Face folder on your own conversations.

    postrain train --config=configs/sft.py --workdir=runs/mine \
        --config.model.path=MODEL_DIR --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

A row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]};
docs/data.md has the other forms. `--config=configs/sft.py:full` trains every parameter in place of LoRA adapters.
The run leaves metrics.jsonl, report.html, checkpoints and the exported model in the workdir.
Every key that there is, with its default and its meaning: postrain/config/schema.py.
"""

from ml_collections import ConfigDict

VARIANTS = ("lora", "full")


def get_config(arg: str = "lora") -> ConfigDict:
    if arg not in VARIANTS:
        raise ValueError(f"no variant {arg!r}, there are {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.recipe = "sft"
    config.data = {"train": [], "eval": [], "sequence_length": 2048, "batch_size": 8, "on_bad_row": "error"}
    config.model = {"path": "", "remat": "dots"}
    if arg == "lora":
        config.model.lora = {"rank": 16, "alpha": 32.0}
    config.optimizer = {
        "learning_rate": 2e-4 if arg == "lora" else 1e-5,
        "schedule": "cosine",
        "warmup_steps": 20,  # of a run of hundreds; a shorter run has as many as it has steps
        "max_grad_norm": 1.0,
    }
    config.train = {"epochs": 2.0}
    config.eval = {"every": 200}
    config.checkpoint = {"every": 200, "keep": 2}
    return config
