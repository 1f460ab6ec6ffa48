"""metrics.jsonl through kill and resume, real trackers read back, the progress line."""

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import time

import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from tensorboardX.proto.event_pb2 import Event

from postrain.config import TrackersConfig
from postrain.errors import UserError
from postrain.report.metrics import MetricsWriter, ProgressLine, format_seconds, read_metrics

OFF = TrackersConfig()


def test_lines_are_sorted_short_and_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, OFF)
    writer.write(1, {"train/loss": jnp.float32(0.1), "eval/loss": np.float64(0.1), "train/weight": 3, "a": jnp.nan})
    expected = '{"step": 1, "a": null, "eval/loss": 0.1, "train/loss": 0.1, "train/weight": 3}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == expected
    writer.write(2, {"train/loss": np.float32(1e-8), "train/exact": np.float32(1) / np.float32(3)})
    last = read_metrics(tmp_path)[1]
    assert np.float32(last["train/exact"]) == np.float32(1) / np.float32(3) and last["train/loss"] == 1e-8
    writer.close()


def log(folder, start, stop, step=None):
    with contextlib.closing(MetricsWriter(folder, OFF, step=step)) as writer:
        for i in range(start, stop):
            writer.write(i, {"train/loss": np.float32(1) / np.float32(i + 3)})


def test_killed_and_resumed_is_the_same_file(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    log(tmp_path / "whole", 0, 10)
    log(tmp_path / "killed", 0, 8)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # torn by the kill
    log(tmp_path / "killed", 6, 10, step=5)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(10))


def test_run_that_starts_anew_leaves_no_old_lines_and_no_part(tmp_path):
    log(tmp_path, 0, 3)
    log(tmp_path, 0, 1)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"loss": 1}', "expected a JSON object with `step`"),
    ],
)
def test_broken_line_is_named(tmp_path, line, words):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=f"metrics.jsonl:2: {words}"):
        MetricsWriter(tmp_path, OFF, step=1)


def test_a_metric_that_is_not_a_scalar_is_refused(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, OFF)) as writer, pytest.raises(ValueError, match=r"shape \(2,\)"):
        writer.write(1, {"a": np.zeros(2)})


def read_events(folder):
    """(step, name, value) of all scalars in TensorBoard's event files: length, 4 bytes, message, 4 bytes."""
    found, purged = [], []
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status:
                purged.append(event.step)
    return found, purged


def test_tensorboard_file_reads_back(tmp_path):
    config = TrackersConfig(tensorboard=True)
    with contextlib.closing(MetricsWriter(tmp_path, config)) as writer:
        writer.write(1, {"train/loss": 2.0, "perf/mfu": 0.25})
        writer.write(2, {"train/loss": 1.5})
    expected = {(1, "train/loss", 2.0), (1, "perf/mfu", 0.25), (2, "train/loss", 1.5)}
    assert set(read_events(tmp_path / "tensorboard")[0]) == expected
    with contextlib.closing(MetricsWriter(tmp_path, config, step=1)) as writer:
        writer.write(2, {"train/loss": 1.25})
    events, purged = read_events(tmp_path / "tensorboard")
    assert purged == [2] and (2, "train/loss", 1.25) in events


def test_wandb_offline_makes_a_run_with_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    with contextlib.closing(
        MetricsWriter(tmp_path, TrackersConfig(wandb="offline"), run_config={"a": {"b": 1}})
    ) as writer:
        writer.write(7, {"train/loss": 2.0})
    run_id = (tmp_path / "wandb_id").read_text()
    [file] = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    deadline = time.monotonic() + 60  # wandb's own process writes the file, and may do so after finish() returns
    while b"train/loss" not in file.read_bytes():
        assert time.monotonic() < deadline, "the metrics never reached the run's file"
        time.sleep(0.1)
    assert wandb.run is None, "closed"


def test_trackers_that_cannot_start_say_what_to_do(tmp_path, monkeypatch):
    for package, config in (("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "offline"})):
        monkeypatch.setitem(sys.modules, package, None)  # what import finds where it is not installed
        with pytest.raises(UserError, match=rf"needs the package {package}, .* pip install -e '.\[log\]'"):
            MetricsWriter(tmp_path, TrackersConfig(**config))


def test_packages_of_trackers_are_not_imported_unless_switched_on(tmp_path, monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with contextlib.closing(MetricsWriter(tmp_path, OFF)) as writer:
        writer.write(0, {"a": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "a": 1}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_rewrites_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    now, stream = [100.0], Terminal()
    line = ProgressLine(600, stream=stream, clock=lambda: now[0])
    line.update(1, {"train/loss": 2.0})
    assert stream.getvalue() == "\r\x1b[Kstep   1/600  loss 2.0000"
    now[0] += 19 * 2
    line.update(20, {"train/loss": 1.25, "perf/tokens_per_second": 1034.4, "perf/mfu": 0.412})
    last = "step  20/600  loss 1.2500  1,034 tokens/s  MFU 41.2%  19m20s left"
    forecast = "forecast: 19m20s more (580 steps of 2 s), then the export"
    assert stream.getvalue().endswith(f"\r\x1b[K{forecast}\nstep   1/600  loss 2.0000\r\x1b[K{last}")
    line.print("eval/loss 1.0")
    assert stream.getvalue().endswith(f"\r\x1b[Keval/loss 1.0\n{last}")
    line.close()
    assert stream.getvalue().endswith(f"{last}\n") and stream.getvalue().count("\n") == 3


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "step 20/60  loss 1.2500  1,034 tokens/s"),
        (39, "step 20/60  loss 1.2500"),
        (11, "step 20/60"),
        (8, "step 20"),
    ],
)
def test_progress_is_one_line_on_a_narrow_terminal(monkeypatch, columns, shown):
    """Whole figures or none; a line that wraps would stay on the screen."""
    monkeypatch.setenv("TERM", "xterm")
    lead, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(follower, "w") as stream:
        ProgressLine(60, stream=stream).update(20, {"train/loss": 1.25, "perf/tokens_per_second": 1034.4})
        assert os.read(lead, 1000).decode() == f"\r\x1b[K{shown}"
    os.close(lead)


def test_a_terminal_that_cannot_erase_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ProgressLine(60, stream=stream).update(20, {"train/loss": 1.25})
    assert stream.getvalue() == "step 20/60  loss 1.2500\n"


def test_progress_in_a_file_is_a_plain_line_every_so_often():
    now, stream = [0.0], io.StringIO()
    line = ProgressLine(100, stream=stream, plain_every=10, clock=lambda: now[0])
    with contextlib.closing(line):
        for step in range(1, 101):
            now[0] += 1
            line.update(step, {})
        line.print("done")
    lines = stream.getvalue().splitlines()
    lines.remove("forecast: 1m36s more (96 steps of 1 s), then the export")
    assert [text.split()[1] for text in lines[:-1]] == [f"{s}/100" for s in [*range(1, 100, 10), 100]]
    assert lines[-1] == "done" and "\r" not in stream.getvalue()


@pytest.mark.parametrize(("every", "evaluations"), [(0, "1 evaluation"), (100, "2 evaluations"), (30, "4 evaluations")])
def test_the_forecast_counts_evaluations_apart_from_steps(every, evaluations):
    """Those to come at what the newest took; none of their time is taken for that of a step."""
    now, stream = [0.0], io.StringIO()
    line = ProgressLine(120, every, stream=stream, plain_every=0, clock=lambda: now[0])
    line.add_evaluation(90)  # before the first step, with what it compiles
    line.update(1, {})
    now[0] += 50
    line.add_evaluation(50)
    now[0] += 3 * 2
    line.update(4, {})
    left = format_seconds(116 * 2 + int(evaluations[0]) * 50)
    assert stream.getvalue().splitlines()[1:] == [
        f"forecast: {left} more (116 steps of 2 s, {evaluations} of 50s), then the export",
        f"step   4/120  {left} left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (18240, "5h04m")]
)
def test_time_is_short(seconds, text):
    assert format_seconds(seconds) == text
