"""Text as it comes is the text of all tokens, for tokenizers of every kind of decoder."""

import random

import pytest
from real_tokenizers import get_tokenizer_folder

from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.rollout.chat import TextStream
from postrain.serve.streams import TextWindow

TEXT = "naïve 東京 👩‍🚀!\n\n  def f(x):\n\treturn x  # <b> ÿ"


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
            window, stream = TextWindow(tokenizer, stops), TextStream(tokenizer, stops)
            pieces = [window.push(token) for token in tokens] + [window.end()]
            expected = "".join([stream.push(token) for token in tokens] + [stream.end()])
            assert "".join(pieces) == expected
            assert (window.stop is not None) == stream.ended
            assert len(window._ids) < 20  # what is decoded again
