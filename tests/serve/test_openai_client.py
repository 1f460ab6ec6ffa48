"""The unmodified `openai` package against a running server."""

import json

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


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
# The random model is led to write a call by a constraint on its text.
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'


def lead_to(text):
    return {"structured_outputs": {"choice": [text]}}


def test_a_call_comes_as_tool_calls_and_its_result_is_taken_back(client, served):
    asked = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 80}
    reply = client.chat.completions.create(**asked, extra_body=lead_to("I look.\n" + CALL))
    message, [call] = reply.choices[0].message, reply.choices[0].message.tool_calls
    assert (message.content, reply.choices[0].finish_reason) == ("I look.", "tool_calls")
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "東京"},
    )
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=lead_to("I look.\n" + CALL)))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    [streamed] = [one for delta in deltas for one in delta.tool_calls or ()]
    assert (streamed.index, streamed.function) == (0, streamed.function.__class__(**call.function.model_dump()))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The client's own objects go back as they are.
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    turns = [*MESSAGES, message, result]
    again = client.chat.completions.create(model="tiny", messages=turns, tools=TOOLS, max_tokens=2)
    rendered = encode_prompt(served.tokenizer, [*MESSAGES, json.loads(message.model_dump_json()), result], tools=TOOLS)
    assert again.usage.prompt_tokens == len(rendered)
    assert CALL in served.tokenizer.decode(rendered)
    off = client.chat.completions.create(**asked, tool_choice="none", extra_body=lead_to(CALL))
    assert off.choices[0].message.content == CALL and not off.choices[0].message.tool_calls


def test_a_call_can_be_forced(client):
    """Of any function, or of a named one; the arguments keep its schema."""
    parameters = {"type": "object", "properties": {"n": {"$ref": "#/$defs/few"}}, "required": ["n"]}
    parameters |= {"additionalProperties": False, "$defs": {"few": {"enum": [1, 2]}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("one", "two")]
    for choice, names in (("required", {"one", "two"}), ({"type": "function", "function": {"name": "two"}}, {"two"})):
        reply = client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=tools, tool_choice=choice, n=4, temperature=2, max_tokens=200, seed=1
        )
        for one in reply.choices:
            [call] = one.message.tool_calls
            assert one.finish_reason == "tool_calls" and one.message.content is None
            assert call.function.name in names and json.loads(call.function.arguments)["n"] in (1, 2)


def test_log_probabilities_of_tokens_and_of_the_most_probable(client, served):
    reply = client.chat.completions.create(
        **GREEDY, logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True}
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert sorted((one.logprob for one in entry.top_logprobs), reverse=True) == [
            one.logprob for one in entry.top_logprobs
        ]
    written = b"".join(bytes(entry.bytes) for entry in content)
    assert written.decode(errors="replace") == reply.choices[0].message.content
    streamed = client.chat.completions.create(**GREEDY, stream=True, logprobs=True, top_logprobs=3)
    choices = [chunk.choices[0] for chunk in streamed]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.bytes for entry in entries] == [entry.bytes for entry in content]


def test_answers_in_the_form_of_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "size": {"enum": [1, 2, 3]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=form, temperature=1.5, n=3, max_tokens=200, seed=1
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert set(value) == {"name", "size"} and value["size"] in (1, 2, 3) and len(value["name"]) <= 5


def test_reasoning_is_told_from_the_answer(client, served):
    """By the switch of the template, and where the model writes the tags itself."""
    ids = {}
    for thinking in (True, False):
        kwargs = {"chat_template_kwargs": {"enable_thinking": thinking}}
        reply = client.chat.completions.create(**GREEDY, extra_body={**kwargs, "return_token_ids": True})
        ids[thinking] = reply.prompt_token_ids
        assert ids[thinking] == encode_prompt(served.tokenizer, MESSAGES, thinking=thinking)
    assert ids[True] != ids[False]
    text = "<think>\nhm 東\n</think>\n\nyes"
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, extra_body=lead_to(text))
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm 東", "yes")
