"""`postrain score`: every row of a file gets its score, whatever it is packed with."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from real_tokenizers import get_template_path, get_tokenizer_folder
from tiny_models import make_tiny_model

from postrain.cli import main
from postrain.data.bad_row import RowRef
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.hf.classifier import load_trunk, save_classifier
from postrain.models.heads import HeadConfig, init_heads
from postrain.rollout import score as scoring

USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))
HEAD = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def make_classifier(folder, outputs=1, labels=()):
    base = make_tiny_model(folder / "base", "llama")
    config, params = load_trunk(base)
    head = HeadConfig("score", outputs)
    params |= init_heads([head], config, jax.random.key(0))
    save_classifier(folder / "scorer", params, config, head, source_folder=base, labels=labels)
    return folder / "scorer"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def in_torch(scorer):
    """Text -> its score in transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(scorer)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32).eval()

    def compute(text):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            return model.score(model.model(ids).last_hidden_state)[0, -1, 0].item()

    return compute


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


GENERATED = {"text": "yes", "finished": True}
# A row, and the texts of its scores; one in no list has a single score.
ROWS = [
    ({"prompt": "hi ", "completion": "yes"}, "hi yes<|im_end|>"),
    ({"messages": [USER, YES], "id": 7}, f"{HEAD}yes<|im_end|>"),
    ({"text": "some text, é \u2028"}, "some text, é \u2028<|im_end|>"),
    ({"prompt": "a ", "chosen": "b", "rejected": "c"}, ["a b<|im_end|>", "a c<|im_end|>"]),
    ({"chosen": [USER, YES], "rejected": [USER, NO]}, [f"{HEAD}{w}<|im_end|>" for w in ("yes", "no")]),
    ({"prompt": "a ", "completions": ["b", "b", "c"], "scores": [1, 1, 0]}, [f"a {w}<|im_end|>" for w in "bbc"]),
    ({"prompt": "a ", "completions": ["b"]}, ["a b<|im_end|>"]),
    ({"prompt": "a ", "completions": ["b", "c"], "labels": [True, False]}, ["a b\n", "a b\nc\n"]),
    ({"prompt": "hi", "generated": GENERATED}, f"{HEAD}yes<|im_end|>"),
    ({"messages": [USER, YES | {"content": "old"}], "generated": GENERATED | {"finished": False}}, f"{HEAD}yes"),
    ({"prompt": "hi", "generated": GENERATED | {"raw": True}}, "hiyes<|im_end|>"),
]  # fmt: skip


def test_every_row_has_the_score_of_its_text_in_the_order_of_the_file(scorer, in_torch, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "LENGTH", 64)  # several packed rows, and several batches
    rows = [row for row, _ in ROWS for _ in range(3)]
    count = scoring.score_file(scorer, write(tmp_path / "rows.jsonl", rows), str(tmp_path / "out.jsonl"), batch_size=2)
    found = read(tmp_path / "out.jsonl")
    assert count == len(found) == len(rows)
    for one, row, (_, texts) in zip(found, rows, [pair for pair in ROWS for _ in range(3)], strict=True):
        assert {key: value for key, value in one.items() if key != "score"} == row and list(one)[-1] == "score"
        expected = [in_torch(text) for text in texts] if isinstance(texts, list) else in_torch(texts)
        np.testing.assert_allclose(one["score"], expected, atol=1e-5)
    assert not (tmp_path / "out.jsonl.unfinished").exists()


def test_options_say_how_rows_are_read(scorer, in_torch, tmp_path, capsys):
    def score(row, **options):
        path = write(tmp_path / "rows.jsonl", [row])
        scoring.score_file(scorer, path, str(tmp_path / "out.jsonl"), **options)
        return read(tmp_path / "out.jsonl")[0]["score"]

    generated = {"prompt": "hi", "generated": GENERATED}
    assert score(generated, raw=True) == pytest.approx(in_torch("hiyes<|im_end|>"), abs=1e-5)
    assert "note" not in capsys.readouterr().err
    head = "<|im_start|>system\nBe.<|im_end|>\n" + HEAD
    assert score(generated, system="Be.") == pytest.approx(in_torch(f"{head}yes<|im_end|>"), abs=1e-5)
    assert "note: 1 of the text prompts are put through the chat template" in capsys.readouterr().err
    steps = {"prompt": "a ", "completions": ["b", "c"]}
    assert score(steps, steps=True) == pytest.approx([in_torch("a b\n"), in_torch("a b\nc\n")], abs=1e-5)
    assert score({"prompt": "hi", "generated": {"text": " ", "finished": True}}) is None


def test_the_last_answer_is_scored_whatever_stands_before_it(scorer, in_torch, tmp_path, capsys):
    """Also where a template renders earlier turns of reasoning in another way than the last."""
    turns = [USER, YES | {"reasoning_content": "so", "weight": 0.5}, USER, NO, USER, YES]
    text = f"{HEAD}yes<|im_end|>\n{HEAD}no<|im_end|>\n{HEAD}yes<|im_end|>"
    plain = [{key: value for key, value in turn.items() if key in ("role", "content")} for turn in turns]
    rows = [
        {"messages": plain},
        {"messages": [turn | {"train": True} if turn["role"] == "assistant" else turn for turn in plain[:-1]]
         + [YES | {"weight": 0.5}]},
        {"messages": [turn | {"weight": 0.5} if turn["role"] == "assistant" else turn for turn in plain[:-1]],
         "generated": GENERATED},
        {"prompt": "hi", "generated": GENERATED | {"text": "<think>never closed"}},
    ]  # fmt: skip
    scoring.score_file(scorer, write(tmp_path / "rows.jsonl", rows), str(tmp_path / "out.jsonl"))
    *scores, unclosed = [row["score"] for row in read(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(scores, in_torch(text), atol=1e-5)
    assert unclosed is None
    error = capsys.readouterr().err
    assert "1 of the generated answers cannot be rendered, so that their score is null; the first at" in error
    assert "rows.jsonl:4: " in error
    folder = shutil.copytree(get_tokenizer_folder("qwen3"), tmp_path / "qwen3")
    shutil.copy(get_template_path("qwen3"), folder / "chat_template.jinja")
    tokenizer, three = load_tokenizer(folder), [turns[0], turns[1] | {"weight": 1}, turns[2], turns[1], USER, NO]
    parsed = scoring.parse_row_texts({"messages": three}, RowRef("rows", "rows.jsonl", 1))
    ((document,),) = scoring._render([parsed], tokenizer, "")
    assert tokenizer.decode(document.tokens).endswith("no<|im_end|>") and document.num_trained < 10


@pytest.mark.parametrize(
    ("trained_on", "row", "words"),
    [
        ("text", {"messages": [USER, YES]}, "would be scored as conversations, .*: write it as text"),
        ("text", {"prompt": "hi", "generated": GENERATED}, "run `postrain generate` and `postrain score` with --raw"),
        ("messages", {"prompt": "hi ", "chosen": "a", "rejected": "b"}, "as plain text, .*: write it as messages"),
        ("messages", {"prompt": "hi", "generated": GENERATED | {"raw": True}}, "`postrain score` without --raw"),
        ("messages", {"prompt": "a ", "completions": ["b"], "labels": [True]}, "write it as messages"),
    ],
)
def test_rows_of_another_form_than_the_model_was_trained_on_are_refused(scorer, tmp_path, trained_on, row, words):
    """As its config.json says; where nothing is said, every form is scored."""
    folder = shutil.copytree(scorer, tmp_path / "scorer")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"postrain_trained_on": trained_on}))
    good = {"text": "good"} if trained_on == "text" else {"messages": [USER, YES]}
    model = scoring.load_scorer(folder)
    assert scoring.score_file(model, write(tmp_path / "good.jsonl", [good]), str(tmp_path / "out.jsonl")) == 1
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{words}"):
        scoring.score_file(model, write(tmp_path / "rows.jsonl", [good, row]), str(tmp_path / "out.jsonl"))


def test_a_score_that_is_not_finite_names_its_row(scorer, tmp_path):
    model = scoring.load_scorer(scorer)
    broken = model._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    path = write(tmp_path / "rows.jsonl", [{"text": "good"}])
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: its score is not finite: check the model with `postrain verify"
    ):
        scoring.score_file(broken, path, str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_longer_than_the_model_knows_are_told(scorer, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "a" * 512}])
    scoring.score_file(scorer, path, str(tmp_path / "out.jsonl"))
    assert "warning: 1 of the texts are longer than the 512 positions that the model" in capsys.readouterr().err


def test_classes_have_names_and_probabilities(tmp_path):
    folder = make_classifier(tmp_path, 3, ("low", "middle", "high"))
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "some more"}])
    scoring.score_file(folder, path, str(tmp_path / "out.jsonl"))
    for row in read(tmp_path / "out.jsonl"):
        shares = row["score"]["probabilities"]
        assert list(shares) == ["low", "middle", "high"] and sum(shares.values()) == pytest.approx(1)
        assert row["score"]["label"] == max(shares, key=shares.get)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "score": 1}, "has a key 'score' already"),
        ({"prompt": "a"}, "expected the keys 'messages'"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completions": []}, "'completions' must be a list of answers; found []"),
        ({"prompt": "a", "completions": ["b", ""]}, "completions[1]: 'completion' is empty"),
        ({"prompt": "a", "generated": "b"}, "'generated' must be an object with 'text'"),
        ({"prompt": "a", "generated": GENERATED | {"raw": "no"}}, "'generated.raw' must be true or false; found 'no'"),
        ({"messages": [USER]}, "no assistant message"),
        (
            {"messages": [USER, YES, USER]},
            "must end with the answer that is judged, an assistant message; it ends with a",
        ),
        ({"messages": [USER, YES, USER, NO | {"train": False}]}, "it ends with an answer with train: false"),
    ],
)
def test_a_row_that_has_no_score_is_named(scorer, tmp_path, capsys, row, words):
    path = write(tmp_path / "rows.jsonl", [{"text": "good"}, row])
    assert main(["score", str(scorer), path, f"--output={tmp_path / 'out.jsonl'}"]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:2: " in error and words in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_files_and_models_that_cannot_be_are_refused(scorer, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"text": "good"}])
    (tmp_path / "empty.jsonl").write_text("")
    base = scorer.parent / "base"
    for words, message in (
        ([scorer, path, f"--output={path}"], "is the file of the rows, which stays as it is"),
        ([scorer, tmp_path / "empty.jsonl"], "has no rows"),
        ([scorer, tmp_path / "none.jsonl"], "cannot be read"),
        ([base, path], "expected a reward model or classifier (*ForSequenceClassification), found a language model"),
        ([tmp_path, path], "holds no config.json"),
        ([scorer, path, "--batch-size=0"], "--batch-size 0: expected at least 1"),
    ):
        assert main(["score", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert json.loads(open(path).read()) == {"text": "good"}
