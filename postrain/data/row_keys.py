"""What becomes of every key of a row: it is read, ignored on purpose, refused by its name, or counted as unread.

Refused are keys by which other tools change the prompt or what is trained, and that are not read here: to drop them
would train something else than the row says. Whatever nobody knows is counted, and printed with its count for each
source (``postrain.data.batches.row_filter``). Null and empty values say nothing and are passed over: in a table every
row has every column.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

_SYSTEM = "a system message is the first of the messages, with the role 'system'"
_SWITCH = "reasoning is switched on by an answer's reasoning_content, and off where it has none: take the key out"
_TOOLS = "name it 'tools', which is a key of the row"
_TEXT = "only text is trained on: take the key out, or leave such rows out with a function as the source's kind"
_PROMPT = "it would be missing in the prompt: put its text into a message, or take the key out"
_REASONING = "write the answer as a message, with its reasoning as 'reasoning_content'"

# By each level's other names for what changes the prompt, the input of a model or the loss: what to do instead.
TOOL_KEYS = {"functions": "it is the old form of 'tools': rename it"} | dict.fromkeys(
    ("available_tools", "tool_definitions", "tool_schemas", "tools_schema"), _TOOLS
)
SWITCH_KEYS = dict.fromkeys(
    ("chat_template_kwargs", "enable_thinking", "reasoning_effort", "thinking_budget", "thinking_mode"), _SWITCH
)
MEDIA_KEYS = dict.fromkeys(
    ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio", "objects"), _TEXT
)
PROMPT_KEYS = (
    TOOL_KEYS
    | SWITCH_KEYS
    | dict.fromkeys(("system", "system_prompt", "system_message", "developer", "developer_message"), _SYSTEM)
    | {"documents": _PROMPT, "chat_template": "the template is that of the tokenizer, or data.chat_template=FILE"}
)
INPUT_KEYS = dict.fromkeys(("instruction", "instructions", "context", "input", "history"), _PROMPT)
REASONING_KEYS = dict.fromkeys(
    ("reasoning", "reasoning_content", "thinking", "think", "thought", "chain_of_thought", "cot"), _REASONING
)
WEIGHT_KEYS = ("weight", "sample_weight", "loss_weight")
LOSS_KEYS = (
    dict.fromkeys(WEIGHT_KEYS, "rows of this kind all count the same: take the key out")
    | {"mask_history": "it is read beside 'messages': write the row so"}
    | {"loss_mask": "it is read beside 'messages', one number for each: write the row so"}
    | dict.fromkeys(("completion_mask", "assistant_masks"), "what is trained is found by rendering: take the key out")
    | {"train_on_inputs": 'prompts are not trained: write all of it as {"text": ...}'}
)
# Values of these keys that ask for what is done anyway.
_HARMLESS = {"train_on_inputs": (False, "false", "False")} | dict.fromkeys(WEIGHT_KEYS, (1, 1.0, "1"))
_IGNORED = frozenset("id _id uuid source metadata timestamp created created_at updated_at".split())


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a row, or of an object in it.

    Attributes:
      read: keys that are read.
      refused: key -> why it is refused, and what to do.
      ignored: keys that say nothing about the training.
      harmless: key in ``refused`` -> its values that are ignored all the same.
      strict: a likely misspelling is refused even where it is empty, or stands beside the key that it may mean.
    """

    read: tuple[str, ...]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = _IGNORED
    harmless: Mapping[str, tuple] = dataclasses.field(default_factory=lambda: _HARMLESS)
    strict: bool = False

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """What nothing more is to be said about."""
        return self.ignored.union(self.read)

    def check(self, raw: Mapping, where: str, unread: set[str]) -> str:
        """Why ``raw`` is refused, or "". Adds the keys that are not read to ``unread``, each as ``where`` + key."""
        for key, value in raw.items():
            if key in self.known:
                continue
            empty = is_empty(value)
            if key in self.refused:
                if empty or any(type(value) is type(v) and value == v for v in self.harmless.get(key, ())):
                    continue
                return f"{key!r} is not read: {self.refused[key]}"
            if not empty or self.strict:
                near = find_near_key(str(key), self.read, self.strict)
                if near and (self.strict or is_empty(raw.get(near))):
                    return f"unknown key {key!r:.60}; did you mean {near!r}?"
            if not empty:
                unread.add(f"{where}{key}")
        return ""


def is_empty(value: Any) -> bool:
    """Whether a value is null, or an empty string, list or object; an array never counts as empty."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


@functools.lru_cache(maxsize=4096)
def find_near_key(key: str, known: tuple[str, ...], strict: bool = False) -> str:
    """The known key that ``key`` misspells, or empty; ``prompt_id`` contains a known key and is not a misspelling."""
    if not strict and set(key.split("_")) & set(known):
        return ""
    lower = key.lower()
    if swapped := [one for one in known if one != lower and one[0] == lower[:1] and sorted(one) == sorted(lower)]:
        return swapped[0]
    cutoff = 0.8 if strict else 0.85
    return next(iter(difflib.get_close_matches(key if strict else key.lower(), known, n=1, cutoff=cutoff)), "")


# Of rows, by their form

_CHAT = PROMPT_KEYS | MEDIA_KEYS | INPUT_KEYS | REASONING_KEYS | LOSS_KEYS
_ROW_MASKS = ("mask_history", "loss_mask", *WEIGHT_KEYS)
ROW_KEYS = {
    "messages": Keys(("messages", "tools", *_ROW_MASKS), _CHAT),
    "prompt_completion": Keys(("prompt", "completion", "tools", *WEIGHT_KEYS), _CHAT),
    "text": Keys(("text", *WEIGHT_KEYS), MEDIA_KEYS | LOSS_KEYS),
    "sharegpt": Keys(("conversations", "system", "tools", *_ROW_MASKS), _CHAT),
    "alpaca": Keys(
        ("instruction", "input", "output", "system", "history", "tools", "mask_history", *WEIGHT_KEYS), _CHAT
    ),
    # Of no form: only what a key may have meant is of interest.
    "": Keys(("messages", "tools", "prompt", "completion", "text", "conversations", "instruction", "output")),
}

# Where a row's text is, and what counts it: what an unread key beside them may be another spelling of.
DATA_KEYS = (
    *ROW_KEYS[""].read, "chosen", "rejected", "completions", "scores",
    "margin", "weight", "label", "labels", "reward", "propensity",
)  # fmt: skip

# Of the objects in them

NUMBER_FLAGS = ("weight", "loss_weight", "loss_mask", "loss")
TRUE_FLAGS = ("train", "training", "trainable", "train_on_turn")
FALSE_FLAGS = ("ignore", "masked")
REASONING_TEXTS = (
    "reasoning_content", "reasoning", "thinking", "think", "thought", "chain_of_thought", "cot", "reasoning_text",
)  # fmt: skip
REASONING_BLOCKS = ("thinking_blocks", "reasoning_details")
MESSAGE_KEYS = Keys(
    (
        "role", "content", "name", "tool_calls", "tool_call_id",
        *REASONING_TEXTS, *REASONING_BLOCKS, *TRUE_FLAGS, *FALSE_FLAGS, *NUMBER_FLAGS,
    ),
    PROMPT_KEYS | MEDIA_KEYS | INPUT_KEYS | {
        "tools": "it is a key of the row: write it beside 'messages'",
        "refusal": "the answer is 'content': write it there",
        "channel": "write an analysis as reasoning_content, and what is said to the user as content",
        "recipient": "write a call as tool_calls",
        "tool_name": "name it 'name'",
        "type": "a message is told by its role: reasoning is reasoning_content, a call tool_calls",
    }
    | dict.fromkeys(("tool_result", "tool_results", "tool_response", "tool_responses"),
                    "the result of a tool is a message with the role 'tool'")
    | dict.fromkeys(("train_detail", "training_detail"), "a message is trained as a whole or not at all"),
    ignored=_IGNORED | frozenset("annotations message_id parent_id model provider usage cache_control".split()),
    harmless={"type": ("message", "text"), "channel": ("final",)},
    strict=True,
)  # fmt: skip
PART_KEYS = Keys(("type", "text"), MEDIA_KEYS, frozenset({"id", "annotations", "cache_control", "logprobs"}))
_CALL = "name it 'arguments'"
_FUNCTIONS = "only calls of functions can be trained on"
CALL_KEYS = Keys(
    ("function", "id"),
    dict.fromkeys(("name", "arguments", "args", "input", "parameters"), "beside 'function' it is not: put it in there")
    | {"type": _FUNCTIONS},
    frozenset({"index"}),
    harmless={"type": ("function",)},
)
FUNCTION_KEYS = Keys(("name", "arguments"), dict.fromkeys(("args", "input", "parameters", "kwargs"), _CALL))
FLAT_CALL_KEYS = Keys(
    ("name", "arguments", "id"),
    {**FUNCTION_KEYS.refused, "type": _FUNCTIONS},
    frozenset({"index"}),
    harmless={"type": ("function", "function_call")},
)
BLOCK_KEYS = Keys(("type", "thinking", "text"), {}, frozenset("id index format signature cache_control".split()))
TURN_KEYS = Keys(("from", "value"))
