"""A server stops an exported model whichever file of the folder it reads: each names the trained stop token."""

import json

import pytest
import transformers
from real_tokenizers import get_template, get_tokenizer_folder
from tiny_models import CHAT_TEMPLATE, make_tiny_tokenizer

from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.hf.folders import copy_side_files

BASE_END, TURN_END = "<|endoftext|>", "<|im_end|>"  # ids 0 and 2
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def source(tmp_path):
    """As a base model to which a chat template was given: only generation_config.json knows the end of a turn."""
    folder = make_tiny_tokenizer(tmp_path / "source")
    write(folder, "tokenizer_config.json", eos_token=BASE_END)
    write(folder, "special_tokens_map.json", eos_token={"content": BASE_END, "lstrip": False})
    write(folder, "generation_config.json", eos_token_id=[0, 2], temperature=0.6)
    return folder


def read(folder, name):
    file = folder / name
    return json.loads(file.read_text()) if file.exists() else {}


def write(folder, name, **keys):
    (folder / name).write_text(json.dumps(read(folder, name) | keys))


def copy(source, folder, **config):
    """The side files in ``folder``, which has a config.json with these keys where there are some."""
    folder.mkdir()
    if config:
        write(folder, "config.json", **config)
    copy_side_files(source, folder, load_tokenizer(source))
    return folder


@pytest.mark.parametrize("stated", [{"eos_token_id": 0}, {"eos_token_id": None}, {"hidden_size": 8}, {}])
def test_every_file_names_the_token_that_ends_the_trained_answers(source, tmp_path, stated):
    out = copy(source, tmp_path / "out", **stated)
    assert read(out, "tokenizer_config.json") == read(source, "tokenizer_config.json") | {"eos_token": TURN_END}
    assert read(out, "special_tokens_map.json") == {"eos_token": TURN_END}
    assert read(out, "generation_config.json") == read(source, "generation_config.json")
    assert read(out, "config.json") == (stated | {"eos_token_id": [0, 2]} if stated else {})
    theirs, trained = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(source)
    assert theirs.eos_token == TURN_END and load_tokenizer(out).stop_ids == trained.stop_ids == {0, 2}
    rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == transformers.AutoTokenizer.from_pretrained(source).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("stated", [2, [0, 2], [2]])
def test_files_that_name_it_stay_as_they_are(source, tmp_path, stated):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        write(source, name, eos_token=TURN_END)
    out = copy(source, tmp_path / "out", eos_token_id=stated)
    assert read(out, "config.json") == {"eos_token_id": stated}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "template",
    [
        "",  # plain text ends at the tokenizer's own end token
        CHAT_TEMPLATE.replace("<|im_end|>", ""),
        CHAT_TEMPLATE + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",  # Phi-3's does
    ],
)
def test_the_end_token_stays_where_the_template_gives_no_other(source, tmp_path, template):
    """None, no end of a turn, or one in which another end token would change the text."""
    write(source, "tokenizer_config.json", chat_template=template)
    out = copy(source, tmp_path / "out", eos_token_id=0)
    assert read(out, "tokenizer_config.json")["eos_token"] == BASE_END
    assert read(out, "config.json")["eos_token_id"] == ([0, 2] if "eos_token" in template else 0)
    assert read(out, "generation_config.json")["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    ("name", "own", "stops", "end"),
    [
        ("qwen3", "<|endoftext|>", ("<|endoftext|>", "<|im_end|>"), "<|im_end|>"),
        ("gemma3", "<eos>", ("<eos>", "<end_of_turn>"), "<end_of_turn>"),
        ("gptoss", "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>"), "<|return|>"),
        # Its template writes eos_token after the last turn.
        ("phi3", "<|endoftext|>", ("<|endoftext|>", "<|end|>"), "<|endoftext|>"),
    ],
)
def test_real_tokenizers_under_their_templates(tmp_path, name, own, stops, end):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").symlink_to(get_tokenizer_folder(name) / "tokenizer.json")
    write(source, "tokenizer_config.json", eos_token=own, chat_template=get_template(name))
    fast = load_tokenizer(source).fast
    write(source, "generation_config.json", eos_token_id=[fast.token_to_id(token) for token in stops])
    assert read(copy(source, out), "tokenizer_config.json")["eos_token"] == end
