"""Direct preference optimisation from config to export: what it learns, logs, resumes and refuses.

Its loss and gradients are held to trl's in tests/objectives/test_preference_losses.py.
"""

import json
import re

import numpy as np
import pytest
import transformers
from sft_runs import crash_at_batch, make_values, read_folder, read_lines, run_cli, without_perf, write_config

import postrain
from postrain.data.documents import layout_of
from postrain.data.kinds.preference import LAYOUT
from postrain.errors import UserError
from postrain.recipes.preference import make_program
from postrain.sharding import make_mesh
from postrain.training.model import abstract_model
from postrain.training.rows import prepare_groups

WORDS = ("red", "blue", "green", "grey", "pink", "gold")


def write_pairs(path, count, first=0):
    """Questions whose better answer is the word of the question, the worse one another word; ragged lengths."""
    lines = []
    for i in range(first, first + count):
        word, other = WORDS[i % 6], WORDS[(i + 1 + i // 6 % 5) % 6]
        lines.append(json.dumps({"prompt": f"{i} {word}", "chosen": word, "rejected": f"{other} " * (1 + i % 3)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 36)
    write_pairs(folder / "eval.jsonl", 7, first=36)
    return folder


def values_of(inputs, pairs, **sections):
    data = {"train": str(pairs / "train.jsonl"), "eval": str(pairs / "eval.jsonl")}
    own = {"data": data, "eval": {"every": 4, "generate_rows": 0}, "train": {"steps": 8}, "checkpoint": {"every": 4}}
    values = make_values(inputs, **{name: own.get(name, {}) | sections.get(name, {}) for name in own | sections})
    return values | {"recipe": "preference", "preference": {"beta": 0.5} | sections.get("preference", {})}


@pytest.fixture(scope="module")
def finished(inputs, pairs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("preference") / "run"
    return workdir, postrain.train(values_of(inputs, pairs), workdir)


def test_pairs_are_learned_and_every_number_of_the_margin_is_logged(finished):
    workdir, metrics = finished
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected"]
    assert all(f"train/{name}" in line for line in lines[1:] for name in names)
    first, last = lines[0], lines[-1]
    # The reference is the model without its adapters, which have no effect at the start.
    assert first["eval/loss"] == pytest.approx(np.log(2), rel=1e-6) and first["eval/rewards/margins"] == 0
    assert last["eval/loss"] < 0.95 * first["eval/loss"] and last["eval/rewards/accuracies"] > 0.5
    margin = last["eval/rewards/chosen"] - last["eval/rewards/rejected"]
    assert metrics["eval/rewards/margins"] == pytest.approx(margin, rel=1e-5)


def test_the_weight_of_a_step_is_its_pairs(inputs, pairs, tmp_path):
    """The packed rows of an epoch as one batch: its weight is the number of all pairs.

    With their prompts shared they are in fewer rows, and the update is the same.
    """
    lines = []
    for share, rows in (("off", 11), ("auto", 9)):
        data = {"batch_size": rows, "share_prompts": share}
        values = values_of(inputs, pairs, data=data, train={"steps": 1}, eval={"before": False})
        values["export"] = {"format": "none"}
        postrain.train(values, tmp_path / share)
        lines += without_perf(read_lines(tmp_path / share / "metrics.jsonl"))
    plain, shared = lines
    assert plain["train/weight"] == shared["train/weight"] == 36, "36 pairs in 11 rows, and in 9"
    for name, value in plain.items():
        if not name.endswith("accuracies"):  # in training both answers have the same reward: rounding decides
            assert shared[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_exported_model_has_the_logged_margins(inputs, pairs, finished):
    """transformers, on the two folders and no adapters, gives the margins of the last evaluation."""
    import torch

    workdir, metrics = finished
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy, reference = load(workdir / "export"), load(inputs / "model")

    def logp(model, prompt, answer):
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt").input_ids
        end = torch.tensor([[tokenizer.eos_token_id]])
        ids = torch.cat([ids, end], 1)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1)
        return logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]][start - 1 :].sum().item()

    margins = []
    for row in read_lines(pairs / "eval.jsonl"):
        gain = lambda answer, row=row: logp(policy, row["prompt"], answer) - logp(reference, row["prompt"], answer)
        margins.append(0.5 * (gain(row["chosen"]) - gain(row["rejected"])))
    assert np.mean(margins) == pytest.approx(metrics["eval/rewards/margins"], rel=1e-3)
    assert np.mean(np.array(margins) > 0) == metrics["eval/rewards/accuracies"]


def test_stopped_by_a_crash_and_started_again_it_ends_in_the_same_bytes(inputs, pairs, finished, tmp_path):
    with crash_at_batch(7):
        postrain.train(values_of(inputs, pairs), tmp_path / "run")
    postrain.train(values_of(inputs, pairs), tmp_path / "run")
    reference = finished[0]
    assert read_folder(tmp_path / "run" / "export") == read_folder(reference / "export")
    metrics = [without_perf(read_lines(folder / "metrics.jsonl")) for folder in (tmp_path / "run", reference)]
    assert metrics[0] == metrics[1]


def test_the_report_shows_the_margins(finished):
    page = (finished[0] / "report.html").read_text()
    assert re.search("rewards/margins|Reward margin", page)
    assert "shared prompts: 206 slots saved, 20.9% of those that the answers would take" in page
    assert "text prompts are trained as plain text, without the chat template: serve them with --raw" in page


def test_the_layout_that_is_compiled_is_that_of_the_rows(inputs, pairs):
    from postrain.config import resolve
    from postrain.data.batches.in_memory import load_examples
    from postrain.data.rendering.tokenizer import load_tokenizer

    config, tokenizer = resolve(values_of(inputs, pairs)), load_tokenizer(inputs / "model")
    rows = load_examples(config.data.train, tokenizer, config.data, kind="preference")
    assert layout_of(rows.examples[0]) == LAYOUT
    preparation = prepare_groups(config)
    shared = load_examples(config.data.train, tokenizer, config.data, kind="preference", preparation=preparation)
    mesh = make_mesh(config.mesh)
    program = make_program(config, abstract_model(config, inputs / "model", mesh), mesh, 1)
    assert layout_of(shared.examples[0]).arrays.keys() == program.abstract_batch.fields.keys() > LAYOUT.arrays.keys()


def test_the_plan_of_a_preference_run_compiles(inputs, pairs, tmp_path):
    config = write_config(tmp_path / "c.py", values_of(inputs, pairs))
    result = run_cli("plan", f"--config={config}", "--target=cpu:8", "--config.data.batch_size=8", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["fits"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"model": {"lora": {"rank": 0}}, "preference": {"reference": "base"}},
            "'preference.reference' = 'base' .* needs 'model.lora.rank' above 0",
        ),
        (
            {"model": {"new_tokens": {"tokens": ["<x>"]}}, "preference": {"reference": "base"}},
            "'preference.reference' = 'base' .* no 'model.new_tokens'",
        ),
        (
            {"model": {"lora": {"rank": 0}}, "data": {"streaming": True, "stream": {"shards": 2}}},
            "computed once for all rows, which 'data.streaming' does not have",
        ),
        ({"preference": {"loss": "simpo", "reference": "cached"}}, "'preference.loss' = 'simpo' has no reference"),
        ({"eval": {"generate_rows": 2}}, "'eval.generate_rows'"),
        (
            {"data": {"share_prompts": "on"}, "model": {"attention": "flash_tpu"}},
            "'model.attention' = 'flash_tpu' computes no shared prompts, but 'data.share_prompts' is 'on': set the one",
        ),
    ],
)
def test_settings_that_dpo_cannot_have_are_refused(inputs, pairs, tmp_path, sections, words):
    with pytest.raises(UserError, match=words) as caught:
        postrain.train(values_of(inputs, pairs, **sections), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_lists_of_three_answers_are_refused(inputs, tmp_path):
    row = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 2, 3]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    values = values_of(inputs, tmp_path, data={"eval": []})
    with pytest.raises(UserError, match=r"train.jsonl:1: a row of preferences has 3 answers; expected 2"):
        postrain.train(values, tmp_path / "run")


def test_a_loss_without_a_reference_trains_every_parameter(inputs, pairs, tmp_path):
    """With a second loss, whose mean is over tokens and not over pairs."""
    values = values_of(inputs, pairs, model={"lora": {"rank": 0}}, export={"format": "none"})
    values |= {"preference": {"loss": "orpo", "beta": 0.2, "nll_coef": 0.5}}
    postrain.train(values, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    for line in lines[1:]:
        total = line["train/loss/preference"] + 0.5 * line["train/loss/nll"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-6)
        assert line["train/weight/nll"] > line["train/weight/preference"]
    first, last = lines[0], lines[-1]
    assert last["eval/loss"] < 0.95 * first["eval/loss"] and last["eval/logps/chosen"] > first["eval/logps/chosen"]


def test_lists_are_learned_by_their_best_answer(inputs, tmp_path):
    lines = []
    for i in range(30):
        answers = [WORDS[i % 6], *(WORDS[(i + 1 + j) % 6] for j in range(1 + i % 4))]
        scores = [3.0, *(-float(j) for j in range(1, len(answers)))]
        lines.append(
            json.dumps({"prompt": f"{i} {WORDS[i % 6]}", "completions": answers[::-1], "scores": scores[::-1]})
        )
    for name, part in (("train", lines[:24]), ("eval", lines[24:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    values = values_of(inputs, tmp_path, data={"sequence_length": 256}, export={"format": "none"})
    postrain.train(values | {"preference": {"loss": "softmax", "beta": 0.5}}, tmp_path / "run")
    first, *_, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["eval/loss"] == pytest.approx(np.mean([np.log(2 + i % 4) for i in range(24, 30)]), rel=1e-5)
    assert last["eval/loss"] < 0.95 * first["eval/loss"]


def test_a_cached_reference_is_the_base_without_its_adapters(inputs, pairs, finished, tmp_path):
    values = values_of(inputs, pairs, preference={"reference": "cached"}, export={"format": "none"})
    postrain.train(values, tmp_path / "run")
    found, expected = (without_perf(read_lines(folder / "metrics.jsonl")) for folder in (tmp_path / "run", finished[0]))
    assert len(found) == len(expected) and found[-1].keys() == expected[-1].keys()
    for own, other in zip(found, expected, strict=True):
        for name, value in other.items():
            # Before an update has changed anything, rounding decides which of two equal rewards is the higher.
            if other["step"] > 1 or not name.endswith("accuracies"):
                assert own[name] == pytest.approx(value, rel=1e-5, abs=2e-6), (other["step"], name)


def test_every_parameter_trains_against_the_model_that_it_started_from(inputs, pairs, tmp_path, monkeypatch):
    """The reference is computed once: a resumed run has the same, though its weights are others by now."""
    from postrain.training import reference

    computed, compute = [], reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *args: computed.append(1) or compute(*args))
    values = values_of(inputs, pairs, model={"lora": {"rank": 0}}, eval={"loss_rows": 5})
    whole = postrain.train(values, tmp_path / "whole")
    assert len(computed) == 2  # of data.train, and of the rows that are evaluated
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert lines[0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert lines[1]["train/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["eval/loss"] < 0.95 * lines[0]["eval/loss"]

    half = values | {"train": values["train"] | {"steps": 4}}
    postrain.train(half, tmp_path / "parts")
    postrain.train(values, tmp_path / "parts")
    assert len(computed) == 4
    tail = [without_perf(read_lines(tmp_path / name / "metrics.jsonl"))[-1] for name in ("whole", "parts")]
    assert set(tail[0]) == set(tail[1]) and whole["eval/rewards/margins"] > 0


def test_a_broken_file_of_the_reference_is_computed_again(inputs, pairs, tmp_path):
    values = values_of(inputs, pairs, preference={"reference": "cached"}, train={"steps": 1}, export={"format": "none"})
    first = postrain.train(values, tmp_path / "run")
    files = sorted((tmp_path / "run" / "reference").iterdir())
    assert len(files) == 2
    before = [np.load(file) for file in files]
    files[0].write_bytes(files[0].read_bytes()[:-8])
    files[1].write_bytes(b"")
    again = postrain.train(values | {"train": values["train"] | {"steps": 2}}, tmp_path / "run")
    assert all((np.load(file) == own).all() for file, own in zip(files, before, strict=True))
    assert again["eval/rewards/margins"] != first["eval/rewards/margins"]


def test_a_run_that_ended_while_its_reference_was_computed_starts_again(inputs, pairs, tmp_path, monkeypatch):
    from postrain.training import reference

    compute, calls = reference._compute, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return compute(*args)

    values = values_of(inputs, pairs, preference={"reference": "cached"}, train={"steps": 1}, export={"format": "none"})
    monkeypatch.setattr(reference, "_compute", crash)
    with pytest.raises(MemoryError):
        postrain.train(values, tmp_path / "run")
    postrain.train(values, tmp_path / "run")
    assert len(calls) == 3, "what was there is read"
