"""Tokens that a run adds: one id each, in rows and in text, and wrong ones refused by name."""

import json

import pytest
from real_tokenizers import get_tokenizer_folder
from tiny_models import make_tiny_tokenizer

from postrain.config import NewTokensSection
from postrain.data.bad_row import RowRef
from postrain.data.messages import parse_row
from postrain.data.rendering.render import render
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError

ITEMS = tuple(f"<item_{i}_{j}>" for i in range(40) for j in range(50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(folder, *tokens, **keys):
    return load_tokenizer(folder, new_tokens=NewTokensSection(tokens=tokens, **keys))


def render_ids(tokenizer, user, assistant):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    row = parse_row({"messages": messages}, "sft", RowRef("rows", "rows.jsonl", 1))
    (rendered,) = render(row, tokenizer)
    return rendered


def test_two_thousand_tokens_are_one_id_each_where_the_answer_trains(folder):
    tokenizer = load(folder, *ITEMS)
    assert tokenizer.vocab_size == 260 + len(ITEMS) and tokenizer.new_tokens.first == 260
    rendered = render_ids(tokenizer, f"x{ITEMS[7]}", f"{ITEMS[1999]}{ITEMS[12]}.")
    ids = rendered.tokens.tolist()
    assert [i for i in ids if i >= 260] == [267, 260 + 1999, 272]
    assert rendered.tokens[rendered.loss_mask].tolist()[:2] == [260 + 1999, 272]
    assert tokenizer.decode(ids).count("<item_") == 3
    assert tokenizer.fingerprint() != load(folder, *ITEMS[:-1]).fingerprint() != load(folder, *ITEMS[1:]).fingerprint()


def test_special_tokens_are_never_read_from_a_row(folder):
    plain, special = (load(folder, "<tool>", special=special) for special in (False, True))
    assert 260 in render_ids(plain, "a<tool>b", "ok").tokens and 260 not in render_ids(special, "a<tool>b", "ok").tokens
    assert special.encode_text("<tool>") == [260]


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3"])
def test_real_tokenizers_take_them_after_their_own(name):
    folder = get_tokenizer_folder(name)
    old, new = load_tokenizer(folder), load(folder, "<item_1>", "<cubic metre>", "<item_12>")
    text = "One <item_12>, two<item_1> <cubic metre>."
    assert [i for i in new.encode_text(text) if i >= old.vocab_size] == [
        old.vocab_size + 2,
        old.vocab_size,
        old.vocab_size + 1,
    ]
    assert new.decode(new.encode_text(text)) == text
    assert new.encode_text("plain text, 12 items") == old.encode_text("plain text, 12 items")


def test_a_token_that_would_not_be_written_back_is_refused(folder):
    """A byte-level decoder takes è for the byte 0xE8. Elsewhere it stays what it is."""
    with pytest.raises(UserError, match=r"tokens\[1\]: 'mètre' is decoded as 'm.tre': write it in ASCII"):
        load(folder, "<a>", "mètre")
    new = load(get_tokenizer_folder("gemma3"), "<mètre²>")
    assert new.decode(new.encode_text("a<mètre²>b")) == "a<mètre²>b"


def test_rows_start_from_texts(folder, tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text("<a>\tab\n<b>\n", encoding="utf-8")
    new = load_tokenizer(folder, new_tokens=NewTokensSection(file=str(file))).new_tokens
    assert new.texts == ("<a>", "<b>")
    assert new.start_ids == (tuple(load_tokenizer(folder).encode_text("ab")), ())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("<a>\n\n<b>\n", "tokens.txt:2 is empty"),
        ("<a>\n<b>\n<a>\n", "tokens.txt:3: '<a>' comes twice, first in .*tokens.txt:1"),
        ("<a>\n<|im_end|>\n", r"tokens.txt:2: '<\|im_end\|>' is one token of the tokenizer already, id 2"),
        ("a\n", "tokens.txt:1: 'a' is one token of the tokenizer already, id"),
        ("<a>\t\n", "tokens.txt:1: '<a>' has a tab and no text after it"),
        ("", "tokens.txt is empty"),
    ],
)
def test_wrong_tokens_are_refused_by_name(folder, tmp_path, lines, words):
    file = tmp_path / "tokens.txt"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(folder, new_tokens=NewTokensSection(file=str(file)))
    assert "\n" not in str(caught.value)


def test_all_wrong_tokens_are_named_together(folder):
    with pytest.raises(UserError) as caught:
        load(folder, "<a>", "<|pad|>", "b", "<c>")
    assert "tokens[1]: '<|pad|>'" in str(caught.value) and "tokens[2]: 'b'" in str(caught.value)
    assert "<c>" not in json.dumps(str(caught.value))
