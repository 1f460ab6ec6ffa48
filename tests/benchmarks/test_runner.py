"""The sides of a benchmark take turns, see the command's options, and their lines become a table with its bars."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent

BENCHMARK = """
import pathlib, sys
sys.path.insert(0, {here!r})
import workloads
import runner
from runner import Bar, describe_versions, find_versions, make_parser, run_in_turns

def prepare(folder):
    pathlib.Path(folder, "count").write_text("0")

def run_side(arguments):
    count = pathlib.Path(arguments.model, "count")
    count.write_text(str(int(count.read_text()) + 1))
    if arguments.fail == arguments.side:
        raise ValueError("no such luck")
    print("noise")
    turn, versions = int(count.read_text()), find_versions("numpy")
    workloads.emit(side=arguments.side, turn=turn, size=arguments.size, versions=versions)

def summarize(lines):
    table = str({{side: [run["turn"] for run in runs] for side, runs in lines.items()}}) + describe_versions(lines)
    size = lines["a"][0]["size"]
    return table, [Bar("size", size, "<=", 7, "{{:.0f}}"), Bar("share", 0.25, ">", 0.2, "{{:.0%}}")]

runner.PAGE = pathlib.Path(__file__).with_name("page.md")
parser = make_parser("a test")
parser.add_argument("--size", type=int, default=1)
parser.add_argument("--fail")
run_in_turns(parser, "table", ("a", "b"), run_side, summarize, prepare)
"""


def run(folder, *words):
    file = folder / "benchmark.py"
    file.write_text(BENCHMARK.format(here=str(HERE)))
    return subprocess.run([sys.executable, file, *words], capture_output=True, text=True)


def test_sides_take_turns(tmp_path):
    result = run(tmp_path, "--rounds=2", "--size=7")
    *lines, table, empty, bars = result.stdout.splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["side"], run["turn"], run["size"]) for run in runs] == [
        ("a", 1, 7), ("b", 2, 7), ("a", 3, 7), ("b", 4, 7)
    ]  # fmt: skip
    assert table.startswith("{'a': [1, 3], 'b': [2, 4]}numpy ")
    assert (empty, bars) == ("", "Bars: size 7 (<= 7): **met**; share 25% (> 20%): **met**.")
    assert result.returncode == 0


def test_a_missed_bar_is_written_and_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- table -->\nold\n<!-- /table -->\nend\n")
    result = run(tmp_path, "--rounds=1", "--size=8", "--write")
    assert result.returncode == 1 and result.stderr == ""
    missed = "Bars: size 8 (<= 7): **missed**; share 25% (> 20%): **met**."
    assert result.stdout.splitlines()[-1] == missed
    head, start, table, empty, bars, end, last = page.read_text().splitlines()
    assert (head, start, empty, bars, end, last) == ("# Page", "<!-- table -->", "", missed, "<!-- /table -->", "end")
    assert table.startswith("{'a': [1]")


def test_a_side_that_fails_is_shown(tmp_path):
    result = run(tmp_path, "--fail=b")
    assert result.returncode == 1 and "--side b" in result.stderr and "no such luck" in result.stderr


@pytest.fixture
def load_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def sft_run(rate, memory):
    figures = {"tokens_per_second": rate, "median_step_seconds": 1.0, "micro_batches": 2, "peak_rss_gib": memory}
    return figures | {"others_cpu_share": 0.0, "versions": {"jax": "1"}}


@pytest.mark.parametrize(
    ("rate", "memory", "met"),
    [(3500, 1.9, [1, 1, 1]), (3499, 1.9, [0, 1, 1]), (3500, 2.0, [1, 0, 1]), (3500, 5.0, [1, 0, 0])],
)
def test_bars_of_fine_tuning(load_benchmark, rate, memory, met):
    sft = load_benchmark("sft")
    sides = {"postrain": [sft_run(rate, memory)], "trl_packed": [sft_run(1000, 2.0)], "trl_padded": [sft_run(500, 5.0)]}
    _, bars = sft.summarize(sides)
    assert [bar.met for bar in bars] == met
    assert str(bars[0]).startswith(f"useful tokens/s over TRL packed {rate / 1000:.2f}x (>= 3.50x): **")


@pytest.mark.parametrize(
    ("many", "size", "chunked", "met"),
    [
        (1.3, 130, 100, [1, 1]),
        (1.31, 131, 100, [0, 0]),
        (1.3, 130, 101, [1, 1]),
        (float("nan"), 100, 100, [0, 1]),
    ],
)
def test_bars_of_compilation(load_benchmark, many, size, chunked, met):
    """Seconds and instructions over those of the fewest layers, of layers alike and in a pattern; the loss's memory."""
    few = {(4, False): [(0.5, 100), (1.0, 100), (2.0, 100)], (6, True): [(1.0, 100)] * 3}
    alike = few | {(32, False): [(many, size)] * 3, (48, True): [(1.0, 100)] * 3}
    pattern = few | {(32, False): [(1.0, 100)] * 3, (48, True): [(many, size)] * 3}
    for programs, found in ((alike, slice(0, 2)), (pattern, slice(2, 4))):
        _, bars = load_benchmark("compile").summarize(programs, chunked, 1000, 0.0)
        assert [bar.met for bar in bars[found]] == met
        assert sum(bar.met for bar in bars[:4]) == 2 + sum(met) and bars[4].met == (chunked <= 100)


def load_run(ratio):
    return {"ratio": ratio, "seconds": 2.0, "held": 2**30, "file": 10**9, "versions": {}}


@pytest.mark.parametrize(("worst", "met"), [(1.2, True), (1.21, False)])
def test_the_bar_of_loading_is_the_worst_layout_s(load_benchmark, worst, met):
    load = load_benchmark("load")
    first, *others = load.SIDES
    lines = {side: [load_run(1.0), load_run(1.1)] for side in others} | {first: [load_run(worst), load_run(1.0)]}
    _, [bar] = load.summarize(lines)
    assert bar.met == met


@pytest.mark.parametrize(
    ("ours", "tailed", "group", "met"),
    [
        (30.0, 50.0, 4.0, [1] * 8),
        (29.9, 50.0, 4.0, [0, 0, 0, 1, 1, 1, 1, 1]),
        (19.9, 49.9, 3.9, [0] * 8),
    ],
)
def test_bars_of_generation(load_benchmark, ours, tailed, group, met):
    """Beside transformers at equal lengths and long-tailed ones, beside Tunix, and a group beside prompts apart."""
    engine = load_benchmark("engine")
    names = ("first_median", "first_p99", "between_median", "between_p99", "pause_median", "pause_p99")
    figures = {"peak_rss_gib": 1.0, "others_cpu_share": 0.0, "versions": {"jax": "1"}}
    own = {"group": group, "latency": dict.fromkeys(names, 0.01), "long_tailed": tailed}
    sides = {"postrain": (ours, own), "transformers": (10.0, {"long_tailed": 10.0}), "tunix": (10.0, {})}
    lines = {
        side: [figures | {"equal": dict.fromkeys(engine.WAYS, rate)} | more] for side, (rate, more) in sides.items()
    }
    _, bars = engine.summarize(lines)
    assert [bar.met for bar in bars] == met


def test_the_quickstarts_figures_are_its_first_and_last_evaluation(load_benchmark, tmp_path):
    quickstart, runner = load_benchmark("quickstart"), load_benchmark("runner")
    lines = [
        {"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.0, "eval/valid_json": 0.01},
        {"step": 1, "perf/tokens_per_second": 100.0},
        {"step": 2, "perf/tokens_per_second": 300.0, "eval/loss": 9.0, "eval/exact_match": 0.9, "eval/valid_json": 0.9},
        {"step": 3, "perf/tokens_per_second": 200.0, "eval/loss": 0.5, "eval/exact_match": 0.8, "eval/valid_json": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = quickstart.read_metrics(tmp_path / "metrics.jsonl")
    assert found == {
        "exact_match before": 0.0, "exact_match after": 0.8, "valid_json before": 0.01, "valid_json after": 1.0,
        "loss before": 3.0, "loss after": 0.5, "updates": 3, "tokens_per_second": 200.0,
    }  # fmt: skip
    run = {"seed": 0, "minutes": 9.96, "others_cpu_share": 0.01, "versions": {"jax": "1"}, **found}
    text, bars = quickstart.summarize([run | {"exact_match after": 0.9}, run | {"seed": 1}])
    assert "| 1 | 0% -> 80% | 1% -> 100% | 3.000 -> 0.500 | 10.0 | 200 | 1.0% |" in text.splitlines()
    assert runner.describe_bars(bars) == (
        "Bars: exact match before 0% (< 5%): **met**; exact match after 80% (> 80%): **missed**; "
        "minutes 10.0 (<= 10.0): **met**."
    )


def preference_run(short, long, largest=32, of_reference=0):
    rates = {"prompts up to 128": short, "prompts of 192": long}
    memory = {"largest": largest, "logits": 272, "of_reference": of_reference, "model": 44}
    figures = {"steps_per_second": rates, "without_reference": rates, "memory": memory, "peak_rss_gib": 1.0}
    return figures | {"others_cpu_share": 0.0, "versions": {"jax": "1"}}


@pytest.mark.parametrize(
    ("short", "long", "memory", "met"),
    [
        (0.5, 0.75, {}, [1, 1, 1, 1, 1]),
        (0.47, 0.75, {}, [0, 1, 0, 1, 1]),
        (0.5, 0.74, {}, [1, 0, 1, 1, 1]),
        (0.5, 0.75, {"largest": 272, "of_reference": 44}, [1, 1, 1, 0, 0]),
    ],
)
def test_bars_of_preferences(load_benchmark, short, long, memory, met):
    preference = load_benchmark("preference")
    sides = {"postrain": [preference_run(short, long, **memory)], "postrain_lora": [preference_run(1, 1, **memory)]}
    sides |= {"trl": [preference_run(0.125, 0.125)], "tunix": [preference_run(0.16, 0.2)]}
    text, bars = preference.summarize(sides)
    assert [bar.met for bar in bars] == met
    assert str(bars[0]).startswith(f"updates/s over TRL {short / 0.125:.2f}x (>= 4.00x)")
    assert f"in later epochs it makes {short:.3f} and {long:.3f} updates/s" in text
    del sides["tunix"]  # where its environment is not there
    assert len(preference.summarize(sides)[1]) == 4


def test_pairs_of_the_benchmark_are_no_longer_than_they_say(load_benchmark):
    workloads = load_benchmark("workloads")
    for long_prompts in (False, True):
        pairs = workloads.preference_pairs(40, 256, long_prompts)
        lengths = [len(prompt) + len(answer) for prompt, *answers in pairs for answer in answers]
        assert 200 < max(lengths) <= 256 and all(answer[-1] == workloads.EOS_ID for _, *two in pairs for answer in two)
        assert {len(prompt) for prompt, *_ in pairs} == {192} if long_prompts else max(len(p) for p, *_ in pairs) <= 128


def test_the_step_of_preferences_makes_no_logits_and_no_second_model(load_benchmark, monkeypatch):
    """What the benchmark measures of the compiled step, on a model of one layer and fewer words."""
    import dataclasses

    import jax
    from odd_config import ODD_CONFIG

    from postrain.data.batches.token_shift import assemble_batch
    from postrain.data.documents import layout_of
    from postrain.models.params import init_params
    from postrain.types import Batch

    preference, workloads = load_benchmark("preference"), load_benchmark("workloads")
    config = dataclasses.replace(ODD_CONFIG, vocab_size=4096, num_layers=1)
    loaded = config, init_params(config, jax.random.key(0))
    monkeypatch.setattr("postrain.hf.load.load_pretrained", lambda folder: loaded)
    monkeypatch.setitem(workloads.TINY, "vocab", config.vocab_size)
    groups = preference.make_groups(workloads.preference_pairs(4, 256))
    batch = Batch.from_arrays(assemble_batch([groups[:2], groups[2:]], preference.ROW_LENGTH, layout_of(groups[0])))
    memory = preference.measure_memory("", True, batch)
    assert memory["largest"] < memory["logits"] / 4 and memory["of_reference"] < memory["model"] / 2


@pytest.mark.parametrize("name", ["sft", "preference", "engine", "compile", "quickstart", "load"])
def test_every_section_is_on_the_page(load_benchmark, name):
    page = load_benchmark("runner").PAGE.read_text()
    assert f"<!-- {name} -->\n" in page and f"<!-- /{name} -->" in page
    assert f"python tests/benchmarks/{name}.py" in page
