"""The keys of a config file: where each is documented, checked and made immutable.

A config file ``configs/NAME.py`` has ``get_config(arg=None) -> ml_collections.ConfigDict``; the command
line overrides keys as ``--config.optimizer.learning_rate=1e-5``. ``resolve`` turns the ConfigDict into
the frozen dataclasses below. An unknown key is an error that names the nearest key.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of rows."""

    path: str = ""  # a .jsonl or .parquet file, a glob of them, or a folder saved by `datasets`
    name: str = ""  # in reports; empty: the file's stem
    kind: str = "auto"  # "messages", "prompt_completion", "text", or "auto" (by the keys of the first row)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows -> rendered tokens and loss mask -> packed batches."""

    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()  # held out; empty: no evaluation
    sequence_length: int = 1024  # T, slots of a packed row
    batch_size: int = 8  # B, packed rows of one update, over all hosts and micro-batches
    packing: str = "best_fit"  # or "none": one document a row
    packing_window: int = 10_000  # documents that best-fit looks at together
    too_long: str = "drop"  # documents over sequence_length: "drop", "truncate", "error"
    on_bad_row: str = "error"  # or "skip": counted, written to rejected.jsonl
    max_bad_fraction: float = 0.05  # a run that skips a larger share of a source's rows stops
    shuffle: bool = True
    seed: int = 0
    chat_template: str = ""  # path of a jinja file in place of the tokenizer's own
    template_date: str = "2024-07-26"  # what templates that print today's date are given
    default_system: str = ""  # a system message for conversations that have none


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters. ``rank=0``: every parameter trains."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The model to start from and how its maths is carried out."""

    path: str = ""  # a Hugging Face folder
    tokenizer: str = ""  # another folder for the tokenizer; empty: the model's
    compute_dtype: str = "auto"  # "float32", "bfloat16"; auto: bfloat16 on accelerators, float32 on CPU
    remat: str = "none"  # "none", "dots", "full"
    attention: str = "auto"  # back end
    attention_chunk: int = 128  # positions per attention block
    loss_chunk: int = 1024  # loss-bearing tokens per block of the projection onto the vocabulary
    lora: LoraSection = LoraSection()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and others from optax, the learning-rate schedule, clipping, averaging."""

    name: str = "adamw"  # "adamw", "lion", "adafactor", "sgd", "muon"
    learning_rate: float = 1e-5  # the peak
    schedule: str = "cosine"  # "constant", "linear", "cosine", "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0  # of "wsd": length of the final decay; 0: a tenth of the run
    final_fraction: float = 0.0  # learning rate at the end / peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0  # of sgd
    weight_decay: float = 0.0  # decoupled; applied to matrices only
    weight_decay_exclude: tuple[str, ...] = ("norm", "bias", "embed")  # parts of a parameter's path
    max_grad_norm: float = 1.0  # 0: no clipping
    ema_decay: float = 0.0  # 0: no moving average of the weights


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1: whatever is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How long and how."""

    steps: int = 0  # updates; 0: by epochs
    epochs: float = 1.0  # used when steps is 0
    micro_batches: int = 1  # splits of a batch; the result does not depend on it
    seed: int = 0
    log_every: int = 1


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Evaluation on ``data.eval``: loss on all rows, and greedy generations scored against the answers."""

    every: int = 0  # steps between evaluations; 0: at the end only
    before: bool = True  # also before the first step
    generate_rows: int = 0  # rows that are generated and scored; 0: loss only
    max_new_tokens: int = 128
    batch_size: int = 32  # prompts generated together
    metrics: tuple[str, ...] = ("exact_match",)  # and "valid_json"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: at the end only
    keep: int = 2  # newest ones
    keep_best: int = 0  # best ones by `metric`, besides
    metric: str = "eval/loss"
    mode: str = "min"  # or "max"
    asynchronous: bool = True


@dataclasses.dataclass(frozen=True)
class TrackersConfig:
    """Besides metrics.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: str = "off"  # "online", "offline"
    wandb_project: str = "postrain"


@dataclasses.dataclass(frozen=True)
class ExportSection:
    format: str = "merged"  # a Hugging Face folder; "adapter": a PEFT folder; "none"
    dtype: str = "as_loaded"  # or "float32", "bfloat16", "float16"


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. ``recipe`` names the file in postrain/recipes that carries it out."""

    recipe: str = "sft"
    data: DataConfig = DataConfig()
    model: ModelSection = ModelSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()
    export: ExportSection = ExportSection()
