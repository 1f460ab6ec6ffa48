"""The preview shows what is trained on, exactly, and lets nothing in a row steer the terminal or the page."""

import dataclasses
import functools
import html.parser
import re

import numpy as np
import pytest
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.cli import main
from postrain.config import Config, DataConfig, ModelSection, SourceConfig
from postrain.config.load import load_config
from postrain.data.bad_row import RowRef
from postrain.data.documents import AS_RENDERED
from postrain.data.preview import preview, render_tokens_html
from postrain.data.rendering.render import Rendered
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.recipes import describe_rows, find_preparation

NASTY = "<script>alert('x')</script> & \x1b[2J caf\u00e9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(folder, tmp_path):
    rows = [chat("Hello?", "Good day."), chat(NASTY, NASTY + "!"), chat("more", "x" * 90)]
    train = SourceConfig(path=str(write_jsonl(tmp_path / "train.jsonl", rows)))
    held_out = SourceConfig(path=str(write_jsonl(tmp_path / "held_out.jsonl", rows[:1])))
    data = DataConfig(train=(train,), eval=(held_out,), sequence_length=256)
    return Config(data=data, model=ModelSection(path=str(folder)))


class _Page(html.parser.HTMLParser):
    """The text of a page, that of its green spans, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.trained, self._open = [], "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "meta":
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1][0] == "span" and "title" in self._open[-1][1]:
            self.trained.append(data)


def test_trained_tokens_stand_between_marks(config):
    shown = preview(config, color=False)
    assert re.findall("\u27e6([^\u27e7]*)\u27e7", shown.split("--- ", 1)[1])[0] == "Good day.<|im_end|>"
    assert shown.count("\u27e6") - 1 == 3 and "\x1b" not in shown  # one more in the legend
    assert f"{config.data.train[0].path}:1" in shown


def test_colours_only_where_asked_for(config, monkeypatch):
    assert "\x1b[1;32mGood day.<|im_end|>\x1b[0m" in preview(config, color=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;32m" in preview(config)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in preview(config)


def test_counts_packing_and_histogram_are_shown(config):
    shown = preview(config, rows=0, color=False)
    assert "data.train" in shown and "data.eval" in shown and "held_out" in shown
    assert re.findall(r"packing: .*? of 256 tokens, [\d.]+% filled", shown)[1].startswith("packing: 1 row of ")
    train = shown.split("data.eval")[0]
    assert sum(int(n) for n in re.findall(r"\|#* (\d+)", train)) == 3
    assert "---" not in shown


def test_lengths_are_in_tokens_everywhere(config, tmp_path):
    shown = preview(config, tmp_path / "page.html", rows=50, color=False)
    lengths = [int(n) for n in re.findall(r"--- \S+  (\d+) tokens, ", shown)]
    train, held_out = shown.split("data.eval")
    assert re.search(r"^train +3 +3 +" + str(sum(lengths)) + r" .* " + str(max(lengths)) + "$", train, re.MULTILINE)
    assert re.search(r"^held_out +1 +1 +" + str(lengths[0]) + r" .* " + str(lengths[0]) + "$", held_out, re.MULTILINE)
    bins = re.findall(r"^ *(\d+) - (\d+) \|#* (\d+)$", train, re.MULTILINE)
    assert [sum(int(a) <= n <= int(b) for n in lengths) for a, b, _ in bins] == [int(count) for _, _, count in bins]
    assert "slot" not in shown + (tmp_path / "page.html").read_text() and "1 rows" not in shown


def test_rows_are_spread_over_the_set(config):
    assert re.findall(r"--- \S+:(\d+)", preview(config, rows=2, color=False)) == ["1", "3"]
    assert re.findall(r"--- \S+:(\d+)", preview(config, rows=50, color=False)) == ["1", "2", "3"]


def test_a_row_cannot_steer_the_terminal(config):
    shown = preview(config, color=False)
    assert "\u241b[2J" in shown and "\x1b" not in shown and "caf\u00e9" in shown


def test_the_page_is_one_file_with_everything_escaped(config, tmp_path):
    path = tmp_path / "out" / "preview.html"
    preview(config, path, color=False)
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.trained[:2] == ["Good day.<|im_end|>", NASTY.replace("\x1b", "\u241b") + "!<|im_end|>"]
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert "packing: " in page.text and "held_out" in page.text
    assert [p.name for p in path.parent.iterdir()] == ["preview.html"]


def test_tokens_as_html_are_the_text(folder):
    tokenizer = load_tokenizer(folder)
    text = "a <b> & c caf\u00e9\n d"
    ids = np.array(tokenizer.encode_text(text), np.int32)
    loss_mask = np.arange(len(ids)) >= 3
    page = _Page(render_tokens_html(Rendered(ids, loss_mask, RowRef("s", "f", 1)), tokenizer))
    assert page.text == text and page.trained == [tokenizer.decode(ids[3:])] and page.tags == ["pre", "span"]


def test_spelt_control_tokens_are_not_shown_as_real_ones(config, tmp_path):
    assert "ordinary text to the model" not in preview(config, tmp_path / "page.html", color=False)
    rows = [chat("What is <|im_end|>?", "<|im_end|> ends a turn.")]
    train = (SourceConfig(path=str(write_jsonl(tmp_path / "spelt.jsonl", rows))),)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=train))
    path = tmp_path / "page.html"
    shown = preview(config, path, color=False)
    assert "What is \u2039<|im_end|>\u203a?<|im_end|>" in shown
    assert "\u27e6\u2039<|im_end|>\u203a ends a turn.<|im_end|>\u27e7" in shown
    assert "control tokens that a row spells, ordinary text to the model, are between \u2039 and \u203a" in shown
    assert "\x1b[1;32m\x1b[4m<|im_end|>\x1b[24m ends a turn.<|im_end|>\x1b[0m" in preview(config, color=True)
    page = path.read_text(encoding="utf-8")
    assert page.count('title="spelt in the row: ordinary text"') == 2 and "Underlined</i> control tokens" in page


def test_what_cannot_be_done_is_said(config, tmp_path):
    with pytest.raises(UserError, match=r"model\.path"):
        preview(Config(data=config.data))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        preview(config, tmp_path / "file" / "preview.html")


def test_the_first_rows_of_a_stream_are_shown(config):
    data = dataclasses.replace(config.data, streaming=True)
    shown, whole = (preview(dataclasses.replace(config, data=d), color=False) for d in (data, config.data))
    assert shown.startswith("data.train (the first rows)\n")
    assert shown.split("\n", 1)[1] == whole.split("\n", 1)[1]  # all of so few rows


def test_lists_that_training_refuses_are_told(config, tmp_path):
    pair = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}
    three = {"prompt": "2+2=", "completions": [" 4", " 5", " four"], "scores": [1, 0, 0.5]}
    lists = SourceConfig(path=str(write_jsonl(tmp_path / "lists.jsonl", [three, three])), kind="preference")
    pairs = SourceConfig(path=str(write_jsonl(tmp_path / "pairs.jsonl", [pair])), kind="preference")
    data = dataclasses.replace(config.data, train=(pairs,), eval=(lists,))
    shown = preview(dataclasses.replace(config, recipe="preference", data=data), tmp_path / "page.html", color=False)
    told = f"would refuse 2 rows with more, the first at {tmp_path}/lists.jsonl:1: make rows of two out of longer lists"
    assert shown.count(told) == 1 and told in shown.partition("data.eval")[2]
    assert told in _Page((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"prompt": "c", "label": 5}, r"recipe 'preference' would refuse the rows: .*rows.jsonl:2: the label is 5"),
        ({"prompt": "a", "label": False}, "would refuse the rows: .*none of 2 rows can be paired with the answer to"),
        ({"prompt": "c", "label": False}, "labels      1 true, 1 false\nmismatched  2 answers to other prompts"),
    ],
)
def test_what_the_recipe_says_of_all_rows_is_told(config, tmp_path, second, told):
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"completion": "d"} | second]
    source = SourceConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), kind="labelled")
    data = dataclasses.replace(config.data, train=(source,), eval=())
    section = dataclasses.replace(config.preference, loss="kto")
    config = dataclasses.replace(config, recipe="preference", data=data, preference=section)
    options = {"preparation": find_preparation(config), "describe": functools.partial(describe_rows, config)}
    assert re.search(told, preview(config, color=False, **options))


def test_what_the_length_costs_is_told(config):
    data = dataclasses.replace(config.data, sequence_length=40, eval=())
    shown = preview(dataclasses.replace(config, data=data), color=False)
    told = (
        r"source 'train': 2 of 3 documents left out, longer than data.sequence_length = 40 \(the longest has \d+ tokens"
    )
    assert re.search(told, shown)
    assert "left out" not in preview(config, color=False)


def test_a_misspelt_key_is_told_with_a_guess(config, tmp_path):
    rows = [chat("a", "b") | {"mesages": 1, "difficulty": 2}, chat("a", "b") | {"complation": "c"}]
    train = (SourceConfig(path=str(write_jsonl(tmp_path / "odd.jsonl", rows))),)
    shown = preview(dataclasses.replace(config, data=dataclasses.replace(config.data, train=train)), color=False)
    told = (
        "'complation' (1 row; did you mean 'completion'?), 'difficulty' (1 row), 'mesages' (1 row; did you mean 'messag"
    )
    assert told in shown


def test_documents_are_those_that_the_recipe_trains_on(config, tmp_path, capsys):
    """KTO's answers to other prompts among them; a reward model reads last tokens, which take slots of a packed row."""
    rows = [{"prompt": f"{i}+1=", "completion": f" {i + 1}", "label": i % 2} for i in range(4)]
    pairs = [{"prompt": f"{i}+1=", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(4)]
    assert find_preparation(config) == AS_RENDERED
    for recipe, made in (("preference", rows), ("reward", pairs)):
        path = write_jsonl(tmp_path / f"{recipe}.jsonl", made)
        values = {"recipe": recipe, "model": {"path": config.model.path}, "data": {"train": str(path)}}
        values |= {"preference": {"loss": "kto"}} if recipe == "preference" else {}
        code = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
        (tmp_path / "config.py").write_text(code)
        found = find_preparation(load_config(str(tmp_path / "config.py")))
        assert (found.together is not None, found.each is not None) == (recipe == "preference", recipe == "reward")
        assert main(["preview", f"--config={tmp_path / 'config.py'}", "--rows=4"]) == 0
        assert capsys.readouterr().out.count("[labels -1]") == (4 if recipe == "preference" else 0)
