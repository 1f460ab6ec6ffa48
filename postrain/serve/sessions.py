"""Rollouts of clients that know nothing of them: each turn of a session, with the exact ids.

A request with the header ``X-Session-ID`` belongs to the session of that name. What is recorded of a turn is what
training needs: ids of the prompt and of the answers as the engine had them, log-probabilities, weights, settings.
"""

import collections
import dataclasses
import json
import threading
import time

from postrain.rollout.requests import Completion
from postrain.serve.errors import ApiError
from postrain.serve.schemas import Job
from postrain.serve.streams import find_spans

HEADER = "x-session-id"
MAX_NAME = 200
MAX_SIZE = 4_000_000  # of all sessions together; those that were used least recently go first
CHARACTERS = 4  # of settings that count as much as a token


class Sessions:
    """Turns by the name of their session. For several threads."""

    def __init__(self, max_size: int = MAX_SIZE):
        self.max_size, self.size = max_size, 0
        self._sessions: collections.OrderedDict[str, _Session] = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, job: Job, completions: dict[int, Completion], versions: dict[int, str]) -> None:
        """The answers of one request, of which all have ended."""
        settings = dataclasses.asdict(job.sampling)
        del settings["banned_ids"]
        settings["constraint"] = job.wanted and job.wanted.spec
        settings_size = len(json.dumps(settings)) // CHARACTERS
        for i, prompt in enumerate(job.prompts):
            answers = [_to_dict(completions[i * job.n + k], versions) for k in range(job.n)]
            turn = {"created": time.time(), "prompt_ids": list(prompt), "answers": answers, "sampling": settings}
            size = settings_size + len(prompt) + sum(len(one["token_ids"]) for one in answers)
            with self._lock:
                session = self._sessions.setdefault(name, _Session())
                self._sessions.move_to_end(name)
                session.turns.append(turn)
                session.sizes.append(size)
                self.size += size
                self._make_room()

    def get(self, name: str) -> dict:
        """``turns``, and ``forgotten_turns``: how many there were before these."""
        with self._lock:
            if name not in self._sessions:
                raise ApiError(
                    404, f"there is no session {name!r:.80}: nothing was recorded, or later ones needed room"
                )
            session = self._sessions[name]
            return {"turns": list(session.turns), "forgotten_turns": session.num_forgotten}

    def delete(self, name: str) -> int:
        """How many turns it had."""
        turns = self.get(name)["turns"]
        with self._lock:
            self._forget(name)
        return len(turns)

    def _make_room(self) -> None:
        """Forgets whole sessions first: a rollout without its beginning is of no use."""
        while self.size > self.max_size:
            name, session = next(iter(self._sessions.items()))
            if len(self._sessions) > 1:
                self._forget(name)
            else:
                session.turns.popleft()
                self.size -= session.sizes.popleft()
                session.num_forgotten += 1

    def _forget(self, name: str) -> None:
        if name in self._sessions:
            self.size -= sum(self._sessions.pop(name).sizes)


@dataclasses.dataclass
class _Session:
    turns: collections.deque[dict] = dataclasses.field(default_factory=collections.deque)
    sizes: collections.deque[int] = dataclasses.field(default_factory=collections.deque)
    num_forgotten: int = 0


def check_name(name: str | None) -> str | None:
    if name is not None and not (0 < len(name) <= MAX_NAME and name.isascii() and name.isprintable()):
        message = f"X-Session-ID: expected 1 to {MAX_NAME} printable characters of ASCII, found {name!r:.80}"
        raise ApiError(400, message, "X-Session-ID")
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
