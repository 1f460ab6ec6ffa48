"""Rollouts of clients that know nothing of them: each turn of a session, with the exact ids.

A request with the header ``X-Session-ID`` belongs to the session of that name. What is recorded of a turn is what
training needs: ids of the prompt and of the answers as the engine had them, log-probabilities, weights, settings.
"""

import collections
import dataclasses
import threading
import time

from postrain.rollout.requests import Completion
from postrain.serve.errors import ApiError
from postrain.serve.schemas import Job
from postrain.serve.streams import find_spans

HEADER = "x-session-id"
MAX_NAME = 200
MAX_TOKENS = 4_000_000  # of all sessions together; the sessions that were used least recently go first


class Sessions:
    """Turns by the name of their session. For several threads."""

    def __init__(self, max_tokens: int = MAX_TOKENS):
        self.max_tokens, self.num_tokens = max_tokens, 0
        self._turns: collections.OrderedDict[str, list[dict]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, job: Job, completions: dict[int, Completion], versions: dict[int, str]) -> None:
        """The answers of one request, of which all have ended."""
        settings = dataclasses.asdict(job.sampling)
        del settings["banned_ids"]
        for i, prompt in enumerate(job.prompts):
            answers = [_to_dict(completions[i * job.n + k], versions) for k in range(job.n)]
            turn = {"created": time.time(), "prompt_ids": list(prompt), "answers": answers, "sampling": settings}
            with self._lock:
                self._turns.setdefault(name, []).append(turn)
                self._turns.move_to_end(name)
                self.num_tokens += _count_tokens(turn)
                while self.num_tokens > self.max_tokens and len(self._turns) > 1:
                    self._forget(next(iter(self._turns)))

    def get(self, name: str) -> list[dict]:
        with self._lock:
            if name not in self._turns:
                raise ApiError(
                    404, f"there is no session {name!r:.80}: nothing was recorded, or later ones needed room"
                )
            return list(self._turns[name])

    def delete(self, name: str) -> int:
        """How many turns it had."""
        turns = self.get(name)
        with self._lock:
            self._forget(name)
        return len(turns)

    def _forget(self, name: str) -> None:
        self.num_tokens -= sum(map(_count_tokens, self._turns.pop(name, [])))


def check_name(name: str | None) -> str | None:
    if name is not None and not 0 < len(name) <= MAX_NAME:
        raise ApiError(400, f"X-Session-ID: expected 1 to {MAX_NAME} characters, found {len(name)}", "X-Session-ID")
    return name


def _to_dict(completion: Completion, versions: dict[int, str]) -> dict:
    return {
        "token_ids": completion.tokens,
        "logprobs": completion.logprobs.tolist(),  # of what was sampled from
        "model_logprobs": completion.model_logprobs.tolist(),
        "kept_mass": completion.kept_mass.tolist(),
        "weight_versions": find_spans(completion.versions.tolist(), versions),
        "finish_reason": completion.finish,
    }


def _count_tokens(turn: dict) -> int:
    return len(turn["prompt_ids"]) + sum(len(one["token_ids"]) for one in turn["answers"])
