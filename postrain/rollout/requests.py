"""What is asked of the engine, and what it gives: numpy, no model and no device."""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping

import numpy as np

from postrain.errors import UserError
from postrain.rollout.constraints import Constraint

MAX_NEW_TOKENS = 2**24  # beyond any model's context: a typing error
MAX_TOP_LOGPROBS = 20
MAX_STOP_IDS = 32  # every row has room for so many, so that none of them compiles anything


class WrongSetting(UserError):
    """A value out of range. ``name``: its field of SamplingParams; ``rule``: what is expected."""

    def __init__(self, name: str, rule: str, value):
        super().__init__(f"sampling.{name} must be {rule}, found {value!r}")
        self.name, self.rule, self.value = name, rule, value


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. ``temperature`` 0 is greedy. Raises WrongSetting for values out of range.

    First the logits are edited: ``logit_bias`` is added, then come the penalties. ``banned_ids`` and constraints leave
    ids out. Of what remains top_k, top_p and min_p, each where it is set, keep the most probable.
    """

    temperature: float = 0.0
    top_p: float = 1.0  # the fewest most probable ids that reach this probability; 1: all
    top_k: int = 0  # at most this many most probable ids; 0: all
    min_p: float = 0.0  # only ids of at least this share of the most probable one's probability; 0: all
    repetition_penalty: float = 1.0  # logits of ids of prompt and answer are divided by it, negative ones multiplied
    presence_penalty: float = 0.0  # taken from the logits of ids that the answer has
    frequency_penalty: float = 0.0  # times the number of times that the answer has an id, taken from its logit
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit); a mapping is taken too
    max_new_tokens: int = 128
    min_new_tokens: int = 0  # no stop id before this many tokens, unless a constraint leaves nothing else
    stop_ids: tuple[int, ...] = ()  # a row ends after the first of these, which is part of its tokens
    stop: tuple[str, ...] = ()  # texts that end an answer, which ends before them; read where answers are text
    ignore_eos: bool = False  # the tokenizer's stop ids end nothing; those of ``stop_ids`` do
    banned_ids: tuple[int, ...] = ()  # of the model's ids those that are never chosen
    top_logprobs: int = 0  # at each token also the most probable ids of the model with their log-probabilities
    prompt_logprobs: bool = False  # of the prompt's tokens too, and their ``top_logprobs``
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        for name in ("stop_ids", "banned_ids"):
            if not all(map(_is_id, getattr(self, name))):
                raise WrongSetting(name, "integer ids", getattr(self, name))
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise WrongSetting("stop_ids", f"at most {MAX_STOP_IDS} ids", len(self.stop_ids))
        has_ids = all(_is_id(token) for token, _ in self.logit_bias)
        biases = [value for _, value in self.logit_bias]
        rules = {
            # Below, float32 divides by 0; above, every token is as likely as any other.
            "temperature": ("0 (greedy), or 1e-6 to 1e6", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "top_k": ("at least 0", self.top_k >= 0),
            "min_p": ("0 to 1", 0 <= self.min_p <= 1),
            "repetition_penalty": ("1e-3 to 1e3", 1e-3 <= self.repetition_penalty <= 1e3),
            "presence_penalty": ("-1e4 to 1e4", -1e4 <= self.presence_penalty <= 1e4),
            "frequency_penalty": ("-1e4 to 1e4", -1e4 <= self.frequency_penalty <= 1e4),
            "logit_bias": (
                "integer ids with numbers of -1e6 to 1e6",
                has_ids and all(-1e6 <= value <= 1e6 for value in biases),
            ),
            "max_new_tokens": (f"1 to {MAX_NEW_TOKENS}", 1 <= self.max_new_tokens <= MAX_NEW_TOKENS),
            "min_new_tokens": ("0 to max_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens),
            "stop": ("texts that are not empty", all(isinstance(text, str) and text for text in self.stop)),
            "top_logprobs": (f"0 to {MAX_TOP_LOGPROBS}", 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS),
            "seed": ("0 to 2**32 - 1", 0 <= self.seed < 2**32),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise WrongSetting(name, rule, getattr(self, name))

    @property
    def filters(self) -> bool:
        """Whether any id is left out for its probability, where tokens are drawn at all."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def edits(self) -> bool:
        """Whether the model's logits are changed before anything else."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_new_tokens
        )


def _is_id(token) -> bool:
    return isinstance(token, numbers.Integral) and not isinstance(token, bool)


@dataclasses.dataclass(frozen=True)
class TopLogprobs:
    """The most probable ids at each of N positions, the first the most probable."""

    ids: np.ndarray  # int32 [N, top_logprobs]
    logprobs: np.ndarray  # float32 [N, top_logprobs], as ``Completion.model_logprobs``


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens generated for one prompt. Arrays are [len(tokens)], float32 where nothing else is said."""

    tokens: list[int]  # with the stop id, when one was met
    logprobs: np.ndarray  # under what was sampled from: edited, filtered, at its temperature; 0 when greedy
    model_logprobs: np.ndarray  # under the model at that temperature, whole vocabulary; greedy: at temperature 1
    kept_mass: np.ndarray  # probability, of the edited logits, of all ids that could have been chosen
    versions: np.ndarray  # int32: of the weights that chose each token
    finish: str  # "stop": a stop id or the end of a constraint; "length"; "abort"; "error", see ``error``
    cached_tokens: int = 0  # positions of the prompt that were not computed for this request
    top_logprobs: TopLogprobs | None = None  # of the tokens
    prompt_logprobs: np.ndarray | None = None  # [tokens of the prompt], the first NaN: nothing precedes it
    prompt_top_logprobs: TopLogprobs | None = None  # of the prompt's tokens from the second on
    error: Exception | None = None  # logits not finite, no id left to choose, or what a constraint or ``until`` raised

    @property
    def finished(self) -> bool:
        """Whether the model ended it; False where it was cut."""
        return self.finish == "stop"


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step gave to one request. Arrays are [len(tokens)]."""

    handle: int
    tokens: list[int]
    logprobs: np.ndarray
    model_logprobs: np.ndarray
    kept_mass: np.ndarray
    version: int
    top_logprobs: TopLogprobs | None = None
    completion: Completion | None = None  # the whole of it, with the last event of a request


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt on its way through the engine, which alone changes it."""

    handle: int
    prompt: np.ndarray  # int32 ids
    sampling: SamplingParams
    sample_id: int
    constraint: Constraint | None = None
    until: Callable[[int], bool | None] | None = None
    events: list[Event] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0
    cache_version: int | None = None  # of the weights that computed the beginning of its cache
    prompt_logprobs: np.ndarray | None = None
    prompt_top_logprobs: TopLogprobs | None = None
    error: Exception | None = None
    is_sound: bool = False  # whether the cache of its slot is known to be finite

    @property
    def context(self) -> np.ndarray:
        """The ids whose keys and values must be in the cache before the next token is chosen."""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int32)])[:-1] if self.tokens else self.prompt[:-1]

    @property
    def last(self) -> int:
        """The newest token, which is not in the cache."""
        return self.tokens[-1] if self.tokens else int(self.prompt[-1])

    @property
    def remaining(self) -> int:
        return self.sampling.max_new_tokens - len(self.tokens)

    @functools.cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """``logit_bias`` as distinct ids, int64 [N], and what each is given, float32 [N]."""
        total: dict[int, float] = {}
        for token, value in self.sampling.logit_bias:
            total[token] = total.get(token, 0.0) + value
        return np.array(list(total), np.int64), np.array(list(total.values()), np.float32)

    def complete(self, finish: str) -> Completion:
        def join(name: str) -> np.ndarray:
            parts = [getattr(event, name) for event in self.events]
            return np.concatenate([np.zeros(0, np.float32), *parts])

        versions = [np.full(len(event.tokens), event.version, np.int32) for event in self.events]
        tops = [event.top_logprobs for event in self.events if event.top_logprobs is not None]
        return Completion(
            tokens=list(self.tokens),
            logprobs=join("logprobs"),
            model_logprobs=join("model_logprobs"),
            kept_mass=join("kept_mass"),
            versions=np.concatenate([np.zeros(0, np.int32), *versions]),
            finish=finish,
            cached_tokens=self.cached_tokens,
            top_logprobs=_join_tops(tops) if tops else None,
            prompt_logprobs=self.prompt_logprobs,
            prompt_top_logprobs=self.prompt_top_logprobs,
            error=self.error,
        )


def _join_tops(tops: list[TopLogprobs]) -> TopLogprobs:
    return TopLogprobs(
        np.concatenate([one.ids for one in tops]),
        np.concatenate([one.logprobs for one in tops]),
    )
