"""Runs whose rows are streamed or mixed: they learn, go on to the same bytes, and say what they drew."""

import pathlib
import shutil
import subprocess
import sys

import pytest
from sft_runs import make_values, read_folder, read_lines, without_perf, write_config, write_rows

import postrain
from postrain.errors import UserError

WAYS = {
    "streamed": {"streaming": True, "stream": {"shards": 2}},
    "mixed": {"mixture": {"phases": [{"step": 5, "weights": [1.0, 3.0]}]}},
    "streamed and mixed": {"streaming": True, "stream": {"shards": 1}, "mixture": {"by": "rows"}},
}


def values_of(inputs, way, **sections):
    second = inputs / "second.jsonl"
    if not second.exists():
        write_rows(second, 30, first=100)
    sources = [{"path": str(inputs / "train.jsonl"), "weight": 3.0}, {"path": str(second), "weight": 1.0}]
    if way == "streamed":
        sources = [str(inputs / "train.jsonl"), str(second)]
    values = make_values(inputs, train={"steps": 8}, checkpoint={"every": 3, "keep": 9}, eval={"every": 4}, **sections)
    values["data"] |= {"train": sources, "packing_window": 12} | WAYS[way]
    return values


@pytest.mark.parametrize("way", WAYS)
def test_learns_and_goes_on_to_the_same_bytes(inputs, way, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    postrain.train(values_of(inputs, way), whole)
    assert "consumed    train: " in capsys.readouterr().out
    losses = [line["train/loss"] for line in read_lines(whole / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.3
    # The run as it was when a kill came between its checkpoint of step 3 and that of step 6.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "export")
    for step in (6, 8):
        shutil.rmtree(cut / "checkpoints" / str(step))
    postrain.train(values_of(inputs, way), cut)
    assert "goes on from step 3" in capsys.readouterr().out
    assert without_perf(read_lines(cut / "metrics.jsonl")) == without_perf(read_lines(whole / "metrics.jsonl"))
    assert read_folder(cut / "export") == read_folder(whole / "export")


def test_the_time_that_the_step_waits_for_rows_is_logged(inputs, tmp_path):
    postrain.train(values_of(inputs, "streamed", export={"format": "none"}), tmp_path / "run")
    waited = [line["perf/input_wait_fraction"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert len(waited) == 8 and all(0 <= share < 1 for share in waited)


def test_a_resume_with_other_shards_or_files_is_refused(inputs, tmp_path):
    workdir, values = tmp_path / "run", values_of(inputs, "streamed", export={"format": "none"})
    postrain.train(values, workdir)
    values["train"]["steps"] = 9
    values["data"]["stream"] = {"shards": 1}
    with pytest.raises(UserError, match="data.stream.shards: was 2, is 1"):
        postrain.train(values, workdir)
    values["data"]["stream"] = {"shards": 2}
    rows = pathlib.Path(values["data"]["train"][1])
    other = write_rows(tmp_path / rows.name, 31, first=100)
    values["data"]["train"] = [values["data"]["train"][0], str(other)]
    with pytest.raises(UserError, match=r"file second.jsonl has other content: was [\d,]+ bytes, is [\d,]+"):
        postrain.train(values, workdir)


@pytest.mark.parametrize("way", ["streamed", "in memory"])
def test_changed_data_are_accepted_by_the_code_that_the_refusal_names(inputs, way, tmp_path, capsys):
    """From there on the run is as exact as any: killed after its next checkpoint, it ends in the same bytes."""
    workdir, cut = tmp_path / "run", tmp_path / "cut"
    values = values_of(inputs, "streamed", export={"format": "none"}) if way == "streamed" else make_values(inputs)
    values |= {"train": {"steps": 4}, "checkpoint": {"every": 2, "keep": 9}}
    postrain.train(values, workdir)
    values["train"]["steps"] = 8
    changes = [{"stream": {"shards": 1}}, {"packing_window": 6}] if way == "streamed" else [{"seed": 5}, {"seed": 6}]
    refused = []
    for change in (changes[1], changes[0]):
        changed = values | {"data": values["data"] | change}
        with pytest.raises(
            UserError, match=r"start the changed data anew at step 4 by --config\.data\.accept_change=(\w+)$"
        ) as caught:
            postrain.train(changed, workdir)
        refused.append(str(caught.value).rpartition("=")[2])
    changed["data"]["accept_change"] = refused[0]
    wrong = f"data.accept_change = '{refused[0]}' is the code of another change"
    with pytest.raises(UserError, match=f"{wrong}.: .* or start .*data.accept_change={refused[1]}$"):
        postrain.train(changed, workdir)
    changed["data"]["accept_change"] = refused[1]
    postrain.train(changed, workdir)
    assert "goes on from step 4" in (output := capsys.readouterr().out) and "the data changed, as accepted" in output
    shutil.copytree(workdir, cut)
    shutil.rmtree(cut / "checkpoints" / "8")
    postrain.train(changed, cut)
    assert "as accepted" not in (output := capsys.readouterr().out) and "goes on from step 6" in output
    assert without_perf(read_lines(cut / "metrics.jsonl")) == without_perf(read_lines(workdir / "metrics.jsonl"))


def test_bad_rows_are_written_down_once(inputs, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    lines = rows.read_text().splitlines()
    lines[7] = "{"
    rows.write_text("\n".join(lines))
    values = values_of(inputs, "streamed", export={"format": "none"})
    values["data"] |= {"train": str(rows), "on_bad_row": "skip"}
    postrain.train(values, tmp_path / "run")
    (entry,) = read_lines(tmp_path / "run" / "rejected.jsonl")  # though 8 updates read the file several times
    assert entry["line"] == 8 and entry["file"].endswith("rows.jsonl") and "invalid JSON" in entry["reason"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"streaming": True},
            "'data.streaming': the length of such an epoch is not known beforehand: set 'train.steps'",
        ),
        ({"mixture": {"temperature": 2.0}}, "set 'train.steps'"),
        ({"streaming": True, "stream": {"shards": 3}}, "must be a multiple of 'data.stream.shards' = 3"),
        (
            {"stream": {"cache_folder": "s3://b/c", "cache_gibibytes": 1.0}},
            "config key 'data.stream.cache_folder' s3://b/c: expected a path of this machine",
        ),
        ({"stream": {"cache_folder": "x"}}, "'data.stream.cache_folder' and 'data.stream.cache_gibibytes'"),
        ({"mixture": {"phases": [{"step": 5, "weights": [1.0, 1.0]}]}}, "2 weights for 1 sources"),
        ({"mixture": {"phases": [{"step": 5, "weights": [0.0]}]}}, "one of them above"),
        ({"mixture": {"phases": [{"step": 5, "weights": [1.0]}] * 2}}, "expected an update after 5"),
        ({"train": [{"path": "a", "weight": 1.0}, "b"]}, "source 'b' has no weight and others have"),
        ({"train": [{"path": "a", "weight": 1.0}], "mixture": {"temperature": 2.0}}, "leave one of them out"),
    ],
)
def test_keys_that_do_not_fit(inputs, data, words):
    steps = 0 if "train.steps" in words else 6
    values = make_values(inputs, data=data, train={"steps": steps})
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        postrain.config.resolve(values)


def test_a_signal_ends_the_wait_for_rows(inputs, tmp_path):
    """With a checkpoint of the last update that had its rows, from which the run goes on to the same bytes."""
    values = values_of(inputs, "streamed", export={"format": "none"})
    values["train"]["steps"], values["checkpoint"]["every"] = 12, 50
    script = pathlib.Path(__file__).with_name("stuck_process.py")
    config, workdir = write_config(tmp_path / "c.py", values), tmp_path / "run"
    command = [sys.executable, script, "train", f"--config={config}", f"--workdir={workdir}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 143, result.stdout + result.stderr
    assert "stuck" in result.stdout and "stopped at step 9 of 12; the same command goes on" in result.stdout
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["9"]
    postrain.train(values, workdir)
    postrain.train(values, tmp_path / "whole")
    lines = [without_perf(read_lines(folder / "metrics.jsonl")) for folder in (workdir, tmp_path / "whole")]
    assert lines[0] == lines[1]
