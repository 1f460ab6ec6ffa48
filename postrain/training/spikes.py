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


def judge_step(
    history: dict, loss: jax.Array, norm: jax.Array, has_weight: jax.Array, threshold: float
) -> tuple[jax.Array, dict, dict[str, jax.Array]]:
    """Whether a step is an update, the history after it, and the facts for ``check_step``.

    ``loss`` and ``norm`` are those of the step; ``has_weight``: whether it has a trained token. A batch without one is
    neither an update nor bad. Without threshold or history, a step only has to be finite.
    """
    # The most that loss and gradient norm may be.
    has_limits = (history["updates"] >= MIN_UPDATES) & (threshold > 0)
    limits = (threshold * jnp.nanmedian(history[name]) for name in ("loss", "grad_norm"))
    loss_limit, norm_limit = (jnp.where(has_limits, limit, jnp.inf) for limit in limits)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    usual = finite & (loss <= loss_limit) & (norm <= norm_limit)
    is_update = usual & has_weight

    place = history["updates"] % WINDOW

    def put(values, value):
        return values.at[place].set(jnp.where(is_update, value, values[place]))

    after = {
        "loss": put(history["loss"], loss),
        "grad_norm": put(history["grad_norm"], norm),
        "updates": history["updates"] + is_update,
        "skipped": history["skipped"] + ~usual,
        "in_a_row": jnp.where(is_update, 0, history["in_a_row"] + ~usual),
    }
    facts = {"finite": finite, "usual": usual, "loss_limit": loss_limit, "grad_norm_limit": norm_limit}
    return is_update, after, facts | {name: after[name] for name in ("skipped", "in_a_row")}


def check_step(
    config: SpikeSection,
    step: int,
    metrics: Mapping[str, Any],
    describe_rows: Callable[[], str],
    say: Callable[[str], None],
) -> None:
    """Stops the run at a bad step, or says which rows it had and that it was skipped. It has changed no parameter.

    ``metrics`` are those of the train step, ``step`` is its number. Raises UserError naming step and rows where the run
    must stop: the policy is "stop" (or "none", and the step is not finite), or more than ``train.spike.limit`` steps in
    a row were skipped.
    """
    if to_host(metrics["usual"]):
        return
    loss, norm, loss_limit, norm_limit = (
        float(to_host(metrics[name])) for name in ("train/loss", "train/grad_norm", "loss_limit", "grad_norm_limit")
    )
    if to_host(metrics["finite"]):
        found = (
            f"a spike, loss {loss:.4g} and gradient norm {norm:.4g}; expected at most {loss_limit:.4g} and "
            f"{norm_limit:.4g} (train.spike.threshold)"
        )
    else:
        found = f"loss {loss} and gradient norm {norm} are not both finite"
    found = f"step {step}: {found}, rows {describe_rows()}"
    advice = "look at them with `postrain preview`, or lower optimizer.learning_rate"
    if config.policy != "skip":
        raise UserError(f"{found}: {advice}")
    if to_host(metrics["in_a_row"]) > config.limit:
        raise UserError(f"{found}: more than train.spike.limit = {config.limit} steps in a row: {advice}")
    say(f"{found}: skipped")
