"""Words of other tools in a row, read where they mean what ours mean: what is trained, reasoning, ShareGPT, Alpaca."""

import itertools
import math
import re
from typing import Any

from postrain.data.bad_row import BadRow, RowRef, check_string, decode_json, describe_type, explain_quotes
from postrain.data.row_keys import (
    BLOCK_KEYS,
    FALSE_FLAGS,
    NUMBER_FLAGS,
    REASONING_BLOCKS,
    REASONING_TEXTS,
    TRUE_FLAGS,
    TURN_KEYS,
    WEIGHT_KEYS,
    is_empty,
)

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # of a row's or message's tokens: what sums in float32 can hold
_FLAGS = frozenset((*TRUE_FLAGS, *FALSE_FLAGS, *NUMBER_FLAGS))
_REASONING = frozenset((*REASONING_TEXTS, *REASONING_BLOCKS))
# The types of the objects in lists of reasoning, and where their text is.
_REASONING_PARTS = {"thinking": "thinking", "reasoning.text": "text", "reasoning": "text", "text": "text"}
_SHAREGPT_ROLES = (
    dict.fromkeys(("human", "user"), "user")
    | dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant")
    | dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool")
    | {"system": "system", "developer": "developer"}
)


def to_number(value: Any) -> float:
    """A number, also as text, as tables of text have it; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):  # words, or an integer beyond all floats
        return math.nan


# What is trained


def read_train_flag(message: dict, where: str, ref: RowRef, weighted: bool = False) -> tuple[bool | None, float]:
    """Whether an assistant message is trained: true or false where it says so, by whichever words; else None.

    Then how much each of its tokens counts: ``weight`` or ``loss_weight``, other than 0 and 1 only where ``weighted``.

    Raises BadRow: a value that is no such flag; words that contradict each other; a user's message to be trained.
    """
    if _FLAGS.isdisjoint(message):
        return None, 1.0
    said: dict[str, bool] = {}
    for key in (*TRUE_FLAGS, *FALSE_FLAGS):
        if key in message:
            if not isinstance(message[key], bool):
                raise BadRow(ref, f"{where}.{key} must be true or false; found {message[key]!r:.40}")
            said[key] = message[key] == (key in TRUE_FLAGS)
    weights: dict[str, float] = {}
    for key in NUMBER_FLAGS:
        if key in message:
            value, may_weigh = message[key], weighted and key in WEIGHT_KEYS
            is_number = isinstance(value, bool | int | float)
            if not is_number or not (value in (0, 1) or (may_weigh and LEAST_WEIGHT <= value <= MOST_WEIGHT)):
                expected = "0, or a number from 1e-6 to 1e6" if may_weigh else "0 or 1"
                raise BadRow(ref, f"{where}.{key} must be {expected}, for a message as a whole; found {value!r:.40}")
            said[key] = bool(value)
            weights |= {key: float(value)} if may_weigh and value else {}
    role = message["role"]
    if role != "assistant":  # that it is not left out is said of every message, by some tools
        wanted = [key for key, trained in said.items() if trained and key not in FALSE_FLAGS]
        if wanted:
            raise BadRow(ref, f"{where}: only assistant messages can be trained; this one is {role!r}")
        return None, 1.0
    if len(set(said.values())) > 1 or len(set(weights.values())) > 1:
        words = ", ".join(f"{key!r}: {message[key]!r}" for key in said)
        raise BadRow(ref, f"{where}: {words} contradict each other: leave one of them")
    return next(iter(said.values()), None), next(iter(weights.values()), 1.0)


def apply_row_masks(raw: dict, messages: list[dict], where: str, ref: RowRef) -> list[dict]:
    """The messages, with the row's ``loss_mask`` (a number for each) and ``mask_history`` written into them."""
    mask, history = raw.get("loss_mask"), raw.get("mask_history")
    if isinstance(mask, str) and mask:  # of a CSV file
        mask = parse_json(mask, "loss_mask", ref)
    if not is_empty(mask):
        if not isinstance(mask, list | tuple) or len(mask) != len(messages) or any(m not in (0, 1) for m in mask):
            raise BadRow(ref, f"'loss_mask' must be a list of 0 and 1, one for each of {where}; found {mask!r:.60}")
        pairs = enumerate(zip(messages, mask, strict=True))
        messages = [_mask(message, bool(on), f"{where}[{i}]", ref) for i, (message, on) in pairs]
    history = {"true": True, "false": False}.get(history.lower(), history) if isinstance(history, str) else history
    if not is_empty(history) and not isinstance(history, bool):
        raise BadRow(ref, f"'mask_history' must be true or false; found {history!r:.40}")
    if history:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers[:-1]:
            if messages[i].get("train") or (mask and mask[i]):
                raise BadRow(ref, f"{where}[{i}] is to be trained, and 'mask_history' contradicts that: leave one")
        messages = [m | {"train": False} if i in answers[:-1] else m for i, m in enumerate(messages)]
    return messages


def _mask(message: dict, trained: bool, where: str, ref: RowRef) -> dict:
    if message["role"] != "assistant":
        if trained:
            raise BadRow(ref, f"'loss_mask' is 1 for {where}: only assistant messages can be trained")
        return message
    if message.get("train", trained) != trained:
        raise BadRow(ref, f"{where} and the row's 'loss_mask' contradict each other: leave one of them")
    return message if trained else message | {"train": False}


def read_weight(raw: dict, ref: RowRef) -> float:
    """How much each trained token of the row counts, beside 1.0 of other rows; 0: the row is left out."""
    given = {key: raw[key] for key in WEIGHT_KEYS if not is_empty(raw.get(key))}
    if not given:
        return 1.0
    for key, value in given.items():
        if isinstance(value, str):  # of a CSV file
            try:
                given[key] = value = float(value)
            except ValueError:
                pass
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
            raise BadRow(ref, f"{key!r} must be 0, or a number from 1e-6 to 1e6; found {value!r:.40}")
    if len(set(given.values())) > 1:
        raise BadRow(ref, f"{' and '.join(map(repr, given))} contradict each other: leave one of them")
    return float(next(iter(given.values())))


# Reasoning


def read_reasoning(message: dict, where: str, ref: RowRef, unread: set[str]) -> str | None:
    """The reasoning of a message, whatever it is called; None: it has none. Raises BadRow where two differ."""
    blocks = _find_blocks(message.get("content"))
    if _REASONING.isdisjoint(message) and not blocks:
        return None
    found: dict[str, str] = {}
    if blocks:
        found["content"] = _join_blocks(blocks, f"{where}.content", ref, unread)
    for key in REASONING_TEXTS:
        if not is_empty(message.get(key)):
            found[key] = check_string(message[key], f"{where}.{key}", ref)
    for key in REASONING_BLOCKS:
        if not is_empty(message.get(key)):
            found[key] = _join_blocks(message[key], f"{where}.{key}", ref, unread)
    if len({text.strip() for text in found.values()}) > 1:
        raise BadRow(ref, f"{where} has different reasoning in {' and '.join(map(repr, found))}: leave one of them")
    return next(iter(found.values()), None)


def _find_blocks(content: Any) -> list[dict]:
    """The parts of reasoning that a list of parts begins with, as Anthropic's does."""
    if not isinstance(content, list | tuple):
        return []
    is_block = lambda part: isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")
    return list(itertools.takewhile(is_block, content))


def without_reasoning(content: Any) -> Any:
    """The content of a message less the parts that ``read_reasoning`` reads."""
    blocks = _find_blocks(content)
    return content[len(blocks) :] if blocks else content


def _join_blocks(blocks: Any, where: str, ref: RowRef, unread: set[str]) -> str:
    """The text of LiteLLM's and Anthropic's ``thinking_blocks``, or of OpenRouter's ``reasoning_details``."""
    if not isinstance(blocks, list | tuple):
        raise BadRow(ref, f"{where} must be a list; found {describe_type(blocks)}")
    texts = []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else describe_type(block)
        key = _REASONING_PARTS.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise BadRow(ref, f"{where}[{i}]: only reasoning as plain text can be trained on; found {kind!r:.40}")
        if reason := BLOCK_KEYS.check(block, re.sub(r"\[\d+\]", "[]", f"{where}[{i}]."), unread):
            raise BadRow(ref, f"{where}[{i}]: {reason}")
        texts.append(check_string(block.get(key), f"{where}[{i}].{key}", ref))
    return "\n\n".join(texts)


# ShareGPT and Alpaca, as messages that are yet to be checked


def read_sharegpt(raw: dict, ref: RowRef) -> list:
    """``conversations`` of from/value or role/content. Raises BadRow."""
    turns = raw.get("conversations")
    if isinstance(turns, str):
        turns = parse_json(turns, "conversations", ref)
    if not isinstance(turns, list | tuple):
        raise BadRow(ref, f"'conversations' must be a list of turns; found {describe_type(turns)}")
    return [_read_turn(turn, f"conversations[{i}]", ref) for i, turn in enumerate(turns)]


def _read_turn(turn: Any, where: str, ref: RowRef) -> Any:
    if not isinstance(turn, dict) or "from" not in turn or is_empty(turn["from"]):
        return turn
    if not is_empty(turn.get("role")) or not is_empty(turn.get("content")):
        raise BadRow(ref, f"{where} has both 'from' and 'value' and 'role' and 'content': leave two of them")
    role = _SHAREGPT_ROLES.get(turn["from"].lower()) if isinstance(turn["from"], str) else None
    if role is None:
        raise BadRow(ref, f"{where}.from must be one of {', '.join(_SHAREGPT_ROLES)}; found {turn['from']!r:.40}")
    message = {key: value for key, value in turn.items() if key not in TURN_KEYS.read} | {"role": role}
    if turn["from"].lower() != "function_call":
        return message | {"content": turn.get("value")}
    calls = turn.get("value")
    if isinstance(calls, str):
        calls = parse_json(calls, f"{where}.value", ref)
    return message | {"tool_calls": calls if isinstance(calls, list | tuple) else [calls]}


def read_alpaca(raw: dict, ref: RowRef) -> list:
    """``instruction`` and ``input``, a line each, and ``output``; after the turns of ``history``. Raises BadRow."""
    history = raw.get("history") or []
    if isinstance(history, str):
        history = parse_json(history, "history", ref)
    if not isinstance(history, list | tuple):
        raise BadRow(ref, f"'history' must be a list of pairs; found {describe_type(history)}")
    messages: list[Any] = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(ref, f"history[{i}] must be a pair, what the user and the assistant said; found {pair!r:.40}")
        messages += _exchange(pair[0], pair[1])
    parts = [check_string(raw[key], key, ref) for key in ("instruction", "input") if not is_empty(raw.get(key))]
    if not parts:
        raise BadRow(ref, "'instruction' and 'input' are empty: nothing to answer")
    output = check_string(raw.get("output"), "output", ref)
    if not output.strip():
        raise BadRow(ref, "'output' is empty")
    return [*messages, *_exchange("\n".join(parts), output)]


def _exchange(question: Any, answer: Any) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def add_system(system: Any, messages: list[dict], ref: RowRef) -> list[dict]:
    """The checked messages with the row's ``system`` in front. Raises BadRow."""
    if is_empty(system):
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        raise BadRow(ref, "'system' stands beside a first turn that is a system message, too: leave one of them")
    return [{"role": "system", "content": check_string(system, "system", ref)}, *messages]


def parse_json(text: str, where: str, ref: RowRef) -> Any:
    """The value of a JSON string in a row. Raises BadRow."""
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as e:
        raise BadRow(ref, f"{where} is not valid JSON: {e}{explain_quotes(text)}") from None
