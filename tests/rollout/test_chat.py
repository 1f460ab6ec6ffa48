"""Text in and out: streaming adds up to the whole, prompts are rendered as rows are."""

import json
import os
import re
import shutil

import pytest
from real_tokenizers import get_template_path, get_tokenizer_folder
from tiny_models import make_tiny_model

from postrain import cli
from postrain.data.bad_row import RowRef
from postrain.data.messages import parse_row
from postrain.data.rendering.render import render, render_prompt, split_prompt
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.rollout import sampler
from postrain.rollout.chat import TextStream, answer_file, answer_prompt, encode_prompt, generate, load_chat_model
from postrain.rollout.sampler import SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_chat_model(make_tiny_model(tmp_path_factory.mktemp("chat") / "model", "qwen3", vocab_size=301))


def test_a_stream_adds_up_and_never_shows_half_a_character(model):
    text = "naïve 東京 👩‍🚀!"
    stream = TextStream(model.tokenizer)
    pieces = [stream.push(token) for token in model.tokenizer.encode_text(text)]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_at_the_end(model):
    ids = model.tokenizer.encode_text("東")[:2]
    stream = TextStream(model.tokenizer)
    assert [stream.push(token) for token in ids] == ["", ""]
    assert stream.end() == model.tokenizer.decode(ids)


def test_prompts_are_rendered_as_serving_does(model):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = render_prompt(messages, model.tokenizer).tolist()
    assert encode_prompt(model.tokenizer, "hi", "be brief") == expected
    assert encode_prompt(model.tokenizer, messages) == expected
    assert encode_prompt(model.tokenizer, "hi", raw=True) == model.tokenizer.encode_text("hi")
    with pytest.raises(UserError, match="raw prompts are plain text"):
        encode_prompt(model.tokenizer, messages, raw=True)


def test_streamed_is_returned(model):
    pieces = []
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    answer = answer_prompt(model, "hi", sampling, write=pieces.append)
    assert "".join(pieces) == answer.text
    assert [answer.text] == generate(model, "hi", max_new_tokens=12, temperature=1.0, seed=3)


def test_one_string_is_one_prompt(model):
    assert len(generate(model, "hello", max_new_tokens=2)) == 1
    assert len(generate(model, ["hello", "you"], max_new_tokens=2)) == 2


def generate_to(tmp_path, output, source="in.jsonl"):
    """The exit code of `postrain generate` with a folder that holds no model: reading it would be the error."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "folder").mkdir(exist_ok=True)
    words = [f"--model={tmp_path / 'folder'}", f"--input={tmp_path / source}", f"--output={output}"]
    return cli.main(["generate", *words])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "folder is a folder, expected the name of a file"),
        ("in.jsonl", "in.jsonl is the file of --input, which stays as it is: choose another place"),
        ("folder/../in.jsonl", "in.jsonl is the file of --input"),
        ("link.jsonl", "link.jsonl is the file of --input"),
        ("in.jsonl/out.jsonl", "in.jsonl: Not a directory): choose another place"),
        ("pipe", "pipe is not an ordinary file"),
    ],
)
def test_the_place_of_the_answers_is_looked_at_first(tmp_path, capsys, output, message):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    os.mkfifo(tmp_path / "pipe")
    assert generate_to(tmp_path, tmp_path / output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output ") and message in error and error.count("\n") == 1
    assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "hi"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl", "link.jsonl", "pipe"]


def test_an_output_without_a_name_and_an_input_that_is_not_there(tmp_path, capsys):
    assert generate_to(tmp_path, "") == 2
    assert "--output is empty" in capsys.readouterr().err
    assert generate_to(tmp_path, tmp_path / "out.jsonl", source="none.jsonl") == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err


def test_an_answer_overwrites_nothing_of_its_row(model, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        {"prompt": "hi", "completion": "hello", "finished": "2026", "text": 1, "id": None},
        {"messages": messages, "tools": [], "completion": "x"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answer_file(model, str(source), str(output), SamplingParams(max_new_tokens=2)) == 2
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    expected = generate(model, ["hi"], max_new_tokens=2)[0]
    finished = answers[0]["generated"]["finished"]
    assert isinstance(finished, bool)
    assert answers == [row | {"generated": {"text": expected, "finished": finished}} for row in rows]
    # Answered once more, the first answers would be lost: that is refused before the model is loaded.
    with pytest.raises(
        UserError, match=r"out\.jsonl:1: has a key 'generated' already, which the answer goes to: rename"
    ):
        answer_file("no such folder", str(output), None, SamplingParams(max_new_tokens=2))


def test_answers_that_cannot_be_given_leave_the_old_ones(model, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text('{"prompt": "hi"}\n')
    assert answer_file(model, str(source), str(output), SamplingParams(max_new_tokens=2)) == 1
    answers = output.read_text()
    source.write_text('{"prompt": "hi"}\n{"prompt": 7}\n')
    with pytest.raises(UserError, match=r"in\.jsonl:2"):
        answer_file(model, str(source), str(output), SamplingParams(max_new_tokens=2))
    assert output.read_text() == answers and [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """A folder with a tiny model, Qwen3's real tokenizer and its template, which switches reasoning."""
    folder = make_tiny_model(
        tmp_path_factory.mktemp("switched") / "model", "qwen3", vocab_size=151_680, tie_word_embeddings=True
    )
    shutil.copytree(get_tokenizer_folder("qwen3"), folder, dirs_exist_ok=True)
    shutil.copy(get_template_path("qwen3"), folder / "chat_template.jinja")
    return folder


@pytest.fixture
def fed(monkeypatch):
    """The prompts that the sampler is given, as they come."""
    prompts, sample = [], sampler.generate

    def record(params, config, given, *rest, **options):
        prompts.extend(given)
        return sample(params, config, given, *rest, **options)

    monkeypatch.setattr(sampler, "generate", record)
    return prompts


def test_a_model_is_asked_as_it_was_trained(switched, fed, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    tokenizer = load_tokenizer(switched)
    [rendered] = render(parse_row({"messages": messages}, "sft", RowRef("s", "f", 1)), tokenizer)
    trained = split_prompt(rendered)[0].tolist()
    default = tokenizer.encode_text("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert trained == default + tokenizer.encode_text("<think>\n\n</think>\n\n")

    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    for where in ("--prompt=hi", f"--input={tmp_path / 'in.jsonl'}"):
        for thinking, expected in (([], default), (["--thinking=on"], default), (["--thinking=off"], trained)):
            assert cli.main(["generate", f"--model={switched}", where, "--max-new-tokens=1", *thinking]) == 0
            assert fed.pop() == expected and not fed
    generate(switched, ["hi", "hi"], max_new_tokens=1, thinking=False)
    assert fed == [trained, trained]


def test_a_switch_that_is_not_there(model, switched):
    with pytest.raises(UserError, match="reads neither enable_thinking nor thinking: leave out --thinking"):
        encode_prompt(model.tokenizer, "hi", thinking=False)
    with pytest.raises(UserError, match="raw prompts leave out"):
        encode_prompt(load_tokenizer(switched), "hi", raw=True, thinking=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "functions": [{"name": "f"}]}, "'functions' is not read: it is the old form of 'tools'"),
        ({"messages": [{"role": "user", "content": "hi"}], "system": "x"}, "'system' is not read"),
        ({"prompt": "hi", "tool": [{"name": "f"}]}, "did you mean 'tools'?"),
    ],
)
def test_a_row_whose_keys_would_be_dropped_is_not_answered(tmp_path, row, message):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "hi", "id": 1}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{source}:2: ") + ".*" + re.escape(message)):
        answer_file("no such folder", str(source), None, SamplingParams())


def test_raw_prompts_take_neither_system_message_nor_tools(model):
    for options in ({"system": "x"}, {"tools": [{"name": "f"}]}):
        with pytest.raises(UserError, match="raw prompts are fed as they are"):
            encode_prompt(model.tokenizer, "hi", raw=True, **options)
