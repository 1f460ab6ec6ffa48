"""report.html: one self-contained page about a run, made from the files of its workdir. The layout is page.html.j2."""

import functools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from postrain.files import read_jsonl, write_whole
from postrain.report.charts import CHARTS, Chart, draw_curves

MAX_ANSWERS, MAX_CHARACTERS = 20, 300  # rows of the table of answers, and the characters of an answer


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
    row_html: str = "",
    consumed: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    cards: Sequence[Card] = CARDS,
    charts: Sequence[Chart] = CHARTS,
) -> pathlib.Path:
    """Writes ``workdir/report.html`` from config.json, metrics.jsonl and samples.jsonl; returns its path.

    Args:
      workdir: of a run, finished or not.
      row_html: a training row with its trained tokens coloured, as HTML.
      consumed: for each source, a line about the rows used of it.
      environment: name -> value, to list.
      cards, charts: what to show of the metrics, such as ``(*CHARTS, Chart("Margins", ("train/margins",)))``. Metrics
        that the run lacks are left out.
    """
    workdir = pathlib.Path(workdir)
    metrics, samples = _read_lines(workdir / "metrics.jsonl"), _read_lines(workdir / "samples.jsonl")
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    last = max((line["step"] for line in metrics), default=None)
    page = render_page(
        "postrain.report",
        "page.html.j2",
        title=f"{config['recipe'].upper()} of {pathlib.PurePath(config['model']['path']).name}",
        updates="no updates yet" if last is None else f"{last} update{'s' * (last != 1)}",
        cards=[(card.label, text) for card in cards if (text := _format_card(card, metrics))],
        charts=_draw_charts(charts, metrics),
        answers=_collect_answers(samples),
        row_html=row_html,
        consumed=consumed,
        config=json.dumps(config, indent=2),
        environment=environment or {},
    )
    write_whole(workdir / "report.html", page)
    return workdir / "report.html"


def render_page(package: str, name: str, **values: Any) -> str:
    """The HTML of a template in a package's folder; values are escaped."""
    return _load_templates(package).get_template(name).render(**values)


@functools.cache
def _load_templates(package: str) -> jinja2.Environment:
    loader = jinja2.PackageLoader(package, package_path="")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a file, [] where it does not exist."""
    return [line for _, line in read_jsonl(path, drop_torn=True)] if path.exists() else []


# Metrics


def collect(metrics: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of every line in which the metric is a finite number."""
    pairs = [(line["step"], line.get(name)) for line in metrics]
    return [(step, value) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]


def _format_card(card: Card, metrics: list[dict]) -> str:
    values = [value for _, value in collect(metrics, card.metric)]
    if not values:
        return ""
    shown = [statistics.median_high(values)] if card.median else [values[0], values[-1]]
    return " → ".join(card.form.format(value) for value in shown)


def _draw_charts(charts: Sequence[Chart], metrics: list[dict]) -> list[tuple[str, str, list[str]]]:
    """(title, SVG, names of its curves) of every chart whose metrics the run has."""
    shown = []
    for chart in charts:
        curves = {name: points for name in chart.metrics if (points := collect(metrics, name))}
        if curves:
            shown.append(
                (chart.title, draw_curves(list(curves.values()), low=chart.low, high=chart.high), list(curves))
            )
    return shown


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
        rows.append(
            {
                "prompt": sample["prompt"][start : len(sample["prompt"]) - end],
                "name": pathlib.PurePath(row).name + (f" turn {turn}" if turn > 1 else ""),
                "expected": sample["expected"],
                "answers": [_shorten_answer(by_prompt.get((step, row, turn))) for step in steps],
            }
        )
    return {"steps": steps, "rows": rows}


def _shorten_answer(sample: dict | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    found = sample["found"]
    right = found.strip() == sample["expected"].strip() and sample["finished"]
    return {"right": right, "text": found if len(found) <= MAX_CHARACTERS else found[:MAX_CHARACTERS] + " …"}


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
