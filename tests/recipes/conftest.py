import pytest
from sft_runs import make_inputs, make_values

from postrain import train


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """(workdir, returned metrics) of one whole run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(make_values(inputs), workdir)
