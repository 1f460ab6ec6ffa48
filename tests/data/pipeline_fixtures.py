"""Ragged documents, lengths as measured on real conversations, and a small real tokenizer with a chat template."""

import json
import pathlib

import numpy as np
import scipy.optimize
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from postrain.config import DataConfig
from postrain.data.bad_row import RowRef
from postrain.data.batches.in_memory import ExampleSet
from postrain.data.batches.row_filter import DataReport
from postrain.data.rendering.render import Rendered

QUICKSTART = pathlib.Path(__file__).resolve().parents[2] / "configs" / "data"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sample_record_lengths(num: int, seed: int = 0) -> np.ndarray:
    """Lengths by the percentiles measured on real shared conversations, in SmolLM2's tokens."""
    percentiles = [0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999, 1]
    tokens = [40, 219, 772, 1752, 2219, 2498, 3419, 8000, 33809]
    return np.interp(np.random.default_rng(seed).random(num), percentiles, tokens).astype(np.int64)


def sample_stress_lengths(num: int, seed: int = 0) -> np.ndarray:
    """Log-normal, median 300, sigma 1.2, up to 8,000."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(300), 1.2, num))
    return np.clip(lengths, 1, 8000).astype(np.int64)


def fewest_rows(lengths: np.ndarray, capacity: int) -> int:
    """A number of rows that no packing of ``lengths`` can go below, and that the best one all but reaches.

    The linear program over all sets of documents that fit in a row, its sets found one by one as those whose documents
    are worth most at the program's prices: Gilmore and Gomory, "A linear programming approach to the cutting-stock
    problem" (1961). Quick for some hundred distinct lengths.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    sets = [row * (capacity // size) for row, size in zip(np.eye(len(sizes), dtype=int), sizes, strict=True)]
    while True:
        program = scipy.optimize.linprog(np.ones(len(sets)), A_ub=-np.transpose(sets), b_ub=-counts)
        prices = -program.ineqlin.marginals
        worth, last = np.zeros(capacity + 1), np.zeros(capacity + 1, int)  # of the best set of each total length
        for total in range(sizes[0], capacity + 1):
            fitting = sizes[: np.searchsorted(sizes, total, side="right")]
            values = worth[total - fitting] + prices[: len(fitting)]
            last[total] = values.argmax()
            worth[total] = values[last[total]]
        if worth[capacity] <= 1 + 1e-9:
            return int(np.ceil(program.fun - 1e-6))
        row, total = np.zeros(len(sizes), int), capacity
        while total >= sizes[0]:
            row[last[total]] += 1
            total -= sizes[last[total]]
        sets.append(row)


def make_example_set(num: int, max_slots: int, seed: int = 0) -> ExampleSet:
    """Ragged documents; token values say which document and which place of it they are: i * 1000 + t."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(num):
        length = 1 + int(np.clip(rng.lognormal(np.log(max_slots / 5), 0.8), 1, max_slots))
        loss_mask = rng.random(length) < 0.4
        loss_mask[0], loss_mask[-1] = False, True
        tokens = i * 1000 + np.arange(length, dtype=np.int32)
        examples.append(Rendered(tokens, loss_mask, RowRef("made", "made.jsonl", i + 1)))
    return ExampleSet(examples, DataReport([], max_slots), {})


def make_config(**changes) -> DataConfig:
    return DataConfig(**{"sequence_length": 64, "batch_size": 4, "packing_window": 40, "seed": 3} | changes)


def make_tokenizer_folder(folder: pathlib.Path) -> pathlib.Path:
    """A byte-level BPE of 600 tokens trained on the quickstart's rows, with a ChatML template; pad = eos."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = (QUICKSTART / "quickstart_train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    tokenizer.train_from_iterator(rows, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<|im_end|>")}))
    return folder


def write_jsonl(path: pathlib.Path, rows: list) -> pathlib.Path:
    """A string is written as it is: a line that is not JSON."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str, **of_answer) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **of_answer},
        ]
    }
