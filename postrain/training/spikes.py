"""Steps whose loss or gradient norm explodes: left out inside the jitted step, told or undone by the loop.

A step is usual when its loss and its gradient norm are at most ``threshold`` times their medians over the last 64 steps
that were taken. The history is part of the train state, so a run that was killed judges as one that was not. Until 16
steps have been taken nothing is judged but whether loss and gradient are finite.

Going back to a checkpoint and past the bad batch is what PaLM did by hand (arXiv:2204.02311, section 5.1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from postrain.config import SpikeSection
from postrain.errors import UserError
from postrain.sharding import to_host

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

    def __init__(self, config: SpikeSection, say: Callable[[str], None], rollbacks: int = 0):
        """``rollbacks``: how often this run has gone back already."""
        self._config, self._say, self.rollbacks = config, say, rollbacks

    @property
    def rolls_back(self) -> bool:
        return self._config.policy == "rollback"

    def count(self, metrics: dict) -> dict[str, float]:
        """What metrics.jsonl tells of a policy that leaves steps out."""
        if self._config.policy == "skip":
            return {"train/skipped": float(to_host(metrics["skipped"]))}
        return {"train/rollbacks": float(self.rollbacks)} if self.rolls_back else {}

    def must_roll_back(self, metrics: dict, step: int, describe_rows: Callable[[], str]) -> bool:
        """Whether the run must go back to its newest checkpoint and on with the data after this step.

        Says which rows a skipped step had. Raises UserError naming step and rows where the run must stop: the policy
        is "stop" (or "none", and the step is not finite), or the limit of skips in a row or of rollbacks is passed.
        """
        if to_host(metrics["usual"]):
            return False
        policy, limit = self._config.policy, self._config.limit
        what = f"{_describe(metrics, step)}, rows {describe_rows()}"
        advice = "look at them with `postrain preview`, or lower optimizer.learning_rate"
        if policy in ("none", "stop"):
            raise UserError(f"{what}: {advice}")
        if policy == "skip":
            if to_host(metrics["in_a_row"]) > limit:
                raise UserError(f"{what}: more than train.spike.limit = {limit} steps in a row: {advice}")
            self._say(f"{what}: skipped")
            return False
        self.rollbacks += 1
        if self.rollbacks > limit:
            raise UserError(f"{what}: the run has gone back train.spike.limit = {limit} times already: {advice}")
        self._say(f"{what}: going back to the newest checkpoint, and on after these rows")
        return True


def _describe(metrics: dict, step: int) -> str:
    values = {name: float(to_host(value)) for name, value in metrics.items()}
    loss, norm = values["train/loss"], values["train/grad_norm"]
    if not values["finite"]:
        return f"step {step}: loss {loss} and gradient norm {norm} are not both finite"
    loss_limit, norm_limit = values["loss_limit"], values["grad_norm_limit"]
    return (
        f"step {step}: a spike, loss {loss:.4g} and gradient norm {norm:.4g} where at most {loss_limit:.4g} and "
        f"{norm_limit:.4g} are usual (train.spike.threshold)"
    )
