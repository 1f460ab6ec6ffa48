"""Reward models from config to export: what they learn, log, resume, refuse, and whether `transformers` agrees.

Their losses and gradients are held to trl's in tests/objectives/test_reward_losses.py.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from sft_runs import make_values, read_folder, read_lines, run_cli, without_perf, write_config

import postrain
from postrain import cli
from postrain.checkpoint.record import fingerprint_model, parse_record
from postrain.config import find_row_kind, resolve
from postrain.data.batches.in_memory import load_examples
from postrain.data.documents import layout_of
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.export import export_workdir
from postrain.models.heads import HeadConfig
from postrain.recipes.reward import make_program, prepare, read_last, show_scores
from postrain.rollout.score import score_file
from postrain.sharding import make_mesh
from postrain.training.compatibility import check_record
from postrain.training.model import abstract_model, make_lora_config

ANSWERS = ("chosen", "rejected")
WORDS = ("red", "blue", "green", "grey", "pink", "gold")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_pair(i):
    word, other = WORDS[i % 6], WORDS[(i + 1 + i // 6 % 5) % 6]
    return {"prompt": f"{i} {word}", "chosen": word, "rejected": f"{other} " * (1 + i % 3), "margin": i % 3}


def make_list(i):
    answers = [WORDS[(i + j) % 6] * (1 + j) for j in range(2 + i % 3)]
    return {
        "prompt": f"{i} {WORDS[i % 6]}",
        "completions": answers,
        "scores": [-float(j // 2) for j in range(1, 1 + len(answers))],
    }


def make_steps(i):
    labels = [(i + j) % 3 > 0 for j in range(1 + i % 4)]
    return {"prompt": f"{i}", "completions": ["yes" if label else "no" for label in labels], "labels": labels}


def make_labelled(i):
    return {"prompt": f"{i} ", "completion": WORDS[i % 3], "label": ("warm", "cold", "none")[i % 3]}


def make_rated(i):
    return {"prompt": f"{i} ", "completion": WORDS[i % 3], "label": (0.25, -1.5, 3)[i % 3]}


ROWS = {"bradley_terry": make_pair, "plackett_luce": make_list, "stepwise": make_steps, "cross_entropy": make_labelled}
ROWS["squared_error"] = make_rated


@pytest.fixture(scope="module")
def rows(inputs, tmp_path_factory):
    """LOSS.jsonl and LOSS_eval.jsonl of each loss."""
    folder = tmp_path_factory.mktemp("rows")
    for loss, make in ROWS.items():
        write(folder / f"{loss}.jsonl", [make(i) for i in range(36)])
        write(folder / f"{loss}_eval.jsonl", [make(i) for i in range(36, 43)])
    return folder


def values_of(inputs, rows, loss="bradley_terry", **sections):
    data = {"train": str(rows / f"{loss}.jsonl"), "eval": str(rows / f"{loss}_eval.jsonl")}
    data |= {"label_names": ["warm", "cold", "none"]} if loss == "cross_entropy" else {}
    data |= {"label_numbers": True} if loss == "squared_error" else {}
    own = {"data": data, "eval": {"every": 4, "generate_rows": 0}, "train": {"steps": 8}, "checkpoint": {"every": 4}}
    own["optimizer"] = {"head_learning_rate": 3e-2}
    values = make_values(inputs, **{name: own.get(name, {}) | sections.get(name, {}) for name in own | sections})
    return values | {"recipe": "reward", "reward": {"loss": loss} | sections.get("reward", {})}


@pytest.fixture(scope="module")
def finished(inputs, rows, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reward") / "run"
    reward = {"centering_coef": 0.02, "margin": 0.1, "margin_of": "scores"}
    return workdir, postrain.train(values_of(inputs, rows, reward=reward), workdir)


def test_pairs_are_learned_and_every_number_is_logged(finished):
    workdir, metrics = finished
    lines = read_lines(workdir / "metrics.jsonl")
    names = ("accuracy", "margin", "score_mean", "loss/reward", "loss/centering")
    assert all(f"train/{name}" in line for line in lines[1:] for name in names)
    first, last = lines[0], lines[-1]
    assert last["eval/loss"] < 0.8 * first["eval/loss"] and last["eval/accuracy"] == 1.0
    assert last["eval/margin"] > first["eval/margin"] and last["eval/score_std"] > 0
    assert last["eval/loss"] == pytest.approx(last["eval/loss/reward"] + 0.02 * last["eval/loss/centering"], rel=1e-6)
    assert not any("bins" in name or "square" in name for line in lines for name in line)


def test_the_export_says_what_it_was_trained_on_and_another_head_is_no_resume(inputs, rows, finished, tmp_path):
    workdir = finished[0]
    assert json.loads((workdir / "export" / "config.json").read_text())["postrain_trained_on"] == "text"
    assert cli.main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'again'}"]) == 0
    assert read_folder(tmp_path / "again") == read_folder(workdir / "export")
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    place = workdir / "checkpoints" / str(steps[-1])
    record = parse_record(place, json.loads((place / "run" / "data.json").read_text()))
    config = resolve(values_of(inputs, rows))
    check_record(place, record, config, None, record.model_fingerprint)
    other = [HeadConfig("score", 3, "every")]
    model = fingerprint_model(inputs / "model", make_lora_config(config.model.lora), heads=other)
    with pytest.raises(UserError, match=r"heads: were \(name score, outputs 1, .*\), are \(name score, outputs 3, "):
        check_record(place, record, config, None, model)


def test_rows_of_another_form_that_are_accepted_leave_the_form_open(inputs, rows, finished, tmp_path):
    """A run that has seen text and then conversations has learned neither form alone."""
    shutil.copytree(finished[0], tmp_path / "run")
    say = lambda role, text: [{"role": role, "content": text}]
    pairs = [make_pair(i) for i in range(36)]
    talks = [
        pair | {"prompt": say("user", pair["prompt"])} | {key: say("assistant", pair[key]) for key in ANSWERS}
        for pair in pairs
    ]
    data = {"train": str(write(tmp_path / "talks.jsonl", talks))}
    reward = {"centering_coef": 0.02, "margin": 0.1, "margin_of": "scores"}
    values = values_of(inputs, rows, reward=reward, data=data, train={"steps": 9}, eval={"every": 0})
    with pytest.raises(UserError, match="accept_change=") as caught:
        postrain.train(values, tmp_path / "run")
    values["data"]["accept_change"] = str(caught.value).rpartition("=")[2]
    postrain.train(values, tmp_path / "run")
    assert "postrain_trained_on" not in json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    record = json.loads((tmp_path / "run" / "checkpoints" / "9" / "run" / "data.json").read_text())
    assert record["model_fingerprint"]["trained_on"] == ""


def test_the_report_has_the_table_of_calibration(finished):
    workdir, metrics = finished
    page = (workdir / "report.html").read_text()
    table = json.loads((workdir / "calibration.json").read_text())
    assert table["step"] == 8 and "Calibration on held-out rows at step 8" in page
    gaps = [row["share"] * abs(row["accuracy"] - row["confidence"]) for row in table["bins"]]
    assert sum(gaps) == pytest.approx(metrics["eval/calibration_error"], rel=1e-6)
    assert all(f"{row['confidence']:.1%}" in page for row in table["bins"])
    assert "the score at the coloured token is trained" in page and page.count('title="1 trained token"') == 2
    assert "bradley_terry: 36 documents an epoch, of 36 rows" in page


def test_the_shown_row_has_its_label_and_its_scored_tokens_coloured(inputs, rows):
    tokenizer, lines = load_tokenizer(inputs / "model"), {}
    for loss in ("stepwise", "cross_entropy", "squared_error"):
        config = resolve(values_of(inputs, rows, loss))
        found = load_examples(config.data.train, tokenizer, config.data, kind=find_row_kind(config))
        [(line, sequence)] = show_scores(config, read_last(found.examples[2])).sequences
        lines[loss] = line, int(sequence.loss_mask.sum())
    steps = "steps right, wrong, right"  # of row 2
    assert lines == {"stepwise": (steps, 3), "cross_entropy": ("label none", 1), "squared_error": ("label 3", 1)}


def score(folder, path, output, **options):
    assert score_file(folder, str(path), str(output), **options) == len(read_lines(path))
    return [row["score"] for row in read_lines(output)]


def score_in_transformers(folder, texts):
    """[N, K] of texts in one padded batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.numpy()


def test_transformers_gives_the_scores_and_metrics_of_the_export(finished, rows, tmp_path):
    workdir, metrics = finished
    path = rows / "bradley_terry_eval.jsonl"
    found = np.array(score(workdir / "export", path, tmp_path / "scores.jsonl"))
    texts = [f"{row['prompt']}{row[key]}<|im_end|>" for row in read_lines(path) for key in ("chosen", "rejected")]
    np.testing.assert_allclose(found.ravel(), score_in_transformers(workdir / "export", texts)[:, 0], atol=1e-5)
    assert (found[:, 0] - found[:, 1]).mean() == pytest.approx(metrics["eval/margin"], rel=1e-4)
    assert found.std() == pytest.approx(metrics["eval/score_std"], rel=1e-3)


def test_padding_with_the_end_token_is_put_right(inputs, rows, tmp_path):
    """Where a model pads with the token that ends texts, transformers would score the token before the end."""
    folder = shutil.copytree(inputs / "model", tmp_path / "model")
    for name, change in (("config.json", {"pad_token_id": 2}), ("tokenizer_config.json", {"pad_token": "<|im_end|>"})):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | change))
    values = values_of(inputs, rows, model={"path": str(folder)}, train={"steps": 2}, data={"eval": []})
    postrain.train(values, tmp_path / "run")
    export = tmp_path / "run" / "export"
    path = rows / "bradley_terry_eval.jsonl"
    found = np.array(score(export, path, tmp_path / "scores.jsonl"))
    texts = [f"{row['prompt']}{row[key]}<|im_end|>" for row in read_lines(path) for key in ("chosen", "rejected")]
    assert transformers.AutoTokenizer.from_pretrained(export).pad_token == "<|im_start|>"
    np.testing.assert_allclose(found.ravel(), score_in_transformers(export, texts)[:, 0], atol=1e-5)
    raw = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(raw | {"pad_token_id": 2}))
    assert np.abs(found.ravel() - score_in_transformers(export, texts)[:, 0]).max() > 1e-3, "the trap is there"


def test_stopped_by_a_crash_and_started_again_it_ends_in_the_same_bytes(inputs, rows, finished, tmp_path, monkeypatch):
    from postrain.training.rows import Rows

    next_batch, calls = Rows.__next__, []

    def crash(source):
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError("no room")
        return next_batch(source)

    reward = {"centering_coef": 0.02, "margin": 0.1, "margin_of": "scores"}
    values = values_of(inputs, rows, reward=reward)
    monkeypatch.setattr(Rows, "__next__", crash)
    with pytest.raises(MemoryError):
        postrain.train(values, tmp_path / "run")
    monkeypatch.undo()
    postrain.train(values, tmp_path / "run")
    reference = finished[0]
    assert read_folder(tmp_path / "run" / "export") == read_folder(reference / "export")
    metrics = [without_perf(read_lines(folder / "metrics.jsonl")) for folder in (tmp_path / "run", reference)]
    assert metrics[0] == metrics[1]
    export_workdir(tmp_path / "run", tmp_path / "again")
    assert read_folder(tmp_path / "again") == read_folder(reference / "export")
    with pytest.raises(UserError, match="a reward model is exported whole, with its head: use --format merged"):
        export_workdir(tmp_path / "run", tmp_path / "adapter", "adapter")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_adapters_and_new_tokens_beside_a_classifier_are_merged(inputs, rows, finished, tmp_path, quantization):
    """The head goes on from that of the folder; a token is added to the vocabulary."""
    model = {"path": str(finished[0] / "export"), "quantization": quantization, "new_tokens": {"tokens": ["<x>"]}}
    metrics = postrain.train(values_of(inputs, rows, model=model, train={"steps": 3}), tmp_path / "run")
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["eval/accuracy"] == 1.0, "as the folder's head has it"
    found = score(tmp_path / "run" / "export", rows / "bradley_terry_eval.jsonl", tmp_path / "scores.jsonl")
    assert np.diff(found)[:, 0].mean() == pytest.approx(-metrics["eval/margin"], rel=1e-4)


@pytest.mark.parametrize("loss", ["plackett_luce", "stepwise", "cross_entropy", "squared_error"])
def test_every_kind_of_rows_is_learned_exported_and_scored(inputs, rows, tmp_path, loss):
    """Every parameter trains; then the export trains on as a classifier."""
    model = {"lora": {"rank": 0}}
    values = values_of(inputs, rows, loss, model=model)
    metrics = postrain.train(values, tmp_path / "run")
    first, *_, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert last["eval/loss"] < 0.9 * first["eval/loss"]
    assert loss == "squared_error" or 0 <= metrics["eval/calibration_error"] <= 1
    export, path = tmp_path / "run" / "export", rows / f"{loss}_eval.jsonl"
    found, lines = score(export, path, tmp_path / "scores.jsonl"), read_lines(path)
    if loss == "cross_entropy":
        texts = [f"{row['prompt']}{row['completion']}<|im_end|>" for row in lines]
        expected = torch.softmax(torch.from_numpy(score_in_transformers(export, texts)), -1).numpy()
        shares = [list(one["probabilities"].values()) for one in found]
        assert list(found[0]["probabilities"]) == ["warm", "cold", "none"]
        right = [one["label"] == row["label"] for one, row in zip(found, lines, strict=True)]
        assert np.mean(right) == pytest.approx(metrics["eval/accuracy"])
    elif loss == "squared_error":
        texts = [f"{row['prompt']}{row['completion']}<|im_end|>" for row in lines]
        expected, shares = score_in_transformers(export, texts)[:, 0], found
        errors = [(one - row["label"]) ** 2 for one, row in zip(found, lines, strict=True)]
        assert np.mean(errors) == pytest.approx(metrics["eval/loss"], rel=1e-4)
    else:
        texts = []
        for row in lines:
            steps = row["completions"]
            cut = lambda i, row=row, steps=steps: row["prompt"] + "".join(f"{step}\n" for step in steps[: i + 1])
            whole = lambda i, row=row, steps=steps: f"{row['prompt']}{steps[i]}<|im_end|>"
            texts += [(cut if loss == "stepwise" else whole)(i) for i in range(len(steps))]
        expected, shares = score_in_transformers(export, texts)[:, 0], [one for of_row in found for one in of_row]
    np.testing.assert_allclose(shares, expected, atol=1e-5)

    again = values_of(inputs, rows, loss, model=model | {"path": str(export)}, train={"steps": 1})
    postrain.train(again, tmp_path / "on")
    start = read_lines(tmp_path / "on" / "metrics.jsonl")[0]
    assert start["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5), "it begins where the first run ended"
    assert (tmp_path / "on" / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("loss", ROWS)
def test_the_layout_that_is_compiled_is_that_of_the_rows(inputs, rows, loss):
    config = resolve(values_of(inputs, rows, loss))
    mesh, tokenizer = make_mesh(config.mesh, jax.devices()[:1]), load_tokenizer(inputs / "model")
    options = {"kind": find_row_kind(config), "preparation": prepare(config, mesh)}
    found = load_examples(config.data.train, tokenizer, config.data, **options)
    program = make_program(config, abstract_model(config, config.model.path, mesh), mesh, 1)
    fields = {name: (x.dtype, x.shape[2:]) for name, x in program.abstract_batch.fields.items()}
    assert fields == dict(layout_of(found.examples[0]).arrays)
    assert (found.report.saved_slots > 0) == ("prefix_starts" in fields) == (options["kind"] == "preference")


def test_the_plan_of_a_reward_run_compiles(inputs, rows, tmp_path):
    config = write_config(tmp_path / "c.py", values_of(inputs, rows))
    result = run_cli("plan", f"--config={config}", "--target=cpu:8", "--config.data.batch_size=8", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] and report["flops"]["model_by_kind"]["unembedding"] == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"reward": {"margin_of": "scores"}}, "'reward.margin_of' = 'scores' needs a factor"),
        ({"loss": "stepwise", "reward": {"margin": 1.0}}, "'stepwise' does not read 'reward.margin'"),
        ({"loss": "plackett_luce", "reward": {"label_smoothing": 0.1}}, "does not read 'reward.label_smoothing'"),
        ({"loss": "cross_entropy", "data": {"label_names": ["a"]}}, "'data.label_names' has one name"),
        ({"loss": "squared_error", "data": {"label_numbers": False}}, "reads numbers, not classes: set 'data.label_n"),
        ({"data": {"label_numbers": True}}, "'data.label_numbers' is for 'reward.loss' = 'squared_error'"),
        ({"eval": {"generate_rows": 2}}, "'eval.generate_rows': a reward model generates nothing"),
        ({"export": {"format": "adapter"}}, "'export.format' = 'adapter': a reward model is exported whole"),
    ],
)
def test_settings_that_a_reward_model_cannot_have_are_refused(inputs, rows, tmp_path, sections, words):
    with pytest.raises(UserError, match=words) as caught:
        postrain.train(values_of(inputs, rows, **sections), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "row", "words"),
    [
        ("bradley_terry", make_list(1), r"bad.jsonl:1: a row of preferences has 3 answers.* 'reward.loss' to 'pl"),
        ("bradley_terry", make_pair(0) | {"rejected": "red"}, "bad.jsonl:1: chosen and rejected are equal"),
        ("bradley_terry", make_pair(0) | {"rejected": ""}, "bad.jsonl:1: rejected: 'completion' is empty"),
        ("stepwise", make_steps(1) | {"labels": [True, True]}, "data.train: all labels are 1: there is nothing to"),
        ("cross_entropy", make_labelled(0) | {"label": 3}, "bad.jsonl:1: 'label' must be below 3"),
        ("squared_error", make_rated(0) | {"label": "much"}, "bad.jsonl:1: 'label' must be a finite number"),
        ("squared_error", make_rated(0) | {"label": float("nan")}, "bad.jsonl:1: "),
        ("squared_error", make_rated(0), "data.train: all labels are 0.25: there is nothing to"),
        ("cross_entropy", make_labelled(0), "data.train: all labels are 'warm': there is nothing"),
    ],
)
def test_rows_that_teach_nothing_are_refused(inputs, rows, tmp_path, loss, row, words):
    data = {"train": str(write(tmp_path / "bad.jsonl", [row])), "eval": []}
    with pytest.raises(UserError, match=words) as caught:
        postrain.train(values_of(inputs, rows, loss, data=data), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_classes_without_names_are_false_and_true(inputs, rows, tmp_path):
    lines = [make_labelled(i) | {"label": label} for i, label in enumerate([True, False, 2])]
    data = {"train": str(write(tmp_path / "bad.jsonl", lines)), "eval": [], "label_names": []}
    with pytest.raises(UserError, match=r"bad.jsonl:3: label 2 is not one of the 2 classes, which are counted from 0"):
        postrain.train(values_of(inputs, rows, "cross_entropy", data=data), tmp_path / "run")


def test_a_classifier_of_other_outputs_is_refused(inputs, rows, finished, tmp_path):
    values = values_of(inputs, rows, "cross_entropy", model={"path": str(finished[0] / "export")})
    with pytest.raises(UserError, match="is a classifier of 1 outputs, LABEL_0, and 'reward.loss' = 'cross_entropy' t"):
        postrain.train(values, tmp_path / "run")
