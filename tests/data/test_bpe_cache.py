"""Ids found word by word are those of the whole text, whatever stands at the places where it is cut."""

import itertools
import json
import random

import pytest
import tokenizers
from rendering_fixtures import load_bare, save_small_tokenizer
from tokenizers import pre_tokenizers

from postrain.data.rendering import bpe_cache
from postrain.data.rendering.bpe_cache import encode_texts

# What the cuts look at: letters and none, both sorts of white space, digits, apostrophes, slashes, added tokens.
PIECES = [
    *"ab  \n'./5,(",
    "The",
    " the",
    "'s",
    "'LL",
    "don't",
    "x.y",
    "foo(Bar)",
    "\r\n",
    "\t",
    "\u00a0",
    "\u180e",
    "\x1c",
]
PIECES += [
    "\x00",
    "\u3000",
    "é",
    "e\u0301",
    " \u0301",
    "ß",
    "你好",
    "12",
    "½",
    "²",
    "Ⅷ",
    "👩‍👩‍👧",
    "<|im_end|>",
    "<|",
    "_",
    "ǅ",
]
CUT = ("qwen3", "llama3", "gptoss", "digits", "gpt2")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load_one(name):
        if name not in ("digits", "gpt2", "swallow", "metaspace"):
            return load_bare(name).fast
        kind = name if name in ("swallow", "metaspace") else "byte_level"
        path = save_small_tokenizer(tmp_path_factory.mktemp(name), kind) / "tokenizer.json"
        fast = tokenizers.Tokenizer.from_file(str(path))
        if name == "digits":  # as SmolLM2's
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            fast.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return fast

    return load_one


@pytest.mark.parametrize("name", [*CUT, "deepseek_v3", "gemma3", "swallow", "metaspace"])
def test_ids_are_those_of_the_whole_text(load, name):
    """And the places: of every added token, and of none that it has not."""
    fast, rng = load(name), random.Random(name)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 30))) for _ in range(1500)]
    texts += [
        "".join(three) for three in itertools.product(["a", ".", "\n", " ", "  ", "7", "\n\n", "'s", "/"], repeat=4)
    ]
    assert (find_words(fast) is not None) == (name in CUT)
    added = fast.get_added_tokens_decoder()
    for text, found in zip(texts, encode_texts(fast, texts), strict=True):
        whole = fast.encode(text, add_special_tokens=False)
        assert found.ids.tolist() == whole.ids, repr(text)
        where = {place: start for start, place in zip(found.starts, found.places, strict=True)}
        for place, token in enumerate(whole.ids):
            assert token not in added or where[place] == whole.offsets[place][0], repr(text)


def test_words_that_were_met_are_not_encoded_again(load):
    fast = load("gpt2")
    known = bpe_cache.Words(fast, {})
    text = " ".join(f"word{i % 50} and." for i in range(1000))
    expected = fast.encode(text).ids
    assert (
        known.encode([text])[0].ids.tolist() == expected and len(known._known) == 54
    )  # word, 50 numbers, and, the dot; the first word has no space
    known._fast = None  # all of it is known
    assert known.encode([text, text])[1].ids.tolist() == expected


def test_what_is_remembered_is_bounded(load, monkeypatch):
    monkeypatch.setattr(bpe_cache, "_KNOWN", 100)
    fast = load("gpt2")
    known = bpe_cache.Words(fast, {})
    texts = [" ".join(f"w{i}{'x' * (i % 90)}" for i in range(n, n + 60)) for n in range(0, 1200, 60)]
    for text in texts * 2:
        (found,) = known.encode([text])
        assert found.ids.tolist() == fast.encode(text).ids
        assert len(known._known) <= 100 and max(map(len, known._known)) <= bpe_cache._LONGEST


def find_words(fast):
    return bpe_cache.find_words(fast, repr(fast.get_added_tokens_decoder()))


def changed(spec, **changes):
    return tokenizers.Tokenizer.from_str(json.dumps(spec | changes))


def test_a_tokenizer_with_another_way_to_cut_is_left_to_the_library(load):
    spec = json.loads(load("gpt2").to_str())
    split = {"type": "Split", "pattern": {"Regex": bpe_cache._LLAMA3}, "behavior": "Isolated", "invert": False}
    other = split | {"pattern": {"Regex": bpe_cache._LLAMA3.replace(r"|\s+(?!\S)", "")}}
    level = spec["pre_tokenizer"]
    token = spec["added_tokens"][0]
    assert find_words(changed(spec)) and find_words(changed(spec, pre_tokenizer=split))
    for change in (
        {"pre_tokenizer": other},
        {"pre_tokenizer": split | {"behavior": "MergedWithPrevious"}},
        {"pre_tokenizer": level | {"use_regex": False}},
        {"pre_tokenizer": level | {"add_prefix_space": True}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [token | {"lstrip": True}]},
        {"added_tokens": [token | {"content": "a b"}]},
        {"added_tokens": [token, token | {"id": token["id"] + 1, "content": "<n>", "normalized": True}]},
        {"added_tokens": [token | {"normalized": True}], "normalizer": {"type": "NFC"}},
        {"model": spec["model"] | {"dropout": 0.1}},
    ):
        assert find_words(changed(spec, **change)) is None, change


def test_tokens_added_after_its_first_use_are_found(load):
    fast = changed(json.loads(load("gpt2").to_str()))
    text = "so <new> it <new>went"
    before = encode_texts(fast, [text])[0].ids.tolist()
    for token in ("<new>", tokenizers.AddedToken("<new>", lstrip=True)):
        fast.add_special_tokens([token])
        found = encode_texts(fast, [text])[0].ids.tolist()
        assert found == fast.encode(text).ids and found != before
