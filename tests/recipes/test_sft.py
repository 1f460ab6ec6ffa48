"""The recipe from config to report on a tiny model: what it writes, what it says, what it learns."""

import html
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
import transformers
from sft_runs import make_values, read_folder, read_lines

import postrain
from postrain import cli
from postrain.errors import UserError
from postrain.export import export_workdir
from postrain.report.metrics import MetricsWriter
from postrain.training import rows
from postrain.training.step import count_compilations


def test_the_workdir_holds_everything(finished):
    workdir, _ = finished
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "export", "report.html"}


def test_every_step_has_its_line(finished, inputs):
    workdir, metrics = finished
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [0, 2, 4, 6]
    trained = {
        "train/loss",
        "train/accuracy",
        "train/grad_norm",
        "train/learning_rate",
        "train/weight",
    }
    for line in lines[1:]:
        assert trained | {"perf/tokens_per_second", "perf/mfu"} <= set(line)
    assert metrics["eval/loss"] == lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert set(metrics) >= {"eval/exact_match", "eval/valid_json"}


def test_the_weight_of_a_step_is_its_trained_tokens(inputs, finished, tmp_path):
    """Forty rows in batches of one epoch: the weights add up to the trained tokens of the data."""
    values = make_values(
        inputs, train={"steps": 0, "epochs": 1.0}, eval={"generate_rows": 0}, export={"format": "none"}
    )
    metrics = postrain.train(values, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    answers = [row["messages"][1]["content"] for row in read_lines(inputs / "train.jsonl")]
    expected = sum(len(answer) + 1 for answer in answers)  # a token a byte, and the one that ends the answer
    assert sum(line.get("train/weight", 0) for line in lines) == expected
    assert not (tmp_path / "run" / "export").exists()
    assert "eval/exact_match" not in metrics


def test_samples_are_the_answers_of_every_evaluation(finished, inputs):
    workdir, metrics = finished
    samples = read_lines(workdir / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6]
    answers = [row["messages"][1]["content"] for row in read_lines(inputs / "eval.jsonl")]
    assert [sample["expected"] for sample in samples[:3]] == answers[:3]
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert samples[0]["row"] == f"{inputs / 'eval.jsonl'}:1"
    share = np.mean([s["found"] == s["expected"] and s["finished"] for s in samples[-3:]])
    assert metrics["eval/exact_match"] == share


def test_the_export_is_the_evaluated_model(finished, inputs):
    """Loaded by transformers, the exported folder gives the loss that the last evaluation reported."""
    import torch

    workdir, metrics = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    total = count = 0
    for row in read_lines(inputs / "eval.jsonl"):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text.removesuffix("\n"), return_tensors="pt", add_special_tokens=False).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1)
        picked = logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]][start - 1 :]
        total, count = total - picked.sum().item(), count + len(picked)
    assert total / count == pytest.approx(metrics["eval/loss"], rel=1e-4)


def test_a_finished_run_only_writes_its_export_and_report_again(finished, capsys):
    workdir, metrics = finished
    before = read_folder(workdir / "export")
    config = json.loads((workdir / "config.json").read_text())
    assert postrain.train(config, workdir) == metrics
    assert "goes on from step 6" in capsys.readouterr().out
    assert read_folder(workdir / "export") == before


def test_the_report_is_one_file_with_everything(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert not re.search(r"""(src|href)=|@import|url\(""", page)
    for words in ("Loss per trained token", "Held-out answers", "polyline", "Step 0", "Step 6", "trained tokens"):
        assert words in page


def test_what_is_printed_first(inputs, tmp_path, capsys):
    values = make_values(inputs, train={"steps": 1}, eval={"before": False}, export={"format": "none"})
    values["optimizer"]["warmup_steps"] = 20
    train, held_out = (tmp_path / f"{name}.jsonl" for name in ("noted", "held_out"))
    for path, key in ((train, "level"), (held_out, "grade")):
        rows = read_lines(inputs / "train.jsonl")
        path.write_text("".join(json.dumps(row | {key: 1}) + "\n" for row in rows), encoding="utf-8")
    values["data"] |= {"train": str(train), "eval": str(held_out)}
    postrain.train(values, tmp_path / "run")
    printed = capsys.readouterr().out
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    for name, key in (("noted", "level"), ("held_out", "grade")):
        line = f"source '{name}': keys that were not read: '{key}' (40 rows)"
        assert printed.count(line) == 1 and line in page
    for words in (
        "  optimizer.learning_rate = 0.01",
        "1 device (cpu)",
        "frozen",
        "2 rows x 96 tokens x 1 micro-batch x 1 host = 192 tokens an update",
        "attention   chunked",
        "GiB a device",
        "FLOPs/step = ",
        "warning     optimizer.warmup_steps = 20: longer than the run, cut to its 1 step\n",
        "train ",
    ):
        assert words in printed
    assert printed.index("GiB a device") < printed.index("step 1/1")


@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_export_of_a_workdir_is_the_export_of_the_run(finished, inputs, tmp_path, format):
    workdir, _ = finished
    assert cli.main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}", f"--format={format}"]) == 0
    if format == "merged":
        assert read_folder(tmp_path / "out") == read_folder(workdir / "export")
    else:
        found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (found["r"], found["peft_type"]) == (4, "LORA")


def test_the_exported_adapter_gives_our_logits_in_peft(finished, inputs, tmp_path):
    """As a user takes it away: the run's adapter, loaded by peft onto the model that the run started from."""
    import peft
    import torch

    workdir, _ = finished
    export_workdir(workdir, tmp_path / "adapter", "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 301, 40)
    with torch.no_grad():
        untrained = base(torch.tensor(tokens)[None]).logits[0].numpy()
        theirs = (
            peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(torch.tensor(tokens)[None]).logits[0].numpy()
        )
    config, params = postrain.load_pretrained(workdir / "export")
    ours = np.asarray(postrain.logits(params, config, tokens))
    assert np.abs(ours - theirs).max() <= 1e-4 < 1e-1 < np.abs(untrained - theirs).max()


def test_nothing_compiles_after_the_second_step(inputs, tmp_path, monkeypatch):
    """In the loop itself: evaluations with generation and checkpoints at steps 2, 4 and 6, and none before step 1."""
    started, ended = [], {}
    with count_compilations() as compiled:
        place, write = rows.Rows.__next__, MetricsWriter.write
        # Called at the start of every step, and not by evaluations.
        monkeypatch.setattr(rows.Rows, "__next__", lambda *rest: started.append(len(compiled)) or place(*rest))

        def note(writer, step, line):
            ended[step] = len(compiled)
            return write(writer, step, line)

        monkeypatch.setattr(MetricsWriter, "write", note)
        keep = {"every": 2, "asynchronous": False}
        values = make_values(inputs, eval={"before": False}, export={"format": "none"}, checkpoint=keep)
        values["optimizer"]["ema_decay"] = 0.9
        postrain.train(values, tmp_path / "run")
    assert len(started) == 6 and list(ended) == [1, 2, 3, 4, 5, 6]
    assert started[0] > 0 and ended[2] > started[1], "the first evaluation compiles: the counter counts"
    assert ended[6] == started[2], f"{ended[6] - started[2]} programs were compiled in steps 3 to 6"


@pytest.mark.parametrize("damage", ["{", None])
def test_export_of_a_damaged_checkpoint_is_one_line(finished, tmp_path, damage):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    newest = workdir / "checkpoints" / "6" / "run" / "data.json"
    newest.write_text(damage) if damage else newest.unlink()
    with pytest.raises(UserError, match=r"checkpoints/6: is damaged .* use another of steps \[4, 6\]") as caught:
        export_workdir(workdir, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert export_workdir(workdir, tmp_path / "out", step=4).startswith("wrote step 4")


def test_full_fine_tuning_is_one_key(inputs, tmp_path):
    values = make_values(inputs, eval={"generate_rows": 0}, train={"steps": 2})
    values["model"]["lora"] = {"rank": 0}
    metrics = postrain.train(values, tmp_path / "run")
    before = safetensors.numpy.load_file(inputs / "model" / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert np.isfinite(metrics["eval/loss"])


def test_the_average_is_what_is_evaluated_and_exported(inputs, tmp_path):
    """With a decay of almost 1 the average stays at the start: nothing is learned as far as evaluation sees."""
    values = make_values(inputs, eval={"generate_rows": 0}, optimizer={"ema_decay": 1 - 1e-9})
    values["model"]["lora"] = {"rank": 0}
    postrain.train(values, tmp_path / "run")
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in line]
    assert lines[-1]["eval/loss"] == pytest.approx(lines[0]["eval/loss"], rel=1e-5)
    before = safetensors.numpy.load_file(inputs / "model" / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "run" / "export" / "model.safetensors")
    np.testing.assert_allclose(after["model.norm.weight"], before["model.norm.weight"], atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_naming_its_rows(inputs, tmp_path):
    values = make_values(inputs, optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0}, eval={"generate_rows": 0})
    with pytest.raises(UserError, match=r"step \d: loss .* not both finite, rows .*train\.jsonl:\d+") as caught:
        postrain.train(values, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "export").exists()


def test_the_public_functions_agree(finished, inputs):
    workdir, _ = finished
    config, params = postrain.load_pretrained(workdir / "export")
    tokens = np.arange(10) % 256 + 4
    whole = postrain.logits(params, config, tokens)
    assert whole.shape == (10, config.vocab_size)
    packed = postrain.logits(params, config, np.tile(tokens, 2)[None], segment_ids=np.repeat([1, 2], 10)[None])
    np.testing.assert_allclose(packed[0, :10], whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[0, 10:], whole, rtol=1e-4, atol=1e-4)
    tokenizer = postrain.load_tokenizer(workdir / "export")
    [from_folder] = postrain.generate(workdir / "export", ["41 gold"], max_new_tokens=8)
    assert postrain.generate((params, config, tokenizer), "41 gold", max_new_tokens=8) == [from_folder]
    sample = next(s for s in read_lines(workdir / "samples.jsonl") if s["step"] == 6 and "41 gold" in s["prompt"])
    assert sample["found"] == from_folder
