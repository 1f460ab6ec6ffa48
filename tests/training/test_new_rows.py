"""Rows of new tokens: where they are, what they start as, and that nothing else moves."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import make_tiny_model

from postrain.checkpoint.record import fingerprint_model
from postrain.config import NewTokensSection, resolve
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.models.lora import merge_lora
from postrain.models.params import merge_params
from postrain.models.transformer import unembedding
from postrain.sharding import make_mesh
from postrain.training.model import abstract_model, load_model

OLD = 260  # ids of the tiny tokenizer
TOKENS = ["<a>\tred", "<b>", "<c>\tx"]


def configure(folder, tokens=TOKENS, rank=0, **keys):
    model = {"path": str(folder), "lora": {"rank": rank}, "new_tokens": {"tokens": tokens, **keys}}
    return resolve({"model": model, "data": {"train": "unread", "batch_size": 2}, "mesh": {"fsdp": 1}})


def describe(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding) for path, leaf in leaves}


@pytest.mark.parametrize("keys", [{}, {"rank": 4}, {"train_alone": True}], ids=str)
@pytest.mark.parametrize(("size", "tied"), [(270, True), (262, False), (255, False)], ids=str)
def test_rows_start_as_means_of_old_rows(tmp_path, size, tied, keys):
    folder = make_tiny_model(tmp_path / "model", "qwen2", vocab_size=size, tie_word_embeddings=tied)
    if size < OLD:  # fewer rows than the tokenizer has ids
        other = make_tiny_model(tmp_path / "other", "qwen2", vocab_size=301)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((other / name).read_bytes())
    ids = {text: load_tokenizer(folder).encode_text(text) for text in ("red", "x")}
    tensors = load_file(folder / "model.safetensors")
    config, mesh = configure(folder, **keys), make_mesh(resolve_mesh(), jax.devices()[:1])
    if size < OLD and max(ids["red"]) >= size:
        pytest.fail("the texts are to have rows")
    model = load_model(config, folder, mesh)
    abstract = abstract_model(config, folder, mesh)
    assert abstract.config == model.config
    assert describe(abstract.params) == describe(model.params) and describe(abstract.frozen) == describe(model.frozen)

    first, stop, rows = min(OLD, size), OLD + len(TOKENS), max(size, OLD + len(TOKENS))
    assert model.config.vocab_size == rows
    whole = merge_params(model.params, model.frozen)
    merged = merge_lora(whole, model.config)
    names = {"embed": "model.embed_tokens.weight"} | ({} if tied else {"unembed": "lm_head.weight"})
    assert set(names) == {"embed", "unembed"} & set(merged)
    for part, name in names.items():
        old, found = tensors[name], np.asarray(merged[part]["embedding"])
        np.testing.assert_array_equal(found[:first], old[:first])
        np.testing.assert_array_equal(found[stop:size], old[stop:])
        assert not found[rows:].any()
        means = [old[ids["red"]].mean(0), old[:first].mean(0), old[ids["x"]].mean(0)]
        np.testing.assert_allclose(found[OLD:stop], means, atol=1e-6)
        np.testing.assert_allclose(found[first:OLD], np.tile(old[:first].mean(0), (OLD - first, 1)), atol=1e-6)
    np.testing.assert_array_equal(unembedding(whole, model.config), unembedding(merged, model.config))
    if keys.get("train_alone"):
        assert {path.split("'")[3] for path in describe(model.params)} == {"new_rows"}


def resolve_mesh():
    return resolve({"model": {"path": "x"}, "data": {"train": "x"}, "mesh": {"fsdp": 1}}).mesh


def test_a_start_without_a_row_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", vocab_size=300)
    raw = json.loads((folder / "config.json").read_text()) | {"vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"'<a>' is to start as the mean of tokens \[.*rows up to 19"):
        abstract_model(configure(folder), folder, make_mesh(resolve_mesh(), jax.devices()[:1]))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"new_tokens": {"tokens": ["<a>"], "file": "x"}}, "are both set"),
        ({"new_tokens": {"train_alone": True}}, "there are no new tokens"),
        ({"new_tokens": {"tokens": ["<a>"], "train_alone": True}, "lora": {"rank": 4}}, "set one of them"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(model, words):
    with pytest.raises(UserError, match=words):
        resolve({"model": {"path": "x", **model}, "data": {"train": "x"}})


def test_the_fingerprint_knows_the_list(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", vocab_size=300)
    prints = [
        json.dumps(fingerprint_model(folder, None, section))
        for section in (
            None,
            NewTokensSection(("<a>", "<b>")),
            NewTokensSection(("<b>", "<a>")),
            NewTokensSection(("<a>", "<b>\tx")),
            NewTokensSection(("<a>", "<b>"), special=True),
            NewTokensSection(("<a>", "<b>"), train_alone=True),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert json.dumps(fingerprint_model(folder, None, NewTokensSection())) == prints[0]
