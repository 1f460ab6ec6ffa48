"""KTO and its relatives from config to export, and references that are held, cached, or the model without adapters."""

import json

import pytest
from sft_runs import crash_at_batch, make_values, read_folder, read_lines, without_perf

import postrain

WORDS = ("red", "blue", "green", "grey", "pink", "gold")


def write_answers(path, count, first=0):
    """Questions whose right answer is the word of the question; a third of the answers are wrong; ragged lengths."""
    lines = []
    for i in range(first, first + count):
        word, other = WORDS[i % 6], WORDS[(i + 1 + i // 6 % 5) % 6]
        answer = word if i % 3 else f"{other} " * (1 + i % 4)
        lines.append(json.dumps({"prompt": f"{i} {word}", "completion": answer, "label": bool(i % 3)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def answers(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    write_answers(folder / "train.jsonl", 36)
    write_answers(folder / "eval.jsonl", 7, first=36)
    return folder


def values_of(inputs, answers, **sections):
    data = {"train": str(answers / "train.jsonl"), "eval": str(answers / "eval.jsonl")}
    own = {"data": data, "eval": {"every": 4, "generate_rows": 0}, "train": {"steps": 8}, "checkpoint": {"every": 4}}
    values = make_values(inputs, **{name: own.get(name, {}) | sections.get(name, {}) for name in own | sections})
    return values | {
        "recipe": "preference",
        "preference": {"loss": "kto", "beta": 0.5} | sections.get("preference", {}),
    }


@pytest.fixture(scope="module")
def finished(inputs, answers, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unpaired") / "run"
    return workdir, postrain.train(values_of(inputs, answers), workdir)


def test_answers_are_learned_by_their_labels(finished):
    workdir, metrics = finished
    lines = read_lines(workdir / "metrics.jsonl")
    names = [f"{of}/{name}" for of in ("rewards", "logps") for name in ("chosen", "rejected")]
    assert all(
        f"train/{name}" in line for line in lines[1:] for name in (*names, "rewards/accuracies", "kl", "desirable")
    )
    first, last = lines[0], lines[-1]
    # The reference is the model without its adapters, which have no effect at the start.
    assert first["eval/loss"] == pytest.approx(0.5, rel=1e-6) and first["eval/rewards/margins"] == first["eval/kl"] == 0
    assert last["eval/loss"] < 0.7 * first["eval/loss"] and last["eval/rewards/accuracies"] > 0.5
    assert last["eval/kl"] != 0 and last["eval/desirable"] == pytest.approx(4 / 7)
    margin = last["eval/rewards/chosen"] - last["eval/rewards/rejected"]
    assert metrics["eval/rewards/margins"] == pytest.approx(margin, rel=1e-6) and margin > 1


def test_the_weight_of_a_step_is_its_labelled_answers(inputs, answers, tmp_path, capfd):
    """The packed rows of an epoch as one batch: mismatched answers fill rows and count for nothing."""
    values = values_of(inputs, answers, data={"batch_size": 11}, train={"steps": 1}, eval={"before": False})
    values["export"] = {"format": "none"}
    postrain.train(values, tmp_path / "run")
    [line] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["train/weight"] == 36 and line["train/desirable"] == pytest.approx(24 / 36)
    text = capfd.readouterr().out
    assert "labels      24 true, 12 false: 2.00 to 1 by their weights, where 1 to 1.33 is advised" in text
    assert "set 'preference.undesirable_weight' to 2" in text
    assert "mismatched  36 answers to other prompts, 0 of them cut to fit beside the row's own; 0 rows" in text


def test_stopped_by_a_crash_and_started_again_it_ends_in_the_same_bytes(inputs, answers, finished, tmp_path):
    with crash_at_batch(7):
        postrain.train(values_of(inputs, answers), tmp_path / "run")
    postrain.train(values_of(inputs, answers), tmp_path / "run")
    assert read_folder(tmp_path / "run" / "export") == read_folder(finished[0] / "export")
    metrics = [without_perf(read_lines(folder / "metrics.jsonl")) for folder in (tmp_path / "run", finished[0])]
    assert metrics[0] == metrics[1]


def test_a_held_reference_is_the_base_without_its_adapters(inputs, answers, finished, tmp_path):
    """To the bit: its adapters are those that have no effect yet."""
    values = values_of(inputs, answers, preference={"reference": "live"})
    postrain.train(values, tmp_path / "run")
    metrics = [without_perf(read_lines(folder / "metrics.jsonl")) for folder in (tmp_path / "run", finished[0])]
    assert metrics[0] == metrics[1]
    assert read_folder(tmp_path / "run" / "export") == read_folder(finished[0] / "export")


def test_a_held_reference_of_every_parameter_is_the_cached_one(inputs, answers, tmp_path):
    lines = {}
    for reference in ("cached", "live"):
        values = values_of(inputs, answers, model={"lora": {"rank": 0}}, preference={"reference": reference})
        postrain.train(values | {"optimizer": {"learning_rate": 1e-3}}, tmp_path / reference)
        lines[reference] = without_perf(read_lines(tmp_path / reference / "metrics.jsonl"))
    assert lines["live"][-1]["eval/loss"] < 0.95 * lines["live"][0]["eval/loss"]
    for held, cached in zip(lines["live"], lines["cached"], strict=True):
        for name, value in cached.items():
            print(held["step"], name, held[name], value)
