"""Greedy answers to held-out rows, scored against the expected answers.

A question is cut from the same sequence as the loss: the tokens before a row's last trained span are the prompt that
serving feeds the model, and the span is the expected answer.
"""

import collections
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from postrain.data.batches.in_memory import ExampleSet
from postrain.data.rendering.render import Rendered, split_prompt
from postrain.data.rendering.tokenizer import Tokenizer
from postrain.files import read_jsonl, write_whole
from postrain.models.config import ModelConfig
from postrain.models.params import merge_params
from postrain.rollout.chat import for_tokenizer, to_answer
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams
from postrain.training.evaluate import Evaluator
from postrain.training.session import Session
from postrain.types import TrainState


class Question(NamedTuple):
    """A held-out row as a task: continue ``prompt`` with ``answer``."""

    prompt: list[int]
    answer: str  # without the stop token
    row: str  # file:line
    turn: int = 1  # of the row's documents, where a conversation was split into several


class Sample(NamedTuple):
    """An answer of the model, beside the expected one."""

    row: str
    prompt: str
    expected: str
    found: str
    finished: bool
    scores: dict[str, float]
    turn: int = 1  # as in Question


def make_questions(examples: Sequence[Rendered], tokenizer: Tokenizer, limit: int) -> list[Question]:
    """The first ``limit`` documents that have a prompt and their whole answer.

    Plain text, trained from its second token on, has no prompt; of a truncated document the answer is cut, and a
    model that rightly continues it would be marked wrong.
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
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    metrics: Sequence[str],
    max_new_tokens: int,
) -> list[Sample]:
    """Greedy answers and their scores."""
    sampling = for_tokenizer(SamplingParams(max_new_tokens=max_new_tokens), tokenizer, engine.config)
    completions = engine.generate([question.prompt for question in questions], sampling)
    samples = []
    for question, completion in zip(questions, completions, strict=True):
        found, finished = to_answer(completion, tokenizer, sampling)
        # An answer that never stops is wrong, however well it begins.
        scores = {name: SCORES[name](found, question.answer) * finished for name in metrics}
        prompt = tokenizer.decode(question.prompt)
        samples.append(Sample(question.row, prompt, question.answer, found, finished, scores, question.turn))
    return samples


def mean_scores(samples: Sequence[Sample]) -> dict[str, float]:
    """``{"eval/exact_match": share, ...}`` over the samples."""
    names = samples[0].scores if samples else ()
    return {f"eval/{name}": sum(sample.scores[name] for sample in samples) / len(samples) for name in names}


def make_answer_evaluator(session: Session, model_config: ModelConfig, rows: ExampleSet) -> Evaluator:
    """Greedy answers to the first ``eval.generate_rows`` of ``rows``, scored by ``eval.metrics``.

    The questions are the same at every evaluation. Writes samples.jsonl; measures the moving average of the weights
    where the run keeps one. Without questions it measures nothing.
    """
    config, tokenizer = session.config.eval, session.tokenizer
    questions = make_questions(rows.examples, tokenizer, config.generate_rows)
    truncated = sum(example.truncated for example in rows.examples)
    if truncated and config.generate_rows:
        session.say(f"evaluation: {truncated:,} truncated documents are in eval/loss, but not generated and scored")

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        if not questions:
            return {}
        # An engine a time: between evaluations its copy of the weights would take memory from training.
        params = merge_params(state.params if state.ema is None else state.ema, state.frozen)
        engine = Engine(params, model_config, slots=config.batch_size, version=step)
        options = {"metrics": config.metrics, "max_new_tokens": config.max_new_tokens}
        samples = answer_questions(engine, tokenizer, questions, **options)
        if session.is_lead:
            append_samples(session.workdir / "samples.jsonl", step, samples)
        return mean_scores(samples)

    return evaluate


def append_samples(path: pathlib.Path, step: int, samples: Sequence[Sample]) -> None:
    """Adds the answers of ``step`` to a JSONL file, in place of its lines of that step and later ones.

    A run that resumes from an earlier checkpoint evaluates the same steps again.
    """
    earlier = [line for _, line in read_jsonl(path)] if path.exists() else []
    lines = [line for line in earlier if line["step"] < step]
    lines += [{"step": step, **sample._asdict()} for sample in samples]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


# --- scores: (found, expected) -> 0.0 or 1.0 ---


def exact_match(found: str, expected: str) -> float:
    """The same text, but for white space around it."""
    return float(found.strip() == expected.strip())


def valid_json(found: str, expected: str) -> float:
    """One JSON value and nothing else, of any content."""
    del expected
    try:
        json.loads(found, parse_constant=_refuse)  # NaN and Infinity are Python's, not JSON's
    except (ValueError, RecursionError):  # the second: thousands of brackets, one in the other
        return 0.0
    return 1.0


def _refuse(constant: str):
    raise ValueError(constant)


SCORES: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "valid_json": valid_json}
