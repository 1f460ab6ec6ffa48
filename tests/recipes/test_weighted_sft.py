"""Reward-weighted fine-tuning from config to export: what it is equal to, what it prefers, how it resumes."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from sft_runs import make_values, read_folder, read_lines, without_perf

import postrain
from postrain.config import Config, MeshConfig, SftSection, WeightsSection, resolve
from postrain.errors import UserError
from postrain.export import export_workdir
from postrain.recipes.sft import make_weight_meter
from postrain.sharding import make_mesh
from postrain.training.model import abstract_model, load_model
from postrain.training.rows import Rows
from postrain.training.step_means import StepMeans

WORDS = ("red", "blue", "green", "grey", "pink", "gold")


def write_logged(path, reward_of, count=36):
    """Questions that were answered with their word, or with another one: rewards by ``reward_of(i, is_right)``."""
    rows = []
    for i in range(count):
        right = i % 3 != 0
        answer = WORDS[i % 6] if right else WORDS[(i + 1) % 6]
        messages = [{"role": "user", "content": f"{i} {WORDS[i % 6]}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "reward": reward_of(i, right), "member": i % 4, "propensity": 0.5})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values_of(inputs, rows, weights, **sections):
    values = make_values(inputs, data={"train": str(rows), "eval": []}, checkpoint={"every": 2}, **sections)
    return values | {"sft": {"weights": weights}}


def test_a_reward_that_only_tells_members_apart_gives_the_bytes_of_supervised_fine_tuning(inputs, tmp_path, capsys):
    """With each member's mean as the baseline nothing is left to prefer; without it members of high rewards decide."""
    rows = write_logged(tmp_path / "rows.jsonl", lambda i, right: [0.1, 0.7, -2.0, 30.0][i % 4])
    short = {"train": {"steps": 3}}
    runs = {
        "plain": {"mode": "none"},
        "members": {"mode": "advantage", "baseline": "member", "temperature": 0.3},
        "alone": {"mode": "exp", "temperature": 10.0},
    }
    exports, printed = {}, {}
    for name, weights in runs.items():
        postrain.train(values_of(inputs, rows, weights, **short), tmp_path / name)
        exports[name], printed[name] = read_folder(tmp_path / name / "export"), capsys.readouterr().out
    assert exports["members"] == exports["plain"] != exports["alone"]
    line = read_lines(tmp_path / "members" / "metrics.jsonl")[-1]
    assert line["train/weights/effective_share"] == 1 and line["train/weights/mean"] == 1
    assert "effective sample size 36.0 of 36 rows (100.0%)\n" in printed["members"]
    assert "baseline    member explains 100.0% of the variance of rewards; 4 members\n" in printed["members"]
    assert "'reward' (36 rows)" in printed["plain"] and "'reward' (36 rows)" not in printed["alone"]
    shares = [line["train/weights/effective_share"] for line in read_lines(tmp_path / "alone" / "metrics.jsonl")]
    assert 0 < min(shares) < 0.9, "rows of reward 30 decide"
    report = (tmp_path / "alone" / "report.html").read_text()
    assert "Effective share of the tokens of an update" in report and "mode exp, temperature 10.0" in report


def test_what_a_head_explains_is_of_all_documents_of_a_line():
    """Not of each update alike, of which one may have few; and an update without any explains nothing."""
    config = Config(sft=SftSection(weights=WeightsSection(mode="advantage", baseline="head")))
    measure, means = make_weight_meter(config, make_mesh(MeshConfig()), variance=4.0), StepMeans()
    for loss, documents in ((4.0, 1.0), (0.0, 3.0), (0.0, 0.0)):
        value = {"train/loss/value": loss, "weight_of/loss/value": documents}
        means.add(measure(value | {"train/weights/mean": 1.0, "train/weights/square": 1.0}, None))
    line = means.values()
    assert line["train/loss/value"] == 1 and line["train/value/explained_variance"] == 0.75


def test_a_head_trains_beside_the_vocabulary_and_is_held_against_plain_means(inputs, tmp_path, capsys):
    """Rewards differ by member, which no prompt names: here the mean of a member's rewards is the better baseline."""
    rows = write_logged(tmp_path / "rows.jsonl", lambda i, right: right + [0.1, 0.7, -2.0, 3.0][i % 4])
    weights = {"mode": "advantage", "baseline": "head", "temperature": 0.5, "clip": 20.0}
    values = values_of(inputs, rows, weights, train={"steps": 4}, optimizer={"head_learning_rate": 0.03})
    postrain.train(values, tmp_path / "run")
    printed, lines = capsys.readouterr().out, read_lines(tmp_path / "run" / "metrics.jsonl")
    rewards = np.array([json.loads(line)["reward"] for line in rows.read_text().splitlines()])
    assert f"baseline    head, which starts at the mean reward, {rewards.mean():.4g}" in printed
    for line in lines:
        explained = 1 - line["train/loss/value"] / rewards.var()
        assert line["train/value/explained_variance"] == pytest.approx(explained, abs=1e-6)  # of a float32 near 0
        assert line["train/loss"] == pytest.approx(line["train/loss/sft"] + 0.1 * line["train/loss/value"], rel=1e-5)
        assert 0 < line["train/weights/effective_share"] < 1 and "train/weights/square" not in line
    assert re.search(
        "warning     the head explains .* of the variance of rewards, the mean of the other rows of", printed
    )
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Baselines of rewards" in report and "the mean of the other rows of the same member" in report

    # The language model's folder has no head; the checkpoint has it, and is exported without it, too.
    assert "export      without the head 'value', which stays in the checkpoints\n" in printed
    assert "without the head 'value'" in export_workdir(tmp_path / "run", tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "run" / "export")
    export_workdir(tmp_path / "run", tmp_path / "adapter", "adapter")
    names = lambda path: set(load_file(path))
    assert names(tmp_path / "again" / "model.safetensors") == names(inputs / "model" / "model.safetensors")
    assert all(".lora_" in name for name in names(tmp_path / "adapter" / "adapter_model.safetensors"))

    # What `postrain plan` compiles has the head as well.
    config = resolve(values)
    mesh = make_mesh(config.mesh)
    model, planned = (make(config, inputs / "model", mesh) for make in (load_model, abstract_model))
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert shapes(model.params) == shapes(planned.params) and "heads" in planned.params and planned.projects


WAYS = {
    "exp": {"mode": "exp", "temperature": 0.2},
    "streamed": {"mode": "ips", "clip": 2.5},
    "head": {"mode": "advantage", "baseline": "head", "temperature": 0.2},
}


@pytest.mark.parametrize("way", WAYS)
def test_stopped_by_a_crash_and_started_again_it_ends_in_the_same_bytes(inputs, tmp_path, monkeypatch, way):
    """In memory exp, whose weights come from all rows; streamed ips, whose weights are an array of the batch; a head
    beside all parameters, whose weights are made in the step."""
    rows = write_logged(tmp_path / "rows.jsonl", lambda i, right: right + i % 5 / 10)
    weights, sections = WAYS[way], {"train": {"steps": 4, "micro_batches": 2}}
    values = values_of(inputs, rows, weights, **sections)
    if way == "head":
        values["model"]["lora"] = {"rank": 0}
    if way == "streamed":
        values["data"] |= {"streaming": True, "stream": {"shards": 2}}
        values["sft"] |= {"label_smoothing": 0.1}
    postrain.train(values, tmp_path / "whole")
    next_batch, calls = Rows.__next__, []

    def crash(rows):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no room")
        return next_batch(rows)

    monkeypatch.setattr(Rows, "__next__", crash)
    with pytest.raises(MemoryError):
        postrain.train(values, tmp_path / "parts")
    monkeypatch.undo()
    postrain.train(values, tmp_path / "parts")
    lines = [without_perf(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts")]
    assert lines[0] == lines[1] and "train/weights/effective_share" in lines[0][0]
    assert read_folder(tmp_path / "parts" / "export") == read_folder(tmp_path / "whole" / "export")
    # Other weights are other data.
    changed = values | {"sft": values["sft"] | {"weights": weights | {"clip": 2.0}}}
    changed["train"] = values["train"] | {"steps": 6}
    with pytest.raises(
        UserError, match="documents were trained with weights of mode .*, are with weights of mode .*clip 2.0"
    ):
        postrain.train(changed, tmp_path / "parts")
    # With a key of the data too: the config alone tells that, the rows both, whose code is the one that is accepted.
    changed["data"] = values["data"] | {"packing_window": 7}
    for words in ("has changed: data.packing_window", "data.packing_window.*; documents were trained.*'sft.weights'"):
        with pytest.raises(UserError, match=words + ".*accept_change=") as caught:
            postrain.train(changed, tmp_path / "parts")
        changed["data"]["accept_change"] = str(caught.value).rpartition("=")[2]
    postrain.train(changed, tmp_path / "parts")


REFUSED = {
    "a baseline that is not read": ({"mode": "exp", "baseline": "member"}, {}, "'exp' does not read 'sft.weights.base"),
    "a temperature that is not read": ({"mode": "ips", "temperature": 2.0}, {}, "does not read 'sft.weights.temp"),
    "weights that are off": ({"clip": 2.0}, {}, "'sft.weights.mode' = 'none' does not read 'sft.weights.clip'"),
    "an advantage over nothing": ({"mode": "advantage"}, {}, "set 'sft.weights.baseline' to 'member', 'item', 'va"),
    "a mean over a stream": (
        {"mode": "advantage", "baseline": "item"},
        {"streaming": True},
        "'sft.weights.baseline' = 'item' is a mean over all rows, which 'data.streaming' does not have",
    ),
    "a negative clip": ({"mode": "exp", "clip": -1.0}, {}, "sft.weights.clip"),
    "a head over a stream": (
        {"mode": "advantage", "baseline": "head"},
        {"streaming": True},
        "'sft.weights.baseline' = 'head' starts at the mean of all rewards, which 'data.streaming' does not have",
    ),
    "a head without its mode": ({"mode": "exp", "baseline": "head"}, {}, "'exp' does not read 'sft.weights.base"),
    "a coefficient of no head": (
        {"mode": "advantage", "baseline": "member", "head_coef": 0.5},
        {},
        "'sft.weights.head_coef' is read with 'sft.weights.baseline' = 'head' alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_go_together_are_refused_before_anything_is_read(tmp_path, case):
    weights, data, message = REFUSED[case]
    values = {"model": {"path": "none"}, "data": {"train": "rows.jsonl"} | data, "train": {"steps": 2}}
    with pytest.raises(UserError, match=message):
        postrain.train(values | {"sft": {"weights": weights}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
