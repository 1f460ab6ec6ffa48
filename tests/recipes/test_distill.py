"""Distillation from the teacher's folder to the exported student: what is written, learned, resumed and refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import fsspec
import jax
import numpy as np
import pytest
import transformers
from sft_runs import make_values, read_folder, read_lines, run_cli, without_perf, write_config
from tiny_models import make_tiny_model

import postrain
from postrain import cli
from postrain.config import resolve
from postrain.data.batches.in_memory import load_examples
from postrain.data.batches.open import open_train_rows
from postrain.data.batches.token_shift import shift
from postrain.data.documents import layout_of
from postrain.data.files.storage import list_files
from postrain.data.rendering.tokenizer import compare_vocabularies, load_tokenizer
from postrain.errors import UserError
from postrain.hf.config import read_config
from postrain.models.flops import BatchStats, count_flops, count_pairs
from postrain.training.teaching import teach as teaching
from postrain.training.teaching.manifest import LOW_MASS, check_teacher_rows, folder_of, read_manifest
from postrain.training.teaching.teach import teach

ALL_IDS = 260  # of the tokenizer; student and teacher have more rows, not as many
QUIET = {"say": lambda line: None}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another family, other sizes, another padding of the same vocabulary; sure of what it says."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    return make_tiny_model(folder, "qwen3", seed=1, vocab_size=330, hidden_size=56, num_hidden_layers=2)


def values_of(inputs, teacher=None, train=None, **sections):
    """A run of six steps; with a teacher beside the student, or on its rows."""
    own = {"eval": {"every": 3, "generate_rows": 2}, "model": {"lora": {"rank": 0}}, "checkpoint": {"every": 3}}
    own["optimizer"] = {"learning_rate": 3e-3}
    own["data"] = {"train": str(train), "eval": ""} if train else {}
    values = make_values(inputs, **{name: own.get(name, {}) | sections.get(name, {}) for name in own | sections})
    values["distill"] = {"top_k": 8} | ({"teacher": str(teacher)} if teacher else {}) | sections.get("distill", {})
    return values | {"recipe": "distill"}


@pytest.fixture(scope="module")
def teacher_rows(inputs, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher_rows") / "rows"
    teach(resolve(values_of(inputs, teacher)), folder, shard_rows=15, **QUIET)
    return folder


@pytest.fixture(scope="module")
def finished(inputs, teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distill") / "run"
    return workdir, postrain.train(values_of(inputs, teacher), workdir)


def load_torch(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


# --- teach ---


def test_rows_of_a_teacher_are_what_transformers_finds_likeliest(inputs, teacher, teacher_rows):
    config = resolve(values_of(inputs, train=teacher_rows))
    rows = load_examples(config.data.train, None, config.data, kind="kd").examples
    (source,) = resolve(values_of(inputs, teacher)).data.train
    tokenizer = load_tokenizer(inputs / "model")
    rendered = load_examples((source,), tokenizer, config.data, kind="sft").examples
    assert len(rows) == len(rendered) == 40
    model = load_torch(teacher)
    for row, expected in zip(rows[:5], rendered, strict=False):
        np.testing.assert_array_equal(row.tokens, expected.tokens)
        np.testing.assert_array_equal(row.loss_mask, expected.loss_mask)
        ids, logprobs = (field.values for field in row.fields)
        logits = model(transformers.BatchEncoding({"input_ids": row.tokens[None]}, tensor_type="pt").input_ids.long())
        found = logits.logits[0, :-1, :ALL_IDS].log_softmax(-1).topk(8)  # without the padding
        trained = row.loss_mask[1:]
        np.testing.assert_array_equal(ids[1:][trained], found.indices.numpy()[trained])
        np.testing.assert_allclose(logprobs[1:][trained], found.values.detach().numpy()[trained], atol=2e-5)
        assert not ids[1:][~trained].any()


def test_the_manifest_names_what_decides_the_rows(inputs, teacher_rows):
    manifest = read_manifest(teacher_rows)
    assert list(manifest.shards) == [f"rows-0000{i}-of-00003.parquet" for i in range(3)] == manifest.names
    assert [facts["rows"] for facts in manifest.shards.values()] == [15, 15, 10]
    assert manifest.identity["vocab_size"] == ALL_IDS and manifest.identity["top_k"] == 8


def test_stopped_and_started_again_teach_ends_in_the_same_bytes(inputs, teacher, teacher_rows, tmp_path, monkeypatch):
    """Between a shard and its line in the manifest, and in the middle of a shard; and where one was damaged since."""
    config, write, calls = resolve(values_of(inputs, teacher)), teaching.write_whole, []

    def crash(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise MemoryError("no room")
        write(path, content)

    monkeypatch.setattr(teaching, "write_whole", crash)
    with pytest.raises(MemoryError):
        teach(config, tmp_path / "rows", shard_rows=15, **QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(teaching.Manifest, "write", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        teach(config, tmp_path / "rows", shard_rows=15, **QUIET)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "rows").iterdir() if path.name[0] != ".")
    assert names == ["manifest.json", "rows-00000-of-00003.parquet", "rows-00001-of-00003.parquet"]
    first = tmp_path / "rows" / names[1]
    first.write_bytes(first.read_bytes()[:-1])
    teach(config, tmp_path / "rows", shard_rows=15, **QUIET)
    assert read_folder(tmp_path / "rows") == read_folder(teacher_rows)


def test_killed_teach_goes_on_to_the_same_bytes(inputs, teacher, teacher_rows, tmp_path, capfd):
    config, output = write_config(tmp_path / "c.py", values_of(inputs, teacher)), tmp_path / "rows"
    words = ["teach", f"--config={config}", f"--output={output}", "--shard-rows=15"]
    process = subprocess.Popen([sys.executable, "-m", "postrain.cli", *words], env=os.environ, stdout=subprocess.PIPE)
    while not (output / "rows-00000-of-00003.parquet").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert cli.main(words) == 0
    assert read_manifest(output).identity["teacher"] in capfd.readouterr().out
    assert read_folder(output) == read_folder(teacher_rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"top_k": 9}}, "manifest.json: the rows there are others .top_k was 8, is 9"),
        ({"distill": {"quantization": "int8"}}, "the rows there are others .teacher was"),
        ({"data": {"sequence_length": 80}}, "the rows there are others .data.sequence_length: was 96, is 80"),
        ({"distill": {"top_k": 270}}, "'distill.top_k' = 270: there are only 260 ids"),
        (
            {"data": {"mixture": {"temperature": 2.0}}, "train": {"steps": 1}},
            "teach` writes every row once, and weights",
        ),
    ],
)
def test_a_folder_of_other_rows_is_not_written_into(inputs, teacher, teacher_rows, changes, words):
    before = read_folder(teacher_rows)
    with pytest.raises(UserError, match=words):
        teach(resolve(values_of(inputs, teacher, **changes)), teacher_rows, shard_rows=15, **QUIET)
    assert read_folder(teacher_rows) == before


def test_half_precision_is_smaller_and_never_sums_to_more_than_1(inputs, teacher, teacher_rows, tmp_path):
    teach(resolve(values_of(inputs, teacher)), tmp_path / "rows", dtype="float16", shard_rows=15, **QUIET)
    config = resolve(values_of(inputs))
    load = lambda folder: (
        load_examples(resolve(values_of(inputs, train=folder)).data.train, None, config.data, kind="kd").examples
    )
    for row, exact in zip(load(tmp_path / "rows"), load(teacher_rows), strict=True):
        half, whole = row.fields[1].values, exact.fields[1].values
        assert (half <= whole).all() and np.abs(half - whole).max() < 0.01
    size = lambda folder: sum(path.stat().st_size for path in folder.glob("*.parquet"))
    assert size(tmp_path / "rows") < 0.9 * size(teacher_rows)


def test_rows_of_a_teacher_are_streamed_as_they_are_read_at_once(inputs, teacher_rows):
    """Of a stream the sizes of shards are compared, and not their contents."""
    stream = {"streaming": True, "stream": {"shards": 2}, "packing": "none", "shuffle": False}
    config = resolve(values_of(inputs, train=teacher_rows, data=stream))
    batches = open_train_rows(None, config.data, kind="kd").batches
    seen = [next(batches) for _ in range(20)]
    batches.close()
    rows = load_examples(config.data.train, None, config.data, kind="kd").examples
    found = [np.exp(row).sum() for batch in seen for row in batch["teacher_logprobs"]]
    slots = config.data.sequence_length
    expected = [np.exp(row.fields[1].values[1:]).sum() + 8 * (slots - row.slots) for row in rows]
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-6)


def test_weights_of_answers_and_sources_are_those_of_training(inputs, teacher, tmp_path):
    """Rows that were written count as the rows themselves; another order of rows is no other data."""
    path = tmp_path / "train.jsonl"
    answers = [("a", 0.25), ("b", 1.0), ("c", 3.0)]
    lines = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()[:3]]
    lines.append(
        {"messages": [
            {"role": role, "content": text} | ({"weight": weight} if role == "assistant" else {})
            for text, weight in answers
            for role in ("user", "assistant")
        ], "weight": 2.0}
    )  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no row\n")
    data = {"train": [{"path": str(path), "loss_weight": 0.5}], "on_bad_row": "skip", "max_bad_fraction": 0.5}
    config, said = resolve(values_of(inputs, teacher, data=data, distill={"loss": "jsd", "beta": 0.3})), []
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "manifest.json.partial").touch()  # of a kill while it was first written
    (tmp_path / "rows" / "_rejected.jsonl").write_text('{"line": 77}\n')  # of the rows that were read then
    teach(config, tmp_path / "rows", say=said.append)
    assert f"rejected    1 bad rows: {tmp_path / 'rows' / '_rejected.jsonl'}" in said
    assert "not read    distill.loss, distill.beta: by training on these rows" in said
    assert [row["line"] for row in read_lines(tmp_path / "rows" / "_rejected.jsonl")] == [5]
    path.write_text(path.read_text() + "no row either\n")
    with pytest.raises(UserError, match="the rows there are others"):
        teach(config, tmp_path / "rows", say=said.append)
    assert [row["line"] for row in read_lines(tmp_path / "rows" / "_rejected.jsonl")] == [5], "nothing was written"
    path.write_text(path.read_text().removesuffix("no row either\n"))
    other = resolve(values_of(inputs, teacher, data=data | {"seed": 7, "shuffle": False}))
    teach(other, tmp_path / "rows", **QUIET)

    tokenizer, stored = load_tokenizer(inputs / "model"), resolve(values_of(inputs, train=tmp_path / "rows"))
    own = load_examples(config.data.train, tokenizer, config.data, kind="sft").examples
    read = load_examples(stored.data.train, None, stored.data, kind="kd").examples
    assert len(own) == len(read) >= 4 and own[-1].weights is not None
    for row, expected in zip(read, own, strict=True):
        np.testing.assert_array_equal(shift(row)[2], shift(expected)[2])
    halved = dataclasses.replace(stored.data.train[0], loss_weight=0.5)
    for row, whole in zip(load_examples((halved,), None, stored.data, kind="kd").examples, read, strict=True):
        np.testing.assert_array_equal(shift(row)[2], shift(whole)[2] * 0.5)


def test_ids_that_leave_much_of_the_teacher_out_are_warned_of(inputs, teacher, tmp_path, capsys):
    said: list[str] = []
    teach(resolve(values_of(inputs, teacher, distill={"top_k": 1})), tmp_path / "rows", say=said.append)
    rows = load_examples(
        resolve(values_of(inputs, train=tmp_path / "rows")).data.train, None, resolve(values_of(inputs)).data, kind="kd"
    ).examples
    mass = np.concatenate([np.exp(row.fields[1].values[row.loss_mask]).sum(1) for row in rows]).mean()
    assert mass < LOW_MASS
    line = f"warning     the 1 ids of a token have {mass:.1%} of the teacher's probability in the mean: much of"
    assert said[-1].startswith(line) and f"bytes, {mass:.1%} of the probability" in said[-2]
    teach(resolve(values_of(inputs, teacher, distill={"top_k": ALL_IDS})), tmp_path / "whole", say=said.append)
    assert said[-1].endswith("bytes, 100.0% of the probability"), "and no warning after it"
    data = {"eval": [{"path": str(tmp_path / "rows")}]}
    values = values_of(inputs, train=tmp_path / "rows", distill={"top_k": 1})
    values["data"] |= data
    values |= {"export": {"format": "none"}, "train": {"steps": 1}, "eval": {"generate_rows": 0}}
    postrain.train(values, tmp_path / "run")
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert printed.count(line) == 1
    assert "train/teacher_top" in page and f"teacher     {read_manifest(tmp_path / 'rows').identity['teacher']}" in page


def test_weights_that_could_not_be_read_again_are_refused(inputs, teacher, tmp_path):
    row = json.loads((inputs / "train.jsonl").read_text().splitlines()[0]) | {"weight": 1e-6}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = {"train": [{"path": str(tmp_path / "train.jsonl"), "loss_weight": 1e-3}]}
    with pytest.raises(UserError, match="train.jsonl:1: its weight times its source's 'loss_weight' is 1e-09"):
        teach(resolve(values_of(inputs, teacher, data=data)), tmp_path / "rows", **QUIET)


def test_half_precision_holds_what_it_has_no_number_for():
    found = teaching.round_down(np.array([-1e30, -65505.0, -3.3, 0.0], np.float32))
    assert np.isfinite(found).all() and found.dtype == np.float16
    np.testing.assert_array_equal(found[:2], [-65504, -65504])


# --- train ---


def test_the_student_comes_nearer_to_a_teacher_beside_it(finished):
    workdir, metrics = finished
    lines = read_lines(workdir / "metrics.jsonl")
    names = ("loss", "divergence", "nll", "accuracy", "agreement")
    assert all(f"train/{name}" in line for line in lines[1:] for name in names)
    first, last = lines[0], lines[-1]
    assert last["eval/loss"] < 0.8 * first["eval/loss"] and metrics["eval/loss"] == last["eval/loss"]
    assert "eval/exact_match" in last and first["eval/loss"] == first["eval/divergence"]
    assert "teacher" not in {path.name for path in (workdir / "checkpoints" / "6" / "state").rglob("*")}


def test_the_exported_student_has_the_logged_divergence(inputs, teacher, finished):
    """transformers, on the two folders, over the ids that the tokenizer has."""
    workdir, metrics = finished
    student, model = load_torch(workdir / "export"), load_torch(teacher)
    config = resolve(values_of(inputs, teacher))
    tokenizer = load_tokenizer(inputs / "model")
    total = count = 0
    for row in load_examples(config.data.eval, tokenizer, config.data, kind="sft").examples:
        ids = transformers.BatchEncoding({"input_ids": row.tokens[None]}, tensor_type="pt").input_ids.long()
        log_q, log_p = (m(ids).logits[0, :-1, :ALL_IDS].log_softmax(-1).detach() for m in (student, model))
        total += (log_p.exp() * (log_p - log_q)).sum(-1)[row.loss_mask[1:]].sum().item()
        count += row.loss_mask[1:].sum()
    assert total / count == pytest.approx(metrics["eval/loss"], rel=1e-4)


def test_all_ids_of_stored_rows_are_the_teacher_itself(inputs, teacher, finished, tmp_path):
    everything = {"distill": {"top_k": ALL_IDS}}
    teach(resolve(values_of(inputs, teacher, **everything)), tmp_path / "rows", **QUIET)
    values = values_of(inputs, train=tmp_path / "rows", eval={"generate_rows": 0}, **everything)
    postrain.train(values | {"export": {"format": "none"}}, tmp_path / "run")
    stored, live = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path / "run", finished[0]))
    for own, other in zip([line for line in stored if "train/loss" in line], live[1:], strict=True):
        for name in ("loss", "divergence", "nll", "grad_norm"):
            tolerance = 1e-6 if own["step"] == 1 and name != "grad_norm" else 1e-4  # rounding, fed back by AdamW
            assert own[f"train/{name}"] == pytest.approx(other[f"train/{name}"], rel=tolerance), (own["step"], name)


def test_prompts_are_learned_too_where_all_tokens_are(inputs, teacher, finished, tmp_path):
    """The same beside the teacher and on its rows; held-out answers are measured as ever."""
    all_tokens = {"distill": {"top_k": ALL_IDS, "tokens": "all"}}
    teach(resolve(values_of(inputs, teacher, **all_tokens)), tmp_path / "rows", **QUIET)
    stored = values_of(inputs, train=tmp_path / "rows", eval={"generate_rows": 0}, distill={"top_k": ALL_IDS})
    config = resolve(stored)
    rows = load_examples(config.data.train, load_tokenizer(inputs / "model"), config.data, kind="kd").examples
    assert rows and all(row.loss_mask[1:].all() and not row.loss_mask[0] for row in rows)
    one_step = {"export": {"format": "none"}, "train": {"steps": 1}}
    postrain.train(stored | one_step, tmp_path / "stored")
    postrain.train(values_of(inputs, teacher, **all_tokens) | one_step, tmp_path / "live")
    [of_rows], lines = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("stored", "live"))
    answers = read_lines(finished[0] / "metrics.jsonl")
    assert lines[0]["eval/loss"] == answers[0]["eval/loss"]
    assert of_rows["train/loss"] == pytest.approx(lines[1]["train/loss"], rel=1e-6)
    assert abs(of_rows["train/loss"] / answers[1]["train/loss"] - 1) > 1e-3


def test_stopped_by_a_crash_and_started_again_it_ends_in_the_same_bytes(
    inputs, teacher, finished, tmp_path, monkeypatch
):
    from postrain.training.rows import Rows

    next_batch, calls = Rows.__next__, []

    def crash(rows):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("no room")
        return next_batch(rows)

    monkeypatch.setattr(Rows, "__next__", crash)
    with pytest.raises(MemoryError):
        postrain.train(values_of(inputs, teacher), tmp_path / "run")
    monkeypatch.undo()
    postrain.train(values_of(inputs, teacher), tmp_path / "run")
    assert read_folder(tmp_path / "run" / "export") == read_folder(finished[0] / "export")
    found, expected = (without_perf(read_lines(folder / "metrics.jsonl")) for folder in (tmp_path / "run", finished[0]))
    assert found == expected


def test_adapters_of_a_student_learn_from_a_quantised_teacher(inputs, teacher, tmp_path):
    sections = {"model": {"lora": {"rank": 4}}, "distill": {"quantization": "int8"}, "eval": {"generate_rows": 0}}
    values = values_of(inputs, teacher, **sections)
    values["optimizer"]["learning_rate"] = 1e-2
    metrics = postrain.train(values, tmp_path / "run")
    first = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert metrics["eval/loss"] < 0.9 * first["eval/loss"]
    assert cli.main(["export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'again'}"]) == 0
    again, export = (
        read_folder(folder)["model.safetensors"] for folder in (tmp_path / "again", tmp_path / "run/export")
    )
    assert again == export
    with pytest.raises(UserError, match="documents were trained towards teacher .*, are towards teacher"):
        postrain.train(values | {"distill": values["distill"] | {"quantization": "none"}}, tmp_path / "run")


def test_the_layout_that_is_compiled_is_that_of_the_rows(inputs, teacher_rows):
    from postrain.recipes.distill import make_program
    from postrain.sharding import make_mesh
    from postrain.training.model import abstract_model

    config = resolve(values_of(inputs, train=teacher_rows))
    rows = load_examples(config.data.train, None, config.data, kind="kd")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(config, abstract_model(config, config.model.path, mesh), mesh, 1)
    fields = {name: (x.dtype, x.shape[2:]) for name, x in program.abstract_batch.fields.items()}
    assert fields == dict(layout_of(rows.examples[0]).arrays)


def test_the_plan_counts_the_teacher(inputs, teacher, tmp_path):
    config = write_config(tmp_path / "config.py", values_of(inputs, teacher))
    result = run_cli("plan", f"--config={config}", "--target=cpu:2", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    parameters = sum(parameter.numel() for parameter in load_torch(teacher).parameters())
    assert parameters <= report["model"]["parameters_frozen"] <= 1.2 * parameters  # with padding
    config = resolve(values_of(inputs, teacher))
    slots, rows = config.data.sequence_length, config.data.batch_size
    of_teacher = read_config(teacher)
    stats = BatchStats(slots * rows, slots * rows, count_pairs(of_teacher, np.full(rows, slots)))
    forward = sum(count_flops(of_teacher, stats).values()) / 3
    assert report["flops"]["executed"] - report["flops"]["model"] == pytest.approx(forward, rel=0.01)
    # Split over the two devices, all but the norms.
    assert 4 * parameters / 2 <= report["memory"]["parameters_frozen"] <= 1.2 * 4 * parameters / 2


# --- what is refused ---


def retrain(inputs, folder, tmp_path, **sections):
    postrain.train(values_of(inputs, train=folder, **sections), tmp_path / "run")


def test_rows_of_a_teacher_that_do_not_fit_are_refused_by_name(inputs, teacher_rows, tmp_path):
    checksum = read_manifest(teacher_rows).identity["teacher"]
    for section, words in (
        ({"checksum": "0" * 32}, f"manifest.json: the rows are of teacher {checksum}; 'distill.checksum' is 0000"),
        ({"temperature": 2.0}, "'distill.temperature' = 2.0, but the rows of .* were written with 1.0"),
        ({"top_k": 16}, "'distill.top_k' = 16, but the rows of .* were written with 8"),
    ):
        with pytest.raises(UserError, match=words):
            retrain(inputs, teacher_rows, tmp_path, distill=section)


def test_a_torn_or_missing_shard_is_refused_by_name(inputs, teacher_rows, tmp_path):
    shutil.copytree(teacher_rows, tmp_path / "rows")
    shard = tmp_path / "rows" / "rows-00001-of-00003.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"rows-00001-of-00003.parquet is torn: expected [\d,]+ bytes, found"):
        retrain(inputs, tmp_path / "rows", tmp_path)
    shard.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    with pytest.raises(UserError, match=r"rows-00001-of-00003.parquet is damaged"):
        retrain(inputs, tmp_path / "rows", tmp_path)
    shard.write_bytes(content)
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    del manifest["shards"]["rows-00002-of-00003.parquet"]
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="1 of 3 shards are not written yet .rows-00002-of-00003.parquet."):
        retrain(inputs, tmp_path / "rows", tmp_path)
    (tmp_path / "rows" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="expected the manifest of `postrain teach`"):
        retrain(inputs, tmp_path / "rows", tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard_rows": 0}, "'shard_rows' is 0"),
        ({"teacher": None}, "'teacher' is None"),
        ({"temperature": "1"}, "'temperature' is '1'"),
        ({"shards": {"rows-00000-of-00003.parquet": {"rows": 15}}}, "'shards' says of 'rows-00000-of-00003.parquet'"),
        ({"version": 1}, "written by another version of postrain"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(teacher_rows, tmp_path, change, words):
    values = json.loads((teacher_rows / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=words):
        read_manifest(tmp_path)


def test_rows_in_a_store_have_their_manifest_there(inputs, teacher_rows, tmp_path):
    store = fsspec.filesystem("memory")
    store.put(f"{teacher_rows}/", "/teacher_rows/", recursive=True)
    assert read_manifest("memory://teacher_rows") == read_manifest(teacher_rows)
    assert read_manifest("memory://elsewhere") is None
    with pytest.raises(UserError, match="memory://.*manifest.json: the rows are of teacher .*; 'distill.checksum' is"):
        retrain(inputs, "memory://teacher_rows", tmp_path, distill={"checksum": "0" * 32})
    name = "/teacher_rows/rows-00001-of-00003.parquet"
    store.pipe(name, store.cat(name)[:-1])
    with pytest.raises(UserError, match="memory://.*rows-00001-of-00003.parquet is torn: expected"):
        retrain(inputs, "memory://teacher_rows", tmp_path)


def test_rows_in_an_archive_have_their_manifest_there(teacher_rows, tmp_path):
    shutil.make_archive(str(tmp_path / "rows"), "zip", teacher_rows)
    archive = f"::file://{tmp_path / 'rows.zip'}"
    files = list_files(f"zip://*.parquet{archive}")
    assert {folder_of(file.url) for file in files} == {f"zip://{archive}"}
    assert read_manifest(f"zip://{archive}") == read_manifest(teacher_rows)


def test_mistakes_about_the_teacher_name_its_key(inputs, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    raw = json.loads((teacher / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(raw | {"architectures": ["NoModel"]}))
    with pytest.raises(UserError, match="^config key 'distill.teacher': .*architecture NoModel is not supported"):
        retrain(inputs, inputs / "train.jsonl", tmp_path, distill={"teacher": str(tmp_path / "teacher")})


def test_ids_that_a_teacher_lacks_are_left_out_and_padding_is_refused(inputs, teacher_rows, tmp_path):
    """A teacher of fewer ids: no mass of others is its rest. Ids of rows that are padding have no probability."""
    config = resolve(values_of(inputs, train=teacher_rows))
    session = types.SimpleNamespace(
        config=config, tokenizer=load_tokenizer(inputs / "model"), model_folder=inputs / "model", say=lambda text: None
    )
    options, known, _ = check_teacher_rows(session)
    assert known == ALL_IDS
    options["check"]({"teacher_ids": np.full((1, 2, 8), ALL_IDS - 1)})
    with pytest.raises(UserError, match="top_ids has id 260, and tokenizer, student and teacher share 260 ids"):
        options["check"]({"teacher_ids": np.full((1, 2, 8), ALL_IDS)})
    shutil.copytree(teacher_rows, tmp_path / "rows")
    values = json.loads((teacher_rows / "manifest.json").read_text())
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(values | {"vocab_size": 250}))
    both = dataclasses.replace(
        config.data, eval=(dataclasses.replace(config.data.train[0], path=str(tmp_path / "rows")),)
    )
    session.config = dataclasses.replace(config, data=dataclasses.replace(both, train=both.eval, eval=()))
    assert check_teacher_rows(session)[1] == 250
    session.config = dataclasses.replace(config, data=both)
    with pytest.raises(UserError, match="the rows are of teachers with 260 ids .* and 250 ids"):
        check_teacher_rows(session)


def change_tokenizer(folder, change):
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw["model"])
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def test_another_tokenizer_is_refused_and_another_folder_of_the_same_is_not(inputs, teacher, teacher_rows, tmp_path):
    from postrain.data.rendering.tokenizer import load_tokenizer

    own = load_tokenizer(inputs / "model")
    for name in ("same", "other", "merged"):
        shutil.copytree(teacher, tmp_path / name)
    config = json.loads((tmp_path / "same" / "tokenizer_config.json").read_text())
    (tmp_path / "same" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 1 }}"}))
    same = load_tokenizer(tmp_path / "same")
    assert compare_vocabularies(own, same) == "" and own.digest_vocabulary() == same.digest_vocabulary()

    def swap(model):
        model["vocab"]["A"], model["vocab"]["B"] = model["vocab"]["B"], model["vocab"]["A"]

    change_tokenizer(tmp_path / "other", swap)
    with pytest.raises(
        UserError, match=r"'distill.teacher': its tokenizer is not the student's: id 36 is 'A' in .* 'B'"
    ):
        retrain(inputs, inputs / "train.jsonl", tmp_path, distill={"teacher": str(tmp_path / "other")})
    shutil.copytree(inputs / "model", tmp_path / "student")
    change_tokenizer(tmp_path / "student", swap)
    with pytest.raises(UserError, match="made with another tokenizer than the student's, in .*student"):
        retrain(inputs, teacher_rows, tmp_path, model={"path": str(tmp_path / "student")})


def test_rows_of_another_tool_are_taken_but_not_as_those_of_a_named_teacher(inputs, teacher_rows, tmp_path):
    config = resolve(values_of(inputs, train=teacher_rows))
    rows = load_examples(config.data.train, None, config.data, kind="kd").examples
    lines = [
        {"tokens": row.tokens.tolist(), "loss_mask": row.loss_mask.astype(int).tolist()}
        | {name: field.values.tolist() for name, field in zip(("top_ids", "top_logprobs"), row.fields, strict=True)}
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="rows.jsonl has no manifest.json, so nobody can tell its teacher"):
        retrain(inputs, tmp_path / "rows.jsonl", tmp_path, distill={"checksum": "0" * 32})
    with pytest.raises(
        UserError, match="rows.jsonl:1: config key 'distill.top_k' = 9, but the rows have 8 ids a token"
    ):
        retrain(inputs, tmp_path / "rows.jsonl", tmp_path, distill={"top_k": 9})
    values = values_of(inputs, train=tmp_path / "rows.jsonl")
    postrain.train(values | {"export": {"format": "none"}, "train": {"steps": 1}}, tmp_path / "run")
    [line] = read_lines(tmp_path / "run" / "metrics.jsonl")
    mass = np.exp(rows[0].fields[1].values[rows[0].loss_mask]).sum(1)
    assert 0 < line["train/teacher_top"] < 1 and (mass < 1).all()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"distill": {"beta": 0.2}}, "'distill.beta' is not read by 'distill.loss' = 'forward_kl'"),
        ({"distill": {"loss": "jsd", "skew": 0.2}}, "'distill.skew' is not read"),
        ({"distill": {"quantization": "nf4"}}, "'distill.quantization' is of a teacher that runs"),
        ({"distill": {"tokens": "all"}}, "'distill.tokens' is of a teacher that runs, or of `postrain teach`"),
        ({"distill": {"teacher": "t", "tokens": "all", "nll_coef": 0.5}}, "would train what users say"),
        (
            {"distill": {"teacher": "t", "tokens": "all"}, "data": {"too_long": "truncate"}},
            "would keep rows of which no answer is left",
        ),
        ({"distill": {"teacher": "t", "checksum": "0"}}, "'distill.checksum' is of rows that a teacher has written"),
        ({"model": {"new_tokens": {"tokens": ["<x>"]}}}, "a teacher does not know the new tokens"),
    ],
)
def test_settings_that_contradict_are_refused(inputs, sections, words):
    with pytest.raises(UserError, match=words):
        resolve(values_of(inputs, **sections))


def test_teach_needs_a_teacher(inputs, tmp_path):
    with pytest.raises(UserError, match="'distill.teacher' is empty"):
        teach(resolve(values_of(inputs)), tmp_path / "rows", **QUIET)
    assert not (tmp_path / "rows").exists()
    config = resolve(values_of(inputs, inputs / "model"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files and no manifest.json"):
        teach(dataclasses.replace(config), pathlib.Path(tmp_path / "notes"), **QUIET)
