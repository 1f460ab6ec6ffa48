"""Steps whose loss or gradient norm explodes: skipped inside the jitted step, reported by the loop.

A step is usual when its loss and its gradient norm are at most ``threshold`` times their medians over the last 64
updates. The history is part of the train state, so a resumed run judges as an uninterrupted one. Until there have been
16 updates the only check is whether loss and gradient are finite.

A step that is skipped goes past the bad batch, as PaLM's authors did by hand (Chowdhery et al. 2022, arXiv:2204.02311,
section 5.1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from postrain.config import SpikeSection
from postrain.errors import UserError

WINDOW, NEEDED = 64, 16


def new_history() -> dict[str, jax.Array]:
    """The part of a TrainState that says what is usual; NaN where no step has been taken yet."""
    empty = jnp.full(WINDOW, jnp.nan, jnp.float32)
    none = jnp.zeros((), jnp.int32)
    return {"loss": empty, "grad_norm": jnp.copy(empty), "taken": none, "skipped": none + 0, "in_a_row": none + 0}


def compute_limits(history: dict, threshold: float) -> tuple[jax.Array, jax.Array]:
    """What loss and gradient norm of a step may be, float32 scalars; infinite without a threshold or enough history."""
    judged = (history["taken"] >= NEEDED) & (threshold > 0)
    limits = (threshold * jnp.nanmedian(history[name]) for name in ("loss", "grad_norm"))
    loss, norm = (jnp.where(judged, limit, jnp.inf) for limit in limits)
    return loss, norm


def update_history(history: dict, loss: jax.Array, norm: jax.Array, taken: jax.Array, bad: jax.Array) -> dict:
    """``history`` with a step that was ``taken``, or was left out because it was ``bad``; else unchanged."""
    place = history["taken"] % WINDOW

    def put(values, value):
        return values.at[place].set(jnp.where(taken, value, values[place]))

    return {
        "loss": put(history["loss"], loss),
        "grad_norm": put(history["grad_norm"], norm),
        "taken": history["taken"] + taken,
        "skipped": history["skipped"] + bad,
        "in_a_row": jnp.where(taken, 0, history["in_a_row"] + bad),
    }


class SpikeGuard:
    """What the loop does about a bad step; the step itself has changed no parameter."""

    def __init__(self, config: SpikeSection, say: Callable[[str], None]):
        self._config, self._say = config, say

    def count(self, metrics: dict) -> dict[str, float]:
        """What metrics.jsonl gets besides: ``train/skipped``, where the policy skips steps."""
        return {"train/skipped": float(metrics["skipped"])} if self._config.policy == "skip" else {}

    def check(self, step: int, metrics: dict, describe_rows: Callable[[], str]) -> None:
        """Says which rows a skipped step had; ``metrics`` are those of the train step, ``step`` is its number.

        Raises UserError naming step and rows where the run must stop: the policy is "stop" (or "none", and the step is
        not finite), or more than ``train.spike.limit`` steps in a row were skipped.
        """
        if bool(metrics["usual"]):
            return
        found = f"{_format_step(metrics, step)}, rows {describe_rows()}"
        advice = "look at them with `postrain preview`, or lower optimizer.learning_rate"
        if self._config.policy != "skip":
            raise UserError(f"{found}: {advice}")
        limit = self._config.limit
        if int(metrics["in_a_row"]) > limit:
            raise UserError(f"{found}: more than train.spike.limit = {limit} steps in a row: {advice}")
        self._say(f"{found}: skipped")


def _format_step(metrics: dict, step: int) -> str:
    loss, norm = float(metrics["train/loss"]), float(metrics["train/grad_norm"])
    if not bool(metrics["finite"]):
        return f"step {step}: loss {loss} and gradient norm {norm} are not both finite"
    loss_limit, norm_limit = float(metrics["loss_limit"]), float(metrics["grad_norm_limit"])
    return (
        f"step {step}: a spike, loss {loss:.4g} and gradient norm {norm:.4g} where at most {loss_limit:.4g} and "
        f"{norm_limit:.4g} are usual (train.spike.threshold)"
    )
