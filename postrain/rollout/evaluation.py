"""Evaluation on held-out rows: the loss of all of them, and greedy answers to some, scored.

The questions are cut out of the very sequences that the loss is measured on: what stands before a row's last
trained span is what serving feeds the model, the span is the expected answer.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from postrain.data.rendering import Rendered
from postrain.data.tokenizer import Tokenizer
from postrain.models.config import ModelConfig
from postrain.rollout import sampler
from postrain.rollout.chat import to_answer
from postrain.rollout.sampler import SamplingParams
from postrain.rollout.scoring import SCORES


class Question(NamedTuple):
    """A held-out row as a task: continue ``prompt`` with ``answer``."""

    prompt: list[int]
    answer: str  # without the stop token
    row: str  # file:line


class Sample(NamedTuple):
    """What the model answered."""

    row: str
    prompt: str
    expected: str
    found: str
    finished: bool
    scores: dict[str, float]


def make_questions(examples: Sequence[Rendered], tokenizer: Tokenizer, limit: int) -> list[Question]:
    """The first ``limit`` rows that have a prompt: plain text, trained from its second token on, has none."""
    questions = []
    for example in examples:
        if len(questions) == limit:
            break
        trained = np.flatnonzero(example.loss_mask)
        untrained = np.flatnonzero(~example.loss_mask[: trained[-1]])
        start = int(untrained[-1]) + 1
        if start < 2:
            continue
        answer = [int(i) for i in example.tokens[start : trained[-1] + 1]]
        if answer[-1] in tokenizer.stop_ids:
            answer = answer[:-1]
        questions.append(Question([int(i) for i in example.tokens[:start]], tokenizer.decode(answer), str(example.ref)))
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
        samples.append(Sample(question.row, prompt, question.answer, found, finished, scores))
    return samples


def mean_scores(samples: Sequence[Sample]) -> dict[str, float]:
    """``{"eval/exact_match": share, ...}`` over the samples."""
    names = samples[0].scores if samples else ()
    return {f"eval/{name}": sum(sample.scores[name] for sample in samples) / len(samples) for name in names}


def compute_eval_loss(eval_step: Callable, params, frozen, batches: Iterable) -> dict[str, float]:
    """``{"eval/loss": mean per trained token, ...}``: sums over all batches, divided once by their weight."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in eval_step(params, frozen, batch).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    weight = totals.pop("weight")
    return {f"eval/{name}": total / weight for name, total in totals.items()}
