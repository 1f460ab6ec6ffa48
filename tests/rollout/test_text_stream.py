"""Text as it comes is the text of all tokens, for tokenizers of every kind of decoder."""

import random

import pytest
from real_tokenizers import get_tokenizer_folder

from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.rollout.text_stream import TextWindow

TEXT = "naïve 東京 👩‍🚀!\n\n  def f(x):\n\treturn x  # <b> ÿ"


def decode_until(tokenizer, tokens, stops):
    """(the text before the first stop, whether there is one), by decoding all ids at every token.

    What was given out stays, though a run of bytes that turns out to be no text may decode to something else later.
    """
    given = ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        whole = given + text[len(given) :]
        if places := [whole.find(stop) for stop in stops if stop in whole]:
            return whole[: min(places)], True
        given = given if text.endswith("\ufffd") else whole
    return given + tokenizer.decode(tokens)[len(given) :], False


@pytest.mark.parametrize("name", ["qwen3", "phi3"])  # bytes; pieces with spaces, some of them bytes
def test_a_window_gives_the_text_of_all_tokens(name):
    tokenizer, rng = load_tokenizer(get_tokenizer_folder(name)), random.Random(0)
    ids = tokenizer.encode_text(TEXT)
    samples = [ids, *(rng.choices(ids, k=40) for _ in range(30))]
    samples += [rng.choices(range(tokenizer.vocab_size), k=30) for _ in range(20)]
    for tokens in samples:
        whole = tokenizer.decode(tokens)
        cut = rng.randrange(len(whole))
        for stops in ((), (whole[cut : cut + 3] or "x", "zzz"), ("\ufffdq", whole[-2:] + "more")):
            window = TextWindow(tokenizer, stops)
            pieces = [window.push(token) for token in tokens] + [window.end()]
            assert ("".join(pieces), window.stop is not None) == decode_until(tokenizer, tokens, stops)
            assert len(window._ids) < 20  # what is decoded again
