"""A tiny model, tiny conversations and the config of a run on them, shared by the tests of recipes."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

from tiny_models import make_tiny_model

WORDS = ("red", "blue", "green", "grey", "pink", "gold")


def write_rows(path, count, first=0):
    """Questions whose answer is a word of the question as JSON: short, each one different."""
    lines = []
    for i in range(first, first + count):
        word = WORDS[i % len(WORDS)]
        messages = [
            {"role": "user", "content": f"{i} {word}"},
            {"role": "assistant", "content": json.dumps({"c": word}, separators=(",", ":"))},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_inputs(folder):
    """model/, train.jsonl and eval.jsonl in ``folder``."""
    folder = pathlib.Path(folder)
    make_tiny_model(folder / "model", "llama", vocab_size=301)
    write_rows(folder / "train.jsonl", 40)
    write_rows(folder / "eval.jsonl", 6, first=40)
    return folder


def make_values(inputs, **sections):
    """Config values of a run of six steps; ``sections`` are laid over it, section by section."""
    values = {
        "model": {"path": str(inputs / "model"), "lora": {"rank": 4}},
        "data": {
            "train": str(inputs / "train.jsonl"),
            "eval": str(inputs / "eval.jsonl"),
            "sequence_length": 96,
            "batch_size": 2,
        },
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 6},
        "eval": {"every": 2, "generate_rows": 3, "max_new_tokens": 8, "metrics": ["exact_match", "valid_json"]},
        "checkpoint": {"every": 2},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    if not values["data"]["eval"]:  # nothing to answer
        values["eval"]["generate_rows"] = 0
    return values


@contextlib.contextmanager
def crash_at_batch(number):
    """The run in this block ends with a MemoryError when it takes its batch of this number, from 1."""
    from postrain.training.rows import Rows

    next_batch, taken = Rows.__next__, []

    def crash(rows):
        taken.append(1)
        if len(taken) == number:
            raise MemoryError("no room")
        return next_batch(rows)

    with mock.patch.object(Rows, "__next__", crash), contextlib.suppress(MemoryError):
        yield
    assert len(taken) == number, "the run did not end there"


def write_config(path, values):
    path.write_text(f"def get_config(arg=None):\n    return {values!r}\n", encoding="utf-8")
    return path


def run_cli(*words, timeout=240, **kwargs):
    command = [sys.executable, "-m", "postrain.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ, **kwargs)


def read_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def without_perf(lines):
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def read_folder(folder):
    """Relative path -> bytes of every file in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}
