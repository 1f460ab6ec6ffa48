"""What a key of the config may be where its type says too little: one of some words, a number of some range."""

import operator
from typing import NamedTuple

_KINDS = ("sft", "messages", "prompt_completion", "text", "preference", "prompts", "kd", "events")
# What a key may be where its type says too little. A test holds this table to the comments above.
CHOICES: dict[str, tuple] = {
    "recipe": ("sft",),
    "data.train.kind": _KINDS,
    "data.eval.kind": _KINDS,
    "data.mixture.by": ("tokens", "rows"),
    "data.packing": ("best_fit", "none"),
    "data.too_long": ("drop", "truncate", "error"),
    "data.on_bad_row": ("error", "skip"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.router.load_balance_over": ("row", "batch"),
    "model.attention": ("auto", "chunked", "flash_tpu", "flash_gpu"),
    "model.quantization": ("none", "nf4", "int8"),
    "model.lora.targets": ("q", "k", "v", "o", "gate", "up", "down"),
    "optimizer.name": ("adamw", "lion", "adafactor", "sgd", "muon"),
    "optimizer.schedule": ("constant", "linear", "cosine", "wsd"),
    "train.spike.policy": ("none", "stop", "skip", "rollback"),
    "eval.metrics": ("exact_match", "valid_json"),
    "checkpoint.mode": ("min", "max"),
    "trackers.wandb": ("off", "offline", "online"),
    "export.format": ("merged", "adapter", "none"),
    "export.dtype": ("as_loaded", "float32", "bfloat16", "float16"),
}


class Range(NamedTuple):
    """The numbers that a key may be; a bound that is None is none."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None  # besides

    def refuse(self, value: float) -> str:
        """What ``value`` should be and is not, "" when it is in the range. NaN is in none."""
        bounds = (
            (self.least, operator.ge, "at least"),
            (self.most, operator.le, "at most"),
            (self.above, operator.gt, "above"),
            (self.below, operator.lt, "below"),
        )
        if self.also is not None and value == self.also:
            return ""
        for bound, holds, words in bounds:
            if bound is not None and not holds(value, bound):
                return f"{words} {bound}" + ("" if self.also is None else f" (or {self.also})")
        return ""


_INT32 = 2**31 - 1  # how far devices count
_STEPS = Range(0, _INT32)  # 0 is off
_SEED = Range(0, 2**32 - 1)  # jax reads no more bits of a seed
_DECAY = Range(0, below=1)
_AXIS = Range(1, 2**20, also=-1)
# What every number may be, whoever asks: preview refuses what train does. Upper bounds of sizes are where memory is
# gone for certain, so that a slip of the finger is an answer and not a machine that swaps.
RANGES: dict[str, Range] = {
    "data.sequence_length": Range(1, 2**24),
    "data.batch_size": Range(1, 2**20),
    "data.packing_window": Range(1, _INT32),
    "data.max_bad_fraction": Range(0, 1),
    **{f"data.{rows}.weight": Range(0) for rows in ("train", "eval")},
    **{f"data.{rows}.max_epochs": Range(0, 100_000) for rows in ("train", "eval")},
    "data.mixture.temperature": Range(above=0),
    "data.mixture.phases.step": Range(2, _INT32),
    "data.mixture.phases.weights": Range(0),
    "data.stream.shards": Range(1, 2**16),
    "data.stream.block_mebibytes": Range(1, 2**20),
    "data.stream.cache_gibibytes": Range(0),
    "data.seed": _SEED,
    "data.prefetch": Range(1, 2**16),
    "model.attention_chunk": Range(1, 2**24),
    "model.loss_chunk": Range(1, 2**20),
    "model.lora.rank": Range(0, 2**16),
    "model.lora.alpha": Range(0),
    **{f"model.lora.ranks.{target}": Range(0, 2**16) for target in ("q", "k", "v", "o", "gate", "up", "down")},
    "model.router.load_balance_coef": Range(0),
    "model.router.z_coef": Range(0),
    "optimizer.learning_rate": Range(above=0),
    "optimizer.warmup_steps": _STEPS,
    "optimizer.decay_steps": _STEPS,
    "optimizer.final_fraction": Range(0, 1),
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": Range(above=0),
    "optimizer.momentum": _DECAY,
    "optimizer.weight_decay": Range(0),
    "optimizer.max_grad_norm": Range(0),
    "optimizer.ema_decay": _DECAY,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.expert": _AXIS,
    "mesh.sequence": _AXIS,
    "train.steps": _STEPS,
    "train.epochs": Range(0, 100_000),
    "train.micro_batches": Range(1, 2**20),
    "train.seed": _SEED,
    "train.log_every": Range(1, _INT32),
    "train.hang_timeout": Range(0),
    "train.spike.threshold": Range(above=1),
    "train.spike.limit": Range(1, _INT32),
    "eval.every": _STEPS,
    "eval.loss_rows": Range(0, _INT32),
    "eval.generate_rows": Range(0, _INT32),
    "eval.max_new_tokens": Range(1, 2**24),
    "eval.batch_size": Range(1, 2**20),
    "checkpoint.every": _STEPS,
    "checkpoint.keep": Range(1, _INT32),
    "checkpoint.keep_best": Range(0, _INT32),
}
