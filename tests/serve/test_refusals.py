"""What bad input gets: a status of 4xx in OpenAI's form with the field named, and nothing else disturbed."""

import random

import openai
import pytest

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def user(**more):
    return {"messages": HI, "max_tokens": 2, **more}


def text(**more):
    return {"prompt": "hi", "max_tokens": 2, **more}


def sglang(**more):
    return {"text": "hi", "sampling_params": {"max_new_tokens": 2, **more}}


REFUSED = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, user(model=7), "model"),
    (CHAT, user(temperature="hot"), "temperature"),
    (CHAT, user(temperature=-1), "temperature"),
    (CHAT, user(temperature=True), "temperature"),
    (CHAT, user(top_p=0), "top_p"),
    (CHAT, user(n=0), "n"),
    (CHAT, user(n=1.5), "n"),
    (CHAT, user(n=100), "n"),
    (CHAT, user(max_tokens=0), "max_tokens"),
    (CHAT, user(max_tokens=600), "max_tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": 600}, "max_completion_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
    (CHAT, user(stop=[""]), "stop"),
    (CHAT, user(top_logprobs=3), "top_logprobs"),
    (CHAT, user(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, user(logit_bias={"x": 1}), "logit_bias"),
    (CHAT, user(logit_bias={"151936": 1}), "logit_bias"),
    (CHAT, user(logit_bias={"1": 10**401}), "logit_bias"),
    (CHAT, user(logit_bias={"9" * 5000: 1}), "logit_bias"),
    (CHAT, user(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
    (CHAT, user(stop=[str(i) for i in range(17)]), "stop"),
    (CHAT, user(stop="x" * 1001), "stop"),
    (CHAT, user(stop_token_ids=[-1]), "stop_token_ids"),
    (CHAT, user(stop_token_ids=list(range(40))), "stop_token_ids"),
    (CHAT, user(stream="yes"), "stream"),
    (CHAT, user(stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (CHAT, user(tools=[{"no": "name"}]), "tools"),
    (CHAT, user(tools=7), "tools"),
    (CHAT, user(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice"),
    (CHAT, user(tools=[TOOL], tool_choice="maybe"), "tool_choice"),
    (CHAT, user(tool_choice="required"), "tool_choice"),
    (CHAT, user(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}), "tool_choice"),
    (CHAT, user(functions=[{"name": "f"}]), "functions"),
    (CHAT, user(reasoning_effort="low"), "reasoning_effort"),
    (CHAT, user(continue_final_message=True), "continue_final_message"),
    (CHAT, user(add_generation_prompt=False), "add_generation_prompt"),
    (CHAT, user(chat_template="{{ messages }}"), "chat_template"),
    (CHAT, user(chat_template_kwargs={"custom": 1}), "chat_template_kwargs.custom"),
    (CHAT, user(guided_json={}), "guided_json"),
    (CHAT, user(regex="a"), "regex"),
    (CHAT, user(grammar="start: /a/"), "grammar"),
    (CHAT, user(enable_thinking=False), "enable_thinking"),
    (CHAT, user(add_special_tokens=True), "add_special_tokens"),
    (CHAT, user(echo=True), "echo"),
    (CHAT, user(max_new_tokens=3), "max_new_tokens"),
    (CHAT, user(sampling_params={"top_k": 3}), "sampling_params"),
    (CHAT, user(response_format={"type": "json_object", "schema": {}}), "response_format.schema"),
    (CHAT, user(structured_outputs={"grammar": 'start: "\ud800"'}), "structured_outputs"),
    (CHAT, user(structured_outputs={"json": '{"enum": ["\\ud800"]}'}), "structured_outputs.json"),
    (CHAT, user(response_format={"type": "xml"}), "response_format.type"),
    (CHAT, user(response_format={"type": "json_schema"}), "response_format.json_schema.schema"),
    (
        CHAT,
        user(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}),
        "response_format.json_schema.schema",
    ),
    (CHAT, user(structured_outputs={"regex": "("}), "structured_outputs.regex"),
    (CHAT, user(structured_outputs={"regex": "a", "choice": ["a"]}), "structured_outputs.choice"),
    (CHAT, user(structured_outputs={"regex": "a"}, ignore_eos=True), "ignore_eos"),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": ["a", 7]}, "prompt"),
    (TEXT, {"prompt": [1, -1]}, "prompt"),
    (TEXT, {"prompt": [151_936]}, "prompt"),
    (TEXT, {"prompt": [5] * 512}, "prompt"),
    (TEXT, {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
    (TEXT, text(logprobs=21), "logprobs"),
    (TEXT, text(best_of=3), "best_of"),
    (TEXT, text(suffix="x"), "suffix"),
    (TEXT, text(use_beam_search=True), "use_beam_search"),
    (TEXT, text(seed="x"), "seed"),
    (TEXT, text(repeat_penalty=1.2), "repeat_penalty"),
    (TEXT, text(n_predict=4), "n_predict"),
    (TEXT, text(mirostat=2), "mirostat"),
    (TEXT, {"prompt": [[1]] * 100_000, "n": 128}, "prompt"),
    (TEXT, text(echo=True, logprobs=1, stream=True), "echo"),
    (GENERATE, {}, "input_ids"),
    (GENERATE, {"text": "a", "input_ids": [1]}, "input_ids"),
    (GENERATE, {"input_ids": [151_936]}, "input_ids"),
    (GENERATE, {"input_ids": []}, "input_ids"),
    (GENERATE, sglang(top_p=2), "sampling_params.top_p"),
    (GENERATE, sglang(min_new_tokens=3), "sampling_params.min_new_tokens"),
    (GENERATE, sglang(stop_regex="x"), "sampling_params.stop_regex"),
    (GENERATE, sglang(max_new_tokens=600), "sampling_params.max_new_tokens"),
    (GENERATE, {"text": "a", "lora_path": "x"}, "lora_path"),
    (GENERATE, {"text": "a", "temperature": 0}, "temperature"),
    (GENERATE, sglang(max_tokens=4), "sampling_params.max_tokens"),
    (GENERATE, {"input_ids": [[1]] * 1000, "sampling_params": {"n": 128}}, "input_ids"),
    ("/update_weights_from_disk", {"model_path": "/nowhere", "load_format": "dummy"}, "load_format"),
    ("/update_weights_from_disk", {"model_path": "/nowhere", "keep_pause": True}, "keep_pause"),
    ("/update_weights_from_disk", {}, "model_path"),
    ("/update_weights_from_disk", {"model_path": "/nowhere"}, "model_path"),
]


def test_a_field_that_cannot_be_taken_is_named(http):
    for path, body, param in REFUSED:
        reply = http.post(path, content=_encode(body))
        assert reply.status_code == 400, (path, body, reply.text)
        error = reply.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (body, error)
        assert error["message"] and "\n" not in error["message"]


def _encode(body):
    import json

    return json.dumps(body).encode()  # httpx refuses half a surrogate pair


def test_fields_that_nobody_reads_are_named_wherever_they_stand(http):
    schema = {"name": "x", "schema": {"const": 1}, "other": 1}
    body = user(
        max_tokens=8, stream_options={"some": 1}, response_format={"type": "json_schema", "json_schema": schema}
    )
    reply = http.post(CHAT, json=body)
    assert reply.headers["x-ignored-fields"] == "'response_format.json_schema.other', 'stream_options.some'"
    reply = http.post(GENERATE, json=sglang(skip_special_tokens=True))
    assert reply.headers["x-ignored-fields"] == "'sampling_params.skip_special_tokens'"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"1" * 9999 + b"}"]
)
def test_a_body_that_is_not_an_object_of_json(http, data):
    reply = http.post(CHAT, content=data)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_json"


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-9'"):
        client.chat.completions.create(model="gpt-9", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="tiny", input="x")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512


def test_random_bodies_never_make_the_server_fail(http, served):
    values = [None, True, 0, 1, -1, 3.5, 1e308, "", "x", [], [1], ["a"], {}, {"a": 1}, "\udfff", [[]], [None], 2**70]
    values += [10**401, {"1": 10**401}, {"9" * 5000: 1}, {"grammar": 'start: "\ud800"'}, {"regex": "\udc00"}]
    values += [{"1": 1e308}, {"type": "json_schema", "json_schema": {"schema": {"enum": ["\ud800"]}}}]
    names = "messages model temperature top_p top_k min_p n stop seed stream logprobs top_logprobs logit_bias tools"
    names += " tool_choice response_format structured_outputs chat_template_kwargs max_tokens stream_options prompt"
    names += " echo stop_token_ids ignore_eos min_tokens return_token_ids text input_ids sampling_params rid"
    names, rng, seen = names.split(), random.Random(0), set()
    for _ in range(150):
        path, base = rng.choice([(CHAT, user()), (TEXT, text()), (GENERATE, sglang())])
        body = base | {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 2))}
        reply = http.post(path, content=_encode(body))
        seen.add(reply.status_code)
        assert reply.status_code in (200, 400, 404), (body, reply.text)
    assert {200, 400} <= seen
    assert served.engine.num_open == 0
