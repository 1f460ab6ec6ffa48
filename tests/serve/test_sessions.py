"""An agent that speaks OpenAI's interface yields rollouts: exact ids, log-probabilities, versions."""

import numpy as np
import openai
import pytest
from serve_server import KEY

from postrain.rollout.chat import encode_prompt
from postrain.rollout.requests import Completion, SamplingParams
from postrain.serve.schemas import Job, Wanted
from postrain.serve.sessions import Sessions


def test_the_turns_of_an_agent_are_recorded(running, http, served):
    address = running[2]
    agent = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, default_headers={"X-Session-ID": "run/7"})
    messages, replies = [{"role": "user", "content": "hi"}], []
    for stream in (False, True):
        asked = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3}
        if stream:
            chunks = list(agent.chat.completions.create(**asked, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = agent.chat.completions.create(**asked).choices[0].message.content
        replies.append(text)
        prompt = encode_prompt(served.tokenizer, messages)
        turns = http.get("/sessions/run/7").json()["turns"]
        assert len(turns) == len(replies)
        [answer] = turns[-1]["answers"]
        assert turns[-1]["prompt_ids"] == prompt
        assert served.tokenizer.decode(answer["token_ids"]) == text
        assert turns[-1]["sampling"]["top_p"] == 0.9 and turns[-1]["sampling"]["seed"] == 3
        # Of the distribution with top_p: larger than the model's by the log of what was kept.
        np.testing.assert_allclose(
            np.array(answer["logprobs"]) + np.log(answer["kept_mass"]), answer["model_logprobs"], atol=1e-4
        )
        assert answer["weight_versions"] == [{"version": "default", "start": 0, "end": 5}]
        messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    assert http.delete("/sessions/run/7").json() == {"id": "run/7", "deleted_turns": 2}
    assert http.get("/sessions/run/7").status_code == 404
    assert http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Session-ID": ""}).status_code == 400


NONE = np.zeros(2, np.float32)
DONE = Completion([5, 6], NONE, NONE, NONE, np.zeros(2, np.int32), "stop")


JOB = Job(((1, 2, 3),), SamplingParams())


def fill(sessions, *names, job=JOB):
    for name in names:
        sessions.add(name, job, {0: DONE}, {0: "default"})
    return sessions.size


@pytest.mark.parametrize("room", [2, 4])
def test_the_oldest_sessions_make_room(room):
    size = fill(Sessions(), "a")
    sessions = Sessions(max_size=room * size)
    fill(sessions, "a", "b", "a", "c")
    kept = [name for name in ("a", "b", "c") if name in sessions._sessions]
    assert kept == (["c"] if room == 2 else ["a", "b", "c"])
    assert sessions.size == (size if room == 2 else 4 * size)


def test_the_oldest_turns_of_a_single_session_make_room():
    sessions = Sessions(max_size=2 * fill(Sessions(), "a"))
    fill(sessions, "a", "a", "a")
    found = sessions.get("a")
    assert (len(found["turns"]), found["forgotten_turns"]) == (2, 1)
    assert sessions.delete("a") == 2 and sessions.size == 0


def test_settings_are_recorded_and_counted():
    plain, sessions = fill(Sessions(), "a"), Sessions()
    long = SamplingParams(stop=("x" * 1000,), logit_bias=tuple((i, 1.0) for i in range(1000)))
    size = fill(sessions, "a", job=Job(((1, 2, 3),), long, wanted=Wanted({"regex": "a" * 1000}, "structured_outputs")))
    assert size > plain + 2000
    assert sessions.get("a")["turns"][0]["sampling"]["constraint"] == {"regex": "a" * 1000}
