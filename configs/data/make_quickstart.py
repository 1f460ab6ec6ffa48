"""Makes the quickstart's conversations: a viewer's request in, a structured film search out.

    python configs/data/make_quickstart.py     # writes quickstart_{train,validation,test}.jsonl here

    "something light and funny, under 90 minutes, not animated"
    {"genres":["comedy"],"mood":"light","limits":{"max_minutes":90},"exclude":["animation"]}

The search is one line of compact JSON against the catalogue schema below: only the keys that the request
states, always in this order, with the catalogue's own values.

    genres    one or two of GENRES            exclude   one or two of EXCLUDE
    mood      one of MOODS                    people    one of PEOPLE (invented)
    limits    max_minutes, min_year, max_year language  one of LANGUAGES (ISO 639-1)

The split is by composition, so that a model which only remembers rows fails on the held-out sets:

* RESERVED pairs. About an eighth of the pairs of values from two different keys (a genre with a mood, a person
  with a language, ...) never occur together in a training row; every held-out row has at least one such pair.
* Frames. The sentences around the attributes ("looking for ...", "... for the flight") are disjoint lists: one
  for training, one for validation, one for the test. What a frame says of the occasion is never in the answer.

Every single value, and every way of saying one, does occur in training. A tenth of the requests has a typing
slip, and some have fillers and lower-case names, in all sets. Choose by the validation set; the figure that is
quoted comes from the test set.
"""

import itertools
import json
import pathlib
import random
from typing import NamedTuple

SEED = 7
NUM_TRAIN = 1300
NUM_HELD_OUT = 100  # of validation and of test
MAX_WORDS = 25
SYSTEM = "Write the film search query."

# value -> (nouns with their article, adjectives)
GENRES = {
    "comedy": (("a comedy", "a funny movie"), ("funny", "hilarious")),
    "drama": (("a drama", "a drama film"), ("dramatic",)),
    "thriller": (("a thriller", "a suspense movie"), ("suspenseful",)),
    "horror": (("a horror film", "a scary movie"), ("scary", "frightening")),
    "romance": (("a romance", "a love story"), ("romantic",)),
    "sci-fi": (("a sci-fi film", "a science fiction movie"), ("futuristic",)),
    "documentary": (("a documentary", "a true-life film"), ()),
    "western": (("a western", "a cowboy movie"), ()),
    "animation": (("an animated film", "a cartoon"), ("animated",)),
    "crime": (("a crime film", "a detective movie"), ()),
}
MOODS = {
    "light": ("light", "lighthearted"),
    "dark": ("dark", "gloomy"),
    "tense": ("tense", "gripping"),
    "sad": ("sad", "heartbreaking"),
    "cozy": ("cozy", "feel-good"),
    "uplifting": ("uplifting", "inspiring"),
    "weird": ("weird", "strange"),
    "slow": ("slow", "quiet"),
}
EXCLUDE = {
    "animation": ("not animated", "no cartoons"),
    "horror": ("nothing scary", "no horror"),
    "romance": ("no romance", "not romantic"),
    "musical": ("no musicals", "no singing"),
    "war": ("no war films", "nothing about war"),
    "violence": ("no violence", "not violent"),
    "superhero": ("no superheroes", "no superhero stuff"),
    "subtitles": ("no subtitles", "without subtitles"),
}
LANGUAGES = {
    "fr": "French",
    "es": "Spanish",
    "ja": "Japanese",
    "ko": "Korean",
    "hi": "Hindi",
    "de": "German",
    "it": "Italian",
    "sv": "Swedish",
}
PEOPLE = (
    "Mara Voss",
    "Ilya Brandt",
    "Chidi Okoro",
    "Lena Falk",
    "Tomas Reyes",
    "Yuki Arai",
    "Nadia Stone",
    "Paul Winter",
    "Rosa Bell",
    "Omar Hale",
)
MINUTES = {
    80: ("80 minutes",),
    90: ("90 minutes", "an hour and a half"),
    100: ("100 minutes",),
    110: ("110 minutes",),
    120: ("120 minutes", "two hours"),
}
DECADES = (1960, 1970, 1980, 1990)
YEARS = (1970, 1980, 1990, 1995, 2000, 2005, 2010, 2015)

MINUTE_CLAUSES = ("under {}", "less than {}", "no longer than {}", "{} at most")
MIN_YEAR_CLAUSES = ("after {}", "since {}", "newer than {}")
MAX_YEAR_CLAUSES = ("before {}", "older than {}", "no later than {}")
DECADE_CLAUSES = ("from the {}s", "made in the {}s")
PEOPLE_CLAUSES = ("with {}", "starring {}", "by {}")
LANGUAGE_CLAUSES = ("in {}", "{} language")

# An opening, and in two of five training rows an occasion around it.
TRAIN_OPENINGS = (
    "{}",
    "i want {}",
    "i would like {}",
    "looking for {}",
    "show me {}",
    "give me {}",
    "can you find {}?",
    "do you have {}?",
    "are there any films like {}?",
    "tonight i need {}",
    "find me {}, thanks",
    "what about {}?",
    "how about {}",
    "we feel like watching {}",
    "in the mood for {}",
    "my sister wants {}",
    "play {}",
    "search for {}",
    "{} would be great",
    "ideally {}",
)
TRAIN_OCCASIONS = (
    "friday night, {}",
    "movie night! {}",
    "it is late, {}",
    "i am bored, {}",
    "my friends are coming over, so {}",
    "the weather is bad and {}",
    "we just had dinner, {}",
    "{} for the flight",
    "{} for our film club",
    "{} with my parents",
    "{} on a monday evening",
    "{} while i cook",
    "{} before bed",
    "{} for the long weekend",
)
TRAIN_FRAMES = tuple(TRAIN_OPENINGS) + tuple(
    occasion.format(opening)
    for occasion, opening in itertools.product(TRAIN_OCCASIONS, TRAIN_OPENINGS)
    if not (occasion.startswith("{}") and opening.endswith(("?", "thanks", "great")))
)
VALIDATION_FRAMES = (
    "i would love to see {}",
    "please recommend {}",
    "is there {} i could watch?",
    "the kids are asleep, so {}",
    "could we try {} this weekend",
    "hit me with {}",
    "today i fancy {}",
    "suggest {} for a rainy sunday",
)
TEST_FRAMES = (
    "got anything like {}?",
    "time for {}",
    "help me pick {}",
    "my flatmate keeps asking for {}",
    "it is snowing outside, let us watch {}",
    "{} to go with the pizza",
    "i have not seen {} in ages",
    "put on {} before the game starts",
)
FILLERS_BEFORE = ("hey, ", "hi! ", "um ", "ok so ")
FILLERS_AFTER = (" pls", " thx", "!", " :)")

CATEGORICAL = {
    "genres": tuple(GENRES),
    "mood": tuple(MOODS),
    "exclude": tuple(EXCLUDE),
    "people": PEOPLE,
    "language": tuple(LANGUAGES),
}


class Row(NamedTuple):
    request: str
    query: dict
    frame: str


def facts(query: dict) -> list[tuple[str, str]]:
    """The (key, value) of every categorical value of a query."""
    found = []
    for key in CATEGORICAL:
        values = query.get(key, [])
        found += [(key, value) for value in ([values] if isinstance(values, str) else values)]
    return found


def pairs(query: dict) -> set[tuple]:
    """Every two facts of a query that come from two different keys."""
    return {(a, b) for a, b in itertools.combinations(facts(query), 2) if a[0] != b[0]}


def reserve_pairs(rng: random.Random) -> set[tuple]:
    """The pairs that training never sees: of each value with each other key, one in eight or so."""
    reserved = set()
    for first, second in itertools.combinations(CATEGORICAL, 2):
        seconds = list(CATEGORICAL[second])
        rng.shuffle(seconds)
        for i, value in enumerate(CATEGORICAL[first]):
            reserved.add(((first, value), (second, seconds[i % len(seconds)])))
    return {pair for pair in reserved if not contradicts(pair)}


def contradicts(pair: tuple) -> bool:
    """No viewer asks for a genre and rules it out."""
    (first, value), (second, other) = pair
    return first == "genres" and second == "exclude" and value == other


def draw_query(rng: random.Random) -> dict:
    """A query of two to four attributes, keys in the schema's order."""
    query = {}
    keys = set(rng.sample(("mood", "limits", "exclude", "people", "language"), rng.choice((1, 2, 2, 3))))
    if rng.random() < 0.8 or len(keys) == 1:
        query["genres"] = rng.sample(tuple(GENRES), 1)
        with_adjective = [g for g in GENRES if GENRES[g][1] and g not in query["genres"]]
        if rng.random() < 0.2:
            query["genres"].insert(0, rng.choice(with_adjective))
    if "mood" in keys:
        query["mood"] = rng.choice(tuple(MOODS))
    if "limits" in keys:
        query["limits"] = draw_limits(rng)
    if "exclude" in keys:
        query["exclude"] = rng.sample(tuple(EXCLUDE), 2 if rng.random() < 0.15 else 1)
    if "people" in keys:
        query["people"] = [rng.choice(PEOPLE)]
    if "language" in keys:
        query["language"] = rng.choice(tuple(LANGUAGES))
    return query


def draw_limits(rng: random.Random) -> dict:
    kind = rng.choice(("minutes", "minutes", "since", "before", "decade"))
    if kind == "minutes":
        return {"max_minutes": rng.choice(tuple(MINUTES))}
    if kind == "since":
        return {"min_year": rng.choice(YEARS)}
    if kind == "before":
        return {"max_year": rng.choice(YEARS)}
    decade = rng.choice(DECADES)
    return {"min_year": decade, "max_year": decade + 9}


def with_article(words: str) -> str:
    return ("an " if words[0].lower() in "aeiou" else "a ") + words


def say_subject(query: dict, rng: random.Random) -> tuple[str, bool]:
    """The noun of the request, and whether it names the language already."""
    genres = query.get("genres", [])
    mood = rng.choice(MOODS[query["mood"]]) if "mood" in query else ""
    adjectives = [rng.choice(GENRES[genre][1]) for genre in genres[:-1]]
    if genres and GENRES[genres[-1]][1] and rng.random() < 0.35:  # "something light and funny"
        words = ([mood] if mood else []) + adjectives + [rng.choice(GENRES[genres[-1]][1])]
        return "something " + " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words), False
    if not genres:
        nouns = ("something {}", "a {} film") if mood else ("a film", "a movie")
        return rng.choice(nouns).format(mood), False
    noun = rng.choice(GENRES[genres[-1]][0])
    article, rest = noun.split(" ", 1)
    spoken = "language" in query and rng.random() < 0.5
    words = ([mood] if mood else []) + adjectives + ([LANGUAGES[query["language"]]] if spoken else [])
    return (with_article(" ".join([*words, rest])) if words else f"{article} {rest}"), spoken


def say_limits(limits: dict, rng: random.Random) -> str:
    if "max_minutes" in limits:
        return rng.choice(MINUTE_CLAUSES).format(rng.choice(MINUTES[limits["max_minutes"]]))
    if "min_year" in limits and "max_year" in limits:
        return rng.choice(DECADE_CLAUSES).format(rng.choice((limits["min_year"], limits["min_year"] % 100)))
    if "min_year" in limits:
        return rng.choice(MIN_YEAR_CLAUSES).format(limits["min_year"])
    return rng.choice(MAX_YEAR_CLAUSES).format(limits["max_year"])


def say(query: dict, frame: str, rng: random.Random) -> str:
    """The request in a viewer's words."""
    subject, spoken = say_subject(query, rng)
    clauses = []
    if "exclude" in query:  # one clause, so that the order of the answer is the order of the request
        clauses.append(", ".join(rng.choice(EXCLUDE[value]) for value in query["exclude"]))
    if "limits" in query:
        clauses.append(say_limits(query["limits"], rng))
    if "people" in query:
        name = query["people"][0]
        clauses.append(rng.choice(PEOPLE_CLAUSES).format(name.lower() if rng.random() < 0.2 else name))
    if "language" in query and not spoken:
        clauses.append(rng.choice(LANGUAGE_CLAUSES).format(LANGUAGES[query["language"]]))
    rng.shuffle(clauses)
    request = frame.format(", ".join([subject, *clauses]))
    if rng.random() < 0.1:
        request = slip(request, query, rng)
    if rng.random() < 0.1:
        request = rng.choice(FILLERS_BEFORE) + request
    if rng.random() < 0.1:
        request = request.rstrip("?!") + rng.choice(FILLERS_AFTER)
    return request[0].upper() + request[1:] if rng.random() < 0.3 else request


def slip(request: str, query: dict, rng: random.Random) -> str:
    """Swaps two neighbouring letters inside one word of five letters or more; names and numbers are left alone."""
    names = {word for name in query.get("people", []) for word in name.lower().split()}
    words = request.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5 and word.isalpha() and word.lower() not in names]
    if not long:
        return request
    i = rng.choice(long)
    at = rng.randrange(1, len(words[i]) - 2)
    word = words[i]
    words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def draw_frame(split: str, rng: random.Random) -> str:
    if split != "train":
        return rng.choice(VALIDATION_FRAMES if split == "validation" else TEST_FRAMES)
    plain = len(TRAIN_OPENINGS)
    return rng.choice(TRAIN_FRAMES[:plain] if rng.random() < 0.6 else TRAIN_FRAMES[plain:])


def make_rows() -> tuple[dict[str, list[Row]], set[tuple]]:
    """(rows of train, validation and test, reserved pairs): a pure function of SEED."""
    rng = random.Random(SEED)
    reserved = reserve_pairs(rng)
    sizes = {"train": NUM_TRAIN, "validation": NUM_HELD_OUT, "test": NUM_HELD_OUT}
    rows, seen = {split: [] for split in sizes}, set()
    while any(len(rows[split]) < size for split, size in sizes.items()):
        query = draw_query(rng)
        if any(contradicts(pair) for pair in pairs(query)):
            continue
        split = rng.choice(("validation", "test")) if pairs(query) & reserved else "train"
        frame = draw_frame(split, rng)
        request = say(query, frame, rng)
        if len(rows[split]) < sizes[split] and request not in seen and len(request.split()) <= MAX_WORDS:
            seen.add(request)
            rows[split].append(Row(request, query, frame))
    return rows, reserved


def to_line(row: Row) -> str:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": row.request},
        {"role": "assistant", "content": json.dumps(row.query, separators=(",", ":"))},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def main(folder: pathlib.Path = pathlib.Path(__file__).parent) -> None:
    rows, _ = make_rows()
    for split, of_split in rows.items():
        (folder / f"quickstart_{split}.jsonl").write_text("".join(map(to_line, of_split)), encoding="utf-8")


if __name__ == "__main__":
    main()
