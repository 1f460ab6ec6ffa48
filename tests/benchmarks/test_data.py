"""Each part of the data benchmark runs on little work and gives its figures; bars are held against known ones."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def load_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import data
    import data_workloads

    return data, data_workloads


def run(case, *words):
    command = [sys.executable, HERE / "data.py", "--case", case, "--rounds", "1", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert "Bars: " in result.stdout, result.stderr  # a bar may be missed: so little work is no measurement
    return {line["side"]: line["figures"] for line in lines}, result.stdout


def test_packing_beside_trl():
    sides, text = run("packing", "--lengths", "3000")
    assert list(sides) == ["postrain", "trl"] and sides["postrain"].keys() == sides["trl"].keys()
    for key, ours in sides["postrain"].items():
        assert 0 <= ours["padding"] <= sides["trl"][key]["padding"] + 0.001 and ours["seconds"] > 0
        assert f"| {key} | " in text


@pytest.mark.slow
def test_both_prepare_the_same_rows():
    sides, _ = run("preparation", "--conversations", "80")
    assert set(sides) == {"postrain", "trl", "postrain_all_cores", "trl_all_cores"}
    for name in ("records", "short"):
        ours, theirs = sides["postrain"][name], sides["trl"][name]
        assert ours["trained"] == theirs["trained"] > 0
        assert ours["tokens"] + ours["documents"] == theirs["tokens"]
        assert 0 < sides["postrain"][f"{name}, streamed"]["tokens"] <= ours["tokens"]


def test_a_stream_is_watched():
    sides, text = run("stream", "--rows", "2000")
    figures = sides["stream"]
    assert figures["rows"] >= 2000 and figures["resident"] > 50 and figures["spread"] >= 0
    assert f"| {figures['rows']:,} | " in text


@pytest.mark.slow
def test_a_step_is_timed_packed_and_padded(load_benchmark, monkeypatch, tmp_path):
    data, _ = load_benchmark
    data.workloads.write_tiny_model(tmp_path)
    monkeypatch.setattr(data, "STEPS", {"stress": (64, 2)})
    monkeypatch.setattr(data, "QUANTILES", 4)
    monkeypatch.setattr(data, "SCALE", 128)
    figures = {side: data.time_steps(side, str(tmp_path), updates=1)["stress"] for side in data.SIDES["step"]}
    assert figures["packed"]["share"] > 0.9 > figures["padded"]["share"] > 0 and figures["full"]["share"] == 1
    assert figures["packed"]["to_longest"] == figures["padded"]["to_longest"] > 1
    assert all(figure["slots_per_second"] > 0 for figure in figures.values())


def test_lengths_are_as_measured(load_benchmark):
    _, workloads = load_benchmark
    for name, percentiles in (("records", workloads.RECORDS), ("replies", workloads.REPLIES)):
        drawn = np.percentile(workloads.LENGTHS[name](200_000), list(percentiles)[1:-1])
        np.testing.assert_allclose(drawn, list(percentiles.values())[1:-1], rtol=0.03)
    stress = workloads.LENGTHS["stress"](200_000)
    assert abs(np.median(stress) - 300) < 6 and stress.max() == 8192
    assert abs(np.log(stress[stress < 8192]).std() - 1.2) < 0.05
    lengths, longer = workloads.draw_fitting("records", 2048, 1000)
    assert lengths.size == 1000 and lengths.max() <= 2048 and 0.3 < longer < 0.4


def test_the_gain_of_packing_is_held_against_its_ceiling(load_benchmark):
    data, _ = load_benchmark
    side = lambda rate, share: [
        {
            "figures": {n: {"slots_per_second": rate, "share": share, "to_longest": 2.0} for n in data.STEPS},
            "others_cpu_share": 0.0,
            "versions": {},
        }
    ]
    for rate, met in ((900, True), (890, False)):
        sides = {"packed": side(rate, 1.0), "padded": side(1000, 0.25), "full": side(2 * rate, 1.0)}
        text, bars = data.summarize_step(sides)
        assert [bar.met for bar in bars] == [met] * 3
        assert f"| **{4 * rate / 1000:.2f}x** | 4.00x | {rate / 1000:.0%} | 50% |" in text


@pytest.mark.parametrize(("rate", "met"), [(3000.0, True), (2990.0, False)])
def test_the_bar_of_preparation_is_a_core_s(load_benchmark, rate, met):
    data, _ = load_benchmark
    row = {"seconds": 1.0, "trained": 5}
    ours = {"records": row | {"tokens": rate, "documents": 3}, "records, streamed": row | {"tokens": rate}}
    line = lambda figures: [{"figures": figures, "others_cpu_share": 0.0, "versions": {}}]
    theirs = {"records": {"seconds": (rate + 3) / 1000, "tokens": rate + 3, "trained": 5}}
    sides = {"postrain": line(ours), "trl": line(theirs)}
    sides |= {"postrain_all_cores": sides["postrain"], "trl_all_cores": sides["trl"]}
    _, bars = data.summarize_preparation(sides)
    assert [bar.met for bar in bars] == [met, met]
    theirs["records"]["trained"] = 6
    with pytest.raises(SystemExit, match="not the same rows"):
        data.summarize_preparation(sides)


def test_a_stream_that_grows_misses_its_bar(load_benchmark):
    data, _ = load_benchmark
    figures = {"rows": 10_000_000, "rows_per_second": 1.0, "resident": 300.0, "spread": 1.0}
    for slope, met in ((1.4, True), (1.6, False)):
        line = {"figures": figures | {"slope": slope}, "others_cpu_share": 0.0, "versions": {}}
        _, [bar] = data.summarize_stream({"stream": [line]})
        assert bar.met == met


@pytest.mark.parametrize("case", ["packing", "preparation", "step", "stream"])
def test_every_section_is_on_the_page(load_benchmark, case):
    import runner

    page = runner.PAGE.read_text()
    assert f"<!-- data_{case} -->\n" in page and f"<!-- /data_{case} -->" in page and case in load_benchmark[0].CASES
