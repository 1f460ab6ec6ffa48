"""What a run says of itself before it starts, and the folder that it takes."""

import concurrent.futures
import dataclasses
import re
import time

import numpy as np
import pytest

from postrain.config import Config, MeshConfig
from postrain.errors import UserError
from postrain.models.config import ModelConfig, MoeConfig
from postrain.report.workdir import make_workdir, open_workdir, save_config
from postrain.sharding import make_mesh
from postrain.training.session import choose_backend, format_backends, format_overlong_warning

CONFIG = ModelConfig(64, 8, 16, 1, 2, 1, 4, max_positions=128)


def test_documents_beyond_the_models_positions_are_warned_of():
    assert format_overlong_warning(np.array([3, 128]), CONFIG) == ""
    line = format_overlong_warning(np.array([3, 128, 129, 2048]), CONFIG)
    assert "2 of 4 documents are longer than the 128 positions" in line and "the longest takes 2,048" in line
    assert "\n" not in line


def test_what_computes_attention_and_experts_is_said_and_what_cannot_is_refused():
    mesh = make_mesh(MeshConfig())  # of CPUs
    assert format_backends(CONFIG, mesh) == ["attention   chunked, float32, remat none"]
    experts = dataclasses.replace(CONFIG, moe=MoeConfig(4, 2, 8))
    assert format_backends(experts, mesh)[1:] == ["experts     blocks"]
    with pytest.raises(UserError, match="'model.attention' = 'flash_tpu' runs on tpu, the devices are cpu"):
        format_backends(dataclasses.replace(CONFIG, attention="flash_tpu"), mesh)


def test_the_kernel_that_shared_prompts_cannot_have_is_named_once(monkeypatch):
    monkeypatch.setattr("postrain.models.attention.dispatch.current_platform", lambda: "tpu")
    mesh = make_mesh(MeshConfig())
    assert format_backends(CONFIG, mesh) == ["attention   flash_tpu, float32, remat none"]
    line = "attention   chunked, float32, remat none (flash_tpu computes no shared prompts)"
    assert format_backends(CONFIG, mesh, prefixes=True) == [line]
    assert choose_backend(CONFIG, mesh, prefixes=True) == "chunked", "which is the one that is checked, as it runs"


def test_processes_that_make_the_same_workdir_do_not_meet(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make_workdir, [tmp_path / "run"] * 200))
    assert set(made) == {tmp_path / "run"} and not list((tmp_path / "run").iterdir())


def fail_in(workdir, write=None):
    with pytest.raises(UserError, match="a mistake"), open_workdir(workdir):
        assert (workdir / ".lock").exists()
        if write:
            (workdir / write).write_text("x")
        raise UserError("a mistake")


def test_a_run_that_fails_before_it_writes_leaves_nothing(tmp_path):
    fail_in(tmp_path / "a" / "b" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    fail_in(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == [], "a folder that was there stays, as it was"
    (tmp_path / "mine" / "notes.txt").write_text("x")
    fail_in(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    fail_in(tmp_path / "run", write="metrics.jsonl")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["notes.md"], "notes.md"),
        (["train.py", "rows.jsonl", "a b", "x", "out.log"], "a b, rows.jsonl, train.py and 1 more"),
        (["config.json"], "config.json"),
        (["checkpoints", "src"], "src"),
    ],
)
def test_a_folder_of_something_else_is_not_taken(tmp_path, names, found):
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"architectures": []}')
    expected = f"--workdir {folder} holds {found} and no run: expected an empty or a new folder, or that of a run"
    with pytest.raises(UserError, match=re.escape(expected)):
        make_workdir(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_folder_of_a_run_is_taken_with_whatever_else_is_there(tmp_path):
    """Also one that was killed before it had written its config, and one whose launcher has opened a log."""
    for name in ("train.log", "slurm-17.out", ".DS_Store", "metrics.jsonl", "lost+found", "hang.1.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints").mkdir()
    make_workdir(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="holds notes.md and no run"):
        make_workdir(tmp_path)
    save_config(tmp_path, Config())
    make_workdir(tmp_path)


def test_one_run_at_a_time_though_the_lock_file_comes_and_goes(tmp_path):
    """Two inside at once would show: each expects to find the count as it left it."""
    (tmp_path / "count.txt").write_text("0")

    def run(_):
        while True:
            try:
                with open_workdir(tmp_path):
                    before = (tmp_path / "count.txt").read_text()
                    (tmp_path / "count.txt").write_text("")
                    time.sleep(0.0002)
                    (tmp_path / "count.txt").write_text(str(int(before) + 1))
                return
            except UserError:
                time.sleep(0.0001)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(100)))
    assert (tmp_path / "count.txt").read_text() == "100"
