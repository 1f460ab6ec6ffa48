"""Text in and out: streaming adds up to the whole, prompts are rendered as rows are."""

import pytest
from tiny_models import make_tiny_model

from postrain.data.rendering import render_prompt
from postrain.errors import UserError
from postrain.rollout.chat import TextStream, answer_prompt, encode_prompt, generate, load_chat_model
from postrain.rollout.sampler import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_chat_model(make_tiny_model(tmp_path_factory.mktemp("chat") / "model", "qwen3", vocab_size=301))


def test_a_stream_adds_up_and_never_shows_half_a_character(model):
    text = "naïve 東京 👩‍🚀!"
    stream = TextStream(model.tokenizer)
    pieces = [stream.push(token) for token in model.tokenizer.encode_text(text)]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_at_the_end(model):
    ids = model.tokenizer.encode_text("東")[:2]
    stream = TextStream(model.tokenizer)
    assert [stream.push(token) for token in ids] == ["", ""]
    assert stream.end() == model.tokenizer.decode(ids)


def test_prompts_are_rendered_as_serving_does(model):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = render_prompt(messages, model.tokenizer).tolist()
    assert encode_prompt(model.tokenizer, "hi", "be brief") == expected
    assert encode_prompt(model.tokenizer, messages) == expected
    assert encode_prompt(model.tokenizer, "hi", raw=True) == model.tokenizer.encode_text("hi")
    with pytest.raises(UserError, match="raw prompts are plain text"):
        encode_prompt(model.tokenizer, messages, raw=True)


def test_streamed_is_returned(model):
    pieces = []
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    answer = answer_prompt(model, "hi", sampling, write=pieces.append)
    assert "".join(pieces) == answer.text
    assert [answer.text] == generate(model, "hi", max_new_tokens=12, temperature=1.0, seed=3)


def test_one_string_is_one_prompt(model):
    assert len(generate(model, "hello", max_new_tokens=2)) == 1
    assert len(generate(model, ["hello", "you"], max_new_tokens=2)) == 2
