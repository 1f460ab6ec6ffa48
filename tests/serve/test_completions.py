"""POST /v1/completions: log-probabilities as lm-evaluation-harness reads them, sampling, limits of an answer."""

import json

import numpy as np
import pytest
from serve_server import SHAPE

from postrain.rollout.chat import for_tokenizer
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams

TEXT = "The capital of 日本 is 東京, and <b>not</b> Kyoto."


def complete(http, status=200, **body):
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_echo_scores_every_token_of_the_prompt_and_exactly_one_more(http, served):
    prompts = [served.tokenizer.encode_text(text) for text in (TEXT, "short", "x")]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    choices = sorted(complete(http, model="tiny", **body)["choices"], key=lambda choice: choice["index"])
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for ids, choice in zip(prompts, choices, strict=True):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        expected, best = score(served, ids)
        np.testing.assert_allclose(found["token_logprobs"][1:-1], expected, atol=1e-4)
        for k, (own, top) in enumerate(zip(found["token_logprobs"], found["top_logprobs"], strict=True)):
            if own is not None:
                assert own in top.values()  # the same float: clients compare it with the largest
            if 0 < k < len(ids):
                assert (own == max(top.values())) == (best[k - 1] == ids[k])
    text, offsets = choices[0]["text"], choices[0]["logprobs"]["text_offset"]
    assert text.startswith(TEXT)
    for token, start, end in zip(choices[0]["logprobs"]["tokens"], offsets, offsets[1:], strict=False):
        assert text[start:end] == token or token.startswith("bytes:")


def score(served, ids):
    """Log-probabilities of all tokens but the first by the forward that trains, and the most probable ids."""
    import jax
    import jax.numpy as jnp

    from postrain.models.transformer import compute_hidden, compute_logits

    tokens = jnp.asarray([ids])
    hidden = compute_hidden(
        served.model.params, served.model.config, tokens, jnp.ones_like(tokens), jnp.arange(len(ids))[None]
    )
    logprobs = np.asarray(jax.nn.log_softmax(compute_logits(served.model.params, served.model.config, hidden)))[0]
    return [logprobs[k, ids[k + 1]] for k in range(len(ids) - 1)], logprobs.argmax(-1).tolist()


def test_a_prompt_alone_is_scored_without_an_answer(http):
    [choice] = complete(http, prompt="one two three", max_tokens=0, echo=True, logprobs=0)["choices"]
    assert choice["text"] == "one two three"
    assert len(choice["logprobs"]["tokens"]) == 3


def test_samples_depend_on_the_seed_and_are_those_of_the_engine(http, served):
    ids = served.tokenizer.encode_text("a b c")
    body = {"prompt": ids, "max_tokens": 10, "temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "n": 3}
    first, again = (complete(http, **body, seed=5, return_token_ids=True)["choices"] for _ in range(2))
    other = complete(http, **body, seed=6, return_token_ids=True)["choices"]
    ids_of = lambda choices: [choice["token_ids"] for choice in choices]
    assert ids_of(first) == ids_of(again) != ids_of(other)
    assert len({tuple(one) for one in ids_of(first)}) == 3
    sampling = SamplingParams(temperature=1.3, top_p=0.9, top_k=50, min_p=0.001, max_new_tokens=10, seed=5)
    sampling = for_tokenizer(sampling, served.tokenizer, served.model.config)
    direct = Engine(served.model.params, served.model.config, **SHAPE).generate([ids], sampling, n=3)
    assert ids_of(first) == [one.tokens for one in direct]


def test_settings_reach_the_engine(http, served):
    greedy = {"prompt": "a b c", "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    plain = complete(http, **greedy)["choices"][0]["token_ids"]
    biased = complete(http, **greedy, logit_bias={"77": 100})["choices"][0]["token_ids"]
    assert biased == [77] * 6
    stopped = complete(http, **greedy, stop_token_ids=[plain[2]])["choices"][0]
    first = plain.index(plain[2]) + 1
    assert (stopped["token_ids"], stopped["finish_reason"], stopped["stop_reason"]) == (plain[:first], "stop", plain[2])
    bias = {"logit_bias": {"77": 100}, "frequency_penalty": 60}
    assert complete(http, **greedy, **bias)["choices"][0]["token_ids"][:3].count(77) == 2
    stop_id = min(served.stop_ids)
    ended = complete(http, **greedy, logit_bias={str(stop_id): 100})["choices"][0]
    assert (ended["token_ids"], ended["text"], ended["finish_reason"]) == ([stop_id], "", "stop")
    going_on = complete(http, **greedy, logit_bias={str(stop_id): 100}, ignore_eos=True)["choices"][0]
    assert (going_on["token_ids"], going_on["finish_reason"]) == ([stop_id] * 6, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_ends_an_answer_is_never_seen(http, stream):
    text = "one, 東京 two; three"
    form = {"structured_outputs": {"choice": [text]}, "prompt": "x", "max_tokens": 40, "stop": ["two; t", "zzz"]}
    pieces, last = [], None
    if stream:
        for event in read_events(http, **form):
            pieces.append(event["choices"][0]["text"])
            last = event["choices"][0]
    else:
        last = complete(http, **form)["choices"][0]
        pieces = [last["text"]]
    assert "".join(pieces) == "one, 東京 "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "two; t")
    assert not any("\ufffd" in piece or "t" in piece for piece in pieces)


def read_events(http, path="/v1/completions", **body):
    with http.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_usage_counts_what_was_computed(http):
    """The second answer to a prompt finds it in the cache, which the first one has filled."""
    chat = {"messages": [{"role": "user", "content": "never asked before " * 8}], "n": 2, "max_tokens": 3}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"prompt": [[*range(900, 940)], [*range(400, 440)]], "n": 2, "max_tokens": 3}),
    ):
        body |= {"ignore_eos": True}
        fresh, again = (http.post(path, json=body).json()["usage"] for _ in range(2))
        assert fresh["completion_tokens"] == (6 if path.endswith("chat/completions") else 12)
        assert fresh["prompt_tokens_details"]["cached_tokens"] == 0
        assert 0 < again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]
        events = read_events(http, path, **body, stream_options={"continuous_usage_stats": True})
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[-1] == fresh["completion_tokens"] and len(set(counts)) > 2


def test_the_requests_of_a_load_generator(http):
    body = {"model": "tiny", "prompt": "hello there", "repetition_penalty": 1.0, "max_tokens": 9, "logprobs": None}
    events = read_events(http, **body, ignore_eos=True, stream_options={"include_usage": True}, extra_thing=7)
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 9
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    ignored = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "extra_thing": 7, "user": "me"})
    assert ignored.headers["x-ignored-fields"] == "'extra_thing', 'user'"
