"""What a tokenizer folder says: ids, template, stop tokens; and what is wrong with it."""

import itertools
import json
import re
import shutil

import pytest
from real_tokenizers import get_template, get_tokenizer_folder
from rendering_fixtures import CHATML, load_bare, load_real, save_small_tokenizer
from transformers import AutoTokenizer

from postrain.data.rendering.tokenizer import compare_vocabularies, load_tokenizer
from postrain.errors import UserError

MULTILINGUAL = [
    "Hello, world! It's 12345.67 — isn't it?  Two  spaces\n\n\ttabs\r\nCRLF",
    "Straße, Łódź, Привет, Ελληνικά, עברית, مرحبا, हिन्दी, ไทย, 你好,世界。日本語 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b \u00a0 \ufb01 def f(x):\n    return {'a': [1]}",
]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "gptoss", "deepseek_v3"])
def test_ids_are_those_of_transformers(name):
    tokenizer = load_bare(name)
    for text in MULTILINGUAL:
        ids = tokenizer.encode_text(text)
        assert ids == tokenizer.hf(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == (text.replace("e\u0301", "é") if name == "qwen3" else text)


def test_named_ids_and_bos():
    qwen, llama, gemma = load_bare("qwen3"), load_bare("llama3"), load_bare("gemma3")
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id, qwen.prefix_ids) == (None, 151645, 151643, [])
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.prefix_ids) == (128000, 128009, 128004, [128000])
    assert (gemma.bos_id, gemma.prefix_ids, gemma.vocab_size) == (2, [2], 262145)


def test_pad_falls_back_to_eos(tmp_path):
    tokenizer = load_tokenizer(save_small_tokenizer(tmp_path))
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.fast.token_to_id("<|im_end|>")


BOS, EOS = ({"SpecialToken": {"id": t, "type_id": 0}} for t in ("<s>", "</s>"))
A, B = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template_processing(*single):
    special = {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in ((1, "<s>"), (2, "</s>"))}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, B], "special_tokens": special}


POST_PROCESSORS = {
    "none": None,
    "text": template_processing(A),
    "<s> text": template_processing(BOS, A),
    "text </s>": template_processing(A, EOS),
    "<s> text </s>": template_processing(BOS, A, EOS),
    "byte level": BYTE_LEVEL,
    "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL]},
    "sequence with <s>": {"type": "Sequence", "processors": [BYTE_LEVEL, template_processing(BOS, A)]},
    "sequence with <s> </s>": {"type": "Sequence", "processors": [BYTE_LEVEL, template_processing(BOS, A, EOS)]},
}
# Without those of GPT-NeoX and Code Llama, whose code has rules of its own.
CLASSES = "PreTrainedTokenizerFast LlamaTokenizerFast LlamaTokenizer GemmaTokenizerFast Qwen2TokenizerFast".split()
CLASSES += [*"GPT2TokenizerFast CohereTokenizerFast TokenizersBackend NotATokenizer".split(), None]


@pytest.mark.parametrize("processor", POST_PROCESSORS)
def test_the_bos_is_the_one_that_transformers_feeds(tmp_path, processor):
    """For every class and both flags of tokenizer_config.json: what AutoTokenizer puts before plain text."""
    kind = "metaspace" if processor.endswith("text") else "byte_level"
    folder = save_small_tokenizer(tmp_path, kind, bos_token="<s>", eos_token="</s>")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    spec["post_processor"] = POST_PROCESSORS[processor]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    flags = (None, True, False)
    for name, bos, eos in itertools.product(CLASSES, flags, flags):
        given = {"tokenizer_class": name, "add_bos_token": bos, "add_eos_token": eos}
        given = {key: value for key, value in given.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | given), encoding="utf-8")
        theirs = AutoTokenizer.from_pretrained(folder)
        plain, fed = theirs("brown", add_special_tokens=False).input_ids, theirs("brown").input_ids
        tokenizer = load_tokenizer(folder)
        assert fed[: len(tokenizer.prefix_ids) + len(plain)] == tokenizer.prefix_ids + plain, given
        assert tokenizer.prefix_ids == ([1] if "<s>" in processor else []), given


# Where no generation_config.json says it, the template is asked what ends a turn.
STOPS = {
    ("qwen3", "qwen3"): ["<|im_end|>"],
    ("llama3", "llama3_1"): ["<|eot_id|>"],
    ("gemma3", "gemma3"): ["<end_of_turn>"],
    ("gptoss", "gptoss"): ["<|call|>", "<|return|>"],
    ("deepseek_v3", "deepseekv3"): ["<｜end▁of▁sentence｜>"],
}


@pytest.mark.parametrize("name, template", STOPS)
def test_stop_tokens_by_template(name, template):
    assert sorted(load_real(name, template).stop_names) == STOPS[(name, template)]


def test_a_turn_end_that_is_not_eos_is_found(tmp_path):
    assert set(load_tokenizer(save_small_tokenizer(tmp_path, eos_token="</s>")).stop_names) == {"</s>", "<|im_end|>"}


def test_generation_config_decides_where_there_is_one(tmp_path):
    folder = save_small_tokenizer(tmp_path, eos_token="</s>")
    end = load_tokenizer(folder).fast.token_to_id("<|im_end|>")
    for ids, expected in (([2, end], {"</s>", "<|im_end|>"}), (2, {"</s>"}), (end, {"</s>", "<|im_end|>"})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert set(load_tokenizer(folder).stop_names) == expected


def test_control_tokens():
    qwen = load_real("qwen3", "qwen3").control_tokens
    assert "<|im_start|>" in qwen and "<|im_end|>" in qwen and "<|endoftext|>" in qwen
    # Tags with both ends are text with structure: the model writes them as their one token.
    assert not {"<think>", "</think>", "<tool_call>", "<tool_response>"} & set(qwen)
    deepseek = load_real("deepseek_v3", "deepseekv3").control_tokens
    assert "<｜User｜>" in deepseek and "<｜tool▁calls▁begin｜>" in deepseek  # not special in its tokenizer.json
    gemma = load_real("gemma3", "gemma3").control_tokens
    assert "<start_of_turn>" in gemma and "\n\n" not in gemma and "<table>" not in gemma


def test_where_the_template_comes_from(tmp_path):
    folder = save_small_tokenizer(tmp_path / "a", template="in config")
    assert load_tokenizer(folder).chat_template == "in config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "by name"}]
    assert load_tokenizer(save_small_tokenizer(tmp_path / "b", template=named)).chat_template == "by name"
    (folder / "chat_template.jinja").write_text("\ufeffin file", encoding="utf-8")  # with a byte order mark
    assert load_tokenizer(folder).chat_template == "in file"
    (tmp_path / "mine.jinja").write_text("\ufeffmine", encoding="utf-8")
    assert load_tokenizer(folder, str(tmp_path / "mine.jinja")).chat_template == "mine"
    assert load_tokenizer(save_small_tokenizer(tmp_path / "c", template=None)).chat_template == ""


def test_the_real_folder_loads_with_a_template_file():
    template = get_tokenizer_folder("qwen3").parent / "qwen3_test.jinja"
    template.write_text(get_template("qwen3"), encoding="utf-8")
    tokenizer = load_tokenizer(get_tokenizer_folder("qwen3"), str(template))
    assert tokenizer.chat_template == get_template("qwen3") and tokenizer.template.switches == ("enable_thinking",)


def test_fingerprint_sees_what_changes_tokens(tmp_path):
    def fingerprint(name, **options):
        return load_tokenizer(save_small_tokenizer(tmp_path / name, **options)).fingerprint()

    first = fingerprint("a")
    assert first == fingerprint("b") and len(first) == 64
    others = [
        fingerprint("c", template=CHATML + " "),
        fingerprint("d", kind="metaspace"),
        fingerprint("e", eos_token="</s>"),
        fingerprint("f", bos_token="<s>", add_bos_token=True),
    ]
    shutil.copytree(tmp_path / "a", tmp_path / "g")
    (tmp_path / "g" / "generation_config.json").write_text('{"eos_token_id": [0]}')
    others.append(load_tokenizer(tmp_path / "g").fingerprint())
    assert len({first, *others}) == 6


def test_what_cannot_be_loaded(tmp_path):
    good = save_small_tokenizer(tmp_path / "good")

    def broken(name, file, text):
        shutil.copytree(good, tmp_path / name)
        (tmp_path / name / file).write_text(text)
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    cases = [
        (tmp_path / "missing", "tokenizer folder", "does not exist"),
        (tmp_path / "empty", "has neither config.json nor tokenizer.json", "give the folder of a model"),
        (tmp_path / "bare", "has no tokenizer.json", "model.tokenizer"),
        (
            broken("b6", "generation_config.json", '{"eos_token_id": "2"}'),
            "eos_token_id holds '2': expected",
        ),
        (broken("b7", "generation_config.json", '{"eos_token_id": [2, null]}'), "eos_token_id holds None: expected"),
        (broken("b1", "tokenizer.json", "{"), "tokenizer.json: cannot be read as a tokenizer"),
        (broken("b2", "tokenizer_config.json", "{"), "tokenizer_config.json: not valid JSON"),
        (broken("b3", "tokenizer_config.json", "[]"), "expected a JSON object"),
        (
            broken("b4", "tokenizer_config.json", '{"eos_token": "<nope>"}'),
            "eos_token is '<nope>', which tokenizer.json",
        ),
        (broken("b8", "tokenizer_config.json", '{"unk_token": "\\ud800"}'), "not valid JSON", "surrogates not allowed"),
        *(
            (
                broken(f"t{i}", "tokenizer_config.json", f'{{"chat_template": {value}}}'),
                "expected chat_template to be a",
            )
            for i, value in enumerate(("5", "[5]", '[{"name": "default"}]', '[{"name": "default", "template": 5}]'))
        ),
        (broken("b5", "chat_template.jinja", "{% for %}"), "chat_template.jinja: the chat template is not valid Jinja"),
    ]
    for folder, *reasons in cases:
        with pytest.raises(UserError) as error:
            load_tokenizer(folder)
        assert all(r in str(error.value) for r in reasons) and "\n" not in str(error.value), str(error.value)
    token = "which tokenizer.json does not have: transformers would add it"
    for key, value in {
        "unk_token": "<new>",
        "image_token": {"__type": "AddedToken", "content": "<new>"},
        "added_tokens_decoder": {"9000": {"content": "<new>", "special": False}},
        "additional_special_tokens": ["<s>", "<new>"],
        "extra_special_tokens": {"tag": "<new>"},
        "model_specific_special_tokens": {"tag": "<new>"},
    }.items():
        folder = save_small_tokenizer(tmp_path / key, **{key: value})
        assert "<new>" in AutoTokenizer.from_pretrained(folder).get_vocab()
        with pytest.raises(UserError, match=f"tokenizer_config.json: {key} (is|names) '<new>', {token}"):
            load_tokenizer(folder)
    for file, text in {
        "added_tokens.json": '{"<new>": 9000}',
        "special_tokens_map.json": '{"additional_special_tokens": ["<new>"]}',
    }.items():
        folder = broken(file, file, text)
        assert "<new>" in AutoTokenizer.from_pretrained(folder).get_vocab()
        with pytest.raises(UserError, match=f"{file}: .* names '<new>', {token}"):
            load_tokenizer(folder)
    with pytest.raises(UserError, match="data.chat_template: .*none.jinja cannot be read"):
        load_tokenizer(good, str(tmp_path / "none.jinja"))


def test_vocabularies_are_compared_by_tokens_and_merges(tmp_path):
    """Of real tokenizers: a folder is another one's copy, has other tokens, or merges them in another order."""
    source = get_tokenizer_folder("phi3")
    own, other = load_tokenizer(source), load_tokenizer(get_tokenizer_folder("granite3_3"))
    assert compare_vocabularies(own, load_tokenizer(source)) == ""
    assert re.match(r"id \d+ is '.+' in .*phi3 and '.+' in .*granite3_3", compare_vocabularies(own, other))
    assert own.digest_vocabulary() != other.digest_vocabulary()
    raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    merges = raw["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert "are merged in another order" in compare_vocabularies(own, load_tokenizer(tmp_path))
