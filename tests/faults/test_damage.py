"""Torn, cut, missing and flipped: every file of a checkpoint is covered, the damage named, the one before used."""

import os
import pathlib
import random
import shutil
import sys

import jax
import numpy as np
import pytest

from postrain.checkpoint.checkpointer import Checkpointer
from postrain.checkpoint.integrity import MANIFEST, Damaged, verify_checksums
from postrain.checkpoint.record import RunRecord
from postrain.config import CheckpointConfig, OptimizerConfig
from postrain.errors import UserError
from postrain.training.optimizer import make_optimizer
from postrain.training.step import abstract_train_state, init_train_state

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from toy_network import make_params  # noqa: E402

OPTIMIZER, _ = make_optimizer(OptimizerConfig(), 10)
FLIPS = 12  # of each file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2, whose parameters differ."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        for step in (1, 2):
            state = init_train_state(make_params(step), {}, OPTIMIZER, jax.random.key(step))
            checkpointer.save(RunRecord(step, {"rows": step}, {}, {}, {}), state)
    return folder


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_of_every_file_is_found_and_named(saved, tmp_path):
    folder, draw = shutil.copytree(saved / "2", tmp_path / "2"), random.Random(0)
    names = list_files(folder)
    assert {MANIFEST, "run/data.json", "state/_METADATA", "state/manifest.ocdbt"} < set(names)
    verify_checksums(folder)
    for name in names:
        size = 8 * (folder / name).stat().st_size
        if not size:  # Orbax's mark of a checkpoint
            continue
        for bit in {0, size - 1, *(draw.randrange(size) for _ in range(FLIPS))}:
            flip(folder / name, bit)
            with pytest.raises(Damaged, match=f"^{name}: expected .*, found") as caught:
                verify_checksums(folder)
            assert ";" not in str(caught.value) and "\n" not in str(caught.value), "only the file that was flipped"
            flip(folder / name, bit)
    verify_checksums(folder)


def test_every_shortened_grown_and_missing_file_is_found_and_named(saved, tmp_path):
    folder = shutil.copytree(saved / "2", tmp_path / "2")
    for name in list_files(folder):
        path, content = folder / name, (folder / name).read_bytes()
        for torn in (content[:-1], content[: len(content) // 2], b"", content + b"\n", None):
            if torn == content:
                continue
            path.unlink() if torn is None else path.write_bytes(torn)
            with pytest.raises(Damaged, match=f"^{name}( is missing|: expected)"):
                verify_checksums(folder)
            path.write_bytes(content)
    verify_checksums(folder)


def test_each_process_reads_its_share_and_together_all(saved, tmp_path):
    folder = shutil.copytree(saved / "2", tmp_path / "2")
    for name in set(list_files(folder)) - {MANIFEST}:
        (folder / name).write_bytes(b"other")
        found = []
        for index in range(3):
            try:
                verify_checksums(folder, share=(index, 3))
            except Damaged as error:
                found.append(str(error).split(":")[0])
        assert found == [name]
        shutil.copy(saved / "2" / name, folder / name)


def largest(folder):
    """A file of array data: Orbax itself reads other numbers from it without a word."""
    return max(list_files(folder), key=lambda name: (folder / name).stat().st_size)


DAMAGE = {
    "arrays flipped": lambda folder: (largest(folder), flip(folder / largest(folder), 8 * 20_000)),
    "shard missing": lambda folder: (largest(folder), (folder / largest(folder)).unlink()),
    "run flipped": lambda folder: ("run/data.json", flip(folder / "run" / "data.json", 100)),
    "run cut": lambda folder: ("run/data.json", os.truncate(folder / "run" / "data.json", 10)),
    "index cut": lambda folder: ("state/_METADATA", os.truncate(folder / "state" / "_METADATA", 100)),
    "no checksums": lambda folder: (MANIFEST, (folder / MANIFEST).unlink()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_damaged_file_is_named_and_the_checkpoint_before_used(saved, tmp_path, damage):
    folder, lines = shutil.copytree(saved, tmp_path / "checkpoints"), []
    name, _ = DAMAGE[damage](folder / "2")
    with Checkpointer(folder, CheckpointConfig(), report=lines.append) as checkpointer:
        abstract = abstract_train_state(make_params(), {}, OPTIMIZER)
        restored = checkpointer.restore(abstract)
    assert restored.record.step == 1 and restored.record.data_position == {"rows": 1}
    jax.tree.map(np.testing.assert_array_equal, restored.state.params, make_params(1))
    [line] = lines
    assert f"{folder / '2'}: cannot be read ({name}" in line and "moved to 2.unreadable" in line, line
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.unreadable"]


def test_a_file_that_the_disk_cannot_read_is_named_and_nothing_is_moved(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    path = folder / "2" / "state" / "manifest.ocdbt"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # whose first page is mapped nowhere
    with (
        Checkpointer(folder, CheckpointConfig()) as checkpointer,
        pytest.raises(UserError, match=f"cannot be read now .*Input/output error.*{path}.* nothing was moved"),
    ):
        checkpointer.restore(abstract_train_state(make_params(), {}, OPTIMIZER))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
