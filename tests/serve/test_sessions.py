"""An agent that speaks OpenAI's interface yields rollouts: exact ids, log-probabilities, versions."""

import numpy as np
import openai
import pytest
from serve_server import KEY

from postrain.rollout.chat import encode_prompt
from postrain.rollout.requests import Completion, SamplingParams
from postrain.serve.schemas import Job
from postrain.serve.sessions import Sessions


def test_the_turns_of_an_agent_are_recorded(running, http, served):
    address = running[2]
    agent = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, default_headers={"X-Session-ID": "episode 7"})
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
        turns = http.get("/sessions/episode 7").json()["turns"]
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
    assert http.delete("/sessions/episode 7").json() == {"id": "episode 7", "deleted_turns": 2}
    assert http.get("/sessions/episode 7").status_code == 404
    assert http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Session-ID": ""}).status_code == 400


@pytest.mark.parametrize("most", [10, 100])
def test_the_oldest_sessions_make_room(most):
    sessions, none = Sessions(max_tokens=most), np.zeros(2, np.float32)
    done = Completion([5, 6], none, none, none, np.zeros(2, np.int32), "stop")
    for name in ("a", "b", "a", "c"):
        sessions.add(name, Job(((1, 2, 3),), SamplingParams()), {0: done}, {0: "default"})
    kept = [name for name in ("a", "b", "c") if name in sessions._turns]
    assert kept == (["c"] if most == 10 else ["a", "b", "c"])
    assert sessions.num_tokens == (5 if most == 10 else 20)
