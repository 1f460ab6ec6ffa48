"""Folders whose tensors are named, tied or spread over files otherwise: what is read is what transformers reads."""

import json
import shutil

import jax
import numpy as np
import pytest
from hf_compare import folder_logits, random_ids, relative_difference, torch_logits
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny_model

from postrain.checkpoint.record import fingerprint_folder
from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.save import save_pretrained
from postrain.hf.tensors import INDEX_FILE, ONE_FILE

IDS = random_ids(301, (1, 16))
EMBEDDING, PROJECTION = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    make_tiny_model(base / "llama", "llama")
    make_tiny_model(base / "sharded", "llama", max_shard_size="40KB")
    make_tiny_model(base / "tied", "qwen3", tie_word_embeddings=True)
    return base


@pytest.fixture
def folder(made, tmp_path, request):
    return shutil.copytree(made / request.param, tmp_path / "model")


def rewrite(folder, change):
    """Lays ``change`` of (name, array) pairs over the weights; returns the transformers logits of before and after."""
    before = torch_logits(folder, IDS)
    tensors = dict(pair for item in load_file(folder / ONE_FILE).items() for pair in change(*item))
    save_file(tensors, folder / ONE_FILE, {"format": "pt"})
    return before, torch_logits(folder, IDS)


def same_params(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), load_pretrained(a)[1], load_pretrained(b)[1]))


@pytest.mark.parametrize("folder", ["llama", "tied"], indirect=True)
@pytest.mark.parametrize("part", ["model.", "model.layers.1"])
def test_tensors_without_the_level_of_the_model(folder, part, made):
    """As a model without a head is saved, and where only some of them are so."""
    source = made / ("tied" if json.loads((folder / "config.json").read_text())["tie_word_embeddings"] else "llama")
    before, after = rewrite(
        folder, lambda name, array: [(name.removeprefix("model.") if name.startswith(part) else name, array)]
    )
    assert np.array_equal(before, after) and same_params(folder, source)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_tensor_under_both_names_is_left_over(folder):
    rewrite(folder, lambda name, array: [(name, array), (name.removeprefix("model."), array.copy())])
    with pytest.raises(UserError, match="left over: embed_tokens.weight"):
        load_pretrained(folder)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_frequencies_left_by_old_versions_are_not_weights(folder, made):
    places = ("model.layers.0.self_attn.", "model.", "layers.1.self_attn.", "")
    buffers = [(f"{place}rotary_emb.inv_freq", np.ones(6, np.float32)) for place in places]
    before, after = rewrite(folder, lambda name, array: [(name, array), *buffers])
    assert np.array_equal(before, after) and same_params(folder, made / "llama")


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_a_tied_model_may_be_stored_by_its_projection(folder, made, tmp_path):
    name_of = lambda name: PROJECTION if name == EMBEDDING else name
    before, after = rewrite(folder, lambda name, array: [(name_of(name), array.astype(np.float16))])
    half = folder_logits(folder, IDS)
    assert relative_difference(half, after) < 1e-5 and relative_difference(after, before) < 0.05
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", params, config, source_folder=folder)
    written = load_file(tmp_path / "out" / ONE_FILE)
    assert PROJECTION not in written and written[EMBEDDING].dtype == np.float16  # of the file, not of config.json
    assert np.array_equal(torch_logits(tmp_path / "out", IDS), after)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_an_untied_model_needs_both(folder):
    rewrite(folder, lambda name, array: [] if name == EMBEDDING else [(name, array)])
    with pytest.raises(UserError, match=f"missing: {EMBEDDING}"):
        load_pretrained(folder)


# --- two sets of weights ---


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
def test_two_sets_of_weights_must_be_the_same(folder, made):
    """transformers reads the whole file, and never the index beside it."""
    one = folder / ONE_FILE
    shutil.copyfile(made / "llama" / ONE_FILE, one)
    assert same_params(folder, made / "llama")
    tensors = load_file(one)
    changed = tensors["model.layers.2.mlp.up_proj.weight"].copy()
    changed[87, 39] += 1
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": changed}, one, {"format": "pt"})
    assert not np.array_equal(torch_logits(folder, IDS), torch_logits(made / "sharded", IDS))
    for other in (tensors | {"model.layers.2.mlp.up_proj.weight": changed}, {**tensors, "extra": changed}):
        save_file(other, one, {"format": "pt"})
        with pytest.raises(UserError) as caught:
            load_pretrained(folder)
        words = (str(folder), ONE_FILE, INDEX_FILE, "up_proj" if "extra" not in other else "extra")
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
def test_an_index_whose_files_are_all_gone_was_left_behind(folder, made):
    """By one who saved the model again as a whole. With one of its files still there the download is not complete."""
    first, *others = sorted(folder.glob("*.safetensors"))
    shutil.copyfile(made / "llama" / ONE_FILE, folder / ONE_FILE)
    for shard in others:
        shard.unlink()
    with pytest.raises(UserError, match=others[0].name):
        load_pretrained(folder)
    first.unlink()
    assert same_params(folder, made / "llama")
    assert fingerprint_folder(folder) == fingerprint_folder(made / "llama")


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_an_index_may_name_the_one_file(folder, made):
    names = load_file(folder / ONE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, ONE_FILE)}))
    assert same_params(folder, made / "llama")
    assert fingerprint_folder(folder) == fingerprint_folder(made / "llama")


@pytest.mark.parametrize("folder", ["llama", "sharded"], indirect=True)
def test_a_fingerprint_is_of_the_files_that_are_read(folder):
    """Every file of an ordinary folder, as ever; one that lies beside them does not refuse a resume."""
    before = fingerprint_folder(folder)
    assert set(before) == {file.name for file in folder.glob("*.safetensors")}
    save_file({"a": np.zeros(3, np.float32)}, folder / "consolidated.safetensors")
    assert fingerprint_folder(folder) == before
    first = folder / sorted(before)[0]
    first.write_bytes(first.read_bytes()[:-1] + b"\x01")
    assert fingerprint_folder(folder) != before


@pytest.mark.parametrize("folder", ["sharded"], indirect=True)
def test_a_missing_shard_is_named_by_the_fingerprint_too(folder):
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        fingerprint_folder(folder)
