"""The fixed work that the benchmarks do: sizes, deterministic token ids, bookkeeping. numpy only.

The same arguments give the same ids on every machine, so that figures taken with different libraries are about
the same work.
"""

import json
import os
import pathlib
import resource
import sys
import time

import numpy as np

TINY = {"hidden": 256, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 32, "mlp": 768, "vocab": 32768}
PAD_ID, EOS_ID, FIRST_ID = 0, 1, 2


def draw_ids(rng: np.random.Generator, count: int, vocab: int = TINY["vocab"]) -> np.ndarray:
    """Ids with a Zipf-like skew, so that a loss has something to learn. int32 [count]."""
    span = vocab - FIRST_ID
    ids = FIRST_ID + np.floor(span ** rng.random(count)).astype(np.int64) - 1
    return ids.clip(FIRST_ID, vocab - 1).astype(np.int32)


def sft_documents(count: int, max_length: int = 1024, median: float = 90.0, sigma: float = 1.0, seed: int = 1234):
    """``count`` pairs (tokens int32 [L], mask bool [L]) of log-normal length, turns alternating user / assistant."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(np.clip(np.round(median * np.exp(sigma * rng.standard_normal())), 8, max_length))
        tokens, mask = draw_ids(rng, length), np.zeros(length, bool)
        turns = int(rng.integers(1, 4)) if length >= 48 else 1
        edges = np.linspace(0, length, turns + 1).astype(int)
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            mask[start + max(1, int((stop - start) * rng.uniform(0.2, 0.6))) : stop] = True
        tokens[-1] = EOS_ID
        documents.append((tokens, mask))
    return documents


def preference_pairs(count: int, max_length: int = 256, long_prompts: bool = False, seed: int = 99):
    """``count`` triples (prompt, chosen, rejected) int32, a prompt with an answer at most ``max_length`` tokens long.

    Prompts are of 16 tokens to half the length, or all of three quarters of it; answers of 16 tokens or more, the end
    token included.
    """
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = max_length * 3 // 4 if long_prompts else int(rng.integers(16, max_length // 2 + 1))
        lengths = rng.integers(15, max_length - prompt, 2)
        answers = (np.append(draw_ids(rng, int(length)), np.int32(EOS_ID)) for length in lengths)
        pairs.append((draw_ids(rng, prompt), *answers))
    return pairs


def write_tiny_model(folder) -> None:
    """A random Qwen3 of the TINY sizes as a Hugging Face folder, with a word-level tokenizer (``t17`` is id 17)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=TINY["vocab"],
        hidden_size=TINY["hidden"],
        intermediate_size=TINY["mlp"],
        num_hidden_layers=TINY["layers"],
        num_attention_heads=TINY["heads"],
        num_key_value_heads=TINY["kv_heads"],
        head_dim=TINY["head_dim"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    words = {"<pad>": PAD_ID, "<eos>": EOS_ID} | {f"t{i}": i for i in range(FIRST_ID, TINY["vocab"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


class Load:
    """Share of the machine's CPU time that other processes took since this object was made.

    A process that this one started is no other; its time counts once it has ended.
    """

    def __init__(self):
        self._start = self._read()

    @staticmethod
    def _read():
        with open("/proc/stat") as file:
            ticks = [int(x) for x in file.readline().split()[1:9]]
        idle = ticks[3] + ticks[4]
        times = os.times()
        hertz = os.sysconf("SC_CLK_TCK")
        return np.array([(sum(ticks) - idle) / hertz, sum(ticks) / hertz, sum(times[:4])])

    def share(self) -> float:
        busy, total, mine = self._read() - self._start
        return round(max(0.0, busy - mine) / max(total, 1e-9), 3)


def peak_rss_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def emit(**record) -> None:
    """One JSON line on standard output: the result of one side of one round."""
    print(json.dumps(record), flush=True)


def time_steps(step, count: int) -> list[float]:
    """Seconds of each of ``count`` calls."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def describe_machine() -> str:
    """Processor, cores, memory and Python, for the head of a table."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{len(names)} x {names[0]}, {memory:.0f} GiB, Python {python}, {time.strftime('%Y-%m-%d')}, float32."


def write_section(file: pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a Markdown file."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = file.read_text().partition(start)
    if not rest:
        raise SystemExit(f"{file} has no section {start.strip()}")
    file.write_text(before + start + text.strip() + "\n" + end + rest.partition(end)[2])
