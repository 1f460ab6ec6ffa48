"""A row of each kind -> what is trained of it, and what is refused, by file, line and reason."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from kind_fixtures import assistant, expected_arrays, make_config, make_rows, user
from odd_config import ODD_CONFIG
from pipeline_fixtures import make_tokenizer_folder, write_jsonl
from rendering_fixtures import load_real

from postrain.data.bad_row import BadRow, RowRef
from postrain.data.batches.in_memory import MemoryBatches, load_examples
from postrain.data.batches.open import open_train_rows
from postrain.data.batches.token_shift import assemble_row
from postrain.data.documents import layout_of
from postrain.data.kinds.preference import parse_preference
from postrain.data.kinds.prompts import parse_prompt
from postrain.data.kinds.teacher import parse_teacher_row
from postrain.data.messages import SFT_FORMS
from postrain.data.rendering.render import render_prompt
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.errors import UserError
from postrain.models.params import init_params
from postrain.models.transformer import compute_hidden

REF = RowRef("rows", "rows.jsonl", 1)
USER, GOOD, BAD = user("hi"), assistant("good"), assistant("bad")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def load(tmp_path, kind, rows, tokenizer=None, **changes):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(path, kind=kind, **changes)
    return load_examples(config.train, tokenizer, config)


def refuse(tmp_path, kind, row, tokenizer=None):
    with pytest.raises(UserError) as error:
        load(tmp_path, kind, [row], tokenizer)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'rows.jsonl'}:1: ") and "\n" not in text
    return text


# Preference


def prompt_of(sequence):
    return sequence.tokens[: int(sequence.loss_mask.argmax())]


def texts_of(group, tokenizer):
    return [tokenizer.decode(one.tokens[one.loss_mask]) for one in group.sequences]


ANSWERS = ["good<|im_end|>", "bad<|im_end|>"]
CONVERSATION = [USER, assistant("hello"), user("more")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, [USER]),
        ({"chosen": [*CONVERSATION, GOOD], "rejected": [*CONVERSATION, BAD]}, CONVERSATION),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),  # UltraFeedback's
        ({"prompt": [USER], "completions": [[GOOD], [BAD]], "scores": [1, 0]}, [USER]),
        ({"prompt": "hi ", "chosen": "good", "rejected": "bad"}, "hi "),
        ({"prompt": "hi ", "completions": ["good", "bad"], "scores": [1, 0.0]}, "hi "),
    ],
)
def test_the_answers_are_trained_after_one_prompt(tmp_path, tokenizer, row, prompt):
    [group] = load(tmp_path, "preference", [row], tokenizer).examples
    assert texts_of(group, tokenizer) == ANSWERS
    assert [one.fields[0].values.tolist() for one in group.sequences] == [
        [score] * len(one.tokens) for score, one in zip((1, 0), group.sequences, strict=True)
    ]
    for sequence in group.sequences:
        np.testing.assert_array_equal(prompt_of(sequence), render_prompt(prompt, tokenizer))


def test_answers_in_other_words_begin_with_the_same_ids(tmp_path):
    """Also where a token of the whole text lies over the end of the prompt."""
    tokenizer = load_real("qwen3", "qwen3")
    row = {"prompt": "so it went\n", "completions": ["\n\nthen", "on", "\n."], "scores": [1, 2, 3]}
    [group] = load(tmp_path, "preference", [row], tokenizer).examples
    prompts = [prompt_of(one).tolist() for one in group.sequences]
    assert prompts == [render_prompt("so it went\n", tokenizer).tolist()] * 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are equal"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [assistant("good")]}, "chosen and rejected are equal"),
        ({"prompt": "p", "completions": ["a", "b", "a"], "scores": [0, 1, 2]}, "[0] and completions[2] are equal"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [2, 2.0]}, "all scores are 2: nothing is preferred"),
        ({"chosen": [USER, GOOD], "rejected": [user("ho"), BAD]}, "no prompt in common: their first messages"),
        ({"chosen": "a", "rejected": "b"}, "the row has no 'prompt'"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' is empty: the answers have no prompt in common"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "chosen[2]: where the conversations part"),
        ({"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, GOOD, user("x"), BAD]}, "found user"),
        ({"prompt": [USER], "chosen": [user("x"), GOOD], "rejected": [BAD]}, "chosen must go on after the prompt"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "2 completions and 1 scores"),
        ({"prompt": "p", "completions": ["a"], "scores": [1]}, "at least 2 completions"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, float("nan")]}, "scores[1] must be a finite number"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 10**60]}, "scores[1] must be a finite number"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1, "2"]}, "scores[1] must be a finite number"),
        ({"prompt": "p", "completions": "ab", "scores": [1, 2]}, "'completions' must be a list"),
        (
            {"prompt": "Q: 2+2? A:", "chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"},
            "each of the answers begins with the whole prompt, which would then stand there twice",
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER, assistant("")]}, "rejected[1]: the assistant message"),
        ({"chosen": [USER, GOOD], "rejected": [USER, assistant("")]}, "rejected[1]: the assistant message is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "all text or all lists of messages; found both"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "rejected: 'completion' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}, "has no 'tools'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"}, "'system' is not read"),
    ],
)
def test_a_preference_that_is_none_is_refused(tmp_path, tokenizer, row, reason):
    assert reason in refuse(tmp_path, "preference", row, tokenizer)


def test_one_answer_alone_may_repeat_the_prompt(tmp_path, tokenizer):
    """A worse answer may well be one that only repeats the question."""
    row = {"prompt": "Q: 2+2? A:", "chosen": " 4", "rejected": "Q: 2+2? A: what?"}
    (document,) = load(tmp_path, "preference", [row], tokenizer).examples
    assert [tokenizer.decode(s.tokens[s.loss_mask]) for s in document.sequences] == [
        " 4<|im_end|>",
        "Q: 2+2? A: what?<|im_end|>",
    ]


@pytest.mark.parametrize(("key", "value"), [("score", 3), ("completion", "x"), ("scores", [1]), ("rank", np.ones(2))])
def test_columns_of_its_own_are_left_to_a_pair(key, value):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    unread = set()
    assert parse_preference(pair | {key: value}, "pair", REF, unread) == parse_preference(pair, "pair", REF, set())
    assert unread == {key}


def test_answers_that_serving_would_ask_for_in_two_ways_are_refused(tmp_path):
    """Qwen3 is asked with another prompt for an answer with reasoning than for one without."""
    tokenizer = load_real("qwen3", "qwen3")
    reasoned = {**GOOD, "reasoning_content": "let me see"}
    row = {"prompt": [USER], "chosen": [reasoned], "rejected": [BAD]}
    assert "the chat template gives the answers different prompts" in refuse(tmp_path, "preference", row, tokenizer)


def test_answers_to_one_prompt_share_a_row_and_never_see_each_other(tmp_path, tokenizer):
    """Through the model: other tokens in one sequence of a batch change what is computed there and nowhere else."""
    example_set = load(
        tmp_path, "preference", make_rows("preference", 12), tokenizer, batch_size=2, sequence_length=256
    )
    config = dataclasses.replace(ODD_CONFIG, vocab_size=tokenizer.vocab_size)
    params = init_params(config, random.key(0))
    batches = MemoryBatches(
        example_set, make_config(tmp_path / "rows.jsonl", kind="preference", batch_size=2, sequence_length=256)
    )
    seen = 0
    for _ in range(batches.num_steps(1)):
        batch = next(batches)
        groups, segments = batch["group_ids"], batch["segment_ids"]
        for b, ids in enumerate(batch["row_ids"]):
            for group in range(1, (ids >= 0).sum() + 1):
                assert np.unique(segments[b][groups[b] == group]).tolist() == [2 * group - 1, 2 * group]
                assert [
                    float(np.unique(batch["scores"][b][segments[b] == s])[0]) for s in (2 * group - 1, 2 * group)
                ] == [1, 0]
                seen += 1
        assert groups.max() > 1 and ((groups == 0) == (segments == 0)).all()
    assert seen >= 12
    batches.close()
    hidden = lambda tokens: np.asarray(
        compute_hidden(params, config, jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(batch["positions"]))
    )
    rejected = (segments == 2) & (np.arange(2)[:, None] == 0)
    changed = np.where(rejected, (batch["tokens"] + 1) % 600, batch["tokens"])
    differs = np.abs(hidden(changed) - hidden(batch["tokens"])).max(-1) > 0
    assert differs[rejected].all() and not differs[~rejected].any()


def test_the_scores_of_a_pair_differ_by_its_margin(tmp_path, tokenizer):
    row = {"prompt": "hi ", "chosen": "good", "rejected": "bad"}
    for margin, expected in ((None, 1.0), ("", 1.0), (2.5, 2.5), ("2.5", 2.5), (0, 0.0)):
        (group,) = load(tmp_path, "preference", [row | {"margin": margin}], tokenizer).examples
        chosen, rejected = (sequence.fields[0].values[0] for sequence in group.sequences)
        assert chosen > rejected and chosen - rejected == np.float32(expected) or margin == 0
        assert abs(chosen - rejected - expected) < 1e-29
    for margin in (-1, True, "two", float("inf"), 10**400):
        reason = refuse(tmp_path, "preference", row | {"margin": margin}, tokenizer)
        assert "'margin' must be a finite number, at least 0; found" in reason


# Labelled


SFT_ROWS = {
    "messages": {"messages": [USER, GOOD]},
    "prompt_completion": {"prompt": [USER], "completion": "good"},  # trl's unpaired rows are these with a label
    "text": {"text": "good"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "good", "text": "hi good"},
}


@pytest.mark.parametrize("form", SFT_FORMS)
def test_a_labelled_row_is_one_of_kind_sft_with_its_label(tmp_path, tokenizer, form):
    assert SFT_ROWS.keys() == SFT_FORMS.keys()
    row = SFT_ROWS[form]
    (plain,) = load(tmp_path, "sft", [row], tokenizer).examples
    found = load(tmp_path, "labelled", [row | {"label": label} for label in (True, 0, 7, 1.0)], tokenizer)
    assert found.kind.name == "labelled" and not found.layout.arrays.keys() - {"labels"}
    for document, label in zip(found.examples, (1, 0, 7, 1), strict=True):
        assert document.tokens.tolist() == plain.tokens.tolist()
        assert document.loss_mask.tolist() == plain.loss_mask.tolist()
        for reads_last in (False, True):  # a head reads the last token too
            kept = dataclasses.replace(document, reads_last=reads_last)
            row = assemble_row([kept], 64, layout_of(kept))
            assert row["labels"].tolist() == [label] * kept.slots + [0] * (64 - kept.slots)


def test_labels_have_names(tmp_path, tokenizer):
    row, names = {"prompt": "hi ", "completion": "good"}, ("drama", "comedy", "news")
    rows = [row | {"label": label} for label in ("news", "comedy", 0, " drama ")]
    examples = load(tmp_path, "labelled", rows, tokenizer, label_names=names).examples
    assert [document.fields[0].values[0] for document in examples] == [2, 1, 0, 0]
    with pytest.raises(UserError, match="1: 'label' must be one of data.label_names, drama, comedy, news; found 'dram"):
        load(tmp_path, "labelled", [row | {"label": "dramas"}], tokenizer, label_names=names)
    with pytest.raises(UserError, match="1: 'label' must be below 3, the number of data.label_names; found 3"):
        load(tmp_path, "labelled", [row | {"label": 3}], tokenizer, label_names=names)
    with pytest.raises(UserError, match="or a number; found 'news': names need data.label_names, which lists them in"):
        load(tmp_path, "labelled", [row | {"label": "news"}], tokenizer)
    with pytest.raises(UserError, match="'label' must be a finite number .data.label_numbers.; found 1000"):
        load(tmp_path, "labelled", [row | {"label": 10**400}], tokenizer, label_numbers=True)
    # In a table of text.
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nhi ,good,True\nhi ,bad,false\nhi ,so,3\n")
    config = make_config(tmp_path / "rows.csv", kind="labelled")
    examples = load_examples(config.train, tokenizer, config).examples
    assert [document.fields[0].values[0] for document in examples] == [1, 0, 3]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "p ", "completion": "a"},
            "expected a 'label' beside the text, true or false, or for recipe 'reward' also a class; found",
        ),
        (
            {"prompt": "p ", "completion": "a", "label": None},
            "true or false, or for recipe 'reward' also a class; found null",
        ),
        ({"label": True}, "expected the keys 'messages', or 'conversations'"),
        ({"prompt": "p ", "completion": "a", "label": -1}, "a whole number from 0, or a name; found -1"),
        ({"prompt": "p ", "completion": "a", "label": 0.5}, "a whole number from 0, or a name; found 0.5"),
        ({"prompt": "p ", "completion": "a", "label": 2**31}, "a whole number from 0, or a name; found 2147483648"),
        ({"prompt": "p ", "completion": "a", "label": " "}, "a whole number from 0, or a name; found ' '"),
        ({"prompt": "p ", "completion": "a", "label": [True]}, "a whole number from 0, or a name; found a list"),
        ({"prompt": "p ", "completion": " ", "label": True}, "'completion' is empty"),
        ({"prompt": "p ", "completion": "a", "label": True, "system": "s"}, "'system' is not read"),
        ({"prompt": "p ", "completion": "a", "label": True, "weight": 2}, "a weight of 2; rows of kind labelled all"),
        ({"messages": [USER, GOOD | {"weight": 0.5}], "label": True}, "an answer has a weight of 0.5; the label is of"),
        ({"messages": [USER, GOOD, USER], "label": True}, "it ends with a message of role 'user'"),
        ({"messages": [USER, GOOD, USER, BAD | {"weight": 0}], "label": 1}, "ends with an answer with train: false"),
        ({"prompt": "p ", "chosen": "a", "rejected": "b"}, "is a row of kind preference"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path, tokenizer, row, reason):
    assert reason in refuse(tmp_path, "labelled", row, tokenizer)


def test_a_labelled_row_is_one_of_kind_sft_where_that_is_read_and_no_preference(tmp_path, tokenizer):
    row = {"prompt": "p ", "completion": "a", "label": True}
    found = load(tmp_path, "sft", [row], tokenizer)
    assert found.report.total.rows == 1 and "label" in str(found.report.format_unread())
    advice = "for recipe 'preference' with 'preference.loss' = 'kto' or 'bco' or 'apo_zero_unpaired': use a config like"
    told = refuse(tmp_path, "preference", row, tokenizer)
    assert f"is a row of kind labelled, {advice} configs/preference.py:kto" in told
    del row["label"]
    assert "which returns {'messages': [...], 'label': ...} for a row" in refuse(tmp_path, "labelled", row, tokenizer)
    pair = {"prompt": "p ", "chosen": "a", "rejected": "b"}
    told = "use a config like configs/preference.py without ':kto' ('preference.loss')"
    assert told in refuse(tmp_path, "labelled", pair, tokenizer)
    told = "is a row of kind sft, for a teacher to answer: run `postrain teach` first, or set 'distill.teacher'"
    assert told in refuse(tmp_path, "kd", row, tokenizer)


def test_a_misspelt_weight_of_a_pair_is_told(tmp_path, tokenizer):
    row = {"prompt": "p ", "chosen": "a", "rejected": "b", "wieght": 2}
    found = load(tmp_path, "preference", [row], tokenizer)
    assert "did you mean 'weight'?" in str(found.report.format_unread())


def test_a_label_is_of_one_whole_sequence(tmp_path, tokenizer):
    tokenizer, turns = load_real("qwen3", "qwen3"), []
    for text in ("good", "bad"):
        turns += [USER, assistant(text) | {"reasoning_content": "so"}]
    assert len(load(tmp_path, "sft", [{"messages": turns}], tokenizer).examples) == 2
    row = {"messages": turns, "label": True}
    assert "becomes 2 sequences, and the label is of one: give all" in refuse(tmp_path, "labelled", row, tokenizer)
    context = [turns[0], turns[1] | {"train": False}, *turns[2:]]
    (document,) = load(tmp_path, "labelled", [row | {"messages": context}], tokenizer).examples
    assert document.fields[0].values[0] == 1
    with pytest.raises(UserError, match="'data.too_long' = 'truncate': part of a row of kind labelled cannot be used"):
        load(tmp_path, "labelled", [row], tokenizer, too_long="truncate")


# Stepwise


def test_the_label_of_a_step_is_at_its_last_token(tmp_path, tokenizer):
    """The ids are those of the prompt as it is served, then of each step and a line break."""
    steps, labels = ["I add 2.", "So it is\n5"], [True, False]
    for prompt in ("2 + 2 = ", [USER]):
        row = {"prompt": prompt, "completions": steps, "labels": labels}
        (document,) = load(tmp_path, "stepwise", [row], tokenizer).examples
        served, parts = render_prompt(prompt, tokenizer).tolist(), [tokenizer.encode_text(f"{s}\n") for s in steps]
        assert document.tokens.tolist() == served + parts[0] + parts[1]
        ends = [len(served) + len(parts[0]) - 1, len(document.tokens) - 1]
        arrays = assemble_row([document], 64, layout_of(document))
        assert {int(i): int(arrays["steps"][i]) for i in np.flatnonzero(arrays["steps"])} == dict(
            zip(ends, (2, 1), strict=True)
        )
        assert arrays["segment_ids"].sum() == len(document.tokens), "the last token is read"


@pytest.mark.parametrize("name", ["phi3", "llama3"])
def test_the_first_step_is_encoded_as_an_answer_would_be(tmp_path, name):
    """Phi 3's prompts end with a special token, and its tokenizer puts a space in front of what follows one."""
    tokenizer, steps = load_real(name, name), ["I add 2.", "Say <|end|> <|im_end|>"]
    row = {"prompt": [USER], "completions": steps, "labels": [True, False]}
    (document,) = load(tmp_path, "stepwise", [row], tokenizer).examples
    whole = {"messages": [USER, assistant("\n".join(steps) + "\n!")]}
    (expected,) = load(tmp_path, "sft", [whole], tokenizer).examples
    assert document.tokens.tolist() == expected.tokens[: document.num_tokens].tolist()
    first = int(document.loss_mask.argmax())
    assert (document.tokens[first - 1] == tokenizer.control_tokens.get("<|assistant|>")) == (name == "phi3")


@pytest.mark.parametrize("name", ["phi3", "qwen3", "gemma3"])
def test_steps_are_encoded_as_one_text(tmp_path, name):
    """As whoever scores the whole text has them. Llama 2's tokenizer puts a space in front of each text by itself."""
    tokenizer = load_real(name, "{{ messages[0].content }}")
    for steps, merged in ((["I add 2.", "def f():", "    return 5 ", "1"], False), (["a", "\n\nb", "c"], True)):
        row = {"prompt": "Say:\n", "completions": steps, "labels": [True] * len(steps)}
        (document,) = load(tmp_path, "stepwise", [row], tokenizer).examples
        start, ends = len(tokenizer.prefix_ids), np.flatnonzero(document.fields[0].values)
        ids, texts = document.tokens[start:].tolist(), [tokenizer.decode(document.tokens[start : i + 1]) for i in ends]
        begins = ["".join(f"{step}\n" for step in steps[: i + 1]) for i in range(len(steps))]
        assert texts == [f"Say:\n{text}" for text in begins]
        whole = tokenizer.encode_text(texts[-1])
        # "\n\n\n" may be one token, over the end of the first step: then every step is encoded by itself.
        assert (ids[-4:] == whole[-4:] and len(ids) == len(whole)) or (merged and name != "phi3")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True]}, "each of the 2 steps; found 1 labels"),
        ({"prompt": "p", "completions": ["a"], "labels": True}, "one label for each of the 1 steps; found True"),
        ({"prompt": "p", "completions": ["a"], "labels": [2]}, "labels[0] must be true or false; found 2"),
        ({"prompt": "p", "completions": ["a", " "], "labels": [True, True]}, "completions[1] is empty"),
        ({"prompt": "p", "completions": [], "labels": []}, "'completions' must be a list of steps; found []"),
        ({"prompt": "p", "completions": [1], "labels": [True]}, "completions[0] must be a string; found a number"),
        ({"prompt": "", "completions": ["a"], "labels": [True]}, "expected a 'prompt', text or a list of messages"),
        ({"completions": ["a"], "labels": [True]}, "expected a 'prompt', text or a list of messages"),
        ({"prompt": "p", "completions": ["a"], "scores": [1.0]}, "is a row of kind preference"),
        ({"prompt": "p", "completions": ["a"]}, "expected 'completions', the steps, and their 'labels'; found"),
        ({"prompt": "p", "completions": ["a"], "labels": [True], "system": "s"}, "'system' is not read"),
    ],
)
def test_steps_that_are_none_are_refused(tmp_path, tokenizer, row, reason):
    assert reason in refuse(tmp_path, "stepwise", row, tokenizer)


# Prompts


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({3, 4}, "'x' is metadata, which must be JSON (text, numbers, lists, objects); found set"),
        ([{"y": np.arange(3)}], "'x[0].y' is metadata, which must be JSON"),
        ({"y": 1, 2: 3}, "key x.2 of the metadata must be a string; found int"),
    ],
)
def test_metadata_that_is_no_json_is_refused(value, reason):
    with pytest.raises(BadRow, match=re.escape(reason)):
        parse_prompt({"prompt": "p", "x": value}, "prompts", REF, set())
    given = {"x": [{"y": None, "z": (1, 2.5, True)}]}
    assert parse_prompt({"prompt": "p"} | given, "prompts", REF, set()).metadata == given


def test_a_prompt_is_what_serving_feeds(tmp_path, tokenizer):
    tools = [{"name": "f", "parameters": {}}]
    rows = [
        {"prompt": [USER], "answer": 4},
        {"prompt": "2+2=", "answer": {"is": [4]}, "id": 7},
        {"prompt": [USER, GOOD, USER]},
    ]
    example_set = load(tmp_path, "prompts", rows, tokenizer)
    for row, prompt in zip(rows, example_set.examples, strict=True):
        np.testing.assert_array_equal(prompt.tokens, render_prompt(row["prompt"], tokenizer))
        assert prompt.metadata == {key: value for key, value in row.items() if key != "prompt"}
    arrays = assemble_row(example_set.examples, 128, example_set.layout)
    for i, prompt in enumerate(example_set.examples, 1):
        np.testing.assert_array_equal(arrays["tokens"][arrays["segment_ids"] == i], prompt.tokens)
    assert not arrays["loss_mask"].any() and example_set.report.total.untrained == 0
    real = load_real("qwen3", "qwen3")
    [prompt] = load(tmp_path, "prompts", [{"prompt": [USER], "tools": tools}], real).examples
    np.testing.assert_array_equal(prompt.tokens, render_prompt([USER], real, tools=tools))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [USER, GOOD]}, "must not end with an assistant message"),
        ({"prompt": ""}, "expected a 'prompt'"),
        ({"prompt": "p", "tools": [{"name": "f"}]}, "has no 'tools'"),
        ({"prompt": "p", "functions": [1]}, "'functions' is not read"),
        ({"prompt": [{"role": "user"}]}, "prompt[0].content is missing"),
        ({"question": "p"}, "expected a 'prompt', text or a list of messages; found 'question'"),
    ],
)
def test_a_prompt_that_is_none_is_refused(tmp_path, tokenizer, row, reason):
    assert reason in refuse(tmp_path, "prompts", row, tokenizer)


# Distillation

TEACHER = {
    "tokens": [5, 6, 7],
    "top_ids": [[0, 0], [6, 9], [7, 1]],
    "top_logprobs": [[0.0, 0.0], [-0.7, -0.8], [-0.1, -5]],
}


def test_a_teachers_distribution_stands_where_its_token_is_the_target(tmp_path):
    example_set = load(tmp_path, "kd", [TEACHER, TEACHER | {"loss_mask": [1, 0, 1]}])
    row = assemble_row(example_set.examples, 6, example_set.layout)
    assert row["targets"].tolist() == [6, 7, 6, 7, 0, 0] and row["loss_mask"].tolist() == [1, 1, 0, 1, 0, 0]
    assert row["teacher_ids"].tolist() == [[6, 9], [7, 1], [0, 0], [7, 1], [0, 0], [0, 0]]
    logprobs = np.float32([[-0.7, -0.8], [-0.1, -5], [0, 0], [-0.1, -5], [0, 0], [0, 0]])
    np.testing.assert_array_equal(row["teacher_logprobs"], logprobs)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"top_ids": [[0], [6, 9], [7, 1]]}, "top_ids must have as many numbers in each entry"),
        ({"top_ids": [[0], [6], [7]]}, "top_ids has 1 entries a token and top_logprobs 2"),
        ({"top_ids": [[0, 0], [6, 9]]}, "top_ids has 2 entries, expected 3"),
        ({"top_ids": [[0, 0], [6, -9], [7, 1]]}, "top_ids must be ids of the vocabulary"),
        ({"top_ids": [[0, 0], [6, 9.5], [7, 1]]}, "top_ids must be ids of the vocabulary"),
        ({"top_logprobs": [[0, 0], [-0.7, 0.1], [-0.1, -5]]}, "top_logprobs[1] must be finite and at most 0"),
        ({"top_ids": [[0, 0], [6, 9], [7, 7]]}, "top_ids[2] must be K different ids; found [7, 7]"),
        ({"top_logprobs": [[0, 0], [-0.7, -2], [-0.1, float("nan")]]}, "top_logprobs[2] must be finite"),
        ({"top_logprobs": [[0, 0], [-0.7, -2], [-0.1, float("-inf")]]}, "top_logprobs[2] must be finite"),
        ({"top_logprobs": [[0, 0], [-0.69, -0.69], [-0.1, -5]]}, "top_logprobs[1]: the probabilities of the K ids sum"),
        ({"loss_mask": [1, 1]}, "loss_mask has 2 entries, expected 3"),
        ({"loss_mask": [0, 1, 2]}, "loss_mask must be whole numbers from 0 to 1; found 2"),
        ({"loss_mask": [1, 0, 0]}, "it has no token to train on"),
        ({"tokens": [5, 6.5, 7]}, "tokens must be whole numbers"),
        ({"tokens": [5, -6, 7]}, "tokens must be whole numbers from 0 to 2,147,483,647; found -6"),
        ({"tokens": []}, "tokens must have at least 2 entries; found 0"),
        ({"tokens": "abc"}, "tokens must be a list"),
        ({"weights": [1, 2]}, "weights must be a list of 3 numbers, one for each token"),
        ({"weights": [1, -2, 1]}, "weights[1] must be a number from 1e-6 to 1e6; found -2"),
        ({"weights": [1, float("nan"), 1]}, "weights[1] must be a number from 1e-6 to 1e6; found nan"),
        ({"loss_maks": [0, 1, 1]}, "unknown key 'loss_maks'; did you mean 'loss_mask'?"),
    ],
)
def test_a_teachers_row_that_is_none_is_refused(tmp_path, changes, reason):
    assert reason in refuse(tmp_path, "kd", TEACHER | changes)


def test_a_teachers_row_may_have_a_weight(tmp_path):
    rows = load(tmp_path, "kd", [TEACHER, TEACHER | {"weight": 0.5}])
    row = assemble_row(rows.examples, 4, rows.layout)
    assert row["loss_mask"].tolist() == [1, 1, 0.5, 0.5]
    least = np.float32(1e-6)  # below 1e-6, and what a column of float32 makes of it
    rows = load(tmp_path, "kd", [TEACHER | {"weight": 0.5, "weights": [0, 3.0, float(least)]}])
    np.testing.assert_array_equal(assemble_row(rows.examples, 2, rows.layout)["loss_mask"], [1.5, 0.5 * least])


def test_logprobs_that_rounding_puts_above_0_are_0(tmp_path):
    logprobs = [[0, 0], [1e-9, -20], [5e-4, -20]]
    (row,) = load(tmp_path, "kd", [TEACHER | {"top_logprobs": logprobs}]).examples
    expected = np.float32([[0, 0], [0, -20], [0, -20]])
    np.testing.assert_array_equal(row.fields[1].values, expected)


def make_read_only(values, dtype):
    array = np.array(values, dtype)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("make", [np.array, make_read_only])
def test_a_function_may_give_arrays(make):
    """They are left as they are."""
    ids, logprobs = make(TEACHER["top_ids"], np.uint32), make(TEACHER["top_logprobs"], np.float32)
    raw = {"tokens": make(TEACHER["tokens"], np.uint32), "top_ids": ids, "top_logprobs": logprobs}
    raw |= {"loss_mask": make([1, 0, 1], np.int8), "lengths": np.ones(3), "tokenz": np.ones(3)}
    found, expected = (parse_teacher_row(row, "kd", REF, set()) for row in (raw, TEACHER | {"loss_mask": [1, 0, 1]}))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
    for one, other in zip(found.fields, expected.fields, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        assert one.values.dtype == other.values.dtype
    assert ids.tolist() == TEACHER["top_ids"]  # those that are not trained too


@pytest.mark.parametrize("key", ["tokens", "loss_mask", "top_ids", "top_logprobs"])
def test_an_array_that_is_no_list_is_refused(key):
    with pytest.raises(BadRow, match=f"{key} must be a list; found array"):
        parse_teacher_row(TEACHER | {key: np.array(3)}, "kd", REF, set())


@pytest.mark.parametrize("streaming", [False, True])
def test_all_rows_have_as_many_ids_of_a_teacher(tmp_path, streaming):
    other = {"tokens": [1, 2], "top_ids": [[0], [2]], "top_logprobs": [[0], [-1]]}
    path = write_jsonl(tmp_path / "rows.jsonl", [TEACHER, other])
    expected = "rows.jsonl:2: expected teacher_ids of 2 a token, .*, as at .*rows.jsonl:1; found teacher_ids of 1 a tok"
    with pytest.raises(UserError, match=expected):
        next(open_train_rows(None, make_config(path, kind="kd", streaming=streaming)).batches)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_is_left_out_does_not_tell_how_many(tmp_path, streaming):
    long = {"tokens": [1] * 9, "top_ids": [[2]] * 9, "top_logprobs": [[-1.0]] * 9}
    path = write_jsonl(tmp_path / "rows.jsonl", [long, TEACHER])
    config = make_config(path, kind="kd", streaming=streaming, sequence_length=4, batch_size=1, packing="none")
    batches = open_train_rows(None, config).batches
    found = [next(batches)["tokens"].tolist() for _ in range(2)]
    batches.close()
    assert found == [[[5, 6, 0, 0]]] * 2


def test_a_row_with_other_arrays_is_a_bad_one_in_every_epoch(tmp_path):
    other = {"tokens": [1, 2], "top_ids": [[0], [2]], "top_logprobs": [[0], [-1]]}
    path = write_jsonl(tmp_path / "rows.jsonl", [TEACHER, other])
    changes = {"on_bad_row": "skip", "max_bad_fraction": 0.5, "sequence_length": 2, "batch_size": 1}
    batches = open_train_rows(None, make_config(path, kind="kd", streaming=True, **changes)).batches
    assert [next(batches)["tokens"].tolist() for _ in range(9)] == [[[5, 6]]] * 9
    batches.close()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("row", [TEACHER, {"items": [3, 9]}])
def test_ids_are_held_to_the_models_vocabulary(tmp_path, row, streaming):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    kind = "kd" if "tokens" in row else "events"
    for vocab_size in (10, 9):
        batches = open_train_rows(None, make_config(path, kind=kind, streaming=streaming, batch_size=1)).batches
        try:
            batches.check_token_ids(vocab_size)
            next(batches)
            assert vocab_size == 10
        except UserError as error:
            assert vocab_size == 9 and "rows.jsonl:1: token id 9 is outside the model's vocabulary of 9" in str(error)
        batches.close()


# Events


def test_events_predict_the_next_item_and_read_the_rest(tmp_path):
    row = {"items": [3, 1, 4, 1], "times": [100, 160, 160, 1000], "actions": [0, 2, 1, 1]}
    example_set = load(tmp_path, "events", [row, row])
    arrays = assemble_row(example_set.examples, 8, example_set.layout)
    assert arrays["tokens"].tolist() == [3, 1, 4, 3, 1, 4, 0, 0]
    assert arrays["targets"].tolist() == [1, 4, 1, 1, 4, 1, 0, 0]
    assert arrays["loss_mask"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert arrays["seconds"].tolist() == [0, 60, 60, 0, 60, 60, 0, 0]
    assert arrays["actions"].tolist() == [0, 2, 1, 0, 2, 1, 0, 0]


def test_too_many_events_keep_the_latest(tmp_path):
    times = [10, 20, 40, 70, 110]
    example_set = load(
        tmp_path, "events", [{"items": [1, 2, 3, 4, 5], "times": times}], sequence_length=3, too_long="truncate"
    )
    [document] = example_set.examples
    assert document.tokens.tolist() == [2, 3, 4, 5] and document.loss_mask.tolist() == [False, True, True, True]
    assert expected_arrays([document], 3)["seconds"].tolist() == [0, 20, 50] and example_set.report.total.truncated == 1


def test_a_teachers_row_keeps_the_beginning(tmp_path):
    [document] = load(tmp_path, "kd", [TEACHER], sequence_length=1, too_long="truncate").examples
    assert document.tokens.tolist() == [5, 6] and document.truncated
    assert expected_arrays([document], 1)["teacher_ids"].tolist() == [[6, 9]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"items": [1]}, "items must have at least 2 entries; found 1"),
        ({"items": [1, -2]}, "items must be whole numbers from 0 to 2,147,483,647; found -2"),
        ({"items": [1, 2.5]}, "items must be whole numbers"),
        ({"items": [1, "2"]}, "items must be whole numbers"),
        ({"items": [1, 2**31]}, "items must be whole numbers"),
        ({"items": [[1], [2]]}, "items must be a list of numbers; found lists in it"),
        ({"items": [1, 2], "times": [5, 4]}, "times go backwards: times[1] = 4 after 5"),
        ({"items": [1, 2], "times": [5]}, "times has 1 entries, expected 2"),
        ({"items": [1, 2], "times": [5, 5 + 2**31]}, "times span 2,147,483,648 seconds: expected unix seconds"),
        ({"items": [1, 2], "actions": [1, 2, 3]}, "actions has 3 entries, expected 2"),
        ({"items": [1, 2], "actions": [1, -1]}, "actions must be whole numbers"),
        ({"items": [1, 2], "action": [1, 2]}, "unknown key 'action'; did you mean 'actions'?"),
    ],
)
def test_events_that_are_none_are_refused(tmp_path, row, reason):
    assert reason in refuse(tmp_path, "events", row)


def test_all_members_have_times_or_none(tmp_path):
    rows = [{"items": [1, 2], "times": [1, 2]}, {"items": [1, 2]}]
    with pytest.raises(UserError, match="rows.jsonl:2: expected seconds, as at .*:1; found no further arrays"):
        load(tmp_path, "events", rows)
