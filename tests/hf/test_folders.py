"""A folder on its way is hidden beside its place; what a killed process leaves is found and removed."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from postrain.errors import UserError
from postrain.hf import folders
from postrain.hf.folders import atomic_folder, clear_leftovers, staged_folder

# Writes a model of the words in argv[3] and is killed in the block, or at one of the two renames that replace an older.
WRITER = """
import os, pathlib, signal, sys
from postrain.hf import folders
kind, out, words, stop = sys.argv[1:]
rename = pathlib.Path.rename
def kill_after(path, target):
    result = rename(path, target)
    if stop == f"{path.name} -> {pathlib.Path(target).name}":
        os.kill(os.getpid(), signal.SIGKILL)
    return result
pathlib.Path.rename = kill_after
with getattr(folders, kind)(out) as folder:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(words)
    if stop == "block":
        os.kill(os.getpid(), signal.SIGKILL)
"""
KINDS = ["atomic_folder", "staged_folder"]


def write(kind, out, words, stop=""):
    result = subprocess.run([sys.executable, "-c", WRITER, kind, str(out), words, stop], capture_output=True, text=True)
    assert result.returncode == (-signal.SIGKILL if stop else 0), result.stderr


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stop", "left"), [("block", "first"), ("out -> old", "first"), ("new -> out", "second")], ids=lambda value: value
)
@pytest.mark.parametrize("again", [False, True])
def test_what_a_killed_process_left_is_removed_and_the_model_is_the_old_one_or_the_new(
    tmp_path, kind, stop, left, again
):
    out = tmp_path / "out"
    write(kind, out, "first")
    assert names(tmp_path) == ["out"]
    write(kind, out, "second", stop)
    assert len(list(tmp_path.glob(".out.*"))) == 1
    if again:
        write(kind, out, "third")
    else:
        clear_leftovers(out)
    assert names(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_text() == ("third" if again else left)


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_process_is_writing_stays(tmp_path, kind):
    out = tmp_path / "out"
    with getattr(folders, kind)(out) as folder:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        clear_leftovers(out)
        with pytest.raises(UserError, match=f"{out}: another process is writing it: wait"):
            getattr(folders, kind)(out).__enter__()
        (folder / "model.safetensors").write_text("whole")
    assert names(tmp_path) == ["out"] and names(out) == ["config.json", "model.safetensors"]


def test_an_address_becomes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folder gs://b/model: expected a path of this machine"):
        with atomic_folder("gs://b/model"):
            raise AssertionError("nothing may be written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [atomic_folder, staged_folder])
def test_a_place_that_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, make, monkeypatch):
    """A new model is made beside its place and renamed: not possible on a mount point, or in a folder of others."""
    (tmp_path / "out").mkdir()
    for place, why in (("/proc", "is a mount point"), (tmp_path / "out", f"{tmp_path} is not writable")):
        if why != "is a mount point":  # root may write everywhere
            monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        with (
            pytest.raises(UserError, match=f"{place}: cannot be replaced .* .{why}.: give .* {place}/model$"),
            make(place),
        ):
            raise AssertionError("nothing may be written")
    with (
        pytest.raises(UserError, match=f"new: cannot be made, {tmp_path} is not a writable folder"),
        make(tmp_path / "new"),
    ):
        raise AssertionError("nothing may be written")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("make", [atomic_folder, staged_folder])
def test_an_older_model_stays_where_the_new_one_cannot_take_its_place(tmp_path, make, monkeypatch):
    out = tmp_path / "out"
    write("atomic_folder", out, "first")
    rename = pathlib.Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(UserError, match="could not be written .Input/output error"), make(out) as folder:
        folder.mkdir(exist_ok=True)
    assert names(tmp_path) == ["out"] and (out / "model.safetensors").read_text() == "first"


def test_the_folder_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "plain").st_mode
