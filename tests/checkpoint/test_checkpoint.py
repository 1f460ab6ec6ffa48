"""Save and restore, what is kept, what is refused, and what is left after a kill, a full disk, a torn folder."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from toy_network import compute_loss, make_batch, make_params

from postrain.checkpoint.checkpointer import Checkpointer
from postrain.checkpoint.integrity import MANIFEST, write_checksums
from postrain.checkpoint.record import RunRecord
from postrain.config import CheckpointConfig, OptimizerConfig
from postrain.errors import UserError
from postrain.training.optimizer import make_optimizer
from postrain.training.step import abstract_train_state, init_train_state, make_train_step

HERE = pathlib.Path(__file__).parent
OPTIMIZER, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, ema_decay=0.9), 10)
FILE = {"name": "chat.jsonl", "bytes": 3, "sha256": "abc"}
FINGERPRINT = {"data": {"seed": 0}, "sources": [{"name": "chat", "files": [FILE]}], "documents": "1"}
RUN = {"data_position": {"epoch": 1, "rows": [3, 4]}, "config": {"é": 0.1, "x": None}, "data_fingerprint": FINGERPRINT}


def record(step, model=None, **values):
    return RunRecord(step=step, model_fingerprint=model or {}, **RUN | values)


def make_state():
    return init_train_state(make_params(), {}, OPTIMIZER, jax.random.key(5), ema=True)


def abstract():
    return abstract_train_state(make_params(), {}, OPTIMIZER, ema=True)


def assert_equal(a, b):
    def compare(x, y):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)

    jax.tree.map(compare, a, b)


def test_what_is_in_the_way_of_a_checkpoint_is_put_away_or_named(tmp_path):
    for name in ("2", "2.saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    said = []
    with Checkpointer(tmp_path, CheckpointConfig(keep=1), report=said.append) as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.restore(abstract()) is None
        for step in (1, 2):
            checkpointer.save(record(step), make_state())
    assert said == [
        f"checkpoint {tmp_path / '2.saving'}: an unfinished save, removed",
        f"checkpoint {tmp_path / '2'}: an empty folder, removed",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "notes.txt"]
    (tmp_path / "3").write_text("mine")
    with Checkpointer(tmp_path, CheckpointConfig(), read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 2
    with pytest.raises(UserError, match=f"{tmp_path / '3'}: a file in the place of a checkpoint's folder: move it"):
        Checkpointer(tmp_path, CheckpointConfig())
    assert (tmp_path / "3").read_text() == "mine"


def test_goes_on_exactly_although_the_saved_arrays_are_donated_at_once(tmp_path):
    step = make_train_step(compute_loss, OPTIMIZER, ema_decay=0.9)
    state = make_state()
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for i in range(1, 5):
            state, _ = step(state, make_batch(i))
            if i == 2:
                checkpointer.save(record(i, metrics={"eval/loss": 1.0}), state)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() == 2
        restored = checkpointer.restore(abstract())
    assert restored.record == record(2, metrics={"eval/loss": 1.0})
    again = restored.state
    for i in range(3, 5):
        again, _ = step(again, make_batch(i))
    assert_equal(again, state)


def test_frozen_is_not_saved(tmp_path):
    params = make_params()
    frozen = {"embed": params.pop("embed")}
    state = init_train_state(params, frozen, OPTIMIZER, jax.random.key(0))
    with Checkpointer(tmp_path / "run", CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), state)
        restored = checkpointer.restore(abstract_train_state(params, frozen, OPTIMIZER))
    assert restored.state.frozen == {}
    assert_equal(restored.state.replace(frozen=frozen), state)


@pytest.mark.parametrize(("mode", "best"), [("min", [2, 4]), ("max", [1, 3])])
def test_keeps_the_newest_and_the_best(tmp_path, mode, best):
    losses = {1: 9.0, 2: 1.0, 3: 8.0, 4: 2.0, 5: 5.0, 6: 6.0, 7: float("nan"), 8: None}
    state = make_state()
    with Checkpointer(tmp_path, CheckpointConfig(keep=2, keep_best=2, mode=mode)) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(record(step, metrics={} if loss is None else {"eval/loss": loss}), state)
        checkpointer.wait()
        assert checkpointer.steps() == [*best, 7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, [*best, 7, 8]))


def test_of_equally_good_ones_the_newer_stays_also_where_the_best_are_kept_from_a_resume_on(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path, CheckpointConfig(keep=4)) as checkpointer:
        for step, metrics in enumerate(({}, {"eval/loss": 1.0}, {"eval/loss": 1.0}, {"eval/loss": 3.0}), start=1):
            checkpointer.save(record(step, metrics=metrics), state)
    with Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_best=1)) as checkpointer:
        checkpointer.save(record(5, metrics={"eval/loss": 2.0}), state)
        checkpointer.wait()
        assert checkpointer.steps() == [3, 5]


def test_a_checkpoint_whose_evaluation_came_later_is_ranked_by_it(tmp_path):
    """A signal had stopped it: the checkpoint was saved without its scores."""
    with Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_best=1)) as checkpointer:
        for step, metrics in {1: {"eval/loss": 2.0}, 2: {"train/loss": 1.0}}.items():
            checkpointer.save(record(step, metrics=metrics), make_state())
        checkpointer.wait()
    with Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_best=1)) as checkpointer:
        checkpointer.add_metrics(2, {"eval/loss": 1.0})
        for step in (3, 4):
            checkpointer.save(record(step, metrics={"eval/loss": 5.0}), make_state())
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4]
        checkpointer.restore(jax.eval_shape(make_state), step=2)  # whole as it was


def test_the_record_is_checked_before_the_arrays_are_read_and_a_refusal_moves_nothing(tmp_path, monkeypatch):
    def refuse(folder, found):
        assert folder == tmp_path / "1" and found == record(1)
        raise UserError("of another run")

    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
        checkpointer.wait()
        load = checkpointer._load
        monkeypatch.setattr(checkpointer, "_load", lambda folder, items: load(folder, {"run": items["run"]}))
        with pytest.raises(UserError, match="of another run"):
            checkpointer.restore(abstract(), refuse)
        assert checkpointer.steps() == [1]


def test_a_record_of_another_version_is_refused_and_stays(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
    path = tmp_path / "1" / "run" / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rollbacks": 0}))
    (tmp_path / "1" / MANIFEST).unlink()
    write_checksums(tmp_path / "1")
    with (
        Checkpointer(tmp_path, CheckpointConfig()) as checkpointer,
        pytest.raises(UserError, match="/1: another version of postrain wrote this checkpoint: resume with that"),
    ):
        checkpointer.restore(abstract())
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_other_parameters_or_optimizer_are_refused_by_name(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
        wide = make_params() | {"embed": {"embedding": np.zeros((64, 16), np.float32)}}
        with pytest.raises(UserError, match=r"\(params.embed.embedding 'float32\[32, 16\]' -> 'float32\[64, 16\]'"):
            checkpointer.restore(abstract_train_state(wide, {}, OPTIMIZER, ema=True))
        sgd, _ = make_optimizer(OptimizerConfig(name="sgd"), 10)
        with pytest.raises(UserError, match=r"train state .*opt_state.0.* the same model and optimizer"):
            checkpointer.restore(abstract_train_state(make_params(), {}, sgd, ema=True))
        assert checkpointer.steps() == [1], "a refusal leaves the checkpoint where it is"


def test_no_checkpoint_is_none_and_a_missing_step_is_refused(tmp_path):
    with Checkpointer(tmp_path / "new" / "checkpoints", CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore(abstract()) is None
        checkpointer.save(record(3), make_state())
        with pytest.raises(UserError, match=r"no step 2, found \[3\]"):
            checkpointer.restore(abstract(), step=2)


@pytest.mark.parametrize("damage", ["arrays", "json", "metadata"])
def test_torn_checkpoint_is_named_and_the_one_before_used(tmp_path, damage):
    first, lines = make_state(), []
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(record(1), first)
        checkpointer.save(record(2), first.replace(step=first.step + 2))
    files = {
        "arrays": max((tmp_path / "2" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()),
        "json": tmp_path / "2" / "run" / "data.json",
        "metadata": tmp_path / "2" / "state" / "_METADATA",
    }
    os.truncate(files[damage], files[damage].stat().st_size // 2)
    with Checkpointer(tmp_path, CheckpointConfig(), report=lines.append) as checkpointer:
        restored = checkpointer.restore(abstract())
        assert restored.record.step == 1
        assert_equal(restored.state, first)
        assert len(lines) == 1 and f"{tmp_path / '2'}: cannot be read" in lines[0] and "\n" not in lines[0]
        checkpointer.save(record(2), restored.state)
        assert checkpointer.latest_step() == 2
    assert (tmp_path / "2.unreadable").is_dir()


def test_all_torn_does_not_start_again_in_silence_and_every_copy_stays(tmp_path):
    for name in ("1.unreadable", "1.unreadable.2"):
        with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
            checkpointer.save(record(1), make_state())
        os.remove(tmp_path / "1" / "run" / "data.json")
        for attempt in range(2):  # the second finds nothing but what the first set aside
            lines = []
            with (
                Checkpointer(tmp_path, CheckpointConfig(), report=lines.append) as checkpointer,
                pytest.raises(UserError, match=rf"none can be read, found .*{name}: .* use another workdir"),
            ):
                checkpointer.restore(abstract())
            assert len(lines) == 1 - attempt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.unreadable", "1.unreadable.2"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("no room"), "no room.* free some memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.* check the disk"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error.* check the disk"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), "free some memory"),
        (ValueError("PERMISSION_DENIED: reading x"), "PERMISSION_DENIED"),
        (RuntimeError("something else"), "something else"),
    ],
)
@pytest.mark.parametrize("part", ["run", "state"])
def test_a_failing_machine_moves_nothing(tmp_path, monkeypatch, error, words, part):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
        checkpointer.wait()
        load = checkpointer._load

        def fail(folder, items):
            if part in items:
                raise KeyError("incompatible handler") from error  # as Orbax wraps what happens
            return load(folder, items)

        monkeypatch.setattr(checkpointer, "_load", fail)
        with pytest.raises(UserError, match=f"cannot be read now .*{words}.* start again") as caught:
            checkpointer.restore(abstract())
        assert "nothing was moved" in str(caught.value) and "\n" not in str(caught.value)
        monkeypatch.undo()
        assert checkpointer.restore(abstract()).record.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("error", [ValueError("NOT_FOUND: no such key"), FileNotFoundError("x"), KeyError("handler")])
@pytest.mark.parametrize("part", ["run", "shapes", "state"])
def test_a_checkpoint_whose_checksums_hold_is_never_moved(tmp_path, monkeypatch, error, part):
    """Whatever the library says that reads it: that it wrote it, and cannot find it, is no damage."""
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        load = checkpointer._load

        def fail(folder, items=None):
            if items is None or part in items:
                raise error
            return load(folder, items)

        monkeypatch.setattr(checkpointer, "_read_shapes" if part == "shapes" else "_load", fail)
        with pytest.raises(UserError, match="cannot be read now .* nothing was moved"):
            checkpointer.restore(abstract())
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("name", "content"), [("state/_METADATA", "{"), ("state/_METADATA", None), ("run/data.json", "{}")]
)
def test_a_checkpoint_counts_as_saved_when_it_has_been_read_back(tmp_path, monkeypatch, name, content):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
        checkpointer.wait()
        finish = checkpointer._finish

        def spoil(step, unfinished, written, expected):
            written.result()
            (unfinished / name).write_text(content) if content else (unfinished / name).unlink()
            finish(step, unfinished, written, expected)

        monkeypatch.setattr(checkpointer, "_finish", spoil)
        checkpointer.save(record(2), make_state())
        with pytest.raises(UserError, match=r"was not saved \(.*\); the checkpoint of step 1 is whole") as refused:
            checkpointer.wait()
        assert "\n" not in str(refused.value)
        checkpointer._failure = None  # the run would end here
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_read_only_leaves_a_live_save_and_a_damaged_checkpoint_where_they_are(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
        checkpointer.save(record(2), make_state())
    (tmp_path / "3.saving.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2" / "run" / "data.json").write_text("{")
    with Checkpointer(tmp_path, CheckpointConfig(), read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2] and checkpointer.find_step(1) == 1
        assert checkpointer.restore(abstract(), step=1).record.step == 1
        with pytest.raises(UserError, match=r"2: is damaged .* use another of steps \[1, 2\]"):
            checkpointer.restore(abstract())
        with pytest.raises(ValueError, match="read-only"):
            checkpointer.save(record(4), make_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3.saving.orbax-checkpoint-tmp"]
    with pytest.raises(UserError, match="no finished checkpoint in it"):
        Checkpointer(tmp_path / "none", CheckpointConfig(), read_only=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("part", ["run", "state"])
def test_a_checkpoint_that_a_live_run_deletes_meanwhile_is_said(tmp_path, monkeypatch, part):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(record(1), make_state())
        checkpointer.save(record(2), make_state())
    with Checkpointer(tmp_path, CheckpointConfig(), read_only=True) as checkpointer:
        load = checkpointer._load

        def delete_first(folder, items):
            if part in items:
                shutil.rmtree(folder, ignore_errors=True)
            return load(folder, items)

        monkeypatch.setattr(checkpointer, "_load", delete_first)
        with pytest.raises(UserError, match=r"/1: was deleted meanwhile .* another of steps \[2\]") as caught:
            checkpointer.restore(abstract(), step=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_metric_may_be_another_when_the_run_goes_on(tmp_path, mode):
    with Checkpointer(tmp_path, CheckpointConfig(keep=1, keep_best=3)) as checkpointer:
        for step, (loss, share) in {1: (1.0, 0.2), 2: (2.0, 0.9), 3: (3.0, 0.5)}.items():
            checkpointer.save(record(step, metrics={"eval/loss": loss, "eval/exact_match": share}), make_state())
    config = CheckpointConfig(keep=1, keep_best=1, metric="eval/exact_match", mode=mode)
    with Checkpointer(tmp_path, config) as checkpointer:
        checkpointer.save(record(4, metrics={"train/loss": 0.0}), make_state())  # has no such metric: ranks as worst
        checkpointer.save(record(5, metrics={}), make_state())
        checkpointer.wait()
        assert checkpointer.steps() == [{"min": 1, "max": 2}[mode], 5]


def run_script(*arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, HERE / "checkpoint_process.py", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_restores_onto_other_meshes(tmp_path):
    result = run_script("meshes", tmp_path)
    assert result.returncode == 0 and result.stdout.count("ok") == 3, result.stdout + result.stderr


def test_killed_in_mid_save_the_previous_one_is_there(tmp_path):
    result = run_script("kill", tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
    assert [path.name for path in tmp_path.glob("*tmp*")] == ["2.saving.orbax-checkpoint-tmp"], "killed too late"
    lines = []
    with Checkpointer(tmp_path, CheckpointConfig(), report=lines.append) as checkpointer:
        assert checkpointer.latest_step() == 1
        # A fresh process has another state in mind; the folder decides.
        saved = json.loads((tmp_path / "1" / "run" / "data.json").read_text())
        assert saved["data_position"] == {"rows": 1}
    assert lines == [f"checkpoint {tmp_path}/2.saving.orbax-checkpoint-tmp: an unfinished save, removed"]
    assert not list(tmp_path.glob("*tmp*"))
    result = run_script("read", tmp_path)
    assert result.returncode == 0 and "step 1 ok" in result.stdout, result.stdout + result.stderr


def test_full_disk_is_one_line_at_every_call_from_then_on_and_keeps_the_last_good_one(tmp_path):
    result = run_script("full", tmp_path)
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("refused: checkpoint in") for line in lines), result.stdout
    assert all("the checkpoint of step 1 is whole: free some space or lower checkpoint.keep" in line for line in lines)
    assert result.returncode == 1 and "UserError: checkpoint in" in result.stderr, "leaving `with` raises"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="use another workdir"):
        Checkpointer(tmp_path / "file" / "checkpoints", CheckpointConfig())
