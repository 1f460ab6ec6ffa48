"""The real SmolLM2-135M-Instruct, imported without torch, against what transformers makes of the same GGUF."""

import subprocess
import sys
import time

import pytest
import safetensors
import torch
import transformers

from postrain.hf.load import load_pretrained
from postrain.hf.save import save_pretrained
from postrain.hf.verify.compare import verify

SENTENCES = [
    "Hello, world! It's 12345.67 - isn't it? One  two\n\n\ttabs\r\nCRLF",
    "Łódź, Straße, naïve café, İstanbul; Привет, мир! Ελληνικά. עברית. العربية",
    "你好,世界!我喜欢编程。東京タワー、カタカナ。한국어 텍스트 नमस्ते दुनिया ไทย தமிழ்",
    "e\u0301 combining, \u00a0nbsp, \u200bzero width, \ufb01 ligature, 👩‍👧 🏳️‍🌈 🇺🇦",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": None}  # 注释\n\n\n",
    "sum 1,000,000 0x1F 3.14e-10 $E=mc^2$ \\frac{a}{b}",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "   leading and trailing   ",
    "",
]


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    """(model, tokenizer) by transformers' own GGUF reader, in torch."""
    folder, name = str(smollm2_gguf.parent), smollm2_gguf.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


def test_weights_are_the_dequantised_ones(smollm2, reference):
    expected = reference[0].state_dict()
    with safetensors.safe_open(smollm2 / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert names == set(expected) - {"lm_head.weight"}  # tied
        for name in names:
            assert torch.equal(file.get_tensor(name), expected[name].to(torch.bfloat16)), name


def test_config(smollm2, reference):
    ours, theirs = transformers.AutoConfig.from_pretrained(smollm2), reference[0].config
    for key in ("hidden_size", "num_key_value_heads", "rope_parameters", "vocab_size", "bos_token_id", "eos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rms_norm_eps == 1e-5 and ours.tie_word_embeddings


def test_token_ids_are_those_of_the_torch_path(smollm2, reference):
    ours, theirs = transformers.AutoTokenizer.from_pretrained(smollm2), reference[1]
    for text in SENTENCES:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert ours.chat_template and ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)


def test_numbers_follow_the_publishers_rule(smollm2):
    """Every digit is cut out before anything else (llama.cpp's `smollm` too); the torch path forgets that rule."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    for text in ("½ ² Ⅷ ٣٤", "x =   7", "\n  1"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_logits(smollm2):
    report = verify(smollm2, max_length=24)
    assert report.passed, str(report)
    assert all(comparison.top1_agreement == 1.0 for comparison in report.comparisons)


def test_export_is_bit_identical(smollm2, tmp_path):
    config, params = load_pretrained(smollm2)
    save_pretrained(tmp_path / "out", params, config, source_folder=smollm2, max_shard_bytes=100_000_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    before = transformers.AutoModelForCausalLM.from_pretrained(smollm2).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (smollm2 / "tokenizer.json").read_bytes()


def test_import_is_quick_the_same_each_time_and_needs_no_torch(smollm2_gguf, smollm2, tmp_path):
    code = (  # a process without torch
        "import sys; sys.modules['torch'] = None; from postrain.hf.gguf.convert import import_gguf; "
        "import_gguf(*sys.argv[1:])"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, smollm2_gguf, tmp_path / "out"], check=True)
    assert time.monotonic() - start < 60  # 5 s on a quiet machine of two cores
    for path in smollm2.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
