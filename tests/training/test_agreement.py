"""Several processes compare their code, config, files and workdir before anything is compiled; errors name them."""

import dataclasses
import errno
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from postrain.cluster.authentication import SECRET, make_secret
from postrain.cluster.launch import find_ports
from postrain.config import DistillSection, resolve
from postrain.errors import UserError
from postrain.training.agreement import PACKAGES, config_facts, file_facts, find_differences, software_facts

HERE = pathlib.Path(__file__).parent


def test_a_difference_says_who_has_what():
    hosts = ["a", "a", "b", "c", "d", "e"]
    same = {"python": "3.12.1", "file x": "1 bytes"}
    assert find_differences([same] * 6, hosts) == []
    other = {"python": "3.11.9", "file x": "1 bytes"}
    assert find_differences([same, other, same], hosts) == [
        "python: 3.12.1 on processes 0 (a), 2 (b), 3.11.9 on process 1 (a)"
    ]
    missing = find_differences([same, {"python": "3.12.1"}] + [same] * 4, hosts)
    assert missing == ["file x: 1 bytes on processes 0 (a), 2 (b), 3 (c), 4 (d) and 1 more, none on process 1 (a)"]


def make_config(folder, **optimizer):
    return resolve({"model": {"path": str(folder)}, "data": {"train": str(folder / "*.jsonl")}, "optimizer": optimizer})


def test_every_version_key_and_file_is_compared(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    config = make_config(tmp_path)
    files = file_facts(config)
    assert set(files) == {f"file {tmp_path / n}" for n in ("a.jsonl", "b.jsonl", "config.json", "model.safetensors")}
    assert set(PACKAGES) | {"python", "postrain"} <= set(software_facts())
    (tmp_path / "b.jsonl").write_text("[]")  # as long
    assert find_differences([files, file_facts(config)], "ab")[0].startswith(f"file {tmp_path / 'b.jsonl'}: 2 bytes (")
    (tmp_path / "a.jsonl").unlink()
    assert len(find_differences([files, file_facts(config)], "ab")) == 2
    keys = [config_facts(make_config(tmp_path, learning_rate=rate)) for rate in (1e-3, 1e-4)]
    assert find_differences(keys, "ab") == [
        "config key optimizer.learning_rate: 0.001 on process 0 (a), 0.0001 on process 1 (b)"
    ]


def test_the_files_of_a_teacher_are_compared_too(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_text("x")
    config = dataclasses.replace(make_config(tmp_path), distill=DistillSection(teacher=str(tmp_path / "teacher")))
    assert f"file {tmp_path / 'teacher' / 'model.safetensors'}" in file_facts(config)


def test_a_file_that_cannot_be_read_is_named_as_such(tmp_path, monkeypatch):
    """The system's own error does not say whether reading or writing was refused."""
    path, real = tmp_path / "a.jsonl", pathlib.Path.open
    path.write_text("{}")

    def refuse(self, *args, **options):
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        file_facts(make_config(tmp_path))


@pytest.mark.parametrize("place", [0, 1 << 19, (1 << 20) - 1])
def test_of_a_large_file_stretches_are_compared(tmp_path, monkeypatch, place):
    monkeypatch.setattr("postrain.training.agreement._WHOLE", 1 << 16)
    config, path = make_config(tmp_path), tmp_path / "rows.jsonl"
    path.write_bytes(bytes(1 << 20))
    before = file_facts(config)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    assert len(find_differences([before, file_facts(config)], "ab")) == 1


def share(*workdirs):
    """The error and exit code of each process, started with its own of these workdirs as that of one run."""
    coordinator = f"127.0.0.1:{find_ports()}"
    environment = os.environ | {SECRET: make_secret()}
    command = [sys.executable, HERE.parent / "cluster" / "process_check.py", coordinator, str(len(workdirs))]
    processes = [
        subprocess.Popen([*command, str(i), f"share {workdir}"], stderr=subprocess.PIPE, text=True, env=environment)
        for i, workdir in enumerate(workdirs)
    ]
    return [(process.communicate(timeout=60)[1], process.returncode) for process in processes]


def test_the_workdir_must_be_the_same_folder(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / ".shared-0123").touch()  # of a run that was killed while it looked
    assert share(one, one) == [("", 0), ("", 0)]
    assert list(one.iterdir()) == []
    host = socket.gethostname()
    for error, code in share(one, other):
        assert code == 2
        assert f"process 1 ({host}) sees another folder there than process 0 ({host})" in error
    assert list(one.iterdir()) == list(other.iterdir()) == []


def test_a_workdir_that_one_process_cannot_write_stops_all(tmp_path):
    (tmp_path / "file.txt").write_text(json.dumps("no folder"))
    for error, code in share(tmp_path, tmp_path / "file.txt" / "run"):
        assert code == 2 and f"--workdir {tmp_path / 'file.txt' / 'run'} cannot be written (Not a directory)" in error
