"""What stands for a model, and what is near it: an adapter with and without its base, a run's workdir."""

import dataclasses
import json
import shutil

import jax
import pytest
from hf_compare import our_logits, random_ids
from tiny_models import make_tiny_model

from postrain.config import Config
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.hf.find_model import ModelFolder, find_model, locate_model
from postrain.hf.load import load_pretrained
from postrain.hf.peft.adapter import load_model, save_adapter
from postrain.models.config import LoraConfig
from postrain.models.lora import init_lora
from postrain.models.params import merge_params
from postrain.report.workdir import save_config
from postrain.rollout.chat import generate


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("folders") / "base", "qwen3")


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter of ``base``, and the logits of the two together."""
    config, params = load_pretrained(base)
    config = dataclasses.replace(config, lora=LoraConfig(rank=3, alpha=5.0))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapters = jax.tree.map(noise, init_lora(config, jax.random.key(0)))
    save_adapter(tmp_path / "adapter", adapters, config, base_folder=base)
    return tmp_path / "adapter", our_logits(merge_params(adapters, params), config, random_ids(301))


def rename_base(folder, name):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))


def test_a_model_is_itself(base):
    assert find_model(base) == ModelFolder(base, base)


def test_an_adapter_brings_its_base(base, adapter):
    folder, expected = adapter
    found = find_model(str(folder))
    assert found == ModelFolder(base, folder, folder)
    config, params = load_model(found)
    assert (our_logits(params, config, random_ids(301)) == expected).all()
    assert generate(folder, "hi", max_new_tokens=8) == generate(
        (params, config, load_tokenizer(folder)), "hi", max_new_tokens=8
    )
    assert generate(folder, "hi", max_new_tokens=8) != generate(base, "hi", max_new_tokens=8)


def test_an_adapter_without_a_tokenizer_takes_its_bases(base, adapter, monkeypatch):
    folder, _ = adapter
    (folder / "tokenizer.json").unlink()
    assert find_model(folder) == ModelFolder(base, base, folder)
    rename_base(folder, "base")  # as PEFT does: seen from where the command runs
    monkeypatch.chdir(base.parent)
    assert find_model(folder).base.resolve() == base
    monkeypatch.chdir(folder)
    shutil.copytree(base, folder.parent / "near")
    rename_base(folder, "../near")
    monkeypatch.chdir(base)
    assert find_model(folder).base.resolve() == folder.parent / "near"


@pytest.mark.parametrize("name", ["someone/some-model", "", None, 7])
def test_an_adapter_whose_base_is_not_here(adapter, name):
    rename_base(adapter[0], name)
    with pytest.raises(UserError, match=f"adapter_config.json: base_model_name_or_path is {name!r}, expected"):
        find_model(adapter[0])


def test_what_needs_a_whole_model_says_so(adapter):
    for read in (load_pretrained, locate_model):
        with pytest.raises(UserError, match="adapter: expected a whole model, found an adapter: merge it"):
            read(str(adapter[0]))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder_of_an_adapter_and_a_whole_model_is_refused(base, adapter, name):
    """transformers goes by adapter_config.json, servers by the model."""
    folder, _ = adapter
    shutil.copyfile(base / "config.json", folder / "config.json")
    (folder / name).write_bytes((base / "model.safetensors").read_bytes())
    for read in (find_model, locate_model, load_pretrained):
        with pytest.raises(UserError, match="holds an adapter .* and a whole model .* give a folder that") as caught:
            read(str(folder))
        assert name in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("exported", [False, True])
def test_a_workdir_is_answered_with_its_export(base, tmp_path, exported):
    workdir = tmp_path / "run"
    workdir.mkdir()
    save_config(workdir, Config())
    if exported:
        shutil.copytree(base, workdir / "export")
    advice = f"give its export, {workdir}/export" if exported else f"`postrain export --workdir={workdir} --output=OUT`"
    for read in (load_pretrained, locate_model, find_model):
        with pytest.raises(UserError, match="expected the folder of a model, found the workdir of a run") as caught:
            read(str(workdir))
        assert advice in str(caught.value) and "\n" not in str(caught.value)
