"""report.html: one self-contained page about a run, made from the files of its workdir. The layout is page.html.j2.

Charts are inline SVG, so that the page needs no script, no font and no other file.
"""

import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from postrain.files import read_jsonl, write_whole

MAX_ANSWERS, MAX_CHARACTERS = 20, 300  # rows of the table of answers, and the characters of an answer
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 30
COLORS = 4  # CSS classes series0 to series3
Points = Sequence[tuple[float, float]]


class Chart(NamedTuple):
    """Metrics over steps, as curves of one chart; ``low`` and ``high`` are ends of the y axis where they are known."""

    title: str
    metrics: tuple[str, ...]
    low: float | None = None
    high: float | None = None


class Table(NamedTuple):
    """Text in rows under a title; as many cells in each as the header has."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


# The charts of every run. A recipe whose loss has more metrics shows ``(*CHARTS, Chart(...))``.
CHARTS = (
    Chart("Loss per trained token", ("train/loss", "eval/loss")),
    Chart("Held-out answers, greedy", ("eval/exact_match", "eval/valid_json"), 0.0, 1.0),
    Chart("Useful tokens per second", ("perf/tokens_per_second",), 0.0),
    Chart("Gradient norm before clipping", ("train/grad_norm",), 0.0),
)


class Card(NamedTuple):
    """A figure at the top of the page: the first and last value of a metric, or its median."""

    label: str
    metric: str  # a name in metrics.jsonl
    form: str  # format of a value, such as "{:.0%}"
    median: bool = False


CARDS = (
    Card("exact match", "eval/exact_match", "{:.0%}"),
    Card("valid JSON", "eval/valid_json", "{:.0%}"),
    Card("held-out loss", "eval/loss", "{:.3f}"),
    Card("training loss", "train/loss", "{:.3f}"),
    Card("tokens/s, median", "perf/tokens_per_second", "{:,.0f}", median=True),
    Card("MFU, median", "perf/mfu", "{:.0%}", median=True),
)


def write_report(
    workdir: str | os.PathLike,
    *,
    row_title: str = "",
    row_html: str = "",
    consumed: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    cards: Sequence[Card] = CARDS,
    charts: Sequence[Chart] = CHARTS,
    tables: Sequence[Table] = (),
) -> pathlib.Path:
    """Writes ``workdir/report.html`` from config.json, metrics.jsonl and samples.jsonl; returns its path.

    Args:
      workdir: of a run, finished or not.
      row_title, row_html: a training row with its trained tokens coloured, as HTML, and what it shows.
      consumed: for each source, a line about the rows used of it.
      environment: name -> value, to list.
      cards, charts: what to show of the metrics, such as ``(*CHARTS, Chart("Margins", ("train/margins",)))``. Metrics
        that the run lacks are left out.
      tables: to show below the charts.
    """
    workdir = pathlib.Path(workdir)
    metrics, samples = _read_lines(workdir / "metrics.jsonl"), _read_lines(workdir / "samples.jsonl")
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    shown_cards = []
    for card in cards:
        if values := [value for _, value in collect(metrics, card.metric)]:
            shown = [statistics.median_high(values)] if card.median else [values[0], values[-1]]
            shown_cards.append((card.label, " → ".join(card.form.format(value) for value in shown)))
    shown_charts = []  # title, SVG, names of the curves
    for chart in charts:
        curves = {name: points for name in chart.metrics if (points := collect(metrics, name))}
        if curves:
            drawing = draw_curves(list(curves.values()), low=chart.low, high=chart.high)
            shown_charts.append((chart.title, drawing, list(curves)))
    last = max((line["step"] for line in metrics), default=None)
    page = render_page(
        "postrain.report",
        "page.html.j2",
        title=f"{config['recipe'].upper()} of {pathlib.PurePath(config['model']['path']).name}",
        updates="no updates yet" if last is None else f"{last} update{'s' * (last != 1)}",
        cards=shown_cards,
        charts=shown_charts,
        tables=tables,
        answers=_collect_answers(samples),
        row_title=row_title,
        row_html=row_html,
        consumed=consumed,
        config=json.dumps(config, indent=2),
        environment=environment or {},
    )
    write_whole(workdir / "report.html", page)
    return workdir / "report.html"


def render_page(package: str, name: str, **values: Any) -> str:
    """The HTML of a template in a package's folder; values are escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(package, package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(name).render(**values)


def _read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a file, [] where it does not exist."""
    return [line for _, line in read_jsonl(path, drop_torn=True)] if path.exists() else []


def collect(metrics: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of every line in which the metric is a finite number."""
    pairs = [(line["step"], line.get(name)) for line in metrics]
    return [(step, value) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]


# Charts


def draw_curves(curves: Sequence[Points], *, low: float | None = None, high: float | None = None) -> Markup:
    """Curves over one x axis (steps) as an ``<svg>`` element, coloured by the CSS classes ``series0``, ``series1``, ...

    ``low`` and ``high`` are ends of the y axis where they are known, such as 0 and 1 of a share. Each curve has a
    point at least, all finite. A long one is a line; a short one has a mark at each point, with its value as a tooltip.
    """
    xs = [x for points in curves for x, _ in points]
    ys = [y for points in curves for _, y in points]
    x_ticks = make_ticks(min(xs), max(xs))
    y_ticks = make_ticks(min(ys) if low is None else low, max(ys) if high is None else high)
    x_ends, y_ends = (min(xs), max(xs)), (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * _share(x, *x_ends),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, *y_ends),
        )

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    # The axes: a line and a label for each tick of y, a label for each of x.
    for y in y_ticks:
        top = place(x_ends[0], y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{top + 4:.1f}">{y:g}</text>')
    for x in x_ticks:
        if x_ends[0] <= x <= x_ends[1]:
            parts.append(f'<text class="tick" x="{place(x, y_ticks[0])[0]:.1f}" y="{HEIGHT - 8}">{x:g}</text>')
    # The curves.
    for i, points in enumerate(curves):
        color = f"series{i % COLORS}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thin(points)))
        parts.append(f'<polyline class="line {color}" points="{path}"/>')
        if len(points) <= 40:
            for x, y in points:
                at = place(x, y)
                tip = f"<title>step {x:g}: {y:.4g}</title>"
                parts.append(f'<circle class="dot {color}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5">{tip}</circle>')
    return Markup("".join([*parts, "</svg>"]))


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def make_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` or just below to ``high`` or just above."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most ``most`` points: neighbours are averaged, the last one stays."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    middle = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*middle[:-1], points[-1]]


# Generated answers


def _collect_answers(samples: list[dict]) -> dict[str, Any]:
    """Columns (steps) and rows of a table: prompts with the first and the latest answer to each."""
    if not samples:
        return {"steps": [], "rows": []}
    steps = sorted({min(sample["step"] for sample in samples), max(sample["step"] for sample in samples)})
    # A row may have several prompts, one for each turn.
    by_prompt = {(sample["step"], sample["row"], sample.get("turn", 1)): sample for sample in samples}
    latest = [key for key in by_prompt if key[0] == steps[-1]][:MAX_ANSWERS]
    start, end = find_frame([by_prompt[key]["prompt"] for key in latest])
    rows = []
    for key in latest:
        sample, (_, row, turn) = by_prompt[key], key
        answers: list[dict | None] = []
        for step in steps:
            answer = by_prompt.get((step, row, turn))
            if answer is None:
                answers.append(None)
                continue
            found = answer["found"]
            right = found.strip() == answer["expected"].strip() and answer["finished"]
            text = found if len(found) <= MAX_CHARACTERS else found[:MAX_CHARACTERS] + " …"
            answers.append({"right": right, "text": text})
        rows.append(
            {
                "prompt": sample["prompt"][start : len(sample["prompt"]) - end],
                "name": pathlib.PurePath(row).name + (f" turn {turn}" if turn > 1 else ""),
                "expected": sample["expected"],
                "answers": answers,
            }
        )
    return {"steps": steps, "rows": rows}


def find_frame(prompts: list[str]) -> tuple[int, int]:
    """Lengths of the beginning and the end that all prompts share; (0, 0) of a single prompt.

    Cut at the end of a line or token in angle brackets, so that no word that rows happen to share is lost.
    """
    if len(set(prompts)) < 2:
        return 0, 0
    head = os.path.commonprefix(prompts)
    start = max(head.rfind("\n"), head.rfind(">")) + 1
    tail = os.path.commonprefix([prompt[start:][::-1] for prompt in prompts])[::-1]
    places = [place for place in (tail.find("\n"), tail.find("<")) if place >= 0]
    return start, len(tail) - min(places) if places else 0
