"""Direct preference optimisation of a Hugging Face folder on pairs of answers.

    postrain train --config=configs/preference.py --workdir=runs/dpo \
        --config.model.path=MODEL_DIR --config.data.train=pairs.jsonl --config.data.eval=held_out_pairs.jsonl

A row is {"prompt": "...", "chosen": "...", "rejected": "..."}, each text or a list of messages; docs/data.md has the
other forms. Best after configs/sft.py, on prompts like those that will be served. Adapters train; the model without
them is the reference. Look at eval/rewards/accuracies (the share of held-out pairs that the model orders rightly) and
at eval/logps/chosen, which should not fall far.

Single answers that were liked or not, {"prompt": "...", "completion": "...", "label": true}, are for the variant kto
(with --config.preference.loss=bco for that loss):

    postrain train --config=configs/preference.py:kto --workdir=runs/kto \
        --config.model.path=MODEL_DIR --config.data.train=answers.jsonl --config.data.eval=held_out_answers.jsonl
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in (None, "kto"):
        raise ValueError(f"no variant {arg!r}: there is kto")
    config = ConfigDict()
    config.recipe = "preference"
    config.data = {"train": [], "eval": [], "sequence_length": 2048, "batch_size": 16, "on_bad_row": "error"}
    config.model = {"path": "", "remat": "dots", "lora": {"rank": 16, "alpha": 32.0}}
    config.preference = {"beta": 0.1, "loss": arg or "sigmoid"}
    config.optimizer = {"learning_rate": 2e-5, "schedule": "cosine", "warmup_steps": 20, "max_grad_norm": 1.0}
    config.train = {"epochs": 1.0}
    config.eval = {"every": 100}
    config.checkpoint = {"every": 100, "keep": 2}
    return config
