"""Steps whose loss or gradient norm explodes: skipped inside the jitted step, reported by the loop.

A step is usual when its loss and its gradient norm are at most ``threshold`` times their medians over the last 64
updates. The history is part of the train state, so a resumed run judges as an uninterrupted one. Until there have been
16 updates the only check is whether loss and gradient are finite.

A step that is skipped goes past the bad batch, as PaLM's authors did by hand (Chowdhery et al. 2022, arXiv:2204.02311,
section 5.1).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from postrain.config import SpikeSection
from postrain.errors import UserError
from postrain.sharding import to_host

WINDOW = 64  # updates whose medians are what is usual
MIN_UPDATES = 16  # before a step is judged by them


def new_history() -> dict[str, jax.Array]:
    """The part of a TrainState that says what is usual: ring buffers and counters.

    ``loss`` and ``grad_norm`` float32 [WINDOW], of the last updates, NaN before there were any; int32 [] ``updates``,
    ``skipped`` and ``in_a_row``, the steps skipped since the last update.
    """
    empty, zero = jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.zeros((), jnp.int32)
    # A buffer cannot be donated twice.
    return {
        "loss": empty,
        "grad_norm": jnp.copy(empty),
        "updates": zero,
        "skipped": jnp.copy(zero),
        "in_a_row": jnp.copy(zero),
    }


def compute_limits(history: dict, threshold: float) -> tuple[jax.Array, jax.Array]:
    """The most that loss and gradient norm of a step may be, float32 []; infinite without threshold or history."""
    has_limits = (history["updates"] >= MIN_UPDATES) & (threshold > 0)
    limits = (threshold * jnp.nanmedian(history[name]) for name in ("loss", "grad_norm"))
    loss, norm = (jnp.where(has_limits, limit, jnp.inf) for limit in limits)
    return loss, norm


def update_history(history: dict, loss: jax.Array, norm: jax.Array, is_update: jax.Array, is_bad: jax.Array) -> dict:
    """``history`` after a step: an update, or skipped because it was bad. A batch without weight is neither."""
    place = history["updates"] % WINDOW

    def put(values, value):
        return values.at[place].set(jnp.where(is_update, value, values[place]))

    return {
        "loss": put(history["loss"], loss),
        "grad_norm": put(history["grad_norm"], norm),
        "updates": history["updates"] + is_update,
        "skipped": history["skipped"] + is_bad,
        "in_a_row": jnp.where(is_update, 0, history["in_a_row"] + is_bad),
    }


class SpikeGuard:
    """Stops the run at a bad step, or reports that it was skipped. The step itself has changed no parameter."""

    def __init__(self, config: SpikeSection, say: Callable[[str], None]):
        self._config, self._say = config, say

    def count(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Further metrics to log: ``train/skipped``, where the policy skips steps."""
        return {"train/skipped": float(to_host(metrics["skipped"]))} if self._config.policy == "skip" else {}

    def check(self, step: int, metrics: Mapping[str, Any], describe_rows: Callable[[], str]) -> None:
        """Says which rows a skipped step had; ``metrics`` are those of the train step, ``step`` is its number.

        Raises UserError naming step and rows where the run must stop: the policy is "stop" (or "none", and the step is
        not finite), or more than ``train.spike.limit`` steps in a row were skipped.
        """
        if to_host(metrics["usual"]):
            return
        found = f"{_format_step(metrics, step)}, rows {describe_rows()}"
        advice = "look at them with `postrain preview`, or lower optimizer.learning_rate"
        if self._config.policy != "skip":
            raise UserError(f"{found}: {advice}")
        limit = self._config.limit
        if to_host(metrics["in_a_row"]) > limit:
            raise UserError(f"{found}: more than train.spike.limit = {limit} steps in a row: {advice}")
        self._say(f"{found}: skipped")


def _format_step(metrics: Mapping[str, Any], step: int) -> str:
    loss, norm, loss_limit, norm_limit = (
        float(to_host(metrics[name])) for name in ("train/loss", "train/grad_norm", "loss_limit", "grad_norm_limit")
    )
    if not to_host(metrics["finite"]):
        return f"step {step}: loss {loss} and gradient norm {norm} are not both finite"
    return (
        f"step {step}: a spike, loss {loss:.4g} and gradient norm {norm:.4g}; expected at most {loss_limit:.4g} and "
        f"{norm_limit:.4g} (train.spike.threshold)"
    )
