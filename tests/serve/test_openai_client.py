"""The unmodified `openai` package against a running server."""

from postrain.rollout.chat import encode_prompt, generate

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 東京 👩‍🚀"}]
GREEDY = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}


def test_a_chat_is_answered_as_by_generate(client, served):
    reply = client.chat.completions.create(**GREEDY)
    [expected] = generate(served.model, [MESSAGES], max_new_tokens=12)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "length"
    prompt = encode_prompt(served.tokenizer, MESSAGES)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 12)
    assert reply.model == "tiny" and reply.object == "chat.completion"


def test_a_stream_joins_to_the_whole(client):
    whole = client.chat.completions.create(**GREEDY, n=2, seed=3, extra_body={"return_token_ids": True})
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content == whole.choices[1].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert len(whole.choices[0].token_ids) == 12
