"""Limits, clients that go, a step that fails: what has ended leaves nothing behind."""

import asyncio
import concurrent.futures
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest
from serve_server import KEY, run_server, wait_until

from postrain import cli
from postrain.errors import UserError
from postrain.serve import app
from postrain.serve.app import make_app
from postrain.serve.limits import Limits
from postrain.serve.served import Served

LONG = {"prompt": "x", "max_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(served, folder):
    """One answer at a time, one that waits."""
    with run_server(served.model, folder, slots=1, waiting=1, max_bytes=2000, seconds=1.0) as (small, _, address):
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http:
            yield small, http


def test_without_the_key_only_health_is_answered(running):
    address = running[2]
    assert httpx.get(f"{address}/health").status_code == 200
    for headers in ({}, {"authorization": "Bearer wrong"}):
        reply = httpx.get(f"{address}/v1/models", headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="no", max_retries=0).models.list()


def test_bodies_that_are_too_large(small):
    _, http = small
    body = json.dumps({"prompt": "x" * 3000}).encode()
    for content in (body, iter([body[:1500], body[1500:]])):  # its length said, and not
        assert http.post("/v1/completions", content=content).status_code == 413


def test_a_full_queue_and_the_time_limit(small):
    served, http = small
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(http.post, "/v1/completions", json={**LONG, "n": 2})
        wait_until(lambda: served.engine.num_open == 2)
        refused = http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        late = running.result()
    assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")
    wait_until(lambda: served.engine.num_open == 0)
    with http.stream("POST", "/v1/completions", json={**LONG, "n": 2, "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: served.engine.num_open == 0 and served.engine.engine.is_idle)
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def call_app(served, receive, send, body=b"", path="/v1/completions"):
    """The application without a server before it, and 0.1 seconds for a request. How it answered: (status, error)."""
    own = copy.copy(served)
    own.limits = dataclasses.replace(served.limits, seconds=0.05)
    sent = []

    async def collect(message):
        sent.append(message)
        await send(message)

    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    gate = make_app(own)
    asyncio.run(gate(scope, receive, collect))
    assert gate.num_inside == 0
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_requests_that_stand_still_are_ended(served, monkeypatch):
    monkeypatch.setattr(app, "GRACE", 0.05)
    messages = []

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)

    async def read(message):
        pass

    async def stop_reading(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    half = {"type": "http.request", "body": b'{"prompt"', "more_body": True}
    messages[:] = [half]
    status, body = call_app(served, receive, read)
    assert (status, json.loads(body)["error"]["code"]) == (408, "timeout")
    messages[:] = [{"type": "http.request", "body": json.dumps({**LONG, "stream": True}).encode()}]
    assert call_app(served, receive, stop_reading)[0] == 200
    wait_until(lambda: served.engine.num_open == 0)
    messages[:] = [half, {"type": "http.disconnect"}]
    assert call_app(served, receive, read)[0] == 499  # and nothing is raised


def test_a_request_is_counted_before_it_is_read(small):
    served, http = small
    with served.reserve(), served.reserve():
        refused = http.post("/v1/completions", json={"not even": "checked"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert http.post("/v1/completions", json={"not even": "checked"}).status_code == 400
    assert served.engine.num_open == 0


def test_a_constraint_that_takes_long_holds_nobody_up(http, served, monkeypatch):
    compiled, compile_one = threading.Event(), served.compile
    monkeypatch.setattr(served, "compile", lambda job: compiled.wait(20) and compile_one(job))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"prompt": "x", "max_tokens": 1}
        slow = pool.submit(http.post, "/v1/completions", json=body | {"structured_outputs": {"regex": "a"}})
        wait_until(lambda: served.engine.num_open == 1)
        assert http.post("/v1/completions", json=body).status_code == 200 and not slow.done()
        compiled.set()
        assert slow.result().status_code == 200


def test_the_request_of_a_client_that_goes_is_cancelled(http, served):
    for _ in range(3):
        with http.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}) as reply:
            next(reply.iter_lines())
        wait_until(lambda: served.engine.num_open == 0)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.2)
    wait_until(lambda: served.engine.num_open == 0 and served.engine.engine.is_idle)
    assert not served.engine._tickets and served.engine.engine.slots.cache is None


def test_a_step_that_fails_ends_what_is_under_way_and_no_more(http, served, monkeypatch):
    step, engine = served.engine.engine.step, served.engine.engine

    def fail():
        if engine.num_running:
            monkeypatch.setattr(engine, "step", step)
            raise RuntimeError("broken")
        return step()

    monkeypatch.setattr(engine, "step", fail)
    reply = http.post("/v1/completions", json=LONG)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
    assert served.engine.num_open == 0


def test_an_engine_whose_thread_has_ended_is_not_healthy(small, monkeypatch):
    served, http = small
    assert http.get("/health").status_code == 200
    dead = threading.Thread()
    monkeypatch.setattr(served.engine, "_thread", dead)
    assert http.get("/health").status_code == 503
    refused = http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")


def test_a_command_that_fails_does_not_end_the_thread(http, served, capfd):
    def fail():
        raise RuntimeError("broken command")

    served.engine._commands.put(fail)
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert served.engine.is_alive and "broken command" in capfd.readouterr().err


def test_metrics_count_what_went_on(http):
    before = read_metrics(http)
    http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4, "n": 2, "ignore_eos": True})
    http.post("/v1/completions", json={"prompt": []})
    after = read_metrics(http)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["postrain_prompt_tokens_total"] == 3
    assert grown["postrain_generated_tokens_total"] == 8
    assert grown['postrain_answers_total{finish="length"}'] == 2
    assert grown['postrain_requests_total{status="400"}'] == 1
    assert grown["postrain_time_to_first_token_seconds_count"] == 1
    assert after["postrain_open_answers"] == 0


def read_metrics(http):
    lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_port_that_is_taken_is_named(running, folder, capsys):
    port = running[2].rsplit(":", 1)[1]
    assert cli.main(["serve", str(folder), f"--port={port}"]) == 2
    assert f"--port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err


def test_a_context_beyond_the_models_positions_is_refused(served, folder):
    with pytest.raises(UserError, match="--max-length 513: the model was pre-trained for 512 positions"):
        Served(served.model, "m", str(folder), Limits(max_length=513))


def test_sigterm_lets_running_answers_end(folder, tmp_path):
    command = [sys.executable, "-m", "postrain.cli", "serve", str(folder), "--port=0", "--name=m", "--slots=2"]
    with open(tmp_path / "err", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving m at http://127.0.0.1:"), (tmp_path / "err").read_text()
        address = line.split()[3].removesuffix("/v1,")
        with httpx.Client(base_url=address, timeout=60) as http:
            with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
                refused = httpx.post(f"{address}/v1/completions", json={"prompt": "x"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
