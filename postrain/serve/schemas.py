"""Bodies of requests, checked field by field, into what the engine takes.

A field that is null is one that was left out. A field that would change the answer and is not supported is refused by
its name, unless its value asks for what is done anyway; other fields that nobody reads are accepted and named in the
response's header ``x-ignored-fields``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from postrain.rollout.requests import Completion, SamplingParams, WrongSetting
from postrain.serve.errors import ApiError, wrong

MAX_CHOICES = 128
# Each of these costs time or memory at every token of an answer.
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_IDS, MAX_BIASES = 16, 1000, 32, 1024

# Fields that change an answer, with the values that ask for nothing: names of OpenAI, vLLM, SGLang and llama.cpp.
_CONSTRAINT = "write it as response_format or structured_outputs, in /generate within sampling_params"
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "best_of": ((1,), ""),
    "suffix": (("",), ""),
    "use_beam_search": ((False,), ""),
    "length_penalty": ((1, 1.0), ""),
    "typical_p": ((1, 1.0), ""),
    "allowed_token_ids": (([],), ""),
    "bad_words": (([],), ""),
    "logits_processors": (([],), ""),
    "truncate_prompt_tokens": ((), ""),
    "include_stop_str_in_output": ((False,), ""),
    "no_stop_trim": ((False,), ""),
    "stop_regex": ((), ""),
    "audio": ((), ""),
    "modalities": ((["text"],), ""),
    "prediction": ((), ""),
    "web_search_options": ((), ""),
    "reasoning_effort": ((), "switch reasoning with chat_template_kwargs"),
    "verbosity": ((), ""),
    "functions": (([],), "write them as tools"),
    "function_call": (("none",), "write it as tool_choice"),
    "chat_template": ((), "the template is that of the model's folder"),
    "documents": (([],), "write them into a message"),
    "continue_final_message": ((False,), "an answer begins with a turn of its own"),
    "add_generation_prompt": ((True,), "an answer begins with a turn of its own"),
    "guided_json": ((), _CONSTRAINT),
    "guided_regex": ((), _CONSTRAINT),
    "guided_choice": ((), _CONSTRAINT),
    "guided_grammar": ((), _CONSTRAINT),
    "structural_tag": ((), _CONSTRAINT),
    "regex": ((), _CONSTRAINT),
    "ebnf": ((), _CONSTRAINT),
    "grammar": ((), _CONSTRAINT),
    "json_schema": ((), _CONSTRAINT),
    "schema": ((), "write it as response_format.json_schema.schema"),
    "enable_thinking": ((), "write it in chat_template_kwargs"),
    "thinking": ((), "write it in chat_template_kwargs"),
    "add_special_tokens": ((False,), "the chat template writes them"),
    "echo": ((False,), ""),
    "sampling_params": (({},), "write its fields beside the others"),
    "max_tokens": ((), "write it as max_new_tokens"),
    "max_completion_tokens": ((), "write it as max_new_tokens"),
    "min_tokens": ((0,), "write it as min_new_tokens"),
    "seed": ((), "write it as sampling_seed"),
    "max_new_tokens": ((), "write it as max_tokens"),
    "min_new_tokens": ((0,), "write it as min_tokens"),
    "sampling_seed": ((), "write it as seed"),
    "n_predict": ((), "write it as max_tokens"),
    "repeat_penalty": ((1, 1.0), "write it as repetition_penalty"),
    "mirostat": ((0,), ""),
    "dry_multiplier": ((0,), ""),
    "xtc_probability": ((0,), ""),
    "dynatemp_range": ((0,), ""),
    "top_n_sigma": ((-1,), ""),
    "load_format": (("auto", "safetensors"), ""),
    "keep_pause": ((False,), "answers go on after the update"),
    "lora_path": ((), "adapters are chosen when the server starts"),
    "image_data": ((), ""),
    "audio_data": ((), ""),
    "video_data": ((), ""),
    "input_embeds": ((), ""),
    "prompt_embeds": ((), ""),
    "return_hidden_states": ((False,), ""),
    "return_routed_experts": ((False,), ""),
    "return_sampling_mask": ((False,), ""),
    "custom_logit_processor": ((), ""),
}


def parse_body(data: bytes) -> dict:
    """The JSON object of a request."""

    def refuse(word: str):
        raise ValueError(f"{word} is not a number of JSON")

    try:
        body = json.loads(data.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, found {describe(body)}", code="invalid_json")
    if b"\\ud" in data.lower():
        for name, value in body.items():
            if has_half_pair([name, value]):
                raise wrong(ascii(name)[1:-1], "has half of a surrogate pair, which is no character")
    return body


def has_half_pair(value: Any) -> bool:
    """Whether a text in a value of JSON cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def describe(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deep nest"
    return text if len(text) <= 80 else f"{text[:77]}..."


class Fields:
    """The fields of a body, each read once by the type that it must have."""

    def __init__(self, body: Mapping[str, Any], where: str = ""):
        self.values = {name: value for name, value in body.items() if value is not None}
        self.where, self._read = where, set[str]()
        self._inner: list[Fields] = []

    def name(self, name: str) -> str:
        return f"{self.where}{name}"

    def take(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return self.values.get(name, default)

    def reads(self, name: str) -> bool:
        """Whether somebody has asked for it."""
        return name in self._read

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise wrong(self.name(name), f"expected {expected}, found {describe(self.values[name])}")

    def whole(self, name: str, default: Any, least: int = 0, most: int = 2**63 - 1) -> Any:
        value = self.take(name, default)
        if name in self.values:
            whole = isinstance(value, float) and value.is_integer()  # 16.0, as some languages write 16
            value = int(value) if whole else value
            holds = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            self._check(name, holds, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name, default)
        holds = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        self._check(name, holds and math.isfinite(value), "a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        self._check(name, isinstance(value, bool), "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        self._check(name, value is None or isinstance(value, str), "a string")
        return value

    def object(self, name: str) -> dict:
        value = self.take(name, {})
        self._check(name, isinstance(value, dict), "an object")
        return value

    def inner(self, name: str) -> "Fields":
        """The fields of an object, which ``finish`` looks through too."""
        self._inner.append(Fields(self.object(name), f"{self.name(name)}."))
        return self._inner[-1]

    def texts(self, name: str) -> tuple[str, ...]:
        """One string, or a list of them."""
        value = self.take(name, [])
        value = [value] if isinstance(value, str) else value
        holds = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        self._check(name, holds, "a string or a list of strings, none of them empty")
        return tuple(value)

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id, or a list of them."""
        value = self.take(name, [])
        value = [value] if isinstance(value, int) else value
        self._check(name, isinstance(value, list) and all(map(is_whole, value)), "a list of token ids")
        check_ids(value, self.name(name), vocab_size)
        return tuple(value)

    def finish(self) -> list[str]:
        """The names that nobody has read. Raises ApiError for one that would change the answer."""
        left = [name for name in self.values if name not in self._read]
        for name in left:
            if name in UNSUPPORTED:
                harmless, advice = UNSUPPORTED[name]
                if self.values[name] not in harmless:
                    raise wrong(self.name(name), "is not supported" + (f": {advice}" if advice else ""))
        return [self.name(name) for name in left] + [name for inner in self._inner for name in inner.finish()]


def check_name(served, name: str | None) -> None:
    """Raises ApiError where a request is for another model than ``served``."""
    if name is not None and name not in served.names:
        message = f"model: there is no {name!r:.80} here; this is {served.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def write_ignored(names: Sequence[str]) -> str:
    """The header ``x-ignored-fields``, short enough for any client."""
    return ", ".join(map(ascii, names))[:2000]


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_ids(ids: list[int], name: str, vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise wrong(name, f"token id {token} is outside the model's vocabulary of {vocab_size}")


@dataclasses.dataclass(frozen=True)
class Names:
    """How a protocol calls what SamplingParams has."""

    max_new_tokens: tuple[str, ...]  # the first that is there counts
    min_new_tokens: str
    seed: str


OPENAI = Names(("max_completion_tokens", "max_tokens"), "min_tokens", "seed")
SGLANG = Names(("max_new_tokens",), "min_new_tokens", "sampling_seed")


class Wanted(NamedTuple):
    """A constraint as it was asked for: what ``compile_constraint`` takes, and the field that it is from."""

    spec: dict
    param: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that has been checked: ``n`` answers to each prompt."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    n: int = 1
    wanted: Wanted | None = None
    stream: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.prompts) * self.n


def read_sampling(
    fields: Fields, names: Names, *, vocab_size: int, stop_ids, default_tokens: int, room: int, seed: int
) -> SamplingParams:
    """SamplingParams without banned ids.

    ``default_tokens``, ``seed``: where none is named. ``room``: tokens that the context has after the longest prompt.
    """
    given = [name for name in names.max_new_tokens if name in fields.values]
    limits = [fields.whole(name, None) for name in names.max_new_tokens]
    limits = [limit for limit in limits if limit is not None]
    if limits and limits[0] > room:
        raise wrong(
            fields.name(given[0]),
            f"{limits[0]} tokens do not fit: after the prompt the context has room for {room}",
            "context_length_exceeded",
        )
    top_k = fields.whole("top_k", 0, -1)
    ends = () if fields.flag("ignore_eos") else tuple(stop_ids)
    stop_ids = set(fields.ids("stop_token_ids", vocab_size)).union(ends)
    if len(stop_ids) > MAX_STOP_IDS:
        most = f"{MAX_STOP_IDS - len(ends)} beside the model's own {len(ends)}" if ends else f"{MAX_STOP_IDS}"
        raise wrong(fields.name("stop_token_ids"), f"expected at most {most}, found {len(stop_ids) - len(ends)}")
    stops = tuple(dict.fromkeys(fields.texts("stop")))
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise wrong(fields.name("stop"), f"expected at most {MAX_STOPS} texts of {MAX_STOP_LENGTH} characters")
    values = {
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": max(top_k, 0),  # engines write "all" as -1 or as 0
        "min_p": fields.number("min_p", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "logit_bias": _read_bias(fields, vocab_size),
        "max_new_tokens": limits[0] if limits else min(default_tokens, room),
        "min_new_tokens": fields.whole(names.min_new_tokens, 0),
        "stop_ids": tuple(stop_ids),
        "stop": stops,
        "ignore_eos": not ends,
        "seed": fields.whole(names.seed, seed, -(2**63)) % 2**32,
    }
    try:
        return SamplingParams(**values)
    except WrongSetting as error:
        spelled = {"max_new_tokens": given[0] if given else names.max_new_tokens[-1], "seed": names.seed}
        spelled["min_new_tokens"] = names.min_new_tokens
        name = fields.name(spelled.get(error.name, error.name))
        raise wrong(name, f"expected {error.rule}, found {describe(error.value)}") from None


def _read_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    name, biases = fields.name("logit_bias"), {}
    given = fields.object("logit_bias")
    if len(given) > MAX_BIASES:
        raise wrong(name, f"expected at most {MAX_BIASES} token ids, found {len(given)}")
    for key, value in given.items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10
        if not is_id or not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e6:
            raise wrong(name, f"expected token ids with numbers of -1e6 to 1e6, found {describe({key: value})}")
        biases[int(key)] = float(value)
    check_ids(list(biases), name, vocab_size)
    return tuple(biases.items())


@dataclasses.dataclass(frozen=True)
class Output:
    """What an OpenAI client wants to see, besides the text."""

    stream_usage: bool  # a last chunk with the usage
    usage_each: bool  # the usage in every chunk
    token_ids: bool


def read_output(fields: Fields) -> Output:
    options = fields.inner("stream_options")
    each = options.flag("continuous_usage_stats")
    return Output(options.flag("include_usage") or each, each, fields.flag("return_token_ids"))


def read_constraint(fields: Fields) -> Wanted | None:
    found: list[Wanted] = []
    form = fields.inner("response_format")
    kind = form.take("type", "text" if not form.values else None)
    if kind == "json_object":
        found.append(Wanted({"json_object": True}, "response_format"))
    elif kind == "json_schema":
        named = form.inner("json_schema")
        schema, _, _, _ = map(named.take, ("schema", "name", "description", "strict"))
        if schema is None:
            raise wrong("response_format.json_schema.schema", "is missing")
        found.append(Wanted({"json_schema": schema}, "response_format.json_schema.schema"))
    elif kind != "text":
        raise wrong("response_format.type", f"expected text, json_object or json_schema, found {describe(kind)}")
    kinds = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
    for name, value in fields.object("structured_outputs").items():
        param = f"structured_outputs.{name}"
        if value is None or (name == "json_object" and value is False):
            continue
        if name == "json_object" and value is True:
            found.append(Wanted({"json_object": True}, param))
        elif name in kinds:
            found.append(Wanted({kinds[name]: parse_schema(value, param) if name == "json" else value}, param))
        else:
            raise wrong(param, f"expected one of {', '.join([*kinds, 'json_object'])}")
    if len(found) > 1:
        raise wrong(found[1].param, f"stands beside {found[0].param}: expected one constraint")
    return found[0] if found else None


def parse_schema(value: Any, param: str) -> Any:
    """A JSON schema, or one as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise wrong(param, f"not valid JSON: {error}") from None


def make_usage(job: Job, completions: Mapping[int, Completion], num_tokens: int) -> dict:
    """``completions``: those that have ended, by their index; ``num_tokens`` of all answers until now.

    A prompt is computed once for all of its answers: what the first of them did not find in the cache was computed.
    """
    num_prompt, num_cached = sum(map(len, job.prompts)), 0
    for i in range(len(job.prompts)):
        found = [completions[k].cached_tokens for k in range(i * job.n, (i + 1) * job.n) if k in completions]
        num_cached += min(found, default=0) if len(found) == job.n else 0
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
