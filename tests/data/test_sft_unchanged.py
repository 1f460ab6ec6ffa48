"""Batches of kind sft are, byte for byte, what they were: of rows in memory since before there were other kinds, of
streams since windows begin small (SHARD_VERSION 3). Whoever changes them counts a version of the data fingerprint
up."""

import hashlib
import json

import pytest
import tokenizers
from pipeline_fixtures import CHATML, chat, make_config, make_example_set, write_jsonl
from tokenizers import models, pre_tokenizers

from postrain.config import DataConfig, SourceConfig, StreamSection
from postrain.data.batches.in_memory import MemoryBatches, make_eval_batches
from postrain.data.batches.open import open_train_rows
from postrain.data.rendering.tokenizer import load_tokenizer


def hash_batches(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode() + batch[name].tobytes())
    return digest.hexdigest()[:16]


def take(batches, count):
    return [next(batches) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, so that ids do not depend on the package that would train merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.add_special_tokens(alphabet[:2])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return load_tokenizer(folder)


def test_rows_in_memory():
    example_set, config = make_example_set(150, 64), make_config()
    batches = MemoryBatches(example_set, config)
    assert hash_batches(take(batches, 60)) == "8feb380ca70152ac"
    assert hash_batches(make_eval_batches(example_set, config)) == "1e7a7253ed061377"
    batches.close()


@pytest.mark.parametrize(("streaming", "expected"), [(False, "f2dd0eeefea304d2"), (True, "d7afebde1a48987c")])
def test_a_mixture_and_a_stream(tmp_path, tokenizer, streaming, expected):
    for name in "ab":
        rows = [chat(f"{name} {i}?", "word " * (1 + i * 7 % 31)) for i in range(60)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sources = tuple(
        SourceConfig(path=str(tmp_path / f"{name}.jsonl"), weight=w) for name, w in (("a", 2.0), ("b", 1.0))
    )
    config = DataConfig(
        train=sources, sequence_length=160, batch_size=4, packing_window=40, seed=5, too_long="truncate",
        streaming=streaming, stream=StreamSection(shards=2),
    )  # fmt: skip
    batches = open_train_rows(tokenizer, config).batches
    assert hash_batches(take(batches, 60)) == expected
    batches.close()
