"""A run in several processes: the bytes of one process with as many devices, and its errors are everybody's."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors.numpy import load_file
from sft_runs import make_values, read_folder, read_lines, without_perf, write_config

from postrain.cluster.authentication import SECRET
from postrain.cluster.launch import find_ports

HERE = pathlib.Path(__file__).parent
ROWS = {"batch_size": 8}
STREAMED = {"streaming": True, "packing_window": 6, "stream": {"shards": 4}}
KEPT = {"every": 2, "keep": 3}


def with_devices(count):
    """The environment of these tests, with so many devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, SECRET: "of these tests' processes"}


def run(*words, devices):
    command = [sys.executable, "-m", "postrain.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=with_devices(devices), timeout=240)


def one_of_one():
    """A single process whose collectives add up in the order in which those of several processes do."""
    return [f"--coordinator=127.0.0.1:{find_ports()}", "--num-processes=1", "--process-id=0"]


def start_two(script, *words, folders=(None, None)):
    """Two processes of two devices each, to the end: (exit code, stdout, stderr) of both. Words and folder of each."""
    place = [f"--coordinator=127.0.0.1:{find_ports()}", "--num-processes=2"]
    command = [sys.executable, *script]
    processes = [
        subprocess.Popen(
            [*command, "train", *map(str, own), *place, f"--process-id={process}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=with_devices(2),
            cwd=folder,
        )
        for process, (own, folder) in enumerate(zip(words, folders, strict=True))
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


@pytest.fixture(scope="module", params=["in memory", pytest.param("streamed", marks=pytest.mark.slow)])
def two(request, inputs, tmp_path_factory):
    """(config, workdir, result) of a run in two processes of two devices."""
    folder = tmp_path_factory.mktemp("processes")
    rows = ROWS | (STREAMED if request.param == "streamed" else {})
    values = make_values(inputs, data=rows, checkpoint=KEPT, eval={"every": 0}, model={"lora": {"rank": 0}})
    config, workdir = write_config(folder / "c.py", values), folder / "run"
    result = run("launch", "--target=local:2", f"--config={config}", f"--workdir={workdir}", devices=2)
    assert result.returncode == 0, result.stdout + result.stderr
    return config, workdir, result


def test_two_processes_write_one_run(two):
    _, workdir, result = two
    assert "4 devices (cpu): fsdp=4" in result.stdout and result.stdout.count("\ndone after") == 1
    assert "batch       4 rows x 96 tokens x 1 micro-batch x 2 hosts = 768 tokens an update" in result.stdout
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    assert [sample["step"] for sample in read_lines(workdir / "samples.jsonl")] == [0] * 3 + [6] * 3
    made = {"checkpoints", "config.json", "export", "logs", "metrics.jsonl", "report.html", "samples.jsonl"}
    assert {path.name for path in workdir.iterdir()} == made
    log = (workdir / "logs" / "process-00001.log").read_text()
    assert "process 1 of 2 on" in log and "step 6/6" in log and "done after" not in log


def test_one_process_goes_on_from_two_to_the_same_bytes(two, tmp_path):
    """Four of the six updates, the evaluation and the export are done anew, from another number of processes."""
    config, reference, _ = two
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    result = run("train", f"--config={config}", f"--workdir={workdir}", *one_of_one(), devices=4)
    assert result.returncode == 0 and "goes on from step 2" in result.stdout, result.stderr
    lines, expected = (without_perf(read_lines(folder / "metrics.jsonl")) for folder in (workdir, reference))
    assert lines == expected
    assert read_folder(workdir / "export") == read_folder(reference / "export")
    assert read_lines(workdir / "samples.jsonl") == read_lines(reference / "samples.jsonl")


def test_a_full_disk_of_one_stops_both(inputs, tmp_path):
    values = make_values(inputs, data=ROWS | {"eval": []}, checkpoint={"every": 1}, export={"format": "none"})
    train = [f"--config={write_config(tmp_path / 'c.py', values)}", f"--workdir={tmp_path / 'run'}"]
    (code, _, error), (other_code, _, _) = start_two([HERE / "failing_process.py", "full", "1"], train, train)
    reason = re.escape("the disk is full (runs/x): free some space or choose another --workdir")
    assert re.search(rf"error: process 1 \({re.escape(socket.gethostname())}\) stopped: {reason}", error)
    assert (code, other_code) == (1, 1)
    assert "error: the disk is full (runs/x)" in (tmp_path / "run" / "logs" / "process-00001.log").read_text()


def test_processes_that_differ_are_refused_before_anything_is_compiled(inputs, tmp_path):
    config = write_config(tmp_path / "c.py", make_values(inputs))
    train = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    host = socket.gethostname()
    for code, out, error in start_two(["-m", "postrain.cli"], train, [*train, "--config.train.seed=1"]):
        assert (code, out) == (2, "")
        assert f"config key train.seed: 0 on process 0 ({host}), 1 on process 1 ({host}): expected the same" in error
    assert not (tmp_path / "run").exists()


def test_processes_that_read_other_rows_are_refused(inputs, tmp_path):
    """Files of one name and size behind a pattern, which no comparison of the config's paths can look up."""
    rows = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    host, folders = socket.gethostname(), []
    for process in (0, 1):
        folder = tmp_path / f"host{process}"
        folder.mkdir()
        (folder / "rows-0.jsonl").write_text("".join(rows))
        (folder / "rows-1.jsonl").write_text("".join(rows if process == 0 else rows[::-1]))
        folders.append(folder)
    data = ROWS | STREAMED | {"train": "rows-{0..1}.jsonl", "eval": []}
    values = make_values(inputs, data=data, export={"format": "none"})
    train = [f"--config={write_config(tmp_path / 'c.py', values)}", f"--workdir={tmp_path / 'run'}"]
    expected = (
        f'the processes differ: process 1 ({host}) found other rows than process 0 ({host}) ("was"): data.train: '
        "source 'rows-{0..1}': file rows-1.jsonl has other content: expected the same rows on all machines"
    )
    ends = start_two(["-m", "postrain.cli"], train, train, folders=folders)
    assert [code for code, _, _ in ends] == [2, 2]
    assert expected in ends[0][2]
    assert expected in (tmp_path / "run" / "logs" / "process-00001.log").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 4, "tensor": 2}, {"sequence": 8}])
def test_any_split_of_eight_devices_gives_the_same_bytes(inputs, tmp_path, mesh):
    values = make_values(inputs, data=ROWS, model={"lora": {"rank": 0}}, mesh={"fsdp": 1} | mesh)
    train = [f"--config={write_config(tmp_path / 'c.py', values)}"]
    folders = {}
    for count in (1, 2, 4):
        workdir = f"--workdir={tmp_path / str(count)}"
        words = ["train", *train, workdir, *one_of_one()]
        if count > 1:
            words = ["launch", f"--target=local:{count}", *train, workdir]
        result = run(*words, devices=8 // count)
        assert result.returncode == 0, result.stdout + result.stderr
        folders[count] = tmp_path / str(count)
    expected = without_perf(read_lines(folders[1] / "metrics.jsonl"))
    for count in (2, 4):
        assert without_perf(read_lines(folders[count] / "metrics.jsonl")) == expected
        assert read_folder(folders[count] / "export") == read_folder(folders[1] / "export")
    # Without jax.distributed XLA adds up in another order, and that is all the difference.
    result = run("train", *train, f"--workdir={tmp_path / 'plain'}", devices=8)
    assert result.returncode == 0, result.stderr
    plain, other = (load_file(folder / "export" / "model.safetensors") for folder in (tmp_path / "plain", folders[1]))
    for name, tensor in plain.items():
        assert tensor == pytest.approx(other[name], abs=2e-6)
