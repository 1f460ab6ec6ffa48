"""The report page: made from the files of a workdir, safe against markup in rows."""

import html.parser
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from postrain.config import resolve, to_dict
from postrain.report.page import (
    CHARTS,
    COLORS,
    Card,
    Chart,
    collect,
    draw_curves,
    find_frame,
    make_ticks,
    thin,
    write_report,
)

CONFIG = resolve({"model": {"path": "models/small"}, "data": {"train": "x.jsonl"}})


def write_run(folder, metrics, samples):
    (folder / "config.json").write_text(json.dumps(to_dict(CONFIG)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))


def make_sample(step, found, **changes):
    sample = {"step": step, "row": "a/b.jsonl:1", "prompt": "<s>hi</s>", "expected": "x", "found": found}
    return sample | {"finished": True} | changes


def test_the_page_shows_first_and_last(tmp_path):
    metrics = [{"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.04}, {"step": 5, "train/loss": 1.5}]
    metrics += [{"step": 9, "train/loss": 0.25, "eval/loss": 0.5, "eval/exact_match": 0.875}]
    write_run(tmp_path, metrics, [make_sample(0, "before"), make_sample(5, "halfway"), make_sample(9, "x")])
    page = write_report(tmp_path, row_html="<pre>row</pre>", environment={"jax": "1.2"}).read_text()
    for words in ("SFT of small", "4% → 88%", "3.000 → 0.500", "9 updates", "✗ before", "✓ x", "<pre>row</pre>", "1.2"):
        assert words in page
    assert "halfway" not in page
    check_well_formed(page)


class Tags(html.parser.HTMLParser):
    """Refuses a page whose elements are not closed in the order of their opening."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)


def check_well_formed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and {"html", "title", "style", "table", "svg", "details"} <= tags.seen
    assert "{{" not in page and "{%" not in page


def test_the_text_of_rows_is_never_markup(tmp_path):
    write_run(tmp_path, [], [make_sample(0, "<script>alert(1)</script>", prompt="<b>", expected="<i>")])
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<b>" not in page and "<i>" not in page


def test_turns_of_one_row_are_compared_each_with_itself(tmp_path):
    samples = [make_sample(step, f"{step} of {turn}", turn=turn) for step in (0, 9) for turn in (1, 2)]
    write_run(tmp_path, [], samples)
    page = write_report(tmp_path).read_text()
    assert page.index("0 of 1") < page.index("9 of 1") < page.index("0 of 2") < page.index("9 of 2")
    assert page.count("b.jsonl:1 turn 2") == 1


def test_an_answer_that_never_stopped_is_wrong(tmp_path):
    write_run(tmp_path, [], [make_sample(0, "x", finished=False)])
    assert "✗ x" in write_report(tmp_path).read_text()


def test_a_run_without_anything_has_a_page(tmp_path):
    write_run(tmp_path, [], [])
    (tmp_path / "samples.jsonl").unlink()
    assert "no updates yet" in write_report(tmp_path).read_text()


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    write_run(tmp_path, [{"step": 1, "train/loss": 2.0}], [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')
    assert "1 update<" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("prompts", "frame"),
    [
        (["<u>\nred</u>\n", "<u>\nblue</u>\n"], (4, 5)),
        (["same", "same"], (0, 0)),
        (["only"], (0, 0)),
        (["a film of mine", "a film of hers"], (0, 0)),
        (["<u>one</u>", "<u>one and more</u>"], (3, 4)),
    ],
)
def test_the_ends_that_all_prompts_share_are_left_out_at_marks(prompts, frame):
    assert find_frame(prompts) == frame


def test_a_curve_is_drawn_to_scale():
    root = ElementTree.fromstring(draw_curves([[(0, 4.0), (10, 0.0)]]))
    [line] = [element for element in root if element.tag == "polyline"]
    (x0, y0), (x1, y1) = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    ticks = {element.text: float(element.get("y")) - 4 for element in root if element.get("class") == "tick end"}
    assert (y0, y1) == (ticks["4"], ticks["0"])
    assert (x0, x1) == (52.0, 544.0)


def test_values_that_are_not_finite_numbers_are_left_out():
    lines = [{"step": i, "loss": loss} for i, loss in enumerate((math.inf, 2.0, None, math.nan, 1))]
    assert collect([*lines, {"step": 9}], "loss") == [(1, 2.0), (4, 1)]


def test_a_recipe_shows_charts_and_cards_of_its_own(tmp_path):
    names = tuple(f"train/reward_{i}" for i in range(5))
    metrics = [{"step": step, "train/loss": 1.0} | {name: step + i for i, name in enumerate(names)} for step in (1, 2)]
    write_run(tmp_path, metrics, [])
    charts = (*CHARTS, Chart("Rewards <b>", names, low=0.0), Chart("Absent", ("eval/reward",)))
    page = write_report(tmp_path, charts=charts, cards=(Card("margin", names[4], "{:+.1f}"),)).read_text()
    assert "<h3>Rewards &lt;b&gt;</h3>" in page and "Loss per trained token" in page and "Absent" not in page
    assert "<b>+5.0 → +6.0</b><span>margin</span>" in page and "training loss" not in page
    assert all(f'<span class="key series{i % COLORS}">{name}</span>' in page for i, name in enumerate(names))
    assert all(f".series{i} {{ --color" in page for i in range(COLORS))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.13, 0.52, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (3, 3, [3]),
        (0, 600, [0, 200, 400, 600]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert make_ticks(low, high) == ticks


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_mean():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    thinned = thin(points)
    assert len(thinned) <= 400
    assert thinned[-1] == points[-1]
    assert all(abs(y - 0.5) < 0.05 for _, y in thinned[:-1])
