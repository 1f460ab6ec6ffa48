"""MXFP4 folders: the same numbers as transformers unpacks, slice by slice, and an export without the packing."""

import json

import numpy as np
import pytest
import torch
from hf_compare import folder_logits, random_ids, relative_difference, torch_logits
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from postrain.errors import UserError
from postrain.hf.load import load_pretrained
from postrain.hf.mxfp4 import Mxfp4Tensor
from postrain.hf.save import save_pretrained

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2}
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def draw_packed(shape, seed):
    """Blocks and scales of a kernel [E, in, out]."""
    rng = np.random.default_rng(seed)
    experts, size_in, size_out = shape
    blocks = rng.integers(0, 256, (experts, size_out, size_in // 32, 16), np.uint8)
    scales = rng.integers(121, 126, (experts, size_out, size_in // 32), np.uint8)
    return blocks, scales


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random gpt-oss twice: its experts packed, and as transformers unpacks them."""
    plain = make_tiny_model(tmp_path_factory.mktemp("plain") / "model", "gpt_oss", **SIZES)
    packed = make_tiny_model(tmp_path_factory.mktemp("packed") / "model", "gpt_oss", **SIZES)
    tensors = load_file(plain / "model.safetensors")
    packed_tensors = dict(tensors)
    for seed, name in enumerate(name for name in sorted(tensors) if name.endswith(("gate_up_proj", "down_proj"))):
        pair = [torch.from_numpy(x) for x in draw_packed(tensors[name].shape, seed)]
        tensors[name] = convert_moe_packed_tensors(*pair, dtype=torch.float32).contiguous()
        del packed_tensors[name]
        packed_tensors |= {f"{name}_blocks": pair[0], f"{name}_scales": pair[1]}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(packed_tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return plain, packed


def test_logits_are_those_of_the_unpacked_model(folders):
    plain, packed = folders
    ids = random_ids(301)
    assert np.array_equal(folder_logits(packed, ids), folder_logits(plain, ids))
    assert relative_difference(folder_logits(packed, ids), torch_logits(plain, ids)) <= 1e-4


def test_the_export_is_unpacked(folders, tmp_path):
    plain, packed = folders
    config, params = load_pretrained(packed)
    save_pretrained(tmp_path / "out", params, config, source_folder=packed)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = random_ids(301)
    assert np.array_equal(torch_logits(tmp_path / "out", ids), torch_logits(plain, ids))


@pytest.mark.parametrize("part", [slice(None), slice(0, None, 2), slice(1, None, 2)])
def test_slices_are_slices_of_the_whole(part):
    blocks, scales = draw_packed((3, 96, 10), 0)
    whole = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32).numpy()
    index = slice(1, 3), slice(7, 70), slice(2, 5)
    tensor = Mxfp4Tensor(blocks, scales)
    assert tensor.shape == whole.shape
    np.testing.assert_array_equal(tensor[..., part][index], whole[..., part][index])


def test_another_packing_is_refused_by_name(folders, tmp_path):
    raw = json.loads((folders[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match='quant_method is "gptq": of quantised weights, mxfp4 can be read'):
        load_pretrained(tmp_path)
