"""Lengths as they were measured on real shared conversations, and conversations of such lengths as JSON lines.

The text is that of Python's own standard library, paragraph by paragraph (English and code), so that words come as
often as they do in real text and are the same on every machine with this Python.
"""

import functools
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator

import numpy as np

# Percentile -> SmolLM2 tokens, of whole records and of assistants' replies; between them logarithms are interpolated.
RECORDS = {0: 64, 5: 219, 25: 772, 50: 1752, 75: 2219, 90: 2498, 99: 3419, 100: 33_809}
REPLIES = {0: 4, 5: 25, 50: 283, 90: 675, 99: 943, 100: 2000}
CHARACTERS_A_TOKEN = 3.0  # of this text, about

# SmolLM2-Instruct's own template, with the marks by which TRL knows the assistant's tokens.
TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
'}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '
' }}{% else %}{{ message['content'] + '<|im_end|>' + '
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def draw_percentiles(percentiles: dict[int, int], count: int, seed: int = 1) -> np.ndarray:
    """int64 [count]."""
    at = 100 * np.random.default_rng(seed).random(count)
    return np.exp(np.interp(at, list(percentiles), np.log(list(percentiles.values())))).astype(np.int64)


def draw_stress(count: int, seed: int = 1) -> np.ndarray:
    """Log-normal, median 300, sigma 1.2, clipped at 8k. int64 [count]."""
    normal = np.random.default_rng(seed).standard_normal(count)
    return np.round(300 * np.exp(1.2 * normal)).clip(1, 8192).astype(np.int64)


def draw_skewed(count: int, seed: int = 1) -> np.ndarray:
    """Short answers, one in sixteen of them a document of up to 8k. int64 [count]."""
    rng = np.random.default_rng(seed)
    short, long = rng.integers(64, 1024, count), rng.integers(4096, 8193, count)
    return np.where(rng.random(count) < 1 / 16, long, short)


LENGTHS = {
    "records": functools.partial(draw_percentiles, RECORDS),
    "replies": functools.partial(draw_percentiles, REPLIES),
    "stress": draw_stress,
    "skewed": draw_skewed,
}


def draw_fitting(name: str, capacity: int, count: int) -> tuple[np.ndarray, float]:
    """``count`` lengths of a set, all up to ``capacity``, and the share of the set that is longer."""
    lengths = LENGTHS[name](count)
    fitting = lengths[lengths <= capacity]
    again = np.random.default_rng(2).integers(0, fitting.size, count - fitting.size)
    return np.concatenate([fitting, fitting[again]]), 1 - fitting.size / count


@functools.cache
def read_paragraphs() -> list[str]:
    """The standard library's, without its tests, in a shuffled order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(f.parts)]
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    paragraphs = [p.strip("\n") for text in texts for p in text.split("\n\n") if p.strip() and len(p) < 2000]
    paragraphs = [p for p in paragraphs if not re.search(r"<[\w|]+>", p)]  # of the form of control tokens
    order = np.random.default_rng(3).permutation(len(paragraphs))
    return [paragraphs[i] for i in order]


def _speak(characters: int, paragraphs: Iterator[str]) -> str:
    said: list[str] = []
    while sum(map(len, said)) < characters:
        said.append(next(paragraphs))
    return "\n\n".join(said)[: max(characters, 2)].strip() or "None."


def write_conversations(file, lengths: np.ndarray, turns: int = 3) -> None:
    """A row for each length (tokens, about): 1 to ``turns`` turns, the reply two fifths of each."""
    rng, known = np.random.default_rng(4), read_paragraphs()
    paragraphs = (known[i % len(known)] for i in range(10**9))
    with open(file, "w", encoding="utf-8") as lines:
        for length in lengths.tolist():
            number = int(rng.integers(1, turns + 1))
            each = length * CHARACTERS_A_TOKEN / number
            messages = []
            for _ in range(number):
                messages.append({"role": "user", "content": _speak(int(0.6 * each), paragraphs)})
                messages.append({"role": "assistant", "content": _speak(int(0.4 * each), paragraphs)})
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_short_rows(folder, rows: int, shards: int = 8) -> None:
    """``rows`` questions and answers of a few words, some 100 bytes each, in ``shards`` files."""
    words = [word for paragraph in read_paragraphs()[:20_000] for word in paragraph.split() if word.isalpha()]
    for shard in range(shards):
        rng = np.random.default_rng([5, shard])
        count = rows * (shard + 1) // shards - rows * shard // shards
        starts = rng.integers(0, len(words) - 8, (count, 2)).tolist()
        with open(os.path.join(folder, f"rows-{shard:02}.jsonl"), "w", encoding="utf-8") as lines:
            for ask, answer in starts:
                user = {"role": "user", "content": " ".join(words[ask : ask + 4])}
                assistant = {"role": "assistant", "content": " ".join(words[answer : answer + 3])}
                lines.write(json.dumps({"messages": [user, assistant]}) + "\n")
