"""What a run says of itself before it starts, and the folder that it takes."""

import concurrent.futures

import numpy as np

from postrain.compute.summary import describe_overlong
from postrain.compute.workdir import make_workdir
from postrain.models.config import ModelConfig

CONFIG = ModelConfig(64, 8, 16, 1, 2, 1, 4, max_positions=128)


def test_documents_beyond_the_models_positions_are_warned_of():
    assert describe_overlong(np.array([3, 128]), CONFIG) == ""
    line = describe_overlong(np.array([3, 128, 129, 2048]), CONFIG)
    assert "2 of 4 documents are longer than the 128 positions" in line and "the longest takes 2,048" in line
    assert "\n" not in line


def test_processes_that_make_the_same_workdir_do_not_meet(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make_workdir, [tmp_path / "run"] * 200))
    assert set(made) == {tmp_path / "run"} and not list((tmp_path / "run").iterdir())
