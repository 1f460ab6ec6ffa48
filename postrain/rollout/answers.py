"""Evaluation on held-out rows: the loss of all or some of them, and greedy answers to some, scored.

The questions are cut out of the very sequences that the loss is measured on: what stands before a row's last
trained span is what serving feeds the model, the span is the expected answer.
"""

import collections
import dataclasses
import json
import math
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from postrain.config import Config
from postrain.data.batches.in_memory import make_eval_batches
from postrain.data.rendering.render import Rendered, split_prompt
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.errors import UserError
from postrain.files import read_jsonl, write_whole
from postrain.models.config import ModelConfig
from postrain.models.params import merge_params
from postrain.rollout import sampler
from postrain.rollout.chat import to_answer
from postrain.rollout.sampler import SamplingParams
from postrain.rollout.scoring import SCORES
from postrain.sharding import data_process, make_global_batch
from postrain.training.step import make_eval_step
from postrain.types import Batch, TrainState


class Question(NamedTuple):
    """A held-out row as a task: continue ``prompt`` with ``answer``."""

    prompt: list[int]
    answer: str  # without the stop token
    row: str  # file:line
    turn: int = 1  # of the row's documents, where a conversation was split into several


class Sample(NamedTuple):
    """What the model answered."""

    row: str
    prompt: str
    expected: str
    found: str
    finished: bool
    scores: dict[str, float]
    turn: int = 1  # as in Question


def make_questions(examples: Sequence[Rendered], tokenizer: Tokenizer, limit: int) -> list[Question]:
    """The first ``limit`` documents that have a prompt and their whole answer.

    Plain text, trained from its second token on, has no prompt; of a truncated document the answer is cut, and what
    the model rightly goes on to say would count as wrong.
    """
    questions, turns = [], collections.Counter()
    for example in examples:
        if len(questions) == limit:
            break
        row = str(example.ref)
        turns[row] += 1
        prompt, answer = (part.tolist() for part in split_prompt(example))
        if len(prompt) < 2 or example.truncated:
            continue
        if answer[-1] in tokenizer.stop_ids:
            answer = answer[:-1]
        questions.append(Question(prompt, tokenizer.decode(answer), row, turns[row]))
    return questions


def answer_questions(
    params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    metrics: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[Sample]:
    """Greedy answers and their scores. ``params`` is the whole tree, adapters merged or beside their kernels."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=tuple(tokenizer.stop_ids))
    prompts = [question.prompt for question in questions]
    completions = sampler.generate(params, config, prompts, sampling, batch_size=batch_size)
    samples = []
    for question, completion in zip(questions, completions, strict=True):
        found, finished = to_answer(completion, tokenizer)
        # An answer that never stops is wrong however well it begins.
        scores = {name: SCORES[name](found, question.answer) * finished for name in metrics}
        prompt = tokenizer.decode(question.prompt)
        samples.append(Sample(question.row, prompt, question.answer, found, finished, scores, question.turn))
    return samples


def mean_scores(samples: Sequence[Sample]) -> dict[str, float]:
    """``{"eval/exact_match": share, ...}`` over the samples."""
    names = samples[0].scores if samples else ()
    return {f"eval/{name}": sum(sample.scores[name] for sample in samples) / len(samples) for name in names}


def compute_eval_loss(
    eval_step: Callable, params, frozen, batches: Iterable, loss_coefs: Mapping[str, float] | None = None
) -> dict[str, float]:
    """``{"eval/loss": ..., "eval/NAME": ...}`` of every metric: sums over all batches, each divided by its own weight.

    Of several losses ``eval/loss`` is their sum with the factors of ``loss_coefs`` (1 without), and ``eval/loss/NAME``
    each without.
    """
    sums = None
    for batch in batches:
        new = jax.tree.map(float, jax.device_get(eval_step(params, frozen, batch)))
        sums = new if sums is None else jax.tree.map(operator.add, sums, new)
    mean = lambda term: term.total / term.weight if term.weight else 0.0
    losses = {name: mean(term) for name, term in sums.losses.items()}
    values = {"loss": sum((loss_coefs or {}).get(name, 1.0) * loss for name, loss in losses.items())}
    if len(losses) > 1:
        values |= {f"loss/{name}": loss for name, loss in losses.items()}
    values |= {name: mean(term) for name, term in sums.metrics.items()}
    return {f"eval/{name}": value for name, value in values.items()}


def spread(examples: Sequence, count: int) -> list:
    """``count`` of ``examples`` at even distances, so of every source its share; all of them for 0."""
    if not count or count >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // count] for i in range(count)]


class Evaluator:
    """Evaluation of one run on ``data.eval``: called with a state, it returns metrics and writes samples.jsonl.

    The questions are the first rows of the sources, the same ones at every evaluation.
    """

    def __init__(self, config: Config, model_config: ModelConfig, tokenizer, eval_set, loss_fn, mesh, samples_path):
        self.config, self.model_config, self.tokenizer = config.eval, model_config, tokenizer
        self.mesh, self.samples_path = mesh, samples_path
        self.eval_step = make_eval_step(loss_fn, mesh)
        index, count = data_process(mesh)
        measured = dataclasses.replace(eval_set, examples=spread(eval_set.examples, config.eval.loss_rows))
        batches = make_eval_batches(measured, config.data, process_index=index, process_count=count)
        self.batches = [{k: v for k, v in batch.items() if k != "row_ids"} for batch in batches]
        self.questions = make_questions(eval_set.examples, tokenizer, config.eval.generate_rows)
        truncated = sum(example.truncated for example in eval_set.examples)
        if truncated and config.eval.generate_rows and jax.process_index() == 0:
            print(f"evaluation: {truncated:,} truncated documents are in eval/loss, but not generated and scored")

    def __call__(self, state: TrainState) -> dict[str, float]:
        """``eval/loss``, ``eval/accuracy`` and the scores of the greedy answers; the moving average is used if kept.

        Raises UserError where the loss is not finite: weights that an update has ruined are not worth going on with.
        """
        params = state.params if state.ema is None else state.ema
        batches = (Batch(**make_global_batch(batch, self.mesh)) for batch in self.batches)
        metrics = compute_eval_loss(self.eval_step, params, state.frozen, batches)
        if not math.isfinite(metrics["eval/loss"]):
            raise UserError(_describe_ruin(metrics["eval/loss"], int(state.step)))
        if self.questions:
            samples = answer_questions(
                merge_params(params, state.frozen),
                self.model_config,
                self.tokenizer,
                self.questions,
                metrics=self.config.metrics,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            )
            metrics |= mean_scores(samples)
            if jax.process_index() == 0:
                append_samples(self.samples_path, int(state.step), samples)
        return metrics


def _describe_ruin(loss: float, step: int) -> str:
    if not step:
        return f"eval/loss is {loss} before the first update: check the model with `postrain verify`"
    return (
        f"eval/loss is {loss} after step {step}: an update since the last evaluation has ruined the weights: lower "
        "optimizer.learning_rate or optimizer.max_grad_norm, and start in another workdir"
    )


def append_samples(path: pathlib.Path, step: int, samples: Sequence[Sample]) -> None:
    """Adds the answers of ``step`` to a JSONL file, in place of what it holds of that step or later ones.

    A run that goes on from an earlier checkpoint comes past the same steps again.
    """
    known = [line for _, line in read_jsonl(path)] if path.exists() else []
    lines = [line for line in known if line["step"] < step]
    lines += [{"step": step, **sample._asdict()} for sample in samples]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
