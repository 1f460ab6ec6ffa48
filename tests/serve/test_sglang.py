"""POST /generate: ids in, ids out; weights from a folder, in the middle of an answer too."""

import concurrent.futures
import json
import shutil
import time

import numpy as np
import pytest
from serve_server import SHAPE, make_qwen, run_server, wait_until
from test_completions import score

from postrain.errors import UserError
from postrain.rollout.chat import for_tokenizer, load_chat_model
from postrain.rollout.engine import Engine
from postrain.rollout.requests import SamplingParams


def generate(http, **body):
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_ids_and_log_probabilities_are_those_of_the_engine(http, served):
    ids = served.tokenizer.encode_text("one two three four")
    asked = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "max_new_tokens": 8, "sampling_seed": 4}
    found = generate(http, input_ids=ids, sampling_params=asked, return_logprob=True, top_logprobs_num=2, rid="mine")
    sampling = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, max_new_tokens=8, seed=4)
    sampling = for_tokenizer(sampling, served.tokenizer, served.model.config)
    [direct] = Engine(served.model.params, served.model.config, **SHAPE).generate([ids], sampling)
    assert found["output_ids"] == direct.tokens
    assert found["text"] == served.tokenizer.decode(direct.tokens)
    meta = found["meta_info"]
    values, tokens, _ = zip(*meta["output_token_logprobs"], strict=True)
    assert list(tokens) == direct.tokens
    np.testing.assert_allclose(values, direct.model_logprobs, atol=1e-4)
    np.testing.assert_allclose(meta["output_token_sampling_logprobs"], direct.logprobs, atol=1e-4)
    assert [len(one) for one in meta["output_top_logprobs"]] == [2] * 8
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", 4, 8)
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 8}]


def test_several_prompts_and_samples_and_the_prompts_scores(http, served):
    prompts = [served.tokenizer.encode_text(text) for text in ("a b c d", "x y")]
    asked = {"temperature": 0, "max_new_tokens": 2, "n": 2}
    found = generate(http, input_ids=prompts, sampling_params=asked, return_logprob=True, logprob_start_len=0)
    assert len(found) == 4
    for one, ids in zip(found, (prompts[0], prompts[0], prompts[1], prompts[1]), strict=True):
        entries = one["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in entries] == ids and entries[0][0] is None
        np.testing.assert_allclose([value for value, _, _ in entries[1:]], score(served, ids)[0], atol=1e-4)


def test_a_stream_gives_all_until_then(http):
    asked = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True}
    whole = generate(http, text="hello", sampling_params=asked)
    with http.stream("POST", "/generate", json={"text": "hello", "sampling_params": asked, "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len(events) > 1 and events[-1]["output_ids"] == whole["output_ids"]
    for one, following in zip(events, events[1:], strict=False):
        assert following["output_ids"][: len(one["output_ids"])] == one["output_ids"]
        assert following["text"].startswith(one["text"])


@pytest.fixture
def updated(served, folder, tmp_path):
    """A server of its own, whose weights may change, and a folder of others."""
    other = make_qwen(tmp_path / "other", seed=1)
    with run_server(served.model, folder, api_key="") as (own, _, address):
        import httpx

        with httpx.Client(base_url=address, timeout=60) as http:
            yield own, http, other


def test_versions_have_names_of_their_own(updated, monkeypatch):
    """Automatic ones too; that of weights which the probe refuses is free again, and their number too."""
    own, _, other = updated
    own.update_weights(str(other), "2", "recompute")
    own.update_weights(str(other), None, "recompute")
    assert own.versions == {0: "default", 1: "2", 2: "3"}

    def refuse(params):
        raise UserError("the probe shows other weights")

    with monkeypatch.context() as patch:
        patch.setattr(own.engine.engine._weights, "check", refuse)
        with pytest.raises(UserError, match="probe"):
            own.update_weights(str(other), "mine", "abort")
    assert own.versions == {0: "default", 1: "2", 2: "3"} and own.version == "3"
    own.update_weights(str(other), "mine", "recompute")
    assert own.versions[3] == own.version == "mine"


def test_weights_are_swapped_while_an_answer_goes_on(updated, folder, monkeypatch):
    own, http, other = updated
    engine, step, count = own.engine.engine, own.engine.engine.step, 0

    def wait_for_the_update():
        nonlocal count
        if count > 20 and engine.version == 0:
            time.sleep(0.01)
            return []
        events = step()
        count += sum(len(event.tokens) for event in events)
        return events

    monkeypatch.setattr(engine, "step", wait_for_the_update)
    ids = own.tokenizer.encode_text("one two three")
    new, old = load_chat_model(other), own.model
    asked = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(generate, http, input_ids=ids, sampling_params=asked)
        wait_until(lambda: own.engine.engine.num_running)
        reply = http.post("/update_weights_from_disk", json={"model_path": str(other), "weight_version": "step-7"})
        assert reply.status_code == 200 and reply.json()["success"], reply.text
        found = running.result()
    spans = found["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "step-7"]
    assert (spans[0]["start"], spans[0]["end"], spans[1]["end"]) == (0, spans[1]["start"], 60)
    # Before the update the answer is that of the old weights, after it each token is the new weights' best.
    start = spans[1]["start"]
    sampling = for_tokenizer(SamplingParams(max_new_tokens=8, ignore_eos=True), own.tokenizer, old.config)
    [before] = Engine(old.params, old.config, **SHAPE).generate([ids], sampling)
    count = min(start, 8)
    assert found["output_ids"][:count] == before.tokens[:count]
    [after] = Engine(new.params, new.config, **SHAPE).generate([[*ids, *found["output_ids"][:start]]], sampling)
    assert found["output_ids"][start : start + 8] == after.tokens
    one = asked | {"max_new_tokens": 1}
    assert generate(http, input_ids=ids, sampling_params=one)["meta_info"]["weight_version"] == "step-7"
    # The name that the server was started with is still the model's, and the new one is too.
    for name in (own.name, str(folder), str(other)):
        assert http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_folder_that_cannot_be_used_changes_nothing(updated, tmp_path):
    own, http, other = updated
    asked = {"text": "x", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    before = generate(http, **asked)["output_ids"]
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-1000])
    odd = shutil.copytree(own.folder, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0, "rope_parameters": None}))
    for folder in (other, odd, tmp_path / "none"):
        reply = http.post("/update_weights_from_disk", json={"model_path": str(folder)})
        assert (reply.status_code, reply.json()["success"]) == (400, False), reply.text
        assert str(folder) in reply.json()["message"] and reply.json()["error"]["param"] == "model_path"
    after = generate(http, **asked)
    assert after["output_ids"] == before and after["meta_info"]["weight_version"] == "default"
