"""Supervised fine-tuning on logged answers, each weighted by what it earned.

    postrain train --config=configs/weighted_sft.py --workdir=runs/weighted \
        --config.model.path=MODEL_DIR --config.data.train=logged.jsonl

A row is {"messages": [...], "reward": 3.5}; docs/weighted_sft.md has the other modes and the keys that they read:
--config=configs/weighted_sft.py:advantage compares a reward with the mean of the row's "member", and :head with what a
head beside the vocabulary has learned to expect of the prompt. Look at the effective
sample size that is printed: where few rows decide, raise sft.weights.temperature. data.eval is measured without
weights: give rows that were received well.
"""

from ml_collections import ConfigDict

VARIANTS = {
    "exp": {"mode": "exp", "temperature": 1.0, "clip": 0.0},
    "advantage": {"mode": "advantage", "temperature": 1.0, "baseline": "member", "clip": 20.0},
    "head": {"mode": "advantage", "temperature": 1.0, "baseline": "head", "head_coef": 0.1, "clip": 20.0},
}


def get_config(arg: str = "exp") -> ConfigDict:
    if arg not in VARIANTS:
        raise ValueError(f"no variant {arg!r}, there are {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.recipe = "sft"
    config.data = {"train": [], "eval": [], "sequence_length": 2048, "batch_size": 8, "on_bad_row": "error"}
    config.model = {"path": "", "remat": "dots", "lora": {"rank": 16, "alpha": 32.0}}
    config.sft = {"weights": VARIANTS[arg]}
    config.optimizer = {"learning_rate": 2e-4, "schedule": "cosine", "warmup_steps": 20, "max_grad_norm": 1.0}
    if arg == "head":
        config.optimizer.head_learning_rate = 2e-3
    config.train = {"epochs": 2.0}
    config.eval = {"every": 200}
    config.checkpoint = {"every": 200, "keep": 2}
    return config
