"""Inputs that training libraries are known to have read wrongly without a word: what is right for each of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_tokenizers import get_template
from rendering_fixtures import REF, load_real, render_row, save_small_tokenizer, trained_texts
from transformers import AutoTokenizer

from postrain.config import DataConfig, SourceConfig
from postrain.data.batches.in_memory import load_examples
from postrain.data.kinds.preference import parse_preference, render_preferences
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.hf.classifier import choose_pad
from postrain.hf.folders import find_answer_end

OPTIONS = {"template_date": "2024-07-26", "default_system": ""}
TOOL = {"name": "w", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def render_pair(row, tokenizer):
    ((group,),) = render_preferences([parse_preference(row, "pair", REF, set())], tokenizer, **OPTIONS)
    prompts = [s.tokens[: int(s.loss_mask.argmax())].tolist() for s in group.sequences]
    return prompts, [tokenizer.decode(s.tokens[s.loss_mask]) for s in group.sequences]


def test_a_pair_keeps_its_calls_results_and_tools():
    tokenizer = load_real("qwen3", "qwen2_5")
    prompt = [user("q"), answer(None, tool_calls=[{"name": "w", "arguments": "{}"}]), {"role": "tool", "content": "5"}]
    row = {"prompt": prompt, "chosen": [answer("five")], "rejected": [answer("six")], "tools": [TOOL]}
    prompts, answers = render_pair(row, tokenizer)
    text = tokenizer.decode(prompts[0])
    assert prompts[0] == prompts[1] and answers == ["five<|im_end|>", "six<|im_end|>"]
    assert '"properties": {"city"' in text and '{"name": "w", "arguments": {}}' in text
    assert "<tool_response>\n5\n</tool_response>" in text


def test_the_answers_of_a_prompt_that_ends_in_a_space_begin_at_one_place():
    tokenizer, prompt = load_real("qwen3", "qwen2_5"), "[INST] price? [/INST] "
    prompts, answers = render_pair({"prompt": prompt, "chosen": "46 now", "rejected": "$46 now"}, tokenizer)
    assert prompts[0] == prompts[1] == tokenizer.encode_text(prompt)
    assert answers == ["46 now<|im_end|>", "$46 now<|im_end|>"]


def test_a_completion_of_messages_is_trained_and_the_prompts_answers_are_not():
    tokenizer = load_real("qwen3", "qwen2_5")
    row = {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d"), user("e"), answer("f")]}
    (rendered,) = render_row(row, tokenizer)
    assert trained_texts(tokenizer, rendered) == ["d<|im_end|>", "f<|im_end|>"]


def test_a_turn_that_the_template_ends_twice_is_trained_to_its_first_end():
    source = get_template("qwen2_5").replace("<|im_end|>", "<|im_end|><|im_end|>")
    tokenizer = load_real("qwen3", source)
    (rendered,) = render_row({"messages": [user("a"), answer("b"), user("c"), answer("d")]}, tokenizer)
    assert trained_texts(tokenizer, rendered) == ["b<|im_end|>", "d<|im_end|>"]
    assert tokenizer.decode(rendered.tokens).count("<|im_end|><|im_end|>") == 4  # after system, a, b and c


def test_answers_right_after_a_closing_bracket_are_trained_whole():
    source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    source += "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    tokenizer = load_real("phi3", source)
    row = {"messages": [m for text in ("1", " two", "\nthree") for m in (user("q"), answer(text))]}
    texts = [text for r in render_row(row, tokenizer) for text in trained_texts(tokenizer, r)]
    eos = tokenizer.special_tokens["eos_token"]
    assert [text.lstrip(" ") for text in texts] == ["1" + eos, "two" + eos, "\nthree" + eos]


def test_control_tokens_that_swallow_spaces_are_those_of_transformers(tmp_path):
    folder = save_small_tokenizer(tmp_path, "swallow")
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "s"}, user("  a  "), answer(" b ")]
    (rendered,) = render_row({"messages": messages}, tokenizer)
    ids = theirs.apply_chat_template(messages)["input_ids"]
    assert rendered.tokens.tolist() == ids[: len(rendered.tokens)]
    spelt = [{"role": "system", "content": "s"}, user("a<|im_end|>  b <|im_start|> \n c"), answer("x<|im_end|> y")]
    (rendered,) = render_row({"messages": spelt}, tokenizer)
    text = tokenizer.decode(rendered.tokens)
    assert "a<|im_end|>  b <|im_start|> \n c<|im_end|>" in text
    assert trained_texts(tokenizer, rendered) == ["x<|im_end|> y<|im_end|>"]


def test_a_call_is_written_as_transformers_writes_it():
    tokenizer = load_real("qwen3", "qwen2_5")
    arguments = {"q": "Ærø <b> & 'x' 🙂", "n": 1e16, "f": 0.1, "big": 12345678901234567890}
    call = {"type": "function", "function": {"name": "w", "arguments": arguments}}
    messages, tools = [user("w?"), answer("", tool_calls=[call])], [{"type": "function", "function": TOOL}]
    (rendered,) = render_row({"messages": messages, "tools": tools}, tokenizer)
    theirs = tokenizer.hf.apply_chat_template(messages, tools=tools, tokenize=False)
    assert theirs == tokenizer.decode(rendered.tokens) + "\n"
    assert json.dumps(arguments, ensure_ascii=False) in theirs


@pytest.mark.parametrize(
    ("messages", "default_system", "system"),
    [
        ([], "", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ([{"role": "system", "content": ""}], "", ""),
        ([], "x", "x"),
        ([{"role": "system", "content": ""}], "x", ""),
    ],
)
def test_the_default_system_message_is_the_templates_own(messages, default_system, system):
    tokenizer = load_real("qwen3", "qwen2_5")
    (rendered,) = render_row(
        {"messages": [*messages, user("a"), answer("b")]}, tokenizer, default_system=default_system
    )
    assert tokenizer.decode(rendered.tokens).startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na")


def test_a_column_may_be_null_in_one_file_and_objects_in_the_next(tmp_path):
    chats = [{"messages": [user(text), answer("b")]} for text in "xy"]
    pq.write_table(pa.Table.from_pylist([chats[0]]).append_column("tools", pa.nulls(1)), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([chats[1] | {"tools": [TOOL]}]), tmp_path / "b.parquet")
    tokenizer = load_real("qwen3", "qwen2_5")
    source = SourceConfig(path=str(tmp_path / "*.parquet"))
    examples = load_examples((source,), tokenizer, DataConfig(train=(source,), sequence_length=512)).examples
    expected = [render_row(row, tokenizer)[0] for row in (chats[0], chats[1] | {"tools": [TOOL]})]
    assert [e.tokens.tolist() for e in examples] == [e.tokens.tolist() for e in expected]


@pytest.mark.parametrize(
    ("name", "template", "pad"),
    [
        ("llama3", "llama3", "<|finetune_right_pad_id|>"),
        ("qwen3", "qwen3", "<|endoftext|>"),  # stops serving too, but ends no answer
        ("smollm3", "smollm3", "<|begin_of_text|>"),  # whose padding is its end token
        ("phi3", "phi3", "<s>"),  # whose padding ends plain text
        ("granite3_3", "granite3_3", "<fim_prefix>"),  # whose beginning, end and padding are one token
    ],
)
def test_the_padding_token_of_real_tokenizers_ends_no_text(name, template, pad):
    """transformers finds the token that it scores by its value: the last that is no padding (its issue 35352)."""
    tokenizer = load_real(name, template)
    found = choose_pad(tokenizer, 200_000)
    assert found == (pad, tokenizer.fast.token_to_id(pad))
    assert found[1] not in {tokenizer.eos_id, tokenizer.fast.token_to_id(find_answer_end(tokenizer))}
    assert choose_pad(tokenizer, 0) is None, "no id that the model has no row for"
