"""Every way in which a model folder can be wrong gets one line that names the file, key or tensor."""

import json
import resource
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_tiny_model

from postrain.errors import UserError
from postrain.hf.config import read_config
from postrain.hf.folders import check_replaceable
from postrain.hf.load import load_pretrained
from postrain.hf.save import save_pretrained

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    base = tmp_path_factory.mktemp("pristine")
    make_tiny_model(base / "one", "llama")
    make_tiny_model(base / "sharded", "llama", max_shard_size="40KB")
    make_tiny_model(base / "tied", "qwen3", tie_word_embeddings=True)
    return base


@pytest.fixture
def one(pristine, tmp_path):
    return shutil.copytree(pristine / "one", tmp_path / "one")


@pytest.fixture
def sharded(pristine, tmp_path):
    return shutil.copytree(pristine / "sharded", tmp_path / "sharded")


@pytest.fixture
def tied(pristine, tmp_path):
    return shutil.copytree(pristine / "tied", tmp_path / "tied")


def refusal(action, *args, **kwargs):
    """The message of the UserError that ``action`` must raise: one line."""
    with pytest.raises(UserError) as caught:
        action(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def edit_config(folder, **keys):
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in (raw | keys).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | {name.replace("/", "."): v for name, v in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def test_no_folder(tmp_path):
    assert "nowhere" in refusal(load_pretrained, tmp_path / "nowhere")


def test_no_config(one):
    (one / "config.json").unlink()
    assert "config.json" in refusal(load_pretrained, one)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', ""])
def test_broken_config(one, text):
    (one / "config.json").write_text(text)
    assert str(one / "config.json") in refusal(load_pretrained, one)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ..., "model_type": "mamba"}, "mamba"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "modeling.py"}}, "auto_map"),
        ({"hidden_size": "40"}, "hidden_size"),
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_that_changes_the_maths_is_refused_by_name(one, keys, named):
    edit_config(one, **keys)
    message = refusal(read_config, one)
    assert named in message and str(one / "config.json") in message


@pytest.mark.parametrize("used", [0, 5])
def test_more_experts_a_token_than_there_are(tmp_path, used):
    folder = make_tiny_model(
        tmp_path / "m", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )
    edit_config(folder, num_experts_per_tok=used)
    assert f"num_experts_per_tok is {used}, expected 1 to the number of experts, 4" in refusal(read_config, folder)


def test_harmless_keys_are_accepted(one):
    before = read_config(one)
    edit_config(
        one, _name_or_path="x", use_cache=False, rope_scaling=None, attention_dropout=0.0, rope_interleaved=False
    )
    assert read_config(one) == before


def test_no_weights(one):
    (one / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(load_pretrained, one)
    (one / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in refusal(load_pretrained, one)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_corrupt_safetensors(one, damage):
    file = one / "model.safetensors"
    data = file.read_bytes()
    damaged = {"truncated": data[:-100], "garbage": b"not a safetensors file" * 99, "empty": b""}
    damaged["header"] = struct.pack("<Q", 10**12) + data[8:]
    file.write_bytes(damaged[damage])
    assert str(file) in refusal(load_pretrained, one)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00008.safetensors").unlink(missing_ok=True)
    gone = sorted(sharded.glob("model-*.safetensors"))[0]
    gone.unlink()
    assert gone.name in refusal(load_pretrained, sharded)


def test_truncated_shard(sharded):
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:500])
    assert file.name in refusal(load_pretrained, sharded)


def test_index_without_an_entry(sharded):
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    del raw["weight_map"][UP]
    index.write_text(json.dumps(raw))
    message = refusal(load_pretrained, sharded)
    assert UP in message and index.name in message


def test_index_that_names_the_wrong_file(sharded):
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    files = sorted(set(raw["weight_map"].values()))
    wrong = next(file for file in files if file != raw["weight_map"][UP])
    raw["weight_map"][UP] = wrong
    index.write_text(json.dumps(raw))
    message = refusal(load_pretrained, sharded)
    assert UP in message and wrong in message


def test_broken_index(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text("{")
    assert index.name in refusal(load_pretrained, sharded)
    index.write_text("{}")
    assert "weight_map" in refusal(load_pretrained, sharded)


def test_all_problems_with_tensors_in_one_message(one):
    changes = {
        "model/layers/0/mlp/up_proj/weight": None,
        "model/layers/1/mlp/up_proj/weight": None,
        "model/norm/weight": None,
        "model/layers/2/self_attn/q_proj/weight": np.zeros((48, 41), np.float32),
        "model/layers/0/self_attn/sinks": np.zeros(4, np.float32),
    }
    edit_tensors(one, **changes)
    message = refusal(load_pretrained, one)
    assert "model.layers.{0-1}.mlp.up_proj.weight" in message
    assert "model.norm.weight" in message
    assert "model.layers.2.self_attn.q_proj.weight [48, 41] instead of [48, 40]" in message
    assert "model.layers.0.self_attn.sinks" in message


def test_weights_of_another_vocabulary(one):
    edit_config(one, vocab_size=400)
    assert "model.embed_tokens.weight [301, 40] instead of [400, 40]" in refusal(load_pretrained, one)


def test_quantised_tensor(one):
    edit_tensors(one, **{UP.replace(".", "/"): np.zeros((88, 40), np.int8)})
    message = refusal(load_pretrained, one)
    assert UP in message and "I8" in message


def test_rotary_buffers_of_old_exports_are_ignored(one):
    edit_tensors(one, **{"model/layers/0/self_attn/rotary_emb/inv_freq": np.zeros(6, np.float32)})
    load_pretrained(one)


def test_copy_of_a_tied_embedding_must_be_a_copy(tied):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tied, **{"lm_head/weight": embedding.copy()})
    load_pretrained(tied)
    embedding[300, 3] += 1
    edit_tensors(tied, **{"lm_head/weight": embedding})
    assert "lm_head.weight" in refusal(load_pretrained, tied)


def test_full_disk_leaves_nothing(one, tmp_path):
    config, params = load_pretrained(one)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # writes past it fail as on a full disk
    try:
        message = refusal(save_pretrained, tmp_path / "out", params, config, source_folder=one)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "out") in message
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_failed_export_leaves_the_older_one(one, tmp_path):
    config, params = load_pretrained(one)
    save_pretrained(tmp_path / "out", params, config, source_folder=one)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = params | {"final_norm": {"scale": params["final_norm"]["scale"] * np.nan}}
    assert "model.norm.weight" in refusal(save_pretrained, tmp_path / "out", bad, config, source_folder=one)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_places_that_are_not_overwritten(one, tmp_path):
    config, params = load_pretrained(one)
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    for place in ("file", "thesis", "one", "file/below"):
        assert place in refusal(save_pretrained, tmp_path / place, params, config, source_folder=one)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "x"


@pytest.mark.parametrize("extra", ["metrics.jsonl", "checkpoints/1/x", "tokenizer.json/x", ".git/HEAD"])
def test_a_folder_is_replaced_only_when_all_of_it_is_a_model(one, tmp_path, extra):
    config, params = load_pretrained(one)
    out = tmp_path / "out"
    save_pretrained(out, params, config, source_folder=one)
    (out / "additional_chat_templates").mkdir()
    check_replaceable(out)
    if "tokenizer.json" in extra:
        (out / "tokenizer.json").unlink()
    (out / extra).parent.mkdir(parents=True, exist_ok=True)
    (out / extra).write_text("x")
    message = refusal(save_pretrained, out, params, config, source_folder=one)
    assert f"holds {extra.split('/')[0]}" in message and (out / extra).read_text() == "x"


def test_a_lone_config_is_no_model_to_replace(one, tmp_path):
    config, params = load_pretrained(one)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refusal(save_pretrained, tmp_path / "run", params, config, source_folder=one)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_unknown_dtype(one, tmp_path):
    config, params = load_pretrained(one)
    message = refusal(save_pretrained, tmp_path / "out", params, config, source_folder=one, dtype="int4")
    assert "int4" in message and "bfloat16" in message
