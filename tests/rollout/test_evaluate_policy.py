"""`postrain evaluate-policy`: probabilities are the model's own, rows are checked, the report says what it is of."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from tiny_models import make_tiny_model

from postrain import cli
from postrain.errors import UserError
from postrain.rollout.evaluate_policy import evaluate_policy

WORDS = ["red", "blue as the sky", "green"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("policy") / "model", "llama", vocab_size=301)


@pytest.fixture(scope="module")
def reference(model):
    """log p of an answer to a user's message, its stop token included, by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def logp(question, answer):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer + "<|im_end|>")]
        with torch.no_grad():
            logits = network(torch.tensor([ids[0] + ids[1]])).logits[0, :-1].double()
        logprobs = logits.log_softmax(-1)[len(ids[0]) - 1 :]
        return logprobs[torch.arange(len(ids[1])), torch.tensor(ids[1])].sum().item()

    return logp


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(question):
    return [{"role": "user", "content": question}]


def make_rows(count, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        chosen = int(rng.integers(0, 3))
        rows.append(
            {
                "prompt": ask(f"{i} colours"),
                "completion": WORDS[chosen],
                "candidates": WORDS,
                "estimated_rewards": [0.1, 0.5, 0.9],
                "reward": float(rng.random() < 0.2 + 0.3 * chosen),
                "propensity": 1 / 3,
                "member": f"m{i % 5}",
                "page": i,
            }
        )
    return rows


def test_the_estimates_are_those_of_the_probabilities_that_transformers_finds(model, reference, tmp_path, capsys):
    rows = make_rows(24)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert cli.main(["evaluate-policy", str(model), str(file), "--by=member", "--resamples=50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    logprobs = np.array([[reference(row["prompt"][0]["content"], word) for word in WORDS] for row in rows])
    p = np.exp(logprobs - logprobs.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    chosen = np.array([WORDS.index(row["completion"]) for row in rows])
    rewards, q = np.array([row["reward"] for row in rows]), np.array([0.1, 0.5, 0.9])
    weights = 3 * p[np.arange(24), chosen]
    expected = {
        "logged": rewards.mean(),
        "ips": (weights * rewards).mean(),
        "clipped_ips": (np.minimum(weights, 10) * rewards).mean(),
        "snips": (weights * rewards).sum() / weights.sum(),
        "dm": (p @ q).mean(),
        "dr": (p @ q + weights * (rewards - q[chosen])).mean(),
    }
    assert {name: one["value"] for name, one in found["estimates"].items()} == pytest.approx(expected, rel=1e-4)
    assert (found["rows"], found["members"], found["normalised_over"]) == (24, 5, "candidates")
    assert found["keys_not_read"] == ["page"] and found["bootstrap_by"] == "member"
    assert found["mean_weight"] == pytest.approx(weights.mean(), rel=1e-4)
    assert "intervals over 5 members: so few say little of others: expected 10 or more" in found["warnings"]


def test_without_candidates_the_probability_is_that_of_the_text_among_all(model, reference, tmp_path):
    """Messages, and the same as prompt and completion, are one decision; the words after it are the report's."""
    rows = make_rows(6)
    messages = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["completion"]}], "reward": row["reward"],
         "propensity": 0.01} for row in rows
    ]  # fmt: skip
    pairs = [row | {"propensity": 0.01, "candidates": None, "estimated_rewards": None} for row in rows]
    reports = [evaluate_policy(model, write_jsonl(tmp_path / "rows.jsonl", same)) for same in (messages, pairs)]
    assert reports[0].evaluation == reports[1].evaluation
    for row in messages:  # how much a row of the training data counts is of no account
        row["messages"][-1] |= {"weight": 0.5, "train": True}
        row["candidates"] = WORDS
    assert evaluate_policy(model, write_jsonl(tmp_path / "rows.jsonl", messages)).over == "candidates"
    logprobs = [reference(row["prompt"][0]["content"], row["completion"]) for row in rows]
    expected = np.mean([math.exp(logp) / 0.01 for logp in logprobs])
    assert reports[0].evaluation.mean_weight == pytest.approx(expected, rel=1e-4)
    lines = str(reports[0]).splitlines()
    assert lines[1].startswith("its probability of an answer is that among all texts; effective sample size ")
    assert [line.split()[0] for line in lines[3:7]] == ["logged", "ips", "clipped_ips", "snips"]
    assert lines[7].startswith("warning: effective sample size ")
    assert str(reports[1]).endswith("keys that were not read: page"), "member is a key of such rows"


ROW = {"prompt": ask("q"), "completion": "red", "reward": 1.0, "propensity": 0.5}
BAD = {
    "no propensity": ({"propensity": None}, "'propensity' is missing or null, and `postrain evaluate-policy` reads it"),
    "propensity 0": ({"propensity": 0.0}, "'propensity' must be a probability above 0, at most 1; found 0"),
    "no reward": ({"reward": None}, "'reward' is missing or null"),
    "no answer": ({"completion": ""}, "expected the keys 'prompt' and 'completion', or 'messages'"),
    "two forms": ({"messages": ask("q")}, "has 'messages' beside 'prompt' or 'completion'"),
    "no logged answer": ({"candidates": ["blue", "green"]}, "found it 0 times among 2, 2 of them different"),
    "a doubled candidate": ({"candidates": ["red", "red"]}, "'candidates' that are all different"),
    "one candidate": ({"candidates": ["red"]}, "'candidates' must be a list of two or more"),
    "estimates of nothing": ({"estimated_rewards": [1, 2]}, "'estimated_rewards' must be one number for each of"),
    "an estimate that is not": (
        {"candidates": ["red", "blue"], "estimated_rewards": [1, None]},
        r"'estimated_rewards\[1\]' is missing or null, and `postrain evaluate-policy` reads it",
    ),
    "a misspelling": ({"propensiti": 0.5, "propensity": None}, "unknown key 'propensiti'; did you mean 'propensity'?"),
    "a context": ({"context": "words"}, "'context' is not read"),
    "a mixture": (
        {"candidates": ["red", "blue"]},
        "'candidates' must be in all rows or in none, and .*:1 is otherwise",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_are_not_decisions_are_refused_before_a_model_is_read(tmp_path, case):
    change, message = BAD[case]
    file = write_jsonl(tmp_path / "rows.jsonl", [ROW, ROW | change])
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        evaluate_policy(tmp_path / "no model", file)


def test_options_and_members_are_checked(model, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROW])
    for words, message in (
        (["--clip=0"], "error: --clip 0: expected a number above 0"),
        (["--resamples=0"], "error: --resamples 0: expected at least 1"),
        (["--by=member"], f"error: {file}:1: 'member' is missing or null, and --by member reads it"),
    ):
        assert cli.main(["evaluate-policy", str(model), str(file), *words]) == 2
        assert capsys.readouterr().err.startswith(message)
    assert cli.main(["evaluate-policy", str(model), str(file)]) == 0
    told = capsys.readouterr().out
    assert f"{model} on 1 logged row of {file}" in told and told.splitlines()[3].endswith("          1  -")
