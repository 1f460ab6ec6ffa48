"""A reward model out of a Hugging Face folder, from pairs of answers.

    postrain train --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=MODEL_DIR --config.data.train=pairs.jsonl --config.data.eval=held_out_pairs.jsonl

Variants, by their rows (docs/reward.md): configs/reward.py:lists for lists of scored answers, :steps for steps that are
right or wrong, :classes and :numbers for rows with a label. Best on a model that was trained by configs/sft.py on such
prompts. Adapters train, and the head, whose learning rate is its own. Look at eval/accuracy (the share of held-out
pairs in the right order) and eval/calibration_error. `postrain score runs/reward/export rows.jsonl` uses it.
"""

from ml_collections import ConfigDict

LOSSES = {"lists": "plackett_luce", "steps": "stepwise", "classes": "cross_entropy", "numbers": "squared_error"}


def get_config(arg: str | None = None) -> ConfigDict:
    if arg and arg not in LOSSES:
        raise ValueError(f"no variant {arg!r}: there are {', '.join(LOSSES)}")
    config = ConfigDict()
    config.recipe = "reward"
    config.data = {"train": [], "eval": [], "sequence_length": 2048, "batch_size": 16, "on_bad_row": "error"}
    config.data.label_numbers = arg == "numbers"
    config.model = {"path": "", "remat": "dots", "lora": {"rank": 16, "alpha": 32.0}}
    config.reward = {"loss": LOSSES[arg]} if arg else {"loss": "bradley_terry", "centering_coef": 0.01}
    config.optimizer = {"learning_rate": 1e-4, "head_learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 20}
    config.train = {"epochs": 1.0}
    config.eval = {"every": 100}
    config.checkpoint = {"every": 100, "keep": 2}
    return config
