"""`postrain evaluate-policy`: what a model would have earned, from answers of another policy that were logged.

A line of the file is a decision: a question, the answer that was given, its reward, and the probability with which the
policy that chose it did so.

    {"prompt": [...], "completion": "...", "reward": 1.0, "propensity": 0.25}
    {"messages": [..., {"role": "assistant", ...}], "reward": 1.0, "propensity": 0.25}

``candidates``, the answers that could have been given, make the model choose among them: the probability of an answer
is then its share in the sum over candidates of p(answer | question), the answer's stop token included. Without them it
is p(answer | question) itself, the share of one text among all texts, which is small of any text that is not short.
``estimated_rewards``, one for each candidate, allow the direct method and the doubly robust estimate.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from postrain.config import DataConfig, MeshConfig
from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches.in_memory import ExampleSet, iter_documents, iter_eval_batches
from postrain.data.batches.row_filter import DataReport
from postrain.data.documents import Rendered, check_token_ids
from postrain.data.messages import Conversation, Example, check_keys, parse_messages, parse_prompt_completion
from postrain.data.rendering.render import render_many
from postrain.data.rendering.tokenizer import Tokenizer, load_tokenizer
from postrain.data.reward_weights import read_name, read_number, read_propensity
from postrain.data.row_keys import INPUT_KEYS, MEDIA_KEYS, PROMPT_KEYS, Keys, is_empty
from postrain.errors import UserError
from postrain.files import read_jsonl
from postrain.hf.find_model import find_model
from postrain.hf.peft.adapter import load_model
from postrain.rollout.off_policy import Decisions, Evaluation, evaluate
from postrain.sharding import batch_sharding, make_mesh, mesh_context, num_row_shards, replicated, to_host
from postrain.training.model import Forward, choose_compute_dtype
from postrain.training.rows import place_batch

_KEYS = Keys(
    (
        "prompt", "completion", "messages", "tools", "candidates", "estimated_rewards", "reward", "propensity",
        "member",
    ),
    PROMPT_KEYS | MEDIA_KEYS | INPUT_KEYS,
)  # fmt: skip
_LEAST_ROW = 1024  # slots of a packed row, where no answer needs more
_CHUNK = 1024  # tokens projected onto the vocabulary at a time


class LoggedRow(NamedTuple):
    """A line: the examples to compute log p of, all candidates or the logged answer alone, and what was logged."""

    answers: tuple[Example, ...]
    logged: int  # which of them was given
    reward: float
    propensity: float
    estimates: tuple[float, ...]  # of the answers; () without
    member: str
    ref: RowRef


@dataclasses.dataclass(frozen=True)
class PolicyReport:
    """What the command prints."""

    model: str
    file: str
    over: str  # what the model's probabilities are normalised over: "candidates" or "all texts"
    by: str  # what the bootstrap draws: "row" or "member"
    evaluation: Evaluation
    unread: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = self.evaluation
        number = lambda value: float(value) if np.isfinite(value) else None  # JSON has no NaN
        estimates = {
            name: {key: number(value) for key, value in dataclasses.asdict(estimate).items()}
            for name, estimate in found.estimates.items()
        }
        return {
            "model": self.model,
            "file": self.file,
            "rows": found.rows,
            "members": found.members,
            "normalised_over": self.over,
            "bootstrap_by": self.by,
            "effective_sample_size": found.effective_size,
            "mean_weight": number(found.mean_weight),
            "estimates": estimates,
            "warnings": list(found.warnings),
            "keys_not_read": list(self.unread),
        }

    def __str__(self) -> str:
        found = self.evaluation
        units = f", {found.members:,} members" if self.by == "member" else ""
        lines = [
            f"{self.model} on {found.rows:,} logged row{'s' * (found.rows != 1)}{units} of {self.file}",
            f"its probability of an answer is that among {self.over}; effective sample size "
            f"{found.effective_size:,.1f}, mean weight {found.mean_weight:.4g}",
            f"{'estimate':<12}  {'value':>11}  95% interval, by {self.by}",
        ]
        lines += [
            f"{name:<12}  {one.value:>11.5g}  " + ("-" if math.isnan(one.low) else f"{one.low:.5g} to {one.high:.5g}")
            for name, one in found.estimates.items()
        ]
        lines += [f"warning: {doubt}" for doubt in found.warnings]
        lines += [f"keys that were not read: {', '.join(self.unread)}"] if self.unread else []
        return "\n".join(lines)


def evaluate_policy(
    model: str | os.PathLike,
    file: str | os.PathLike,
    *,
    by: str = "row",
    clip: float = 10.0,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 8,
) -> PolicyReport:
    """Estimates of what the model of a folder would have earned on the decisions of a JSONL file.

    Args:
      by: what the bootstrap draws again, "row" or "member".
      clip: of clipped_ips, the largest weight.
      resamples: draws of the bootstrap.
      batch_size: packed rows that the model reads together, rounded up to what divides among the devices.

    Raises:
      UserError: naming the line that is not such a row; a model that cannot be read.
    """
    unread: set[str] = set()
    rows = read_logged_rows(file, needs_member=by == "member", unread=unread)
    found = find_model(model)
    tokenizer = load_tokenizer(found.tokenizer)
    documents = render_answers(rows, tokenizer)
    dtype, mesh = choose_compute_dtype("auto"), make_mesh(MeshConfig())
    config, params = load_model(found, mesh=mesh, dtype=dtype)
    check_token_ids(documents, config.vocab_size)
    forward = Forward(dataclasses.replace(config, compute_dtype=dtype), chunk=_CHUNK)
    logprobs = compute_answer_logprobs(forward, params, documents, mesh, batch_size)
    if not np.isfinite(logprobs).all():
        bad = documents[int(np.flatnonzero(~np.isfinite(logprobs))[0])]
        raise UserError(f"{bad.ref}: log p of an answer is not finite: check the model with `postrain verify`")
    evaluation = evaluate(make_decisions(rows, logprobs, by=by), clip=clip, resamples=resamples, seed=seed)
    over = "candidates" if len(rows[0].answers) > 1 else "all texts"
    return PolicyReport(str(model), str(file), over, by, evaluation, tuple(sorted(unread)))


# --- the rows ---


def read_logged_rows(file: str | os.PathLike, *, needs_member: bool, unread: set[str]) -> list[LoggedRow]:
    """The lines of a file. ``unread`` takes the names of keys that are not read. Raises UserError naming a line."""
    path = pathlib.Path(file)
    rows = []
    for number, raw in read_jsonl(path):
        row = _read_row(raw, RowRef(path.stem, str(path), number), needs_member, unread)
        first = rows[0] if rows else row
        for what, has in (
            ("candidates", lambda one: len(one.answers) > 1),
            ("estimated_rewards", lambda one: bool(one.estimates)),
        ):
            if has(row) != has(first):
                raise BadRow(
                    row.ref, f"{what!r} must be in all rows or in none, and {first.ref} is otherwise: make two files"
                )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows: write one JSON object on each line")
    return rows


def _read_row(raw: dict, ref: RowRef, needs_member: bool, unread: set[str]) -> LoggedRow:
    check_keys(raw, _KEYS, ref, unread)
    prompt, completion = raw.get("prompt"), raw.get("completion")
    if not is_empty(raw.get("messages")):
        if not is_empty(prompt) or not is_empty(completion):
            raise BadRow(ref, "has 'messages' beside 'prompt' or 'completion': leave one of them")
        messages = parse_messages(raw["messages"], ref, unread, weighted=True)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise BadRow(ref, "'messages' must end with the assistant's answer to a question: that is what was logged")
        prompt, completion = messages[:-1], messages[-1:]
    elif is_empty(prompt) or is_empty(completion):
        raise BadRow(
            ref, "expected the keys 'prompt' and 'completion', or 'messages', beside 'reward' and 'propensity'"
        )
    given, estimates = raw.get("candidates"), raw.get("estimated_rewards")
    choices = [completion] if is_empty(given) else _check_list(given, "candidates", ref)
    rows = [{"prompt": prompt, "completion": choice, "tools": raw.get("tools")} for choice in choices]
    answers = tuple(parse_prompt_completion(row, ref, unread, weighted=True) for row in rows)
    logged = _identify(parse_prompt_completion({**rows[0], "completion": completion}, ref, unread, weighted=True))
    identities = [_identify(answer) for answer in answers]
    if len(set(identities)) < len(answers) or logged not in identities:
        raise BadRow(
            ref,
            "expected 'candidates' that are all different, one of them the logged answer; found it "
            f"{identities.count(logged)} times among {len(answers)}, {len(set(identities))} of them different",
        )
    where, numbers = "`postrain evaluate-policy`", ()
    if not is_empty(estimates):
        if is_empty(given) or len(_check_list(estimates, "estimated_rewards", ref)) != len(choices):
            raise BadRow(ref, f"'estimated_rewards' must be one number for each of 'candidates', {len(choices)}")
        named = {f"estimated_rewards[{i}]": value for i, value in enumerate(estimates)}
        numbers = tuple(read_number(named, key, where, ref) for key in named)
    return LoggedRow(
        answers,
        identities.index(logged),
        read_number(raw, "reward", where, ref),
        read_propensity(raw, where, ref),
        numbers,
        read_name(raw, "member", "--by member", ref) if needs_member else "",
        ref,
    )


def _identify(answer: Example) -> str:
    """What tells answers to a question apart, which whether and how much they are trained does not."""
    if not isinstance(answer, Conversation):
        return repr(answer)
    said = [{key: value for key, value in m.items() if key not in ("train", "weight")} for m in answer.messages]
    return repr(said)


def _check_list(value: Any, key: str, ref: RowRef) -> list:
    if not isinstance(value, list) or len(value) < 2:
        raise BadRow(ref, f"{key!r} must be a list of two or more; found {value!r:.40}")
    return value


def render_answers(rows: Sequence[LoggedRow], tokenizer: Tokenizer) -> list[Rendered]:
    """Of every row its answers, one document each. Raises BadRow."""
    examples = [answer for row in rows for answer in row.answers]
    documents = []
    for result in render_many(examples, tokenizer):
        if isinstance(result, BadRow):
            raise result
        if len(result) != 1:
            raise BadRow(result[0].ref, "an answer of several turns is not one decision: log each turn as a row")
        documents += result
    return documents


# --- what the model says of them ---


def compute_answer_logprobs(
    forward: Forward, params: Any, documents: Sequence[Rendered], mesh: Mesh, batch_size: int
) -> np.ndarray:
    """float64 [N]: of each document the sum of log p over its trained tokens."""
    longest = max(document.slots for document in documents)
    parts = num_row_shards(mesh)
    data = DataConfig(
        sequence_length=max(_LEAST_ROW, -(-longest // 128) * 128), batch_size=-(-batch_size // parts) * parts
    )

    def run(params, batch):
        with mesh_context(mesh):
            return forward.logprobs(params, batch)[0].logprobs

    compute = jax.jit(run, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
    rows = ExampleSet(list(documents), DataReport([], data.sequence_length), {})
    sums = np.zeros(len(documents))
    for arrays in iter_eval_batches(rows, data):
        found = to_host(compute(params, place_batch(arrays, mesh))).astype(np.float64)
        for i, place in iter_documents(arrays["row_ids"], rows.lengths):
            sums[i] = found[place].sum()
    return sums


def make_decisions(rows: Sequence[LoggedRow], logprobs: np.ndarray, *, by: str) -> Decisions:
    """Arrays for ``evaluate`` from log p of all answers, [sum of answers]."""
    target, values, chosen, start = [], [], [], 0
    for row in rows:
        own = logprobs[start : start + len(row.answers)]
        start += len(own)
        if len(own) > 1:
            own = own - own.max()
            own = own - np.log(np.exp(own).sum())
        target.append(own[row.logged])
        if row.estimates:
            values.append(float(np.exp(own) @ row.estimates))
            chosen.append(row.estimates[row.logged])
    return Decisions(
        rewards=np.array([row.reward for row in rows]),
        propensities=np.array([row.propensity for row in rows]),
        target_logprobs=np.array(target),
        estimates=np.array(chosen) if chosen else None,
        values=np.array(values) if values else None,
        members=[row.member for row in rows] if by == "member" else (),
        candidates=np.array([len(row.answers) for row in rows]) if len(rows[0].answers) > 1 else None,
    )
