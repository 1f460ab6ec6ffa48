"""The keys of a config file: where each is documented, checked and made immutable.

``resolve`` turns the ConfigDict of a config file (see ``postrain.config.load``) into the frozen dataclasses below.
An unknown key is an error that names the nearest key.
"""

import dataclasses
import difflib
import math
import pathlib
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from postrain.config.functions import PREFIX, describe_function
from postrain.config.limits import CHOICES, RANGES
from postrain.config.rules import check_rules
from postrain.errors import UserError
from postrain.trees import flatten

RowFunction = Callable[[dict], dict | None]  # of a config file: a row -> one of a kind that there is, None: left out


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of rows."""

    path: str = ""  # a .jsonl or .parquet file, a glob of them, a folder saved by `datasets`, s3://, ... (docs/data.md)
    name: str = ""  # in reports; empty: the last part of the path, less its suffix
    # Of kind sft the first row tells the form, or the kind does: "messages", "prompt_completion", "text".
    kind: str | RowFunction = "sft"  # "preference", "prompts", "kd", "events", or a function that gives rows of them
    weight: float = 0.0  # its share beside the other sources' weights; 0 for all of them: by size
    max_epochs: int = 0  # times that its rows may come; 0: as often as its share needs


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Other weights of the sources from an update on."""

    step: int = 2  # the first update with these weights
    weights: tuple[float, ...] = ()  # of the sources, in the order of data.train


@dataclasses.dataclass(frozen=True)
class MixtureSection:
    """Shares of the sources of ``data.train``. Without any weights or caps every row comes once an epoch."""

    by: str = "tokens"  # what the shares are of: "tokens", "rows"
    temperature: float = 1.0  # T: without weights, the share of a source is its size to the power of 1 / T
    phases: tuple[PhaseConfig, ...] = ()  # weights that change while training, in the order of their updates


@dataclasses.dataclass(frozen=True)
class StreamSection:
    """How ``data.streaming`` reads."""

    shards: int = 8  # parts of the data that are read side by side, each by one process; divides data.batch_size
    block_mebibytes: int = 16  # read in one piece and shuffled as a whole; smaller where a shard had fewer than 16
    cache_folder: str = ""  # pieces of remote files are kept here
    cache_gibibytes: float = 0.0  # up to so much; 0: no cache


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows -> rendered tokens and loss mask -> packed batches."""

    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()  # held out; empty: no evaluation
    sequence_length: int = 1024  # T, slots of a packed row
    batch_size: int = 8  # B, packed rows of one update, over all devices and micro-batches
    packing: str = "best_fit"  # or "none": one document a row
    packing_window: int = 10_000  # documents that best-fit looks at together
    too_long: str = "drop"  # documents over sequence_length: "drop", "truncate", "error"
    on_bad_row: str = "error"  # or "skip": counted, written to rejected.jsonl
    max_bad_fraction: float = 0.05  # a run that skips a larger share of a source's rows stops
    shuffle: bool = True  # a new order of rows each epoch
    seed: int = 0  # of that order
    prefetch: int = 8  # batches that are prepared while the device works
    chat_template: str = ""  # path of a jinja file in place of the tokenizer's own
    template_date: str = "2024-07-26"  # what templates that print today's date are given
    default_system: str = ""  # a system message for conversations that have none
    mixture: MixtureSection = MixtureSection()
    accept_change: str = ""  # the code that the refusal of changed data names: the data start anew at this update
    streaming: bool = False  # read data.train while training: for data larger than memory, here or in object stores
    stream: StreamSection = StreamSection()


@dataclasses.dataclass(frozen=True)
class RanksSection:
    """Ranks of single targets in place of ``model.lora.rank``; 0: that one. Alpha is divided by the target's own."""

    q: int = 0  # queries
    k: int = 0  # keys
    v: int = 0  # values
    o: int = 0  # the attention's output
    gate: int = 0  # of the MLP, or of each expert
    up: int = 0  # likewise
    down: int = 0  # likewise


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters. ``rank=0``: every parameter trains."""

    rank: int = 0  # r, columns of A and rows of B
    alpha: float = 32.0  # the adapters' share is scaled by alpha / rank
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")  # linear layers that get adapters
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

    load_balance_coef: float = 0.0  # of experts with the same share of tokens
    z_coef: float = 0.0  # of small router logits
    load_balance_over: str = "row"  # the tokens to balance: of each "row", or of a micro-"batch"


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The model to start from and how its maths is carried out."""

    path: str = ""  # a Hugging Face folder
    tokenizer: str = ""  # another folder for the tokenizer; empty: the model's
    compute_dtype: str = "auto"  # "float32", "bfloat16"; auto: bfloat16 on accelerators, float32 on CPU
    fp8: bool = False  # products with the layers' matrices in float8: e4m3 forward, e5m2 gradients; not of experts
    remat: str = "none"  # "none", "dots", "full"
    attention: str = "auto"  # "chunked" (runs everywhere), "flash_tpu", "flash_gpu"; auto: by the platform
    attention_chunk: int = 128  # positions per block of the back end chunked
    loss_chunk: int = 1024  # loss-bearing tokens per block of the projection onto the vocabulary
    quantization: str = "none"  # of the base under adapters: "nf4" (arXiv:2305.14314), "int8"; of embeddings int8
    lora: LoraSection = LoraSection()
    new_tokens: NewTokensSection = NewTokensSection()
    router: RouterSection = RouterSection()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and others from optax, the learning-rate schedule, clipping, averaging."""

    name: str = "adamw"  # "adamw", "lion", "adafactor", "sgd", "muon"
    learning_rate: float = 1e-5  # the peak
    schedule: str = "cosine"  # "constant", "linear", "cosine", "wsd"
    warmup_steps: int = 0  # of a linear rise from 0
    decay_steps: int = 0  # of "wsd": length of the final decay; 0: a tenth of the run
    final_fraction: float = 0.0  # learning rate at the end / peak
    b1: float = 0.9  # decay of the average of gradients
    b2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # added to the root of that average
    momentum: float = 0.0  # of sgd
    weight_decay: float = 0.0  # decoupled; applied to matrices only
    weight_decay_exclude: tuple[str, ...] = ("norm", "bias", "embed")  # parts of a parameter's path
    max_grad_norm: float = 1.0  # 0: no clipping
    ema_decay: float = 0.0  # 0: no moving average of the weights


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1: whatever is left."""

    data: int = 1  # rows are split, parameters copied
    fsdp: int = -1  # rows and parameters are split
    tensor: int = 1  # heads, hidden units and vocabulary are split
    expert: int = 1  # experts are split, and outside their layers rows
    sequence: int = 1  # the positions of a row are split (context parallelism)


@dataclasses.dataclass(frozen=True)
class SpikeSection:
    """A step whose loss or gradient norm is not finite, or above ``threshold`` times its median over the last 64."""

    policy: str = "none"  # "stop", "skip" (no update), "rollback"; none: only what is not finite stops the run
    threshold: float = 8.0  # judged from the 16th step on; steps that were skipped do not count
    limit: int = 10  # more skips in a row, or more rollbacks, stop the run


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How long and how."""

    steps: int = 0  # updates; 0: by epochs
    epochs: float = 1.0  # used when steps is 0
    micro_batches: int = 1  # splits of a batch; the result does not depend on it
    seed: int = 0  # of new parameters and of anything drawn while training
    log_every: int = 1  # steps between lines of metrics.jsonl
    hang_timeout: float = 1800.0  # seconds without progress after which the run stops, naming where it hangs; 0: never
    spike: SpikeSection = SpikeSection()
    count_moved: bool = False  # log the share of weights that an update changes; holds the parameters twice


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Evaluation on ``data.eval``: loss on its rows, and greedy generations scored against the answers."""

    every: int = 0  # steps between evaluations; 0: at the end only
    before: bool = True  # also before the first step
    loss_rows: int = 0  # documents of `data.eval` that the loss is measured on, spread evenly over them; 0: all
    generate_rows: int = 0  # rows that are generated and scored; 0: loss only
    max_new_tokens: int = 128  # a longer answer is cut and counts as wrong
    batch_size: int = 32  # prompts generated together
    metrics: tuple[str, ...] = ("exact_match",)  # and "valid_json"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept in ``workdir/checkpoints``, from which a run goes on."""

    every: int = 0  # steps; 0: at the end only
    keep: int = 2  # newest ones
    keep_best: int = 0  # best ones by `metric`, besides
    metric: str = "eval/loss"  # what "best" means, a name in metrics.jsonl
    mode: str = "min"  # or "max"
    asynchronous: bool = True  # write while training goes on


@dataclasses.dataclass(frozen=True)
class TrackersConfig:
    """Besides metrics.jsonl, which is always written."""

    tensorboard: bool = False  # event files in workdir/tensorboard
    wandb: str = "off"  # "online", "offline"
    wandb_project: str = "postrain"  # the project that runs are filed under


@dataclasses.dataclass(frozen=True)
class ExportSection:
    """What is written to ``workdir/export`` at the end."""

    format: str = "merged"  # a Hugging Face folder; "adapter": a PEFT folder; "none"
    dtype: str = "as_loaded"  # or "float32", "bfloat16", "float16"


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. ``recipe`` names the file in postrain/recipes that carries it out."""

    recipe: str = "sft"  # which loop
    data: DataConfig = DataConfig()
    model: ModelSection = ModelSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()
    export: ExportSection = ExportSection()


def resolve(values: Any) -> Config:
    """A ConfigDict or nested dict -> the frozen Config, defaults filled in, every key checked.

    A source of ``data.train`` and ``data.eval`` may be a path in place of a dict, and a single one needs no list.
    """
    config = _build(Config, as_dict(values), "")
    if not config.data.train:
        raise UserError("config key 'data.train' is empty: give at least one source of training rows")
    if not config.model.path:
        raise UserError(f"config key 'model.path' is empty: {HOW_TO_GET_A_MODEL.format(name='NAME')}")
    if config.train.steps == 0 and config.train.epochs <= 0:
        raise UserError("config keys 'train.steps' and 'train.epochs' are both 0: set one of them")
    if config.model.lora.rank == 0 and config.export.format == "adapter":
        raise UserError("config key 'export.format' = 'adapter' needs 'model.lora.rank' above 0")
    check_rules(config)
    return config


HOW_TO_GET_A_MODEL = (
    "give the folder of a model; names on the Hugging Face hub are not downloaded, so first "
    "`hf download {name} --local-dir DIR`, then give DIR"
)


def check_model_path(path: str, where: str = "config key 'model.path'") -> None:
    """Raises UserError, saying how to get a model, where ``path`` is no folder. GGUF files and packages pass.

    To be called before anything that takes time: what needs the model would speak of the part that it misses first.
    """
    if path.startswith("pypi:") or path.endswith(".gguf"):
        return
    folder = pathlib.Path(path)
    if not path or not folder.is_dir():
        like_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) and not folder.parent.is_dir()
        found = "a file, expected a folder" if folder.is_file() else "a folder that does not exist"
        found = f"= {path!r} is {found}" if path else "is empty"
        raise UserError(f"{where} {found}: {HOW_TO_GET_A_MODEL.format(name=path if like_hub else 'NAME')}")


def check_paths(config: Config) -> None:
    """Raises UserError where the model, its tokenizer or the chat template of a config is not on this machine."""
    check_model_path(config.model.path)
    if config.model.tokenizer:
        check_model_path(config.model.tokenizer, "config key 'model.tokenizer'")
    tokens = config.model.new_tokens.file
    if tokens and not pathlib.Path(tokens).is_file():
        raise UserError(f"config key 'model.new_tokens.file' = {tokens!r} is no file: give one with a token a line")
    template = config.data.chat_template
    if template and not pathlib.Path(template).is_file():
        raise UserError(f"config key 'data.chat_template' = {template!r} is no file: give a jinja template, or nothing")


def to_dict(config: Config) -> dict:
    """Plain nested dicts and lists, as config.json holds them; ``resolve`` turns them back.

    Of a function only the name and a hash of its text are left: it is known again, and cannot be called.
    """

    def plain(value):
        if callable(value):
            return describe_function(value, "data.train.kind")
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def format_config(config: Config) -> str:
    """One ``section.key = value`` a line; keys that differ from their default are marked with ``*``."""
    given, default = flatten(to_dict(config)), flatten(to_dict(Config()))
    return "\n".join(f"{'*' if value != default.get(key) else ' '} {key} = {value!r}" for key, value in given.items())


def as_dict(values: Any) -> dict:
    """A ConfigDict as the nested dict that it holds. Raises UserError for anything else."""
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    if not isinstance(values, dict):
        raise UserError(f"get_config must return a ConfigDict, found {type(values).__name__}")
    return values


def _build(cls: type, values: dict, prefix: str) -> Any:
    types = typing.get_type_hints(cls)
    for key in values:
        if key not in types:
            raise UserError(f"config key '{prefix}{key}' does not exist{_nearest(key, prefix, types)}")
    return cls(**{key: _check(value, types[key], prefix + key) for key, value in values.items()})


def _nearest(key: str, prefix: str, siblings: dict) -> str:
    """Names the key that was probably meant: of this section, else of the whole config."""
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    if prefix == "mesh.":  # whose axes have other names elsewhere
        return f"; 'mesh' has {', '.join(siblings)}"
    everywhere = {name.rsplit(".", 1)[-1]: name for name in flatten(to_dict(Config()))}
    near = difflib.get_close_matches(key, everywhere, n=1)
    if near:
        return f"; did you mean '{everywhere[near[0]]}'?"
    return f"; '{prefix.rstrip('.')}' has {', '.join(siblings)}" if prefix else f"; there are {', '.join(siblings)}"


def _check(value: Any, kind: Any, key: str) -> Any:
    """``value`` as the type ``kind``, or a UserError that names ``key``."""
    if dataclasses.is_dataclass(kind):
        if kind is SourceConfig and isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, dict):
            raise UserError(f"config key '{key}' is a section of keys, found {value!r}")
        return _build(kind, value, key + ".")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        values = (value,) if isinstance(value, (str, dict)) and value else value or ()
        if not isinstance(values, (list, tuple)):
            raise UserError(f"config key '{key}' must be a list, found {value!r}")
        return tuple(_check(one, item, key) for one in values)
    if isinstance(kind, types.UnionType):  # a word, or a function in its place
        if callable(value):
            describe_function(value, key)
            return value
        if isinstance(value, str) and value.startswith(PREFIX):
            return value
        kind = str
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        raise UserError(f"config key '{key}' must be {kind.__name__}, found {value!r} ({type(value).__name__})")
    if key in CHOICES and value not in CHOICES[key]:
        near = difflib.get_close_matches(str(value), CHOICES[key], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config key '{key}' must be one of {', '.join(CHOICES[key])}; found {value!r}{hint}")
    if kind is float and math.isinf(value):
        raise UserError(f"config key '{key}' must be a finite number, found {value}")
    if kind in (int, float) and (expected := RANGES[key].refuse(value)):
        raise UserError(f"config key '{key}' must be {expected}, found {value!r}")
    return value
