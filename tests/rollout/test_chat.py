"""Text in and out: streaming adds up to the whole, prompts are rendered as rows are."""

import dataclasses
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
from postrain.rollout.chat import (
    answer_file,
    answer_prompt,
    encode_prompt,
    for_tokenizer,
    generate,
    load_chat_model,
)
from postrain.rollout.engine import Engine
from postrain.rollout.filling import Filler
from postrain.rollout.requests import SamplingParams
from postrain.rollout.text_stream import TextWindow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_chat_model(make_tiny_model(tmp_path_factory.mktemp("chat") / "model", "qwen3", vocab_size=301))


def test_a_stream_adds_up_and_never_shows_half_a_character(model):
    text = "naïve 東京 👩‍🚀!"
    stream = TextWindow(model.tokenizer)
    pieces = [stream.push(token) for token in model.tokenizer.encode_text(text)]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_ids_that_are_no_tokens_are_never_chosen(model):
    """The tiny model has 301 rows, its tokenizer 260 tokens: decoding would leave the others out without a word."""
    prompts = [[1, 2, 3]] * 8
    wild = SamplingParams(max_new_tokens=40, temperature=3.0, seed=1)
    free = Engine(model.params, model.config).generate(prompts, wild)
    assert any(token not in model.tokenizer.ids for one in free for token in one.tokens)
    fitted = for_tokenizer(wild, model.tokenizer, model.config)
    assert fitted.stop_ids == tuple(sorted(model.tokenizer.stop_ids))
    for sampling in (fitted, dataclasses.replace(fitted, temperature=0.0)):
        out = Engine(model.params, model.config).generate(prompts, sampling)
        assert all(token in model.tokenizer.ids for one in out for token in one.tokens)
    pieces = []
    answer = answer_prompt(model, "hi", wild, write=pieces.append)
    assert "".join(pieces) == answer.text == model.tokenizer.decode(model.tokenizer.encode_text(answer.text))


def test_a_gap_among_the_ids_and_a_stop_id_that_is_no_token(model):
    tokenizer = load_tokenizer(get_tokenizer_folder("qwen3"))
    config = dataclasses.replace(model.config, vocab_size=151_936)
    fitted = for_tokenizer(SamplingParams(stop_ids=(151_700,), banned_ids=(7,)), tokenizer, config)
    assert fitted.banned_ids == (7, *(i for i in range(tokenizer.vocab_size, 151_936) if i != 151_700))
    exact = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    assert for_tokenizer(SamplingParams(), tokenizer, exact).banned_ids == ()


def test_bytes_that_never_become_a_character_come_at_the_end(model):
    ids = model.tokenizer.encode_text("東")[:2]
    stream = TextWindow(model.tokenizer)
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
    assert "--output: is empty, expected a path" in capsys.readouterr().err
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("prompt 1: expected finite logits")])
def test_answers_are_kept_where_something_ends_it_early(model, tmp_path, monkeypatch, capsys, error):
    source, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    rows = [{"prompt": "hi " * length} for length in (1, 3, 2)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = SamplingParams(max_new_tokens=2)
    fill, left = Filler.fill, [2]

    def end_at_the_third(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return fill(*arguments)

    monkeypatch.setattr(Filler, "fill", end_at_the_third)
    for place in (str(output), None):
        left[0] = 2
        with pytest.raises(type(error)):
            answer_file(model, str(source), place, sampling, batch_size=1)
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl.unfinished"]
    kept = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl.unfinished").read_text().splitlines()]
    out, err = capsys.readouterr()
    assert err == f"2 of 3 answers are in {output}.unfinished\n2 of 3 answers are above\n"
    assert [row["prompt"] for row in kept] == [rows[1]["prompt"], rows[2]["prompt"]]  # the longest first
    assert [json.loads(line) for line in out.splitlines()] == kept
    left[0] = 3
    assert answer_file(model, str(source), str(output), sampling, batch_size=1) == 3
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in rows]
    assert answers[1:] == kept


def test_an_answer_says_that_its_prompt_was_plain_text(model, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "hi"}\n')
    assert answer_file(model, str(source), None, SamplingParams(max_new_tokens=1), raw=True) == 1
    assert json.loads(capsys.readouterr().out)["generated"]["raw"] is True


def test_a_prompt_that_is_null_is_absent(model, tmp_path, capsys):
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": None, "messages": messages},
        {"prompt": "hi", "messages": None},
        {"prompt": "", "messages": messages},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answer_file(model, str(source), None, SamplingParams(max_new_tokens=3)) == 3
    texts = [json.loads(line)["generated"]["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts == generate(model, ["hi"], max_new_tokens=3) * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": null}', "expected an object with 'prompt' or 'messages'"),
        ('{"prompt": ""}', "'prompt' is empty: write what the user says"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "has both 'prompt' and 'messages'"),
        ('{"prompt": "a",', "not valid JSON: Expecting property name enclosed in double quotes at column 16"),
    ],
)
def test_a_row_without_one_prompt_is_named(tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "hi"}\n' + line)
    with pytest.raises(UserError) as caught:
        answer_file("no such folder", str(source), None, SamplingParams())
    assert str(caught.value).startswith(f"{source}:2: {message}") and "line 1" not in str(caught.value)


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
    prompts, submit = [], Engine.submit

    def record(engine, prompt, *rest, **options):
        prompts.append(prompt.tolist())
        return submit(engine, prompt, *rest, **options)

    monkeypatch.setattr(Engine, "submit", record)
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


@pytest.mark.parametrize("stops", [("cab",), ("xx", "aca"), ("b", "abc"), ("zz",), ("c" * 9,)])
def test_a_stream_ends_before_a_stop_text_and_shows_none_of_it(model, stops):
    text = "abacacaxxcabz東"
    stream, shown = TextWindow(model.tokenizer, stops), ""
    for token in model.tokenizer.encode_text(text):
        shown += stream.push(token)
        assert not any(stop in shown for stop in stops)
    shown += stream.end()
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert shown == text[: min(places, default=len(text))] and (stream.stop is not None) == bool(places)


def test_a_stop_text_ends_an_answer_wherever_it_is_asked(model, tmp_path, capsys):
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, seed=1)
    [free] = [answer_prompt(model, "hi", sampling).text]
    stop = free[5:8]
    expected = free[: free.find(stop)]
    ending = dataclasses.replace(sampling, stop=(stop,))
    pieces = []
    answer = answer_prompt(model, "hi", ending, write=pieces.append)
    assert answer == (expected, True) and "".join(pieces) == expected
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "hi"}\n')
    answer_file(model, str(source), None, ending)
    assert json.loads(capsys.readouterr().out)["generated"] == {"text": expected, "finished": True}


def test_stop_ids_of_ones_own_come_beside_those_of_the_tokenizer(model):
    own = tuple(sorted(model.tokenizer.stop_ids))
    fitted = for_tokenizer(SamplingParams(stop_ids=(290,)), model.tokenizer, model.config)  # 290 is no token
    assert fitted.stop_ids == (*own, 290) and not {290, *own}.intersection(fitted.banned_ids)
    alone = for_tokenizer(SamplingParams(stop_ids=(290,), ignore_eos=True), model.tokenizer, model.config)
    assert alone.stop_ids == (290,)


def test_stop_ids_of_the_tokenizer_may_be_ignored(model):
    [stop, *_] = sorted(model.tokenizer.stop_ids)
    sampling = SamplingParams(max_new_tokens=9, ignore_eos=True, logit_bias={stop: 1e3})
    fitted = for_tokenizer(sampling, model.tokenizer, model.config)
    [out] = Engine(model.params, model.config).generate([[1, 2]], fitted)
    assert out.tokens == [stop] * 9 and out.finish == "length"
