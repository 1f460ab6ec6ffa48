"""Tiny random models: as transformers has them, and as they are loaded here."""

import pytest
import torch
import transformers
from tiny_models import make_tiny_model

from postrain.hf.load import load_pretrained


class TinyModel:
    """The same weights on both sides: ``config`` and ``params`` here, ``torch_model`` there."""

    def __init__(self, folder, family):
        make_tiny_model(folder, family)
        self.config, self.params = load_pretrained(folder)
        self.torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def model(request, tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp("llama") / "model", "llama")
