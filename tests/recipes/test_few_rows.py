"""A run says where its rows are fewer than its updates take, and where it is hardly a run."""

import contextlib

import pytest
from sft_runs import make_values, write_rows

from postrain.config import resolve
from postrain.data.batches.open import open_train_rows
from postrain.data.rendering.tokenizer import load_run_tokenizer
from postrain.sharding import make_mesh
from postrain.training.rows import Rows
from postrain.training.session import format_few_rows

SHORT = "warning     the whole run is {}: unless it is a trial, raise "
LOWER = "lower data.batch_size or data.sequence_length"


@pytest.mark.parametrize(
    ("count", "batch_size", "train", "expected"),
    [
        (  # two rows of 96 tokens hold four conversations
            4,
            8,
            {"steps": 0},
            [
                f"warning     1 update of 8 rows made of 2 packed rows: each comes about 4 times: {LOWER}",
                SHORT.format("1 update") + f"train.epochs or {LOWER}",
            ],
        ),
        (
            4,
            8,
            {"steps": 20},
            [f"warning     20 updates of 8 rows made of 2 packed rows: each comes about 80 times: {LOWER}"],
        ),
        (40, 2, {"steps": 0}, []),
        (40, 1, {"steps": 9}, [SHORT.format("9 updates") + "train.steps"]),
        (
            42,
            2,
            {"steps": 0},
            [
                "rows        11 updates of 2 rows for train.epochs = 1 of 21 packed rows: the last is filled up with "
                "rows of a further epoch"
            ],
        ),
        (42, 2, {"steps": 0, "epochs": 2}, []),
        (42, 2, {"steps": 100}, []),  # as the user says
    ],
)
def test_a_run_of_few_rows_says_so(inputs, tmp_path, count, batch_size, train, expected):
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", count)), "eval": [], "batch_size": batch_size}
    config = resolve(make_values(inputs, data=data, train=train))
    tokenizer = load_run_tokenizer(config, inputs / "model")
    opened = open_train_rows(tokenizer, config.data, tmp_path / "rejected.jsonl", kind="sft")
    rows = Rows(opened, make_mesh(config.mesh))
    with contextlib.closing(rows):
        updates = config.train.steps or rows.num_steps(config.train.epochs)
        assert format_few_rows(config, rows.rows_per_epoch, updates).splitlines() == expected


def test_a_stream_does_not_know_its_rows(inputs, tmp_path):
    data = {"streaming": True, "stream": {"shards": 2}}
    config = resolve(make_values(inputs, data=data, train={"steps": 100}))
    tokenizer = load_run_tokenizer(config, inputs / "model")
    rows = Rows(open_train_rows(tokenizer, config.data, tmp_path / "r.jsonl", kind="sft"), make_mesh(config.mesh))
    with contextlib.closing(rows):
        assert rows.rows_per_epoch == 0 and format_few_rows(config, 0, 100) == ""
