"""A reward model over HTTP gives the scores that `postrain score` writes."""

import json

import httpx
import jax
from serve_server import run_gate
from tiny_models import make_tiny_model

from postrain import cli
from postrain.files import read_jsonl
from postrain.hf.classifier import load_trunk, save_classifier
from postrain.models.heads import HeadConfig, init_heads
from postrain.serve.limits import Limits
from postrain.serve.server import open_model

ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"prompt": "hi", "chosen": " a", "rejected": " longer b"},
    {"prompt": "hi", "generated": {"text": "an answer", "finished": True}},
]


def test_rows_are_scored_as_by_the_command(tmp_path):
    base = make_tiny_model(tmp_path / "base", "llama")
    config, params = load_trunk(base)
    head = HeadConfig("score", 1)
    params |= init_heads([head], config, jax.random.key(0))
    save_classifier(tmp_path / "scorer", params, config, head, source_folder=base)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert cli.main(["score", str(tmp_path / "scorer"), str(tmp_path / "rows.jsonl"), f"--output={tmp_path}/out"]) == 0
    expected = [row["score"] for _, row in read_jsonl(tmp_path / "out")]
    _, gate = open_model(str(tmp_path / "scorer"), "judge", Limits())
    with run_gate(gate) as address, httpx.Client(base_url=address, timeout=60) as http:
        found = http.post("/v1/score", json={"model": "judge", "rows": ROWS}).json()
        assert [one["score"] for one in found["data"]] == expected
        [alone] = http.post("/v1/score", json=ROWS[0]).json()["data"]
        assert abs(alone["score"] - expected[0]) < 1e-5
        for body, param in (({"rows": []}, "rows"), ({"rows": [ROWS[0], {"x": 1}]}, "rows[1]"), ({}, "rows[0]")):
            reply = http.post("/v1/score", json=body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
        assert http.post("/v1/chat/completions", json={}).status_code == 404
        assert "postrain_requests_total" in http.get("/metrics").text
