"""Optimizers from optax, the learning-rate schedule, which parameters decay.

Every optimizer is the same chain: a direction (Adam's, Lion's, ...), plus decoupled weight decay on the
matrices, times the scheduled learning rate (Loshchilov & Hutter 2017, arXiv:1711.05101, in the form of
``torch.optim.AdamW``: the decay is multiplied by the learning rate). Clipping by the global norm belongs to
the train step, which has that norm anyway. Learning rates keep their scale from one optimizer to the next
as far as the field's habits allow: Muon's update is brought to AdamW's size.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from postrain.config import OptimizerConfig
from postrain.errors import UserError
from postrain.models.params import VECTORS

Schedule = Callable[[jax.Array], jax.Array]  # int32 [] number of the update, from 0 -> float32 [] learning rate


def make_optimizer(config: OptimizerConfig, total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """The optax transformation for ``config`` and the schedule inside it.

    Names: "adamw"; "lion" (Chen et al. 2023, arXiv:2302.06675); "adafactor" (Shazeer & Stern 2018,
    arXiv:1804.04235, second moments by rows and columns, without scaling by the parameter's size);
    "sgd"; "muon" (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) for the matrices of the layers and Adam
    for the rest. ``config`` has passed ``postrain.config.resolve``. A warm-up that is longer than the run is cut to it,
    a final decay to the rest after the warm-up (``format_schedule_warning`` warns). Raises UserError without updates.
    """
    if total_steps < 1:
        raise UserError(f"train.steps: a run needs at least 1 update, found {total_steps}: set train.steps or epochs")
    schedule = make_schedule(config, total_steps)
    direction = DIRECTIONS[config.name](config)
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config))
    parts = (direction, decay) if config.weight_decay else (direction,)
    optimizer = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if config.head_learning_rate:
        optimizer = _scale_heads(optimizer, config.head_learning_rate / config.learning_rate)
    return optimizer, schedule


def _scale_heads(optimizer: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """``optimizer`` whose updates of ``heads`` are multiplied by ``factor``; its state is the same."""

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        scale = lambda path, leaf: leaf * factor if _parts(path)[0] == "heads" else leaf
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def state_structure(config: OptimizerConfig) -> tuple:
    """The structure of the train state: configs can resume from each other's checkpoints where it is equal."""
    matrix, vector = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    params = {"layers": {"q": {"kernel": matrix}}, "final_norm": {"scale": vector}}
    state = jax.eval_shape(make_optimizer(config, 1)[0].init, params)
    return jax.tree.structure(state), config.ema_decay > 0


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Learning rate of update ``step`` (from 0): a linear warm-up, then constant, linear, cosine or wsd.

    The warm-up wastes no update: step 0 already has ``1 / warmup_steps`` of the peak. After it the rate goes
    towards ``final_fraction`` of the peak, which it would reach at ``total_steps``. "wsd" (warm-up, stable,
    decay; Hu et al. 2024, arXiv:2404.06395) stays at the peak until the last ``decay_steps``.
    """
    warmup = min(config.warmup_steps, total_steps)
    # The decay begins after the warm-up: both at once would never reach the peak.
    decay = min(config.decay_steps or max(total_steps // 10, 1), total_steps - warmup)
    start = total_steps - decay if config.schedule == "wsd" else warmup
    shape = SCHEDULES[config.schedule]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - start) / max(total_steps - start, 1), 0, 1)
        fraction = config.final_fraction + (1 - config.final_fraction) * shape(progress)
        return config.learning_rate * fraction * jnp.minimum((step + 1) / max(warmup, 1), 1)

    return schedule


def format_schedule_warning(config: OptimizerConfig, total_steps: int) -> str:
    """A warning where the schedule asks for more steps than the run has, else ""; one line."""
    count = lambda steps: f"{steps:,} step{'s' * (steps != 1)}"
    left, cut = max(total_steps - config.warmup_steps, 0), []
    if config.warmup_steps > total_steps:
        key = f"optimizer.warmup_steps = {config.warmup_steps:,}"
        cut.append(f"{key}: longer than the run, cut to its {count(total_steps)}")
    if config.schedule == "wsd" and config.decay_steps > left:
        what = "run" if left == total_steps else "rest of the run after the warm-up"
        cut.append(f"optimizer.decay_steps = {config.decay_steps:,}: longer than the {what}, cut to its {count(left)}")
    return f"warning     {'; '.join(cut)}" if cut else ""


SCHEDULES = {
    "constant": jnp.ones_like,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(math.pi * progress)),
    "wsd": lambda progress: 1 - progress,
}


def decay_mask(params, config: OptimizerConfig):
    """True for the leaves that decay: matrices whose path has none of ``weight_decay_exclude``.

    Anything else never decays, whatever that key says. A name excludes a part of the path that equals it or has it
    between underscores: "norm" excludes ``layers.attention_norm.scale`` and "embed" ``embed.embedding``, but not
    ``unembed.embedding``.
    """

    def decays(path, leaf) -> bool:
        words = {word for part in _parts(path) for word in (part, *part.split("_"))}
        return _is_matrix(path, leaf) and not words.intersection(config.weight_decay_exclude)

    return jax.tree_util.tree_map_with_path(decays, params)


def _parts(path) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def _is_matrix(path, leaf) -> bool:
    """Whether one layer's parameter, or one expert's, is a matrix: those under ``layers`` are stacked.

    The biases of experts are stacked twice, [layers, experts, out], so that dimensions alone do not tell.
    """
    parts = _parts(path)
    return parts[-1] not in VECTORS and leaf.ndim - (parts[0] == "layers") >= 2


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    # The clip is the paper's d = 1.0; a stacked parameter is one block, all its layers together.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _sgd(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.trace(config.momentum) if config.momentum else optax.identity()


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    def is_layer_matrix(path, leaf) -> str:
        return "muon" if _parts(path)[0] == "layers" and _is_matrix(path, leaf) else "adam"

    def last_two_axes(params):
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)

    def to_adam_size(updates, params=None):
        # An orthogonal update has root mean square 1 / sqrt(max(in, out)); AdamW's is 0.2 to 0.4 (Liu et al., eq. 4).
        return jax.tree.map(lambda x: x * 0.2 * math.sqrt(max(x.shape[-2:])), updates)

    orthogonal = contrib.scale_by_muon(beta=config.momentum or 0.95, weight_dimension_numbers=last_two_axes)
    return optax.partition(
        {"muon": optax.chain(orthogonal, optax.stateless(to_adam_size)), "adam": _adam(config)},
        lambda params: jax.tree_util.tree_map_with_path(is_layer_matrix, params),
    )


DIRECTIONS = {
    "adamw": _adam,
    "lion": lambda config: optax.scale_by_lion(config.b1, config.b2),
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
}
