"""Weights of logged rows by their rewards: formulas, what is divided by what, what is printed and what is refused."""

import dataclasses
import math

import numpy as np
import pytest
from kind_fixtures import make_config
from pipeline_fixtures import chat, make_tokenizer_folder, write_jsonl

from postrain.config import Config, SftSection, WeightsSection
from postrain.data.batches.in_memory import load_examples, make_eval_batches
from postrain.data.batches.open import open_train_rows
from postrain.data.preview import preview
from postrain.data.rendering.tokenizer import load_tokenizer
from postrain.data.reward_weights import (
    FIELD,
    REWARDS,
    RewardWeights,
    compute_weights,
    effective_size,
    explain_by_others,
    group_means,
)
from postrain.errors import UserError

LOGGED = [
    chat("q 1", "good") | {"reward": 3.0, "member": "ann", "item": 7, "propensity": 0.5, "value": 2.0},
    chat("q 2", "poor answer of several words")
    | {"reward": 1.0, "member": "ann", "item": 8, "propensity": 0.25, "value": 1.5},
    chat("q 3", "fair") | {"reward": "2.0", "member": "bob", "item": 7.0, "propensity": 1, "value": 0.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def weigh(tmp_path, tokenizer, rows, mode, streaming=False, on_bad_row="error", **options):
    """The documents, the summary and the set of them."""
    data = make_config(
        write_jsonl(tmp_path / "rows.jsonl", rows), kind="sft", streaming=streaming, on_bad_row=on_bad_row
    )
    config = Config(data=data, sft=SftSection(weights=WeightsSection(mode=mode, **options)))
    weights = RewardWeights(config)
    loaded = load_examples(data.train, tokenizer, data, kind="sft", preparation=weights.preparation)
    return loaded, weights.summary


def weights_of(tmp_path, tokenizer, rows, mode, **options):
    loaded, _ = weigh(tmp_path, tokenizer, rows, mode, **options)
    return [example.weight for example in loaded.examples]


CASES = {  # by hand
    "linear": ("linear", {}, [3.0, 1.0, 2.0]),
    "linear, clipped": ("linear", {"clip": 2.5}, [2.5, 1.0, 2.0]),
    "exp": ("exp", {"temperature": 0.5}, [1.0, math.exp(-4), math.exp(-2)]),
    "exp, clipped": ("exp", {"clip": math.exp(2.0)}, [1.0, math.exp(-1), 1.0]),
    "advantage of members": ("advantage", {"baseline": "member"}, [1.0, math.exp(-2), math.exp(-1)]),
    "advantage of items": ("advantage", {"baseline": "item"}, [1.0, math.exp(-0.5), math.exp(-1)]),
    "advantage over values": ("advantage", {"baseline": "value"}, [math.exp(-0.5), math.exp(-2), 1.0]),
    "snips": ("snips", {}, [6.0, 4.0, 2.0]),
    "snips, clipped": ("snips", {"clip": 5.0}, [5.0, 4.0, 2.0]),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_formula(tmp_path, tokenizer, case):
    mode, options, expected = CASES[case]
    assert weights_of(tmp_path, tokenizer, LOGGED, mode, **options) == pytest.approx(expected, rel=1e-12)


def test_the_weight_of_a_row_and_that_of_its_reward_are_multiplied(tmp_path, tokenizer):
    rows = [LOGGED[0] | {"weight": 0.5}, *LOGGED[1:]]
    assert weights_of(tmp_path, tokenizer, rows, "linear") == [1.5, 1.0, 2.0]


def test_ips_weighs_tokens_and_keeps_rows_without_reward_in_what_it_is_divided_by(tmp_path, tokenizer):
    rows = [LOGGED[0], LOGGED[1] | {"reward": 0}, LOGGED[2]]
    loaded, summary = weigh(tmp_path, tokenizer, rows, "ips", clip=5.0)
    data = make_config(tmp_path / "rows.jsonl", kind="sft", packing="none", batch_size=3)
    [batch] = make_eval_batches(loaded, data)
    trained = batch["loss_mask"] > 0
    assert set(np.unique(batch["loss_mask"])) == {0.0, 1.0} and trained[1].any()
    for row, weight in zip(range(3), (5.0, 0.0, 2.0), strict=True):
        assert set(batch[FIELD][row][trained[row]]) == {weight}
    assert "effective sample size 1.7 of 3 rows (56.3%); 1 clipped (33.3%)" in summary, "49 / 29 rows"
    # The other modes leave rows of weight 0 out, as a row's own weight does.
    assert len(weights_of(tmp_path, tokenizer, rows, "snips")) == 2


def test_a_row_of_several_documents_counts_once_in_means_and_has_one_weight(tmp_path):
    """Qwen3's template makes a sequence of each turn."""
    from real_tokenizers import get_template, get_tokenizer_folder

    template = tmp_path / "qwen3.jinja"
    template.write_text(get_template("qwen3"))
    qwen3 = load_tokenizer(get_tokenizer_folder("qwen3"), chat_template=template)
    turns = {"messages": [*chat("a", "b", reasoning_content="c")["messages"], *chat("d", "e")["messages"]]}
    rows = [turns | {"reward": 4, "member": 1}, chat("f", "g") | {"reward": 1, "member": 1}]
    loaded, summary = weigh(tmp_path, qwen3, rows, "advantage", baseline="member")
    assert [example.ref.line for example in loaded.examples] == [1, 1, 2], "two documents and one"
    expected = [1.0, 1.0, math.exp(-3)]  # the mean is 2.5
    assert [example.weight for example in loaded.examples] == pytest.approx(expected, rel=1e-12)
    assert "of 2 rows" in summary


def test_rows_without_weight_are_left_out_and_a_file_that_is_listed_twice_counts_twice(tmp_path, tokenizer):
    rows = [ROW, ROW | {"reward": 0.0}, ROW | {"reward": -20.0}]
    loaded, summary = weigh(tmp_path, tokenizer, rows, "exp")
    assert [example.weight for example in loaded.examples] == pytest.approx([1, math.exp(-1)])
    assert "of 3 rows" in summary and "; 1 left out, of less than 1e-06 of the largest weight" in summary
    path = write_jsonl(tmp_path / "one.jsonl", [ROW])
    data = make_config(path, write_jsonl(tmp_path / "more.jsonl", rows[:2]), path, kind="sft")
    config = Config(data=data, sft=SftSection(weights=WeightsSection(mode="advantage", baseline="member")))
    weights = RewardWeights(config)
    loaded = load_examples(data.train, tokenizer, data, kind="sft", preparation=weights.preparation)
    assert "of 4 rows" in weights.summary, "the mean of the member is 3/4"
    assert [example.weight for example in loaded.examples] == pytest.approx([1, 1, math.exp(-1), 1])
    data = make_config(path, path, write_jsonl(tmp_path / "zero.jsonl", [rows[1]]), kind="sft")
    weights = RewardWeights(dataclasses.replace(config, data=data))
    load_examples(data.train, tokenizer, data, kind="sft", preparation=weights.preparation)
    assert "of 3 rows" in weights.summary


def test_numerics_of_rewards_that_no_exponential_holds():
    rewards = np.array([1e6, 1e6 - 1, -1e300])
    weights, clipped = compute_weights(rewards, WeightsSection(mode="exp"))
    np.testing.assert_allclose(weights, [1.0, math.exp(-1), 0.0], rtol=1e-9)
    assert not clipped.any()
    # Differences to a member's own mean are exactly 0 where all its rewards are equal, whatever their digits.
    values = np.array([0.1] * 3 + [0.7] * 7)
    assert np.array_equal(group_means(values, ["a"] * 3 + ["b"] * 7), values)
    assert effective_size(np.array([2.0, 2.0, 0.0])) == 2 and effective_size(np.zeros(3)) == 0


def test_a_stream_has_the_weights_of_each_row_and_the_same_proportions(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", LOGGED)
    data = make_config(path, kind="sft", streaming=True, shuffle=False, packing="none", batch_size=3)
    data = dataclasses.replace(data, stream=dataclasses.replace(data.stream, shards=1))
    found = {}
    for mode, options in (("exp", {}), ("ips", {}), ("advantage", {"baseline": "value"})):
        weights = RewardWeights(Config(data=data, sft=SftSection(weights=WeightsSection(mode=mode, **options))))
        opened = open_train_rows(tokenizer, data, kind="sft", preparation=weights.preparation)
        found[mode] = next(opened.batches)
        opened.batches.close()
        assert opened.fingerprint["preparation"].startswith(f"with weights of mode {mode}")
    per_row = sorted(found["exp"]["loss_mask"].max(1).tolist())
    assert per_row == pytest.approx([math.exp(1), math.exp(2), math.exp(3)], rel=1e-6)
    assert sorted(found["ips"][FIELD].max(1).tolist()) == [2.0, 4.0, 6.0]
    advantages = sorted(found["advantage"]["loss_mask"].max(1).tolist())
    assert advantages == pytest.approx([math.exp(-0.5), math.exp(1), math.exp(1.5)], rel=1e-6)


def test_what_is_printed(tmp_path, tokenizer, folder):
    _, summary = weigh(tmp_path, tokenizer, LOGGED, "exp", clip=math.exp(2.5))
    assert "weights     mode exp, clip 12.18" in summary and "of 3 rows" in summary and "1 clipped (33.3%)" in summary
    rows = [chat(f"q {i}", "a") | {"reward": float(i == 0)} for i in range(60)]
    _, summary = weigh(tmp_path, tokenizer, rows, "exp", temperature=0.01)
    assert "effective sample size 1.0 of 60 rows (1.7%)" in summary
    assert "less than 5% of the rows decide: raise sft.weights.temperature" in summary
    _, summary = weigh(tmp_path, tokenizer, LOGGED, "advantage", baseline="member")
    assert "baseline    member explains 0.0% of the variance of rewards; 2 members, 1 of them with one row" in summary
    _, summary = weigh(tmp_path, tokenizer, LOGGED, "advantage", baseline="value")
    assert "value explains -75.0% of the variance of rewards: the mean of all rewards would be nearer" in summary
    # `postrain preview` says the same, and that the keys are read.
    data = make_config(write_jsonl(tmp_path / "rows.jsonl", LOGGED), kind="sft")
    model = dataclasses.replace(Config().model, path=str(folder))
    config = Config(data=data, model=model, sft=SftSection(weights=WeightsSection(mode="snips")))
    shown = preview(config, rows=1)
    assert "weights     mode snips: 2 to 6" in shown
    assert "keys that were not read: 'item' (3 rows), 'member' (3 rows), 'value' (3 rows)\n" in shown
    without = preview(dataclasses.replace(config, sft=SftSection()), rows=1)
    assert "'propensity' (3 rows), 'reward' (3 rows), 'value' (3 rows)" in without and "weights     " not in without


def test_beside_a_head_rewards_are_less_their_mean_and_means_are_of_the_other_rows(tmp_path, tokenizer):
    rows = [chat("q 4", "more") | {"reward": 6.0, "member": "bob"}, *LOGGED]
    loaded, summary = weigh(tmp_path, tokenizer, rows, "advantage", baseline="head")
    data = make_config(tmp_path / "rows.jsonl", kind="sft", packing="none", batch_size=4)
    [batch] = make_eval_batches(loaded, data)
    for row, reward in enumerate((3.0, 0.0, -2.0, -1.0)):
        assert set(batch[REWARDS][row][batch["loss_mask"][row] > 0]) == {reward}
    assert all(example.weight == 1 for example in loaded.examples)
    assert "mode advantage, baseline head: 0.00674 to 1; effective sample size 1.2 of 4 rows" in summary, "e^-5 to 1"
    assert "baseline    head, which starts at the mean reward, 3: the line above is of the weights then" in summary
    # ann: 3 and 1, bob: 6 and 2; errors 2 and 4 each, of a variance of 14 / 4. The first row has no item.
    assert "explained: -185.7%, by the mean of the other rows of the same member" in summary and "item" not in summary
    rng = np.random.default_rng(0)
    groups = [str(number) for number in rng.integers(0, 40, 60)]
    values = rng.normal(size=60) + np.array([int(group) for group in groups])
    errors = []
    for i, value in enumerate(values):
        others = [values[j] for j in range(60) if j != i and groups[j] == groups[i]]
        errors.append(value - np.mean(others or values))
    assert not all(groups.count(group) > 1 for group in groups), "some are alone"
    expected = 1 - np.mean(np.square(errors)) / values.var()
    assert explain_by_others(values, groups) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'reward' is 1e\+08, .* from the mean .*: scale the rewards"):
        weigh(tmp_path, tokenizer, [rows[0] | {"reward": 1e8}, *LOGGED], "advantage", baseline="head")


ROW = chat("q", "a") | {"reward": 1.0, "propensity": 0.5, "member": "m", "value": 0.0}
BAD = {
    "no reward": ("exp", {}, {"reward": None}, "'reward' is missing or null, and 'sft.weights.mode' = 'exp' reads it"),
    "a reward in words": (
        "exp",
        {},
        {"reward": "good"},
        "'reward' must be a finite number, of size 1e.30 at most; found 'good'",
    ),
    "a flag": (
        "linear",
        {},
        {"reward": True},
        "'reward' must be a number; found true: write 1 and 0 for true and false",
    ),
    "another name": ("exp", {}, {"reward": None, "rewards": 3}, "unknown key 'rewards'; did you mean 'reward'"),
    "NaN": ("exp", {}, {"reward": float("nan")}, "'reward' must be a finite number, of size 1e.30 at most; found nan"),
    "a number beyond all": ("exp", {}, {"reward": 10**400}, "'reward' must be a finite number, of size"),
    "infinity": (
        "linear",
        {},
        {"reward": "inf"},
        "'reward' must be a finite number, of size 1e.30 at most; found 'inf'",
    ),
    "a negative weight": ("linear", {}, {"reward": -2}, "'reward' is -2, and .* cannot be negative: use 'exp'"),
    "a huge weight": (
        "snips",
        {},
        {"reward": 1e9},
        "'reward' = 1e.09 gives the weight 2e.09, expected 0 or 1e-06 to 1e.06",
    ),
    "no propensity": ("ips", {}, {"propensity": None}, "'propensity' is missing or null, and .*'ips' reads it"),
    "propensity 0": ("ips", {}, {"propensity": 0}, "'propensity' must be a probability above 0, at most 1; found 0"),
    "propensity 1.5": (
        "snips",
        {},
        {"propensity": 1.5},
        "'propensity' must be a probability above 0, at most 1; found 1.5",
    ),
    "no member": ("advantage", {"baseline": "member"}, {"member": ""}, "'member' is missing or null, and .*baseline"),
    "no value": ("advantage", {"baseline": "value"}, {"value": None}, "'value' is missing or null, and .*baseline"),
    "a member in parts": ("advantage", {"baseline": "member"}, {"member": [1]}, "'member' must be text or a whole"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_without_what_the_mode_reads_is_refused_by_name_or_left_out(tmp_path, tokenizer, case):
    mode, options, change, message = BAD[case]
    rows = [ROW, ROW | {"reward": 2.0}, ROW | change]
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: {message}"):
        weigh(tmp_path, tokenizer, rows, mode, **options)
    rows = [ROW | {"reward": 1.0 + i / 10} for i in range(30)] + [ROW | change]
    loaded, _ = weigh(tmp_path, tokenizer, rows, mode, on_bad_row="skip", **options)
    assert loaded.report.total.skipped == 1 and len(loaded.examples) == 30


def test_a_reward_without_variance_is_refused_where_it_could_prefer_nothing(tmp_path, tokenizer):
    rows = [ROW, ROW, ROW]
    for mode, options in (("linear", {}), ("exp", {}), ("advantage", {"baseline": "member"})):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: 'reward' is 1, as in all other rows"):
            weigh(tmp_path, tokenizer, rows, mode, **options)
    assert weights_of(tmp_path, tokenizer, rows, "snips") == [2.0] * 3, "there propensities weigh"


def test_a_function_in_place_of_the_kind_may_give_the_reward(tmp_path, tokenizer):
    def rated(row):
        return chat(row["question"], row["shown"]) | {"reward": row["stars"] - 3}

    rows = [{"question": f"q {i}", "shown": "a", "stars": i} for i in range(1, 6)]
    data = make_config(write_jsonl(tmp_path / "rows.jsonl", rows), kind=rated)
    weights = RewardWeights(Config(data=data, sft=SftSection(weights=WeightsSection(mode="exp"))))
    loaded = load_examples(data.train, tokenizer, data, kind="sft", preparation=weights.preparation)
    expected = [math.exp(i - 5) for i in range(1, 6)]
    assert [example.weight for example in loaded.examples] == pytest.approx(expected, rel=1e-12)
    assert not loaded.report.total.unread


def test_a_reward_of_0_and_1_has_variance_though_its_zeros_are_left_out(tmp_path, tokenizer):
    rows = [ROW, ROW | {"reward": 0}]
    assert weights_of(tmp_path, tokenizer, rows, "linear") == [1.0]
