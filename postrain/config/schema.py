"""Every key of a config: its type, range, default and meaning, on one line.

``postrain.config.load`` turns the dict of a config file into these frozen dataclasses.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args


class Range(NamedTuple):
    """The numbers that a key may be, for ``Annotated``; a bound of None is absent."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None  # an extra allowed value outside the range

    def explain_refusal(self, value: float) -> str:
        """Which numbers are expected, such as "at least 1 (or -1)", where ``value`` is not one of them; else ""."""
        bounds = (
            (self.least, operator.ge, "at least"),
            (self.most, operator.le, "at most"),
            (self.above, operator.gt, "above"),
            (self.below, operator.lt, "below"),
        )
        if self.also is not None and value == self.also:
            return ""
        for bound, holds, words in bounds:
            if bound is not None and not holds(value, bound):  # NaN fails every comparison
                return f"{words} {bound}" + ("" if self.also is None else f" (or {self.also})")
        return ""


# Upper bounds of sizes are where memory is exhausted for certain: a typing error is refused before a machine swaps.
INT32 = 2**31 - 1  # the largest integer that devices count to
Count = Annotated[int, Range(0, INT32)]  # of steps or rows
Times = Annotated[int, Range(1, INT32)]
Size = Annotated[int, Range(1, 2**20)]
Length = Annotated[int, Range(1, 2**24)]  # of a sequence, in tokens
Rank = Annotated[int, Range(0, 2**16)]
Devices = Annotated[int, Range(1, 2**20, also=-1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # jax reads 32 bits of a seed
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]


class Dataset:
    """A ``grain.MapDataset`` or ``grain.IterDataset`` of rows (dicts), or a function that returns one. The function has
    no parameter, or two: (shard, shards), and then it returns the rows of that shard alone."""


RowFunction = Callable[[dict], dict | None]  # of a config file: a row -> a row of a known kind, or None: left out
Kind = Literal[
    "sft", "messages", "prompt_completion", "text", "preference", "labelled", "stepwise", "prompts", "kd", "events",
    "sharegpt", "alpaca",
]  # fmt: skip
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
AnswerMetric = Literal["exact_match", "valid_json"]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of rows. A path alone stands for a source with that path."""

    SHORT_FOR: ClassVar[str] = "path"  # the key that a string in place of the section is the value of
    path: str = ""  # a .jsonl or .parquet file, a glob of them, a folder saved by `datasets`, s3://, ... (docs/data.md)
    dataset: Dataset | None = None  # in place of a path: a Grain dataset, or a function that returns one
    name: str = ""  # in reports; empty: the last part of the path, less its suffix, or the dataset's name
    # The first row of kind sft decides between messages, prompt_completion and text; those kinds decide it themselves.
    kind: Kind | RowFunction = "sft"  # or a function that returns rows of these kinds
    weight: NotNegative = 0.0  # its share, relative to the weights of the other sources; 0 for all of them: by size
    max_epochs: Annotated[int, Range(0, 100_000)] = 0  # times that its rows may come; 0: as often as its share needs
    loss_weight: Annotated[float, Range(1e-3, 1e3)] = 1.0  # how much each of its trained tokens counts in the loss


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Other weights of the sources from an update on."""

    step: Annotated[int, Range(2, INT32)] = 2  # the first update with these weights
    weights: tuple[NotNegative, ...] = ()  # of the sources, in the order of data.train


@dataclasses.dataclass(frozen=True)
class MixtureSection:
    """Shares of the sources of ``data.train``. Without any weights or caps every row comes once an epoch."""

    by: Literal["tokens", "rows"] = "tokens"  # the unit of the shares
    temperature: Positive = 1.0  # T: without weights, the share of a source is its size to the power of 1 / T
    phases: tuple[PhaseConfig, ...] = ()  # weights that change while training, in the order of their updates


@dataclasses.dataclass(frozen=True)
class StreamSection:
    """How ``data.streaming`` reads."""

    shards: Annotated[int, Range(1, 2**16)] = 8  # parts of the data, each read by one process; divides data.batch_size
    block_mebibytes: Size = 16  # read in one piece and shuffled as a whole; smaller where a shard had fewer than 16
    cache_folder: str = ""  # for pieces of remote files
    cache_gibibytes: NotNegative = 0.0  # the largest size of that folder; 0: no cache


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows -> rendered tokens and loss mask -> packed batches."""

    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()  # held out; empty: no evaluation
    sequence_length: Length = 1024  # T, slots of a packed row
    batch_size: Size = 8  # B, packed rows of one update, over all devices and micro-batches
    packing: Literal["best_fit", "none"] = "best_fit"  # none: one document a row
    packing_window: Times = 10_000  # documents that best-fit looks at together
    # The prompt of a group of answers stands in a row once and is computed once; auto: where the attention can do that.
    # A group's length is judged so: on devices that do not share, longer groups are left out (too_long).
    share_prompts: Literal["auto", "on", "off"] = "auto"  # the loss of a group is the same
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"  # documents over sequence_length; split: of text
    on_bad_row: Literal["error", "skip"] = "error"  # skip: the row is counted and written to rejected.jsonl
    max_bad_fraction: Share = 0.05  # a run that skips a larger share of a source's rows stops
    shuffle: bool = True  # a new order of rows each epoch
    seed: Seed = 0  # of that order
    prefetch: Annotated[int, Range(1, 2**16)] = 8  # batches that are prepared while the device works
    chat_template: str = ""  # path of a jinja file in place of the tokenizer's own
    template_date: str = "2024-07-26"  # the date that templates print as today
    default_system: str = ""  # a system message for conversations that have none
    label_names: tuple[str, ...] = ()  # of rows of kind labelled: the classes by name, in the order of their numbers
    label_numbers: bool = False  # of rows of kind labelled: labels are any numbers, such as ratings, not classes
    mixture: MixtureSection = MixtureSection()
    accept_change: str = ""  # the code that the refusal of changed data names: the data start anew at this update
    streaming: bool = False  # read data.train while training: for data larger than memory, here or in object stores
    stream: StreamSection = StreamSection()


@dataclasses.dataclass(frozen=True)
class RanksSection:
    """Ranks of single targets in place of ``model.lora.rank``; 0: that one. Alpha is divided by the target's own."""

    q: Rank = 0  # queries
    k: Rank = 0  # keys
    v: Rank = 0  # values
    o: Rank = 0  # output of the attention
    gate: Rank = 0  # gate of the MLP, or of each expert
    up: Rank = 0  # up projection of the MLP, or of each expert
    down: Rank = 0  # down projection of the MLP, or of each expert


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters. ``rank=0``: every parameter trains."""

    rank: Rank = 0  # r, columns of A and rows of B
    alpha: NotNegative = 32.0  # the adapters' share is scaled by alpha / rank
    targets: tuple[Target, ...] = ("q", "k", "v", "o", "gate", "up", "down")  # linear layers that get adapters
    ranks: RanksSection = RanksSection()
    dora: bool = False  # a trained magnitude of each output channel, adapters for its direction (arXiv:2402.09353)


@dataclasses.dataclass(frozen=True)
class NewTokensSection:
    """Tokens that the tokenizer and the model get besides their own, each one id with rows of its own.

    A token is written alone, or as ``token<TAB>text``: its rows then start as the mean of the rows of the text's
    tokens, else as the mean of all old rows.
    """

    tokens: tuple[str, ...] = ()  # the tokens themselves, or
    file: str = ""  # a text file of them, one a line
    special: bool = False  # written by the chat template alone: never read from the text of a row
    train_alone: bool = False  # with lora.rank=0: their rows train and nothing else (with adapters the base is frozen)


@dataclasses.dataclass(frozen=True)
class RouterSection:
    """Losses of the routers of a mixture of experts; their metrics are logged in any case."""

    load_balance_coef: NotNegative = 0.0  # of the loss that is least where all experts get the same share of tokens
    z_coef: NotNegative = 0.0  # of the squared log-sum-exp of the router's logits
    load_balance_over: Literal["row", "batch"] = "row"  # the tokens to balance: of each row, or of a micro-batch


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The model to start from and how its maths is carried out."""

    path: str = ""  # a Hugging Face folder
    tokenizer: str = ""  # another folder for the tokenizer; empty: the model's
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    fp8: bool = False  # products with the layers' matrices in float8: e4m3 forward, e5m2 gradients; not of experts
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: all but products, or all
    attention: Literal["auto", "chunked", "flash_tpu", "flash_gpu"] = "auto"  # by the platform; chunked runs everywhere
    attention_chunk: Length = 128  # positions per block of the back end chunked
    loss_chunk: Size = 1024  # loss-bearing tokens per block of the projection onto the vocabulary
    quantization: Literal["none", "nf4", "int8"] = "none"  # of the base under adapters (nf4: arXiv:2305.14314)
    lora: LoraSection = LoraSection()
    new_tokens: NewTokensSection = NewTokensSection()
    router: RouterSection = RouterSection()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and others from optax, the learning-rate schedule, clipping, averaging."""

    name: Literal["adamw", "lion", "adafactor", "sgd", "muon"] = "adamw"  # which optimizer
    learning_rate: Positive = 1e-5  # the peak
    head_learning_rate: NotNegative = 0.0  # the peak of a head's (recipe reward, baseline head); 0: that of the rest
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"  # of the learning rate after the warm-up
    warmup_steps: Count = 0  # of a linear rise from 0
    decay_steps: Count = 0  # of wsd: length of the final decay; 0: a tenth of the run
    final_fraction: Share = 0.0  # learning rate at the end / peak
    b1: Decay = 0.9  # decay of the average of gradients
    b2: Decay = 0.999  # decay of the average of squared gradients
    eps: Positive = 1e-8  # added to the root of that average
    momentum: Decay = 0.0  # of sgd, and of muon's matrices (0: 0.95)
    weight_decay: NotNegative = 0.0  # decoupled; applied to matrices only
    weight_decay_exclude: tuple[str, ...] = ("norm", "bias", "embed")  # parts of a parameter's path
    max_grad_norm: NotNegative = 1.0  # 0: no clipping
    ema_decay: Decay = 0.0  # 0: no moving average of the weights


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1: whatever is left."""

    data: Devices = 1  # rows are split, parameters copied
    fsdp: Devices = -1  # rows and parameters are split
    tensor: Devices = 1  # heads, hidden units and vocabulary are split
    expert: Devices = 1  # experts are split, and outside their layers rows
    sequence: Devices = 1  # the positions of a row are split (context parallelism)


@dataclasses.dataclass(frozen=True)
class SpikeSection:
    """A step whose loss or gradient norm is not finite, or above ``threshold`` times its median over the last 64."""

    policy: Literal["none", "stop", "skip"] = "none"  # skip: no update; none: only what is not finite stops the run
    threshold: Annotated[float, Range(above=1)] = 8.0  # judged from the 16th step on; skipped steps do not count
    limit: Times = 10  # more skips in a row stop the run


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How long and how."""

    steps: Count = 0  # updates; 0: by epochs
    epochs: Annotated[float, Range(0, 100_000)] = 1.0  # used when steps is 0
    micro_batches: Size = 1  # splits of a batch; the result does not depend on it
    seed: Seed = 0  # of new parameters and of all random numbers of training
    log_every: Times = 1  # steps that a line of metrics.jsonl has the means of
    hang_timeout: NotNegative = 1800.0  # seconds without progress after which the run stops, naming where; 0: never
    spike: SpikeSection = SpikeSection()
    count_moved: bool = False  # log the share of weights that an update changes; holds the parameters twice


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Evaluation on ``data.eval``: loss on its rows, and greedy generations scored against the answers."""

    every: Count = 0  # steps between evaluations; 0: at the end only
    before: bool = True  # also before the first step
    loss_rows: Count = 0  # documents of `data.eval` that the loss is measured on, spread evenly over them; 0: all
    generate_rows: Count = 0  # rows that are generated and scored; 0: loss only
    max_new_tokens: Length = 128  # a longer answer is cut and counts as wrong
    batch_size: Size = 32  # prompts generated together
    metrics: tuple[AnswerMetric, ...] = ("exact_match",)  # scores of the generated answers


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in ``workdir/checkpoints``: a run that is started again goes on from the newest."""

    every: Count = 0  # steps; 0: at the end only
    keep: Times = 2  # the newest ones
    keep_best: Count = 0  # and the best ones by `metric`
    metric: str = "eval/loss"  # what "best" means, a name in metrics.jsonl
    mode: Literal["min", "max"] = "min"  # whether the best has the least or the greatest
    asynchronous: bool = True  # write while training goes on


@dataclasses.dataclass(frozen=True)
class TrackersConfig:
    """Besides metrics.jsonl, which is always written."""

    tensorboard: bool = False  # event files in workdir/tensorboard
    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases
    wandb_project: str = "postrain"  # the project that runs are filed under


@dataclasses.dataclass(frozen=True)
class WeightsSection:
    """How much the tokens of a row count, by the row's ``reward``; docs/weighted_sft.md has the formulas."""

    mode: Literal["none", "linear", "exp", "advantage", "ips", "snips"] = "none"  # none: ``reward`` is not read
    temperature: Annotated[float, Range(1e-6, 1e6)] = 1.0  # of exp and advantage: the lower, the more rewards decide
    # Of advantage, what a reward is compared with: the mean over the row's member or item, the row's ``value``, or what
    # a head beside the vocabulary, which trains with the model, expects after the prompt.
    baseline: Literal["none", "member", "item", "value", "head"] = "none"  # none: mode exp
    head_coef: Positive = 0.1  # of baseline head: factor of the head's squared error in the loss
    clip: NotNegative = 0.0  # a larger weight counts as this much; 0: none is too large


@dataclasses.dataclass(frozen=True)
class SftSection:
    """Variants of the loss of recipe sft; ``objectives/sft.py`` has the formula. All off: the likelihood alone."""

    label_smoothing: Annotated[float, Range(0, below=1)] = 0.0  # share of the target spread over the vocabulary
    z_loss_coef: NotNegative = 0.0  # factor of the squared log of the softmax's denominator
    focal_gamma: NotNegative = 0.0  # weight (1 - p)^gamma: the likelier a token, the less it counts
    probability_weights: bool = False  # weight p without its gradient: dynamic fine-tuning (DFT)
    nll_clip: NotNegative = 0.0  # tokens with a larger -log p have no gradient; 0: none is too large
    noise: NotNegative = 0.0  # NEFTune's alpha: uniform noise in the embeddings while training
    weights: WeightsSection = WeightsSection()


_OfMargins = Literal["sigmoid", "softmax", "hinge", "ipo", "robust", "exo", "discopop", "aot", "aot_unpaired"]
_OfEachAnswer = Literal["sppo_hard", "cal_dpo", "nca", "bco_pair", "apo_zero", "apo_down"]
_WithoutReference = Literal["cpo", "simpo", "orpo"]
_Unpaired = Literal["kto", "bco", "apo_zero_unpaired"]  # of single answers, each with a label
PreferenceLoss = Literal[_OfMargins, _OfEachAnswer, _WithoutReference, _Unpaired]
REFERENCE_FREE: tuple[str, ...] = get_args(_WithoutReference)
UNPAIRED_LOSSES: tuple[str, ...] = get_args(_Unpaired)
WHOLE_UPDATE_LOSSES = ("aot", "aot_unpaired", "kto", "bco")  # with statistics of all rows of an update


@dataclasses.dataclass(frozen=True)
class PreferenceSection:
    """The loss of recipe preference; docs/preference.md has its formulas."""

    loss: PreferenceLoss = "sigmoid"  # of a pair; sigmoid is DPO; kto, bco and apo_zero_unpaired of single answers
    # base: the model without its adapters; cached: the starting model, whose log p of all rows is computed once; live:
    # a copy of what trains, as it was at the start, in memory beside it
    reference: Literal["auto", "base", "cached", "live"] = "auto"  # auto: base with adapters, cached without
    beta: Positive = 0.1  # factor of the margin: the larger, the nearer to the reference
    label_smoothing: Annotated[float, Range(0, below=0.5)] = 0.0  # the probability that a pair is the wrong way round
    target_margin: NotNegative = 0.0  # by how much the chosen answer is to lead, after beta (simpo's gamma)
    per_token: bool = False  # scores by the answers' lengths: log p of the mean token
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"  # from the reference
    divergence_alpha: Positive = 0.5  # of divergence alpha; 1 is reverse_kl
    nll_coef: NotNegative = 0.0  # factor of the second loss, -log p of the chosen (desirable) answers' tokens
    desirable_weight: Positive = 1.0  # of single answers, the factor of the loss of those with label true
    undesirable_weight: Positive = 1.0  # and of those with label false


RewardLoss = Literal["bradley_terry", "plackett_luce", "stepwise", "cross_entropy", "squared_error"]


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """The loss of recipe reward; docs/reward.md has the formulas of ``objectives/reward.py``."""

    loss: RewardLoss = "bradley_terry"  # of pairs, of scored lists, of the steps of an answer, of classes, of numbers
    margin: NotNegative = 0.0  # of bradley_terry: by how much the better answer is to lead, times `margin_of`
    margin_of: Literal["constant", "scores"] = "constant"  # 1, or the difference of the answers' scores
    label_smoothing: Annotated[float, Range(0, below=0.5)] = 0.0  # the probability that a label is the wrong way round
    centering_coef: NotNegative = 0.0  # factor of the second loss, which holds the scores around 0


@dataclasses.dataclass(frozen=True)
class DistillSection:
    """Recipe distill and `postrain teach`; docs/distill.md has the formulas of ``objectives/distill.py``."""

    teacher: str = ""  # a Hugging Face folder that runs beside the student, or for teach; empty: rows are of kind kd
    quantization: Literal["none", "nf4", "int8"] = "none"  # of the teacher
    checksum: str = ""  # the only teacher that rows of kind kd may come from, as teach prints it; empty: any
    tokens: Literal["trained", "all"] = "trained"  # of a row, that are learned; all: those of its prompt too
    loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "forward_kl"  # of a token
    beta: Annotated[float, Range(above=0, below=1)] = 0.5  # of jsd: the teacher's share of the mixture
    skew: Annotated[float, Range(above=0, below=1)] = 0.1  # of the skew losses: how much of itself is mixed in
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0  # that the logits of both are divided by
    nll_coef: NotNegative = 0.0  # factor of the student's own -log p of the token, which is added
    top_k: Annotated[int, Range(1, 2**16)] = 64  # likeliest ids of the teacher in a row of kind kd, for every token


@dataclasses.dataclass(frozen=True)
class ExportSection:
    """What is written to ``workdir/export`` at the end."""

    format: Literal["merged", "adapter", "none"] = "merged"  # merged: a Hugging Face folder; adapter: a PEFT folder
    dtype: Literal["as_loaded", "float32", "bfloat16", "float16"] = "as_loaded"  # of the weights


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    recipe: str = "sft"  # the name of the file in postrain/recipes that carries it out
    data: DataConfig = DataConfig()
    model: ModelSection = ModelSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()
    export: ExportSection = ExportSection()
    sft: SftSection = SftSection()
    preference: PreferenceSection = PreferenceSection()
    reward: RewardSection = RewardSection()
    distill: DistillSection = DistillSection()
