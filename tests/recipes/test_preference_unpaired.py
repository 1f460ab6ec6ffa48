"""KTO and its relatives from config to export, and references that are held, cached, or the model without adapters."""

import json
import shutil

import jax
import numpy as np
import pytest
from sft_runs import crash_at_batch, make_values, read_folder, read_lines, without_perf

import postrain
from postrain.config import resolve
from postrain.data.batches.in_memory import iter_eval_batches
from postrain.errors import UserError
from postrain.hf.config import read_config
from postrain.models.params import merge_params, num_params, param_specs, shapes_of
from postrain.plan.plan import count_held
from postrain.recipes import preference
from postrain.sharding import make_mesh
from postrain.training.model import Forward, abstract_model, load_model
from postrain.training.reference import FIELD, add_reference_logprobs, hold_reference, take_reference
from postrain.training.rows import open_train_rows, place_batch
from postrain.training.session import open_session

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
    one = [json.dumps({"prompt": "say red", "completion": word, "label": word == "red"}) for word in WORDS[:2]]
    (tmp_path / "eval.jsonl").write_text("\n".join(one) + "\n")
    data = {"batch_size": 11, "eval": str(tmp_path / "eval.jsonl")}
    values = values_of(inputs, answers, data=data, train={"steps": 1}, eval={"before": False})
    values["export"] = {"format": "none"}
    postrain.train(values, tmp_path / "run")
    [line] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["train/weight"] == 36 and line["train/desirable"] == pytest.approx(24 / 36)
    assert "eval/loss" in line and "eval/kl" not in line, "held-out rows of one prompt have no answer to another"
    text, report = capfd.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert "24 true, 12 false" in report and "mismatched  36 answers to other prompts" in report
    assert "train: 36 documents an epoch, of 36 rows" in report and "<p>label false</p>" in report
    _, other = report.split("<p>its prompt with an answer to another one: mismatched, not trained</p>")
    assert "<span" not in other[: other.index("</pre>")], "nothing of it is coloured as trained"
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


def test_a_finished_run_is_not_written_down_with_a_key_that_trained_nothing(inputs, answers, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    before = read_folder(tmp_path / "run")
    message = "this run is finished: 8 steps with preference.beta = 0.5; nothing is left to train with 0.1: use another"
    with pytest.raises(UserError, match=message):
        postrain.train(values_of(inputs, answers, preference={"beta": 0.1}), tmp_path / "run")
    assert read_folder(tmp_path / "run") == before
    # What updates do not depend on may change, and is exported anew.
    values = values_of(inputs, answers, eval={"every": 2}) | {"export": {"dtype": "bfloat16"}}
    postrain.train(values, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["export"]["dtype"] == "bfloat16"


def test_a_held_reference_is_the_base_without_its_adapters(inputs, answers, finished, tmp_path):
    """To the bit: adapters that have no effect yet are left out of both."""
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
        assert held.keys() == cached.keys()
        for name, value in cached.items():  # sums of some 30 log p
            if held["step"] > 1 or not name.endswith("accuracies"):  # before, rounding decides the order
                assert held[name] == pytest.approx(value, rel=1e-6, abs=1e-5), (held["step"], name)


def test_the_log_p_of_a_held_reference_are_those_that_are_cached(inputs, answers, tmp_path):
    values = values_of(inputs, answers, model={"lora": {"rank": 0}}, preference={"reference": "live"})
    with open_session(resolve(values), tmp_path / "run") as session:
        rows = open_train_rows(session, kind="labelled", preparation=preference.prepare(session.config))
        model = hold_reference(load_model(session.config, session.model_folder, session.mesh))
        forward = Forward(model.config, chunk=64)
        extend = add_reference_logprobs(session, model, forward, rows.example_set)
        arrays = next(iter_eval_batches(rows.example_set, session.config.data))
        batch = place_batch(arrays, session.mesh)
        moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model.params)
        run = jax.jit(lambda params: forward.logprobs(params, batch)[0].logprobs)
        held = run(take_reference(merge_params(moved, model.frozen)))
        np.testing.assert_allclose(held, extend(arrays)[FIELD], rtol=1e-6, atol=1e-6)
        assert np.abs(held - run(moved)).max() > 0.1


def test_a_stream_of_answers_is_learned_against_a_held_reference(inputs, answers, tmp_path):
    data = {"streaming": True, "stream": {"shards": 2}}
    options = {"loss": "bco", "reference": "live"}
    values = values_of(inputs, answers, data=data, model={"lora": {"rank": 0}}, preference=options)
    postrain.train(values | {"optimizer": {"learning_rate": 1e-3}}, tmp_path / "run")
    first, *_, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["eval/loss"] == pytest.approx(np.log(2), rel=1e-5) and "eval/kl" not in first
    assert last["eval/loss"] < 0.9 * first["eval/loss"]


def test_the_plan_counts_a_held_reference(inputs, answers):
    """In the compute dtype what is rounded to it, per device; with adapters nothing, new rows in float32."""
    held = {}
    for rank, tokens in ((0, []), (4, []), (4, ["<x>", "<y>"])):
        model = {"lora": {"rank": rank}, "compute_dtype": "bfloat16", "new_tokens": {"tokens": tokens}}
        for reference in ("cached", "live"):
            config = resolve(values_of(inputs, answers, model=model, preference={"reference": reference}))
            mesh = make_mesh(config.mesh, jax.devices()[:1])
            program = preference.make_program(config, abstract_model(config, inputs / "model", mesh), mesh, 10)
            held[rank, len(tokens), reference] = count_held(program)["parameters_frozen"]
    size = num_params(shapes_of(param_specs(read_config(inputs / "model"))))
    added = [held[rank, tokens, "live"] - held[rank, tokens, "cached"] for rank, tokens in ((0, 0), (4, 0), (4, 2))]
    assert held[0, 0, "cached"] == 0 and 2 * size <= added[0] < 2.1 * size
    assert added[1] == 0 and added[2] > 0 and added[2] % 4 == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"micro_batches": 2}}, "'kto' compares all answers of an update with each other: set 'train.micro_"),
        (
            {"train": {"micro_batches": 2}, "preference": {"loss": "bco"}},
            "'bco' compares all answers of an update with each other: set 'train.micro_batches' to 1",
        ),
        (
            {"data": {"streaming": True, "stream": {"shards": 2}}},
            "'kto' pairs each prompt with the answer to another one, .* 'bco' or 'apo_zero_unpaired'",
        ),
        (
            {
                "model": {"lora": {"rank": 0}},
                "data": {"streaming": True, "stream": {"shards": 2}},
                "preference": {"loss": "bco"},
            },
            "'data.streaming' does not have: .* or set 'preference.reference' to 'live'",
        ),
        ({"preference": {"loss": "sigmoid", "desirable_weight": 2.0}}, "does not read 'preference.desirable_weight'"),
        ({"preference": {"label_smoothing": 0.1}}, "'kto' does not read 'preference.label_smoothing'"),
        ({"data": {"label_names": ["bad", "bad"]}}, "'data.label_names' must be different names; found bad, bad"),
        ({"data": {"label_names": ["up", "down"]}}, "would make the first name false, whatever it says: leave it out"),
        ({"preference": {"loss": "sigmoid"}, "data": {"label_names": ["a"]}}, "'data.label_names' is of rows of kind"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(inputs, answers, tmp_path, sections, words):
    with pytest.raises(UserError, match=words) as caught:
        postrain.train(values_of(inputs, answers, **sections), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("a", "b", True), ("c", "d", True)],
            "all 2 rows have the label True; expected both: give rows",
        ),
        ([("a", "b", True), ("c", "d", 2)], r"train.jsonl:2: the label is 2; expected true or false \(1 or 0\)"),
        ([("a", "b", True), ("a", "d", False)], "none of 2 rows can be paired with the answer to another prompt"),
    ],
)
def test_rows_that_tell_nothing_are_refused(inputs, tmp_path, rows, words):
    lines = [json.dumps(dict(zip(("prompt", "completion", "label"), row, strict=True))) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    for mixture in ({}, {"temperature": 2.0}):
        with pytest.raises(UserError, match=words) as caught:
            data = {"eval": [], "mixture": mixture}
            postrain.train(values_of(inputs, tmp_path, data=data), tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_a_run_does_not_start_from_an_adapter_whose_base_would_be_its_reference(inputs, answers, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(inputs / "model"), "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    values = values_of(inputs, answers, model={"path": str(tmp_path / "adapter")})
    with pytest.raises(UserError, match="merge it into its base model first"):
        postrain.train(values, tmp_path / "run")
