"""Runs with tokens that neither tokenizer nor model had: only their rows train, and exports are right everywhere."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from sft_runs import make_values
from tiny_models import make_tiny_model

import postrain
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.export import export_workdir
from postrain.hf.find_model import find_model
from postrain.hf.peft.adapter import load_model
from postrain.hf.verify.compare import verify
from postrain.models.transformer import logits

OLD = 260  # ids of the tiny tokenizer
ITEMS = [f"<item_{i}_{3 * i}>" for i in range(70)]
# Rows of the model: more than the tokenizer's ids and as many as are needed; more but too few; fewer.
SIZES = {"some spare rows": 301, "spare rows": 381, "as many rows": 260}
FAMILIES = {"llama": False, "qwen2": True, "gemma2": True}  # tied


def write_items(path, count=24):
    lines = []
    for i in range(count):
        asked, answer = ITEMS[i % len(ITEMS)], ITEMS[(i + 1) % len(ITEMS)]
        messages = [{"role": "user", "content": f"after{asked}"}, {"role": "assistant", "content": f"{answer} ."}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_run(folder, family, rank, *, size="some spare rows", optimizer=None, export="merged", **new_tokens):
    tied = FAMILIES[family]
    model = make_tiny_model(folder / "model", family, vocab_size=SIZES[size], tie_word_embeddings=tied)
    (folder / "tokens.txt").write_text("\n".join([ITEMS[0] + "\tred item", *ITEMS[1:]]) + "\n", encoding="utf-8")
    new_tokens = {"file": str(folder / "tokens.txt"), **new_tokens}
    values = make_values(folder, model={"path": str(model), "lora": {"rank": rank}, "new_tokens": new_tokens})
    values["data"] |= {"train": str(write_items(folder / "train.jsonl")), "eval": str(folder / "train.jsonl")}
    values["eval"] = {"loss_rows": 4, "generate_rows": 2, "max_new_tokens": 3}
    values["optimizer"] |= optimizer or {}
    return values | {"export": {"format": export}}


def tables(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: x for name, x in tensors.items() if name in ("model.embed_tokens.weight", "lm_head.weight")}


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def assert_close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()


def our_logits(folder, ids):
    config, params = load_model(find_model(folder))
    return np.asarray(logits(params, config, ids))


@pytest.mark.parametrize(("family", "size"), zip(FAMILIES, SIZES, strict=True))
def test_alone_only_new_rows_train_and_the_export_is_whole(tmp_path, family, size):
    values = make_run(
        tmp_path, family, 0, size=size, train_alone=True, optimizer={"weight_decay": 0.1, "ema_decay": 0.5}
    )
    postrain.train(values, tmp_path / "run")
    export, before = tmp_path / "run" / "export", tables(tmp_path / "model")
    after, rows = tables(export), max(SIZES[size], OLD + len(ITEMS))
    assert set(after) == set(before)
    for name, old in before.items():
        kept = min(OLD, len(old))
        assert after[name].shape == (rows, 40)
        np.testing.assert_array_equal(after[name][:kept], old[:kept])
        np.testing.assert_array_equal(after[name][OLD + len(ITEMS) :], old[OLD + len(ITEMS) :])
        moved = np.abs(after[name][OLD : OLD + len(ITEMS)] - old[:OLD].mean(0)).max(1)
        assert (moved[:24] > 1e-3).all()  # those that the rows have
    others = {path: x for path, x in load_file(tmp_path / "model" / "model.safetensors").items() if path not in before}
    exported = load_file(export / "model.safetensors")
    for path, x in others.items():
        np.testing.assert_array_equal(exported[path], x)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    text = f"x{ITEMS[3]} {ITEMS[69]}<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == load_tokenizer(export).encode_text(text) and {OLD + 3, OLD + 69} < set(ids)
    assert tokenizer.decode(ids) == text
    reference = transformers.AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    assert reference.config.vocab_size == rows
    assert_close(our_logits(export, ids), torch_logits(reference, ids))
    assert verify(export).passed
    (answer,) = postrain.generate(str(export), [f"after{ITEMS[0]}"], max_new_tokens=2)
    assert isinstance(answer, str) or answer is not None


@pytest.mark.parametrize(("family", "size"), zip(FAMILIES, SIZES, strict=True))
def test_peft_computes_adapters_with_new_rows(tmp_path, family, size):
    values = make_run(tmp_path, family, 4, size=size, export="adapter")
    postrain.train(values, tmp_path / "run")
    adapter = tmp_path / "run" / "export"
    ids = transformers.AutoTokenizer.from_pretrained(adapter).encode(
        f"a{ITEMS[0]}b{ITEMS[9]}", add_special_tokens=False
    )
    ours = our_logits(adapter, ids)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, attn_implementation="eager").eval()
    assert_close(ours, torch_logits(model, ids))
    assert_close(ours, torch_logits(model.merge_and_unload(), ids))
    assert verify(adapter).passed
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    base.resize_token_embeddings(max(SIZES[size], OLD + len(ITEMS)), mean_resizing=False)
    assert np.abs(ours - torch_logits(base, ids)).max() > 1e-3

    export_workdir(tmp_path / "run", tmp_path / "merged", "merged")
    assert_close(our_logits(tmp_path / "merged", ids), ours)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_close(ours, torch_logits(merged, ids))


def test_with_the_rest_everything_trains_and_a_changed_list_is_refused(tmp_path):
    values = make_run(tmp_path, "llama", 0) | {"train": {"steps": 2}, "eval": {}}
    values["data"]["eval"] = []
    postrain.train(values, tmp_path / "run")
    before, after = tables(tmp_path / "model"), tables(tmp_path / "run" / "export")
    assert after["model.embed_tokens.weight"].shape == (330, 40)
    assert (after["lm_head.weight"][:OLD] != before["lm_head.weight"][:OLD]).any()
    assert verify(tmp_path / "run" / "export").passed
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(tokens.read_text().replace("\tred item", "\tblue item"))
    with pytest.raises(UserError, match=r"model\.new_tokens: other tokens, or in another order, or other texts"):
        postrain.train(values | {"train": {"steps": 3}}, tmp_path / "run")
