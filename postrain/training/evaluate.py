"""The loss of held-out rows."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from postrain.data.batches.in_memory import ExampleSet, make_eval_batches
from postrain.errors import UserError
from postrain.sharding import data_process
from postrain.training.program import Program
from postrain.training.rows import place_batch
from postrain.training.session import Session
from postrain.training.step import make_eval_step
from postrain.types import TrainState

Evaluator = Callable[[TrainState, int], dict[str, float]]  # (state, step of the loop) -> metrics


def make_loss_evaluator(session: Session, program: Program, rows: ExampleSet) -> Evaluator:
    """``eval/loss`` and the loss's other metrics on ``rows``, or on ``eval.loss_rows`` of them.

    The moving average of the weights is measured where the run keeps one. The evaluator raises UserError where the
    loss is not finite: weights that an update has ruined are not worth training on.
    """
    config, (process, processes) = session.config, data_process(session.mesh)
    measured = dataclasses.replace(rows, examples=spread(rows.examples, config.eval.loss_rows))
    batches = make_eval_batches(measured, config.data, process_index=process, process_count=processes)
    eval_step = make_eval_step(program.eval_loss_fn, session.mesh)

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        params = state.params if state.ema is None else state.ema
        metrics = compute_eval_loss(
            eval_step, params, state.frozen, (place_batch(batch, session.mesh) for batch in batches)
        )
        if math.isfinite(loss := metrics["eval/loss"]):
            return metrics
        if not step:
            raise UserError(f"eval/loss is {loss} before the first update: check the model with `postrain verify`")
        raise UserError(
            f"eval/loss is {loss} after step {step}: an update since the last evaluation has ruined the weights: lower "
            "optimizer.learning_rate or optimizer.max_grad_norm, and start in another workdir"
        )

    return evaluate


def compute_eval_loss(eval_step: Callable, params, frozen, batches: Iterable) -> dict[str, float]:
    """``{"eval/loss": mean per trained token, ...}``: sums over all batches, divided once by their weight."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in eval_step(params, frozen, batch).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    weight = totals.pop("weight")
    return {f"eval/{name}": total / weight for name, total in totals.items()}


def spread(examples: Sequence, count: int) -> list:
    """``count`` of ``examples`` at even distances, so of every source its share; all of them for 0."""
    if not count or count >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // count] for i in range(count)]
