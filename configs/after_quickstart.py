"""What may follow the quickstart, each in minutes on two cores, on its film searches made into rows of other kinds.

    ./launch/local.sh train --config=configs/after_quickstart.py:preference --workdir=runs/preference \
        --config.model.path=runs/quickstart/export

- `preference` goes on from the quickstart's model: DPO on pairs of a right search and one with an error.

`tests/benchmarks/methods.py` runs them all, and docs/recipes.md has what they reach.
"""

import json
import pathlib
import random
import zlib

from ml_collections import ConfigDict

DATA = pathlib.Path(__file__).parent / "data"
SWAPS = {  # key of a search -> other values of it
    "genres": ("comedy", "drama", "thriller", "horror", "romance", "sci-fi", "western", "crime"),
    "mood": ("light", "dark", "tense", "sad", "cozy", "uplifting", "weird", "slow"),
    "exclude": ("animation", "horror", "romance", "musical", "war", "violence", "superhero", "subtitles"),
    "language": ("fr", "es", "ja", "ko", "hi", "de", "it", "sv"),
}


def to_pair(row: dict) -> dict:
    """A row of the quickstart -> its answer and one with an error, as a pair."""
    *prompt, answer = row["messages"]
    wrong = {"role": "assistant", "content": spoil(answer["content"], draws_of(row))}
    return {"prompt": prompt, "chosen": [answer], "rejected": [wrong]}


def spoil(answer: str, draws: random.Random) -> str:
    """A search in JSON with one error: a key left out, another value, another number."""
    search = json.loads(answer)
    key = draws.choice(sorted(search))
    if len(search) > 1 and draws.random() < 0.4:
        del search[key]
    elif key == "limits":
        name = draws.choice(sorted(search[key]))
        search[key][name] += draws.choice((-20, -10, 10, 20))
    elif key == "people":
        search[key] = [" ".join(reversed(search[key][0].split()))]
    else:
        others = [value for value in SWAPS[key] if value not in search[key]]
        search[key] = draws.choice(others) if key in ("mood", "language") else [draws.choice(others)]
    return json.dumps(search, separators=(",", ":"))


def draws_of(row: dict) -> random.Random:
    """Random numbers that are the row's own, the same in every epoch and process."""
    return random.Random(zlib.crc32(json.dumps(row, sort_keys=True).encode()))


def get_config(arg: str = "preference") -> ConfigDict:
    config = ConfigDict()
    train, test = (str(DATA / f"quickstart_{part}.jsonl") for part in ("train", "test"))
    config.model = {"path": "", "loss_chunk": 256, "remat": "dots", "lora": {"rank": 16, "alpha": 32.0}}
    config.optimizer = {"schedule": "cosine", "warmup_steps": 5, "b2": 0.95}
    config.data = {"sequence_length": 256, "batch_size": 4}
    if arg == "preference":
        config.recipe = "preference"
        config.data.train = [{"path": train, "name": "pairs", "kind": to_pair}]
        config.data.eval = [{"path": test, "name": "held out", "kind": to_pair}]
        config.preference = {"beta": 0.1, "nll_coef": 0.1}
        config.optimizer.learning_rate = 2e-4
        config.train = {"steps": 60}
    else:
        raise ValueError(f"no variant {arg!r}, there is 'preference'")
    return config
