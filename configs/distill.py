"""Distillation of a teacher into a smaller student, from what the teacher has written or with the teacher beside it.

    postrain teach --config=configs/distill.py --output=teacher_rows --config.model.path=STUDENT_DIR \
        --config.distill.teacher=TEACHER_DIR --config.data.train=train.jsonl
    postrain train --config=configs/distill.py --workdir=runs/distill \
        --config.model.path=STUDENT_DIR --config.data.train=teacher_rows

Rows are those of configs/sft.py; best are answers that the teacher has written (`postrain generate`). Both models have
the same tokenizer; docs/distill.md makes a student out of some layers of a teacher. Every parameter of the student
trains. Look at eval/agreement, the share of held-out tokens whose likeliest is the teacher's.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg:
        raise ValueError(f"no variant {arg!r}: this config has none")
    config = ConfigDict()
    config.recipe = "distill"
    config.data = {"train": [], "eval": [], "sequence_length": 2048, "batch_size": 16, "on_bad_row": "error"}
    config.model = {"path": "", "remat": "dots"}
    config.distill = {"loss": "forward_kl", "temperature": 1.0, "top_k": 64}
    config.optimizer = {"learning_rate": 5e-5, "schedule": "cosine", "warmup_steps": 20, "max_grad_norm": 1.0}
    config.train = {"epochs": 1.0}
    config.eval = {"every": 100}
    config.checkpoint = {"every": 100, "keep": 2}
    return config
