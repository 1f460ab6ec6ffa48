"""Classifiers' folders in `transformers` and here give the same scores, padded with the end token or not."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_models import make_tiny_model, make_tiny_tokenizer, randomize

from postrain.errors import UserError
from postrain.hf.classifier import load_classifier, save_classifier
from postrain.hf.config import read_config
from postrain.hf.load import load_pretrained
from postrain.models.heads import HeadConfig, apply_heads, init_heads
from postrain.models.transformer import compute_hidden

EOS, LENGTHS, LABELS = 2, (9, 1, 17, 4), 5
CLASSIFIERS = {"llama": "LlamaForSequenceClassification", "gemma3": "Gemma3TextForSequenceClassification"}
CLASSIFIERS |= {"qwen3_moe": "Qwen3MoeForSequenceClassification"}


def make_classifier(folder, family):
    make_tiny_model(folder, family, pad_token_id=EOS, num_labels=LABELS)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=LABELS)
    torch.manual_seed(1)
    model = getattr(transformers, CLASSIFIERS[family])(config)
    randomize(model)
    for file in folder.glob("*"):
        file.unlink()
    model.save_pretrained(folder)
    make_tiny_tokenizer(folder)
    return folder


def load_torch(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def make_rows(end):
    """Ragged rows padded with EOS; ``end``: the last token of each text, None for any other than EOS."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(LENGTHS), max(LENGTHS) + 2), EOS, np.int64)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = rng.integers(EOS + 1, 300, length)
        if end is not None:
            row[length - 1] = end
    mask = np.arange(tokens.shape[1]) < np.array(LENGTHS)[:, None]
    return tokens, mask.astype(np.int64)


def our_scores(folder, tokens, mask):
    config, head, params = load_classifier(folder)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = jax.jit(compute_hidden, static_argnums=1)(params, config, tokens, mask.astype(np.int32), positions)
    outputs, present = apply_heads(params, [head], hidden, mask.astype(np.int32), 1)
    assert present[head.name].all()
    return np.asarray(outputs[head.name][:, 0])


def torch_scores(model, tokens, mask):
    """At the true last position, and where `transformers` itself looks."""
    inputs = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        every = model.score(model.model(**inputs).last_hidden_state).numpy()
        return every[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1], model(**inputs).logits.numpy()


def distance(a, b):
    return np.abs(a - b).max() / b.std()


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_are_those_of_transformers_at_the_true_end(tmp_path, family):
    folder = make_classifier(tmp_path / "model", family)
    model = load_torch(folder)
    tokens, mask = make_rows(end=None)
    at_end, theirs = torch_scores(model, tokens, mask)
    ours = our_scores(folder, tokens, mask)
    assert ours.shape == (len(LENGTHS), LABELS)
    assert distance(ours, theirs) <= 1e-4 and distance(ours, at_end) <= 1e-4
    tokens, mask = make_rows(end=EOS)  # which transformers takes for padding
    at_end, theirs = torch_scores(model, tokens, mask)
    assert distance(our_scores(folder, tokens, mask), at_end) <= 1e-4
    assert distance(theirs, at_end) > 0.1

    config, head, params = load_classifier(folder)
    save_classifier(tmp_path / "again", params, config, head, source_folder=folder, labels=list("abcde"))
    assert distance(torch_scores(load_torch(tmp_path / "again"), tokens, mask)[0], at_end) <= 1e-6
    assert load_torch(tmp_path / "again").config.id2label == dict(enumerate("abcde"))


def test_a_reward_model_made_of_a_language_model(tmp_path):
    base = make_tiny_model(tmp_path / "base", "gemma2", tie_word_embeddings=True)
    config, params = load_pretrained(base)
    head = HeadConfig("reward")
    params |= init_heads([head], config, jax.random.key(0))
    save_classifier(tmp_path / "reward", params, config, head, source_folder=base, dtype="float32")
    tokens, mask = make_rows(end=None)
    at_end, theirs = torch_scores(load_torch(tmp_path / "reward"), tokens, mask)
    ours = our_scores(tmp_path / "reward", tokens, mask)
    assert ours.shape == (len(LENGTHS), 1)
    assert distance(ours, at_end) <= 1e-4 and distance(ours, theirs) <= 1e-4


def test_folders_that_are_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    with pytest.raises(UserError, match="LlamaForCausalLM, expected a classifier's"):
        load_classifier(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="missing: score.weight; left over: lm_head.weight"):
        load_classifier(folder)


def test_a_language_model_is_wanted_and_a_classifier_found(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}'
    )
    with pytest.raises(
        UserError, match="is a reward model or classifier, expected a language .*`postrain score` reads"
    ):
        read_config(tmp_path)
