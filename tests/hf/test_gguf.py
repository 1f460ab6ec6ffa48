"""GGUF files: tiny ones of every architecture, and what is refused."""

import json
import re
import shutil
import struct

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf_files import SENTENCES, byte_level_fields, make_byte_level, write_gguf
from hf_compare import assert_parity, random_ids, relative_difference, torch_logits
from safetensors.numpy import load_file
from tiny_models import ODD_SIZES, make_tiny_model, randomize
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

from postrain.errors import UserError
from postrain.hf.gguf.convert import ARCHITECTURES, import_gguf
from postrain.hf.load import load_pretrained

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_config_and_logits_come_back(name, tmp_path):
    family = name.split()[0]
    folder = make_tiny_model(tmp_path / "model", family, **MODELS[name])
    file = write_gguf(tmp_path / "model.gguf", folder, family)
    out = import_gguf(file, tmp_path / "out", dtype="float32")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    ids = random_ids(301)
    assert np.array_equal(torch_logits(out, ids), torch_logits(folder, ids))
    config, params = load_pretrained(out)
    assert_parity(folder, params, config, ids)


def test_rope_scaling_of_llama_3_is_read_back(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama", head_dim=64, rope_parameters=LLAMA31_ROPE)
    config = transformers.AutoConfig.from_pretrained(folder)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / LLAMA31_ROPE["rope_theta"] ** (torch.arange(0, 64, 2).float() / 64)
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    out = import_gguf(write_gguf(tmp_path / "a.gguf", folder, "llama", tensors=factors), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_parameters"] == LLAMA31_ROPE
    factors["rope_freqs.weight"][10] = 3.0
    with pytest.raises(UserError, match="rope_freqs.weight"):
        import_gguf(write_gguf(tmp_path / "b.gguf", folder, "llama", tensors=factors), tmp_path / "b")


def test_linear_rope_scaling(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    out = import_gguf(write_gguf(tmp_path / "a.gguf", folder, "llama", fields=fields), tmp_path / "out")
    rope = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}


def test_gemma3(tmp_path):
    """Norms are stored with 1 added, q and k not permuted, and the two ropes and the windows come back."""
    sizes = ODD_SIZES | {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 12}
    config = transformers.Gemma3TextConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config)
    randomize(model)
    model.save_pretrained(tmp_path / "model")
    fields = {"gemma3.attention.sliding_window": 8}
    file = write_gguf(tmp_path / "model.gguf", tmp_path / "model", "gemma3", fields=fields)
    out = import_gguf(file, tmp_path / "out", dtype="float32")
    ids = random_ids(301)
    reference = torch_logits(tmp_path / "model", ids)
    assert relative_difference(torch_logits(out, ids), reference) <= 1e-5
    config, params = load_pretrained(out)
    assert_parity(out, params, config, ids)
    file = write_gguf(tmp_path / "other.gguf", tmp_path / "model", "gemma3")
    with pytest.raises(UserError, match="lacks the field gemma3.attention.sliding_window"):
        import_gguf(file, tmp_path / "other")


@pytest.mark.parametrize(("layers", "scalar"), [(7, 12), (62, 10)])
def test_gemma3_query_scale_goes_by_size(layers, scalar):
    config = {"num_hidden_layers": layers, "hidden_size": 40, "num_attention_heads": 4, "head_dim": 12}
    fields = {"gemma3.attention.sliding_window": 8}
    architecture = ARCHITECTURES["gemma3"]
    found = architecture.extra(architecture, config | {"rope_parameters": {}}, fields, {})
    assert found["query_pre_attn_scalar"] == scalar


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As the publishers' tokenizer.json files have them.
PUBLISHED = {
    "smollm": (
        sequence(
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ),
        None,
        False,
    ),
    "qwen2": (
        sequence(
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ),
        normalizers.NFC(),
        False,
    ),
    "llama-bpe": (
        sequence(
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ),
        None,
        True,
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "qwen3")


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_tokenizers_give_the_same_ids(pre, tiny, tmp_path):
    original = make_byte_level(*PUBLISHED[pre])
    fields = byte_level_fields(original, pre)
    out = import_gguf(write_gguf(tmp_path / "a.gguf", tiny, "qwen3", tokenizer=fields), tmp_path / "out")
    ours = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in SENTENCES:
        assert ours.encode(text).ids == original.encode(text).ids
    assert len({tuple(original.encode(text).ids) for text in SENTENCES}) == len(SENTENCES)


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["Ġthe"]), ("gpt-2", ["Ġ", "the"])])
def test_llama_3_takes_known_words_whole_without_a_merge(pre, expected, tiny, tmp_path):
    fields = byte_level_fields(make_byte_level(*PUBLISHED["llama-bpe"]), pre)
    fields["tokenizer.ggml.merges"] = ["t h", "th e"]
    fields["tokenizer.ggml.tokens"][-3:] = ["th", "the", "Ġthe"]
    out = import_gguf(write_gguf(tmp_path / "a.gguf", tiny, "qwen3", tokenizer=fields), tmp_path / "out")
    ours = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert ours.encode(" the", add_special_tokens=False).tokens == expected


def test_tokenizer_as_transformers_loads_it(tiny, tmp_path):
    fields = byte_level_fields(make_byte_level(*PUBLISHED["qwen2"]), "qwen2") | {"tokenizer.ggml.add_bos_token": True}
    out = import_gguf(write_gguf(tmp_path / "a.gguf", tiny, "qwen3", tokenizer=fields), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer("x<|im_end|>").input_ids[0] == 0 and tokenizer("x<|im_end|>").input_ids[-1] == 1
    assert tokenizer.decode(tokenizer("naïve  12").input_ids, skip_special_tokens=True) == "naïve  12"
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}


def merge_by_score(text, scores):
    """SentencePiece's BPE in its own words: join the best-scoring pair of neighbours, leftmost first, until none is."""
    pieces = list(text)
    while True:
        pairs = [
            (scores[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in scores
        ]
        if not pairs:
            return pieces
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_sentencepiece_tokenizer(tiny, tmp_path):
    words = ["▁the", "▁ca", "ca", "at", "cat", "▁cat", "▁", "he", "the", "ats", "▁s", "▁sat", "sat", "▁▁"]
    characters = sorted(set("".join(words)))
    pieces = words + [c for c in characters if c not in words]
    rank = {piece: i for i, piece in enumerate(pieces)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    out = import_gguf(write_gguf(tmp_path / "a.gguf", tiny, "qwen3", tokenizer=fields), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    scores = {piece: -float(i) for piece, i in rank.items()}
    for text in ("the cats sat", "cat at the  cat", "  scathe"):
        expected = ["<s>", *merge_by_score("▁" + text.replace(" ", "▁"), scores)]
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == expected
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("ž").input_ids)[-2:] == ["<0xC5>", "<0xBE>"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fields": {"split.count": 3}}, "llama-gguf-split"),
        ({"fields": {"qwen3.rope.scaling.type": "yarn"}}, "yarn"),
        ({"fields": {"qwen3.expert_count": 8}}, "expert_count"),
        ({"fields": {"tokenizer.ggml.pre": "chameleon"}}, "chameleon"),
        ({"fields": {"tokenizer.ggml.model": "rwkv"}}, "rwkv"),
        ({"fields": {"qwen3.rope.dimension_count": 6}}, "rope.dimension_count"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "model.layers.1.mlp.up_proj.weight"),
        ({"drop": ["output_norm.weight"]}, "output_norm.weight"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, "attn_sinks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_refused_by_name(tiny, tmp_path, change, named):
    file = write_gguf(tmp_path / "a.gguf", tiny, "qwen3", **change)
    with pytest.raises(UserError, match=named) as caught:
        import_gguf(file, tmp_path / "out")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_quantisation_that_cannot_be_undone(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "qwen3", hidden_size=64)
    kind = gguf.GGMLQuantizationType.Q8_1
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    blocks = {"blk.1.ffn_up.weight": (np.zeros((88, 64 // size * stored), np.uint8), kind)}
    file = write_gguf(tmp_path / "a.gguf", folder, "qwen3", quantised=blocks)
    with pytest.raises(UserError, match="blk.1.ffn_up.weight is of type Q8_1") as caught:
        import_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "model"]


def test_unknown_architecture(tiny, tmp_path):
    with pytest.raises(UserError, match="'qwen3moe', supported are llama"):
        import_gguf(write_gguf(tmp_path / "a.gguf", tiny, "qwen3moe"), tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file to be damaged: its bytes, and where its tensors begin."""
    folder = tmp_path_factory.mktemp("whole")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 297}
    file = write_gguf(folder / "a.gguf", make_tiny_model(folder / "model", "llama", **sizes), "llama")
    return file.read_bytes(), gguf.GGUFReader(file).data_offset


LIBRARY_WORDS = re.compile(r"memmap|mmap|reshape|array|numpy|broadcast|buffer|codec|struct|dtype|out of bounds", re.I)


def refuse(tmp_path, data):
    """The one line that answers a file of these bytes; None where it is imported."""
    file, out = tmp_path / "b.gguf", tmp_path / "out"
    file.write_bytes(data)
    try:
        import_gguf(file, out)
    except UserError as error:
        line = str(error)
        assert line.startswith(f"{file}: ") and "\n" not in line and not LIBRARY_WORDS.search(line), line
        assert not out.exists()
        return line
    shutil.rmtree(out)
    return None


def test_a_file_cut_short_is_told_by_its_sizes(whole, tmp_path):
    data, start = whole
    assert refuse(tmp_path, data) is None
    for size in (len(data) - 33, (start + len(data)) // 2, start + 1):  # the last 32 bytes may be padding
        expected = re.fullmatch(
            rf".*: has {size:,} bytes, expected ([\d,]+) by its header: cut short or damaged: download it again",
            refuse(tmp_path, data[:size]),
        )
        assert len(data) - 32 <= int(expected[1].replace(",", "")) <= len(data)
    for size in (4, 7, 24, 300, start // 2):
        line = refuse(tmp_path, data[:size])
        assert line.endswith(f"its {size:,} bytes end inside the header: cut short or damaged: download it again")
    assert refuse(tmp_path, b"x" * 1000).endswith("does not start as a GGUF file does: download it again")
    assert refuse(tmp_path, b"").endswith("does not start as a GGUF file does: download it again")
    with pytest.raises(UserError, match="none.gguf: expected a GGUF file, found nothing of that name"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_to_the_header_shows_a_library(whole, tmp_path, seed):
    """Wrong bytes anywhere before the tensors: imported, where they change nothing that counts, or one line."""
    data, start = whole
    rng = np.random.default_rng(seed)
    lines = set()
    for _ in range(40):
        damaged = bytearray(data)
        for at in rng.integers(4, start, 2):
            damaged[at] = rng.choice([0, 1, 127, 128, 255])
        lines.add(refuse(tmp_path, bytes(damaged)))
    assert len(lines) > 3


def test_weights_that_are_not_numbers(whole, tmp_path):
    data, start = whole
    line = refuse(tmp_path, data[: start + 64] + struct.pack("<f", float("nan")) + data[start + 68 :])
    assert "weight has values that are not finite: damaged" in line


def test_an_endless_list_is_not_followed(whole, tmp_path):
    data, _ = whole
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8  # past its kind and its items' kind
    assert struct.unpack_from("<Q", data, at) == (297,)
    line = refuse(tmp_path, data[:at] + struct.pack("<Q", 2**60) + data[at + 8 :])
    assert "end inside the header" in line


def nested_field(depth):
    """A whole GGUF of one field: lists in lists, ``depth`` of them, the innermost of one byte."""
    name, array = b"deep", struct.pack("<IQ", 9, 1)
    value = struct.pack("<I", 9) + array * (depth - 1) + struct.pack("<IQB", 0, 1, 7)
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name + value


def test_lists_in_lists(tmp_path):
    for depth in (5, 10_000):
        assert "damaged, lists nested more than 4 deep at byte" in refuse(tmp_path, nested_field(depth))
    assert "nested" not in refuse(tmp_path, nested_field(4).ljust(256, b"\0"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fields": {"qwen3.attention.head_count": [4, 4, 4]}}, r"head_count is \[4, 4, 4\], expected a whole number"),
        ({"fields": {"qwen3.block_count": 0}}, "block_count is 0, expected a whole number above 0"),
        ({"fields": {"qwen3.rope.freq_base": "high"}}, "freq_base is 'high', expected a number"),
        ({"fields": {"qwen3.embedding_length": 48}}, r"embed_tokens.weight \[301, 40\] instead of \[301, 48\]"),
        ({"fields": {"tokenizer.ggml.merges": ["abc"]}}, "merges has 'abc', expected two tokens and a space"),
        ({"fields": {"tokenizer.ggml.merges": ["ab cd"]}}, "'ab' . 'cd', which tokenizer.ggml.tokens lacks"),
        ({"fields": {"tokenizer.ggml.token_type": [1]}}, "token_type has 1 values, expected one for each of the 297"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 9999}}, "eos_token_id is 9999, expected the number of one of the"),
        ({"fields": {"tokenizer.ggml.model": "llama"}, "no": "merges"}, "neither tokenizer.ggml.merges nor"),
        ({"drop": ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.2.attn_q.weight"]}, "q_proj.weight missing"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split(",")[0],
)
def test_metadata_that_contradict_themselves(tiny, tmp_path, change, named):
    tokenizer = byte_level_fields(make_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    tokenizer.pop(f"tokenizer.ggml.{change.pop('no', '')}", None)
    file = write_gguf(tmp_path / "a.gguf", tiny, "qwen3", tokenizer=tokenizer, **change)
    with pytest.raises(UserError, match=named) as caught:
        import_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
