"""Rows of every kind of data, ragged, and what their batches must hold."""

import dataclasses

import numpy as np

from postrain.config import DataConfig, SourceConfig, StreamSection
from postrain.data.batches.token_shift import shift

COMMON = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
K = 3  # ids of a teacher's distribution


def words(rng, most=8):
    return " ".join(["word"] * int(rng.integers(1, most)))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def make_pair(i, rng):
    prompt = f"q {i} {words(rng)}"
    return {"prompt": [user(prompt)], "chosen": f"yes {words(rng)}", "rejected": f"no {words(rng)}"}


def make_scored_list(i, rng):
    answers = [f"{j} {words(rng, 6)}" for j in range(int(rng.integers(2, 5)))]
    return {"prompt": f"q {i} ", "completions": answers, "scores": [float(j) for j in range(len(answers))]}


def make_prompt(i, rng):
    return {"prompt": [user(f"q {i} {words(rng, 30)}")], "answer": str(i), "tests": [{"in": i}]}


def make_teacher_row(i, rng):
    length = int(rng.integers(2, 60))
    logprobs = -1.2 - rng.random((length, K))
    mask = (np.arange(length) >= length // 2).astype(int)
    ids = np.sort(rng.integers(0, 600 - K, (length, K))) + np.arange(K)  # K different ones
    tokens = rng.integers(0, 600, length)
    return {
        "id": i,
        "tokens": tokens.tolist(),
        "loss_mask": mask.tolist(),
        "top_ids": ids.tolist(),
        "top_logprobs": logprobs.tolist(),
    }


def make_member(i, rng):
    length = int(rng.integers(2, 60))
    times = 1_700_000_000 + np.cumsum(rng.integers(0, 90_000, length))
    items, actions = rng.integers(0, 500, length), rng.integers(0, 4, length)
    return {"member": i, "items": items.tolist(), "times": times.tolist(), "actions": actions.tolist()}


def make_chat(i, rng):
    return {"messages": [user(f"q {i}"), assistant(words(rng, 36))]}


def make_labelled(i, rng):
    return {"prompt": f"q {i} ", "completion": words(rng, 36), "label": bool(i % 3)}


def make_stepwise(i, rng):
    steps = [f"{j} {words(rng, 5)}" for j in range(int(rng.integers(1, 5)))]
    return {"prompt": f"q {i} ", "completions": steps, "labels": [bool((i + j) % 3) for j in range(len(steps))]}


# Kind -> a row of it; two forms of preference.
MAKERS = {
    "sft": make_chat,
    "preference": make_pair,
    "preference/list": make_scored_list,
    "labelled": make_labelled,
    "stepwise": make_stepwise,
    "prompts": make_prompt,
    "kd": make_teacher_row,
    "events": make_member,
}


def make_rows(kind, count, seed=0):
    rng = np.random.default_rng(seed)
    return [MAKERS[kind](i, rng) for i in range(count)]


def make_config(*paths, kind, streaming=False, shards=1, **changes):
    """``kind`` of MAKERS, or a function."""
    name = kind.partition("/")[0] if isinstance(kind, str) else kind
    sources = tuple(SourceConfig(path=str(path), name=path.stem, kind=name) for path in paths)
    values = {"sequence_length": 128, "batch_size": 4, "packing_window": 30, "seed": 3}
    stream = StreamSection(shards=shards)
    return DataConfig(train=sources, streaming=streaming, stream=stream, **(values | changes))


def expected_arrays(documents, capacity):
    """The arrays of one row, written down document by document, without ``assemble_row``."""
    parts, segment = [], 0
    for number, document in enumerate(documents, 1):
        for sequence in document.sequences:
            segment += 1
            tokens, targets, mask = shift(sequence)
            slots = len(tokens)
            part = {"tokens": tokens, "targets": targets, "loss_mask": mask, "positions": np.arange(slots)}
            part["segment_ids"] = np.full(slots, segment)
            for field in sequence.fields:
                part[field.name] = field.values[1:] if field.of == "target" else field.values[:slots]
            if len(document.sequences) > 1:
                part["group_ids"] = np.full(slots, number)
            parts.append(part)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    free = capacity - len(joined["tokens"])
    return {name: np.pad(a, [(0, free)] + [(0, 0)] * (a.ndim - 1)) for name, a in joined.items()}


def assert_same_batches(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch.keys() - {"row_ids", "metadata"}:
            np.testing.assert_array_equal(batch[name], other[name], name)
        assert batch.get("metadata") == other.get("metadata")


def join_processes(parts):
    """One step's batches of several processes as the global one."""
    joined = {
        name: np.concatenate([part[name] for part in parts]) for name in parts[0].keys() - {"metadata", "row_ids"}
    }
    if "metadata" in parts[0]:
        joined["metadata"] = [row for part in parts for row in part["metadata"]]
    return joined


def without_shuffle(config):
    return dataclasses.replace(config, shuffle=False, packing="none")
