"""Keys that contradict each other: mistakes that are answered before anything else happens."""

import dataclasses
import typing

from postrain.config.row_kinds import find_row_kind
from postrain.config.schema import (
    REFERENCE_FREE,
    UNPAIRED_LOSSES,
    WHOLE_UPDATE_LOSSES,
    AnswerMetric,
    Config,
    DataConfig,
    DistillSection,
    ModelSection,
    OptimizerConfig,
    PreferenceSection,
    RewardSection,
    SftSection,
    WeightsSection,
)
from postrain.errors import UserError
from postrain.files import check_local


def check_rules(config: Config) -> None:
    """Raises UserError naming keys that do not go together."""
    data, train = config.data, config.train
    if train.steps == 0 and train.epochs <= 0:
        raise UserError("config keys 'train.steps' and 'train.epochs' are both 0: set one of them")
    key = "'data.streaming'" if data.streaming else "'data.mixture' or weights of 'data.train'"
    if (data.streaming or has_mixture(data)) and not train.steps:
        raise UserError(f"config key {key}: the length of such an epoch is not known beforehand: set 'train.steps'")
    _check_division(config)
    _check_sources(data)
    _check_model(config.model)
    if config.model.lora.rank == 0 and config.export.format == "adapter":
        raise UserError("config key 'export.format' = 'adapter' needs 'model.lora.rank' above 0")
    if config.eval.generate_rows and not data.eval:
        raise UserError("config key 'eval.generate_rows' needs held-out rows: give 'data.eval', or set it to 0")
    _check_unread(config)
    _check_labels(config)
    if config.checkpoint.keep_best:
        _check_best(config)
    if data.share_prompts == "on" and config.model.attention.startswith("flash"):
        raise UserError(
            f"config key 'model.attention' = {config.model.attention!r} computes no shared prompts, but "
            "'data.share_prompts' is 'on': set the one to auto or chunked, or the other to off"
        )
    if config.recipe == "preference":
        _check_preference(config)
    _check_weights(config)
    if config.recipe == "reward":
        _check_reward(config)
    if config.recipe == "distill":
        _check_distill(config)


def _check_division(config: Config) -> None:
    """Micro-batches, devices and shards have the same number of rows each.

    An axis of the mesh that is -1 gets its size when the devices are counted, and is checked then.
    """
    data, mesh = config.data, config.mesh
    free = [f"'mesh.{axis.name}'" for axis in dataclasses.fields(mesh) if getattr(mesh, axis.name) == -1]
    if len(free) > 1:
        raise UserError(
            f"config keys {' and '.join(free)} are -1, all devices that are left: give all but one a number"
        )
    rows, micro_batches, shards = data.batch_size, config.train.micro_batches, data.stream.shards
    if rows % micro_batches:
        raise UserError(
            f"config key 'train.micro_batches' = {micro_batches} does not divide 'data.batch_size' = {rows}"
        )
    row_devices = max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.expert, 1)
    if rows % (micro_batches * row_devices):
        raise UserError(
            f"config key 'data.batch_size' = {rows} must be a multiple of 'train.micro_batches' = {micro_batches} "
            f"times 'mesh.data' x 'mesh.fsdp' x 'mesh.expert' = {row_devices}"
        )
    if data.sequence_length % max(mesh.sequence, 1):
        raise UserError(
            f"config key 'data.sequence_length' = {data.sequence_length} must be a multiple of "
            f"'mesh.sequence' = {mesh.sequence}"
        )
    if data.streaming and rows % shards:
        raise UserError(f"config key 'data.batch_size' = {rows} must be a multiple of 'data.stream.shards' = {shards}")


def _check_labels(config: Config) -> None:
    """``data.label_names`` and ``data.label_numbers``, where rows of kind labelled are read."""
    if names := config.data.label_names:
        if find_row_kind(config) != "labelled":
            raise UserError(
                f"config key 'data.label_names' is of rows of kind labelled; this recipe reads rows of kind "
                f"{find_row_kind(config)}: leave it out"
            )
        if "" in names or len(set(names)) < len(names):
            raise UserError(f"config key 'data.label_names' must be different names; found {', '.join(names)}")
    if config.data.label_numbers and (config.recipe, config.reward.loss) != ("reward", "squared_error"):
        raise UserError(
            "config key 'data.label_numbers' is for 'reward.loss' = 'squared_error' of recipe 'reward': leave it out"
        )


def has_mixture(config: DataConfig) -> bool:
    """Whether the shares of the sources are other than each row once an epoch."""
    own = any(source.weight or source.max_epochs for source in config.train)
    return own or bool(config.mixture.phases) or config.mixture.temperature != 1


def _check_sources(data: DataConfig) -> None:
    """Each source by itself, their weights together, and the cache of a stream."""
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for source in sources:
            if source.path and source.dataset is not None:
                raise UserError(
                    f"config key 'data.{key}': a source has both 'path' = {source.path!r} and 'dataset': expected one "
                    "of them: make two sources"
                )
    unsized = [source for source in data.train if source.dataset is not None and not source.weight]
    if data.streaming and len(data.train) > 1 and unsized:
        raise UserError(
            "config key 'data.train': a source with 'dataset' has no size in bytes, which shares in a stream go by "
            "without weights: give every source a 'weight'"
        )

    # Weights that contradict each other.
    sources, mixture = data.train, data.mixture
    weighted = [source.weight > 0 for source in sources]
    if any(weighted) and mixture.temperature != 1:
        raise UserError(
            f"config key 'data.mixture.temperature' = {mixture.temperature} makes weights of the sizes of sources, but "
            "'data.train' gives weights: leave one of them out"
        )
    if any(weighted) and not all(weighted) and not mixture.phases:
        missing = sources[weighted.index(False)]
        raise UserError(
            f"config key 'data.train': source {missing.name or missing.path!r} has no weight and others have: give "
            "every source one, or none (by size), or leave the source out"
        )
    last = 1
    for phase in mixture.phases:
        where = f"config key 'data.mixture.phases', that from update {phase.step}:"
        if len(phase.weights) != len(sources):
            raise UserError(f"{where} {len(phase.weights)} weights for {len(sources)} sources: give one for each")
        if min(phase.weights) < 0 or not any(phase.weights):
            raise UserError(f"{where} expected weights of at least 0, one of them above, found {phase.weights}")
        if phase.step <= last:
            raise UserError(f"{where} expected an update after {last}: phases come in order, the first is 'data.train'")
        last = phase.step

    check_local(data.stream.cache_folder, "config key 'data.stream.cache_folder'")
    if (data.stream.cache_gibibytes > 0) != bool(data.stream.cache_folder):
        raise UserError(
            "config keys 'data.stream.cache_folder' and 'data.stream.cache_gibibytes' go together: set both, or neither"
        )


def _check_model(model: ModelSection) -> None:
    """Refuses adapters that could not change the model, and settings of what is not there."""
    lora, off = model.lora, "'model.lora.rank' is 0, so there are no adapters: set it above 0"
    own_ranks = [target for target, rank in dataclasses.asdict(lora.ranks).items() if rank]
    if not lora.rank:
        if model.quantization != "none":
            raise UserError(f"config key 'model.quantization' = {model.quantization!r} is for a frozen base, but {off}")
        if lora.dora or own_ranks:
            raise UserError(
                f"config key 'model.lora.{'dora' if lora.dora else 'ranks.' + own_ranks[0]}' is set, but {off}"
            )
    if lora.targets and (others := [target for target in own_ranks if target not in lora.targets]):
        raise UserError(
            f"config key 'model.lora.ranks.{others[0]}' is set, but 'model.lora.targets' is {', '.join(lora.targets)}: "
            f"add {others[0]} there, or set its rank to 0"
        )
    twice = [target for i, target in enumerate(lora.targets) if target in lora.targets[:i]]
    if twice:
        raise UserError(f"config key 'model.lora.targets' names {twice[0]!r} twice: name each layer once")
    if lora.rank and not lora.targets:
        raise UserError("config key 'model.lora.targets' is empty: name the layers that get adapters, or set rank to 0")
    if model.fp8 and model.quantization != "none":
        raise UserError(
            f"config keys 'model.fp8' and 'model.quantization' = {model.quantization!r}: a product is in one of them: "
            "switch the other off"
        )
    if lora.rank and not lora.alpha:
        raise UserError("config key 'model.lora.alpha' = 0 switches the adapters off: set it above 0")

    # New tokens. The tokens themselves are checked by postrain.data.rendering.tokenizer, which reads them.
    section, where = model.new_tokens, "config key 'model.new_tokens."
    if section.tokens and section.file:
        raise UserError(
            "config keys 'model.new_tokens.tokens' and 'model.new_tokens.file' are both set: put all tokens in one "
            "of them"
        )
    for key in ("train_alone", "special"):
        if getattr(section, key) and not (section.tokens or section.file):
            raise UserError(f"{where}{key}' is True, but there are no new tokens: give tokens or a file of them")
    if section.train_alone and model.lora.rank:
        raise UserError(
            f"{where}train_alone' is True and 'model.lora.rank' is {model.lora.rank}: set one of them; with adapters "
            "the rows of new tokens train beside them anyway"
        )


def _check_unread(config: Config) -> None:
    """Refuses values of keys that the chosen optimizer, schedule or recipe does not read."""
    optimizer, default = config.optimizer, OptimizerConfig()
    reads = {"adamw": {"b1", "b2", "eps"}, "muon": {"b1", "b2", "eps", "momentum"}, "lion": {"b1", "b2"}}
    unread = {"b1", "b2", "eps", "momentum"} - (reads | {"sgd": {"momentum"}}).get(optimizer.name, set())
    for key in sorted(unread):
        if getattr(optimizer, key) != getattr(default, key):
            raise UserError(
                f"config key 'optimizer.{key}' = {getattr(optimizer, key)} is not read by optimizer "
                f"{optimizer.name!r}: leave it out, or choose another 'optimizer.name'"
            )
    if optimizer.decay_steps and optimizer.schedule != "wsd":
        raise UserError(
            f"config key 'optimizer.decay_steps' = {optimizer.decay_steps} is read by schedule 'wsd' alone, and "
            f"'optimizer.schedule' is {optimizer.schedule!r}: leave it out, or set the schedule"
        )
    if optimizer.final_fraction and optimizer.schedule == "constant":
        raise UserError(
            f"config key 'optimizer.final_fraction' = {optimizer.final_fraction} is not read by schedule 'constant', "
            "which stays at the peak: leave it out, or choose another 'optimizer.schedule'"
        )
    if optimizer.head_learning_rate and config.recipe != "reward" and config.sft.weights.baseline != "head":
        without = " without 'sft.weights.baseline' = 'head'" if config.recipe == "sft" else ""
        raise UserError(
            f"config key 'optimizer.head_learning_rate' = {optimizer.head_learning_rate}: recipe {config.recipe!r}"
            f"{without} trains no head: leave it out"
        )
    if not optimizer.weight_decay and optimizer.weight_decay_exclude != default.weight_decay_exclude:
        raise UserError(
            "config key 'optimizer.weight_decay_exclude' is set, but 'optimizer.weight_decay' is 0: leave it out, or "
            "set the decay"
        )
    if config.data.share_prompts == "on" and find_row_kind(config) != "preference":
        raise UserError(
            "config key 'data.share_prompts' = 'on' is read by recipes 'preference' and 'reward' alone, and there of "
            "rows with several answers to a prompt: leave it out"
        )
    used = {
        "sft": config.sft != SftSection(),
        "preference": config.preference != PreferenceSection(),
        "reward": config.reward != RewardSection(),
        "distill": config.distill != DistillSection(),
    }
    for recipe, is_used in used.items():
        if is_used and config.recipe != recipe:
            raise UserError(f"config keys '{recipe}.*' are not read by recipe {config.recipe!r}: leave them out")


def _check_best(config: Config) -> None:
    """With ``checkpoint.keep_best``, the run must measure ``checkpoint.metric`` at every checkpoint."""
    metric, scored = config.checkpoint.metric, typing.get_args(AnswerMetric)
    where = f"config key 'checkpoint.metric' = {metric!r}"
    if not metric.startswith(("train/", "eval/")):
        raise UserError(f"{where}: expected a name that starts with train/ or eval/, such as eval/loss")
    if metric.startswith("eval/") and not config.data.eval:
        raise UserError(f"{where} needs held-out rows: give 'data.eval', or set 'checkpoint.keep_best' to 0")
    name = metric.removeprefix("eval/")
    answered = config.eval.metrics if config.eval.generate_rows else ()
    if metric.startswith("eval/") and name in scored and name not in answered:
        raise UserError(f"{where} needs 'eval.generate_rows' above 0 and {name!r} in 'eval.metrics'")
    key, every = "train.log_every", config.train.log_every
    if metric.startswith("eval/"):
        key, every = "eval.every", config.eval.every
    saved = config.checkpoint.every  # 0: the only checkpoint is the last, which is always measured
    if saved and (every == 0 or saved % every):
        raise UserError(
            f"{where} is measured every {key!r} = {every} steps{' (at the end only)' * (every == 0)}, so checkpoints "
            f"saved every 'checkpoint.every' = {saved} would not all have it: let {key!r} divide 'checkpoint.every'"
        )


def _check_weights(config: Config) -> None:
    """``sft.weights``: keys that the mode does not read, and a baseline that needs all rows of a stream."""
    section, default = config.sft.weights, WeightsSection()
    where = f"config key 'sft.weights.mode' = {section.mode!r}"
    reads = {
        "none": set(),
        "exp": {"temperature", "clip"},
        "advantage": {"temperature", "clip", "baseline"},
    }.get(section.mode, {"clip"})
    for key in ("temperature", "baseline", "clip"):
        if getattr(section, key) != getattr(default, key) and key not in reads:
            raise UserError(f"{where} does not read 'sft.weights.{key}': leave it out, or choose another mode")
    if section.mode == "advantage" and section.baseline == "none":
        raise UserError(
            f"{where} compares a reward with a baseline: set 'sft.weights.baseline' to 'member', 'item', 'value' or "
            "'head', or use mode 'exp', which has none"
        )
    if section.head_coef != default.head_coef and section.baseline != "head":
        raise UserError("config key 'sft.weights.head_coef' is read with 'sft.weights.baseline' = 'head' alone")
    if section.baseline == "head" and config.data.streaming:
        raise UserError(
            "config key 'sft.weights.baseline' = 'head' starts at the mean of all rewards, which 'data.streaming' does "
            "not have: set that to False, or give every row its 'value' and set the baseline to 'value'"
        )
    if section.baseline in ("member", "item") and config.data.streaming:
        raise UserError(
            f"config key 'sft.weights.baseline' = {section.baseline!r} is a mean over all rows, which 'data.streaming' "
            "does not have: set that to False, or give every row its 'value' and set the baseline to 'value'"
        )


# Keys of ``preference`` that a loss reads besides ``beta`` and ``nll_coef``.
_MARGIN_KEYS = {"target_margin", "per_token", "divergence", "divergence_alpha"}
PREFERENCE_KEYS = {
    **{loss: {"label_smoothing"} | _MARGIN_KEYS for loss in ("sigmoid", "robust", "exo")},
    **{loss: {"label_smoothing", "target_margin", "per_token"} for loss in ("cpo", "simpo")},
    **{loss: _MARGIN_KEYS for loss in ("hinge", "ipo", "discopop")},
    **{loss: {"label_smoothing"} for loss in ("aot", "aot_unpaired")},
    **{loss: {"desirable_weight", "undesirable_weight"} for loss in UNPAIRED_LOSSES},
}


def _check_preference(config: Config) -> None:
    section, default = config.preference, PreferenceSection()
    where = f"config key 'preference.loss' = {section.loss!r}"
    for key in sorted(set().union(*PREFERENCE_KEYS.values())):
        if getattr(section, key) != getattr(default, key) and key not in PREFERENCE_KEYS.get(section.loss, set()):
            raise UserError(f"{where} does not read 'preference.{key}': leave it out, or choose another loss")
    if section.divergence_alpha != default.divergence_alpha and section.divergence != "alpha":
        raise UserError("config key 'preference.divergence_alpha' is read with 'preference.divergence' = 'alpha' alone")
    if section.loss in ("robust", "exo") and not section.label_smoothing:
        raise UserError(f"{where} needs 'preference.label_smoothing' above 0: the share of labels that are wrong")
    if section.loss in ("cpo", "orpo") and not section.nll_coef:
        raise UserError(
            f"{where} is by its paper a sum with -log p of the chosen answers: set 'preference.nll_coef', usually to 1"
        )
    if section.loss in UNPAIRED_LOSSES and config.data.label_names:
        raise UserError(
            f"{where} reads labels of true and false, and 'data.label_names' would make the first name false, whatever "
            "it says: leave it out, and write true or false into the rows (or 1 or 0)"
        )
    if section.loss in WHOLE_UPDATE_LOSSES and config.train.micro_batches > 1:
        what = "answers" if section.loss in UNPAIRED_LOSSES else "pairs"
        raise UserError(f"{where} compares all {what} of an update with each other: set 'train.micro_batches' to 1")
    if section.loss == "kto" and config.data.streaming:
        raise UserError(
            f"{where} pairs each prompt with the answer to another one, for which all rows must be known beforehand: "
            "set 'data.streaming' to False, or use the loss 'bco' or 'apo_zero_unpaired'"
        )
    _check_reference(config)
    if config.eval.generate_rows:
        raise UserError("config key 'eval.generate_rows': rows of preferences have no one answer to score: set it to 0")


def choose_reference(config: Config) -> str:
    """Where recipe preference has its reference from: "none", "base", "cached" or "live"."""
    section, lora = config.preference, config.model.lora.rank
    if section.loss in REFERENCE_FREE:
        return "none"
    if section.reference == "auto":
        return "base" if lora and not has_new_tokens(config) else "cached"
    return section.reference


def has_new_tokens(config: Config) -> bool:
    return bool(config.model.new_tokens.tokens or config.model.new_tokens.file)


def _check_reference(config: Config) -> None:
    section, found = config.preference, choose_reference(config)
    if found == "none" and section.reference != "auto":
        raise UserError(
            f"config key 'preference.loss' = {section.loss!r} has no reference: leave 'preference.reference' out"
        )
    if found == "base" and not (config.model.lora.rank and not has_new_tokens(config)):
        raise UserError(
            "config key 'preference.reference' = 'base' is the model without its adapters: it needs 'model.lora.rank' "
            "above 0, and no 'model.new_tokens', whose rows it would share; 'cached' needs neither"
        )
    if found == "cached" and (config.data.streaming or has_mixture(config.data)):
        which = "'data.streaming'" if config.data.streaming else "a mixture of sources"
        raise UserError(
            f"the reference of recipe 'preference' is computed once for all rows, which {which} does not have: leave "
            "it out, or train adapters ('model.lora.rank' above 0), whose reference is the model without them, or set "
            "'preference.reference' to 'live', which keeps the starting model in memory"
        )


# Keys of ``reward`` that a loss reads.
REWARD_KEYS = {
    "bradley_terry": ("margin", "margin_of", "label_smoothing", "centering_coef"),
    "plackett_luce": ("centering_coef",),
    "stepwise": ("label_smoothing",),
    "cross_entropy": (),
    "squared_error": (),
}


def _check_reward(config: Config) -> None:
    section, default = config.reward, RewardSection()
    where = f"config key 'reward.loss' = {section.loss!r}"
    for key in ("margin", "margin_of", "label_smoothing", "centering_coef"):
        if getattr(section, key) != getattr(default, key) and key not in REWARD_KEYS[section.loss]:
            raise UserError(f"{where} does not read 'reward.{key}': leave it out, or choose another loss")
    if section.margin_of == "scores" and not section.margin:
        raise UserError("config key 'reward.margin_of' = 'scores' needs a factor: set 'reward.margin', usually to 1")
    if section.loss == "squared_error" and (config.data.label_names or not config.data.label_numbers):
        raise UserError(f"{where} reads numbers, not classes: set 'data.label_numbers', and no 'data.label_names'")
    if len(config.data.label_names) == 1:
        raise UserError("config key 'data.label_names' has one name: there is nothing to tell apart")
    if config.eval.generate_rows:
        raise UserError("config key 'eval.generate_rows': a reward model generates nothing: set it to 0")
    if config.export.format == "adapter":
        raise UserError(
            "config key 'export.format' = 'adapter': a reward model is exported whole, with its head: set it to "
            "'merged' or 'none'"
        )


def _check_distill(config: Config) -> None:
    section, default = config.distill, DistillSection()
    if has_new_tokens(config):
        raise UserError(
            "config key 'model.new_tokens': a teacher does not know the new tokens: train them with recipe 'sft', "
            "before or after"
        )
    for key, losses in (("beta", ("jsd",)), ("skew", ("skew_forward_kl", "skew_reverse_kl"))):
        if getattr(section, key) != getattr(default, key) and section.loss not in losses:
            raise UserError(
                f"config key 'distill.{key}' is not read by 'distill.loss' = {section.loss!r}: leave it out, or choose "
                f"{' or '.join(losses)}"
            )
    if not section.teacher and section.quantization != "none":
        raise UserError("config key 'distill.quantization' is of a teacher that runs: give 'distill.teacher'")
    if section.tokens == "all" and section.nll_coef:
        raise UserError(
            "config key 'distill.nll_coef' with 'distill.tokens' = 'all' would train what users say, and answers that "
            "are context only, as answers: leave one of them out"
        )
    if section.tokens == "all" and config.data.too_long == "truncate":
        raise UserError(
            "config key 'data.too_long' = 'truncate' with 'distill.tokens' = 'all' would keep rows whose answers are "
            "cut away: drop them, or set distill.tokens=trained"
        )
    if not section.teacher and section.tokens != default.tokens:
        raise UserError(
            "config key 'distill.tokens' is of a teacher that runs, or of `postrain teach`, which writes it into its "
            "rows: leave it out, or give 'distill.teacher'"
        )
    if section.teacher and section.checksum:
        raise UserError(
            "config key 'distill.checksum' is of rows that a teacher has written, 'distill.teacher' one that runs: "
            "leave one of them out"
        )
