"""The loss of held-out rows: ``eval/loss`` and the loss's other metrics."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from postrain.data.batches.in_memory import ExampleSet, make_eval_batches
from postrain.errors import UserError
from postrain.sharding import data_process, to_host
from postrain.training.program import Program
from postrain.training.rows import Extend, place_batch
from postrain.training.session import Session
from postrain.training.step import make_eval_step
from postrain.types import TrainState

Evaluator = Callable[[TrainState, int], dict[str, float]]  # (state, step of the loop) -> metrics


def make_loss_evaluator(
    session: Session, program: Program, rows: ExampleSet, extend: Callable[[ExampleSet], Extend] | None = None
) -> Evaluator:
    """``eval/loss`` and the loss's other metrics on ``rows``, or on ``eval.loss_rows`` of them.

    ``extend``: what gives batches of the rows that it is given further arrays.

    The moving average of the weights is measured where the run keeps one. The evaluator raises UserError where the
    loss is not finite: weights that an update has ruined are not worth training on.
    """
    config, (process, processes) = session.config, data_process(session.mesh)
    measured = dataclasses.replace(rows, examples=spread(rows.examples, config.eval.loss_rows))
    batches = make_eval_batches(measured, config.data, process_index=process, process_count=processes)
    if extend is not None:
        add = extend(measured)
        batches = [batch | add(batch) for batch in batches]
    eval_step = make_eval_step(program.eval_loss_fn, session.mesh)

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        params = state.params if state.ema is None else state.ema
        placed = (place_batch(batch, session.mesh) for batch in batches)
        metrics = compute_eval_loss(eval_step, params, state.frozen, placed, program.loss_coefs)
        if math.isfinite(loss := metrics["eval/loss"]):
            return metrics
        if not step:
            raise UserError(f"eval/loss is {loss} before the first update: check the model with `postrain verify`")
        raise UserError(
            f"eval/loss is {loss} after step {step}: an update since the last evaluation has ruined the weights: lower "
            "optimizer.learning_rate or optimizer.max_grad_norm, and start in another workdir"
        )

    return evaluate


def compute_eval_loss(
    eval_step: Callable, params, frozen, batches: Iterable, loss_coefs: Mapping[str, float] | None = None
) -> dict[str, float]:
    """``{"eval/loss": ..., "eval/NAME": ...}``: sums over all batches, each divided by its own weight.

    Of several losses ``eval/loss`` is their sum with the factors of ``loss_coefs`` (1 without), and ``eval/loss/NAME``
    each without. A metric of weight 0 is a mean of nothing, and left out.
    """
    sums = None
    for batch in batches:
        new = jax.tree.map(lambda total: float(to_host(total)), eval_step(params, frozen, batch))
        sums = new if sums is None else jax.tree.map(operator.add, sums, new)
    assert sums is not None, "no batch to evaluate"
    mean = lambda term: term.total / term.weight if term.weight else 0.0
    losses = {name: mean(term) for name, term in sums.losses.items()}
    values = {"loss": sum((loss_coefs or {}).get(name, 1.0) * loss for name, loss in losses.items())}
    if len(losses) > 1:
        values |= {f"loss/{name}": loss for name, loss in losses.items()}
    values |= {name: mean(term) for name, term in sums.metrics.items() if term.weight}
    return {f"eval/{name}": value for name, value in values.items()}


def spread(examples: Sequence, count: int) -> list:
    """``count`` of ``examples`` at even distances, so of every source its share; all of them for 0."""
    if not count or count >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // count] for i in range(count)]
