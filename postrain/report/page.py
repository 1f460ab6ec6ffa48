"""report.html: a run on one self-contained page, made from what the workdir holds."""

import html
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from postrain.files import read_jsonl, write_whole
from postrain.report.charts import draw_curves

NUM_SAMPLES = 20
CHARTS = (  # title, metrics, ends of the y axis
    ("Loss per trained token", ("train/loss", "eval/loss"), (None, None)),
    ("Held-out answers, greedy", ("eval/exact_match", "eval/valid_json"), (0.0, 1.0)),
    ("Useful tokens per second", ("perf/tokens_per_second",), (0.0, None)),
    ("Gradient norm before clipping", ("train/grad_norm",), (0.0, None)),
)
STYLE = """
:root { --ink: #1c1e21; --soft: #667; --line: #dde1e6; --page: #fff; --panel: #f6f7f9;
        --one: #2563c9; --two: #d9730d; --good: #1a7f46; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #33383f; --page: #16181b; --panel: #1f2226;
          --one: #6ea8fe; --two: #f2a65a; --good: #5cc98b; --bad: #f28b82; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1180px; margin: 32px auto; padding: 0 24px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 16px; margin: 36px 0 10px; }
.sub { color: var(--soft); margin: 4px 0 20px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; }
.card { background: var(--panel); border-radius: 8px; padding: 12px 16px; min-width: 130px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 8px 28px; }
.charts h3 { font-size: 14px; margin: 12px 0 0; font-weight: 600; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--soft); }
.chart { width: 100%; height: auto; } .grid { stroke: var(--line); }
.tick { font-size: 11px; fill: var(--soft); text-anchor: middle; } .tick.end { text-anchor: end; }
.line { fill: none; stroke-width: 1.8; } .line.series0 { stroke: var(--one); } .line.series1 { stroke: var(--two); }
.dot.series0 { fill: var(--one); } .dot.series1 { fill: var(--two); }
.key { margin-right: 16px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0;
               background: var(--one); }
.key.series1::before { background: var(--two); }
table { border-collapse: collapse; width: 100%; font-size: 13px; table-layout: fixed; }
th { text-align: left; color: var(--soft); font-weight: 500; }
td, th { border-bottom: 1px solid var(--line); padding: 6px 10px 6px 0; vertical-align: top; }
td, pre, .tokens { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
td.prompt { font-family: inherit; white-space: pre-wrap; } .row { color: var(--soft); font-size: 12px; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre span { color: #1c1e21; }
pre, .tokens { background: var(--panel); padding: 14px 16px; border-radius: 8px; font-size: 13px;
               white-space: pre-wrap; }
summary { cursor: pointer; color: var(--soft); }
"""


def write_report(
    workdir: str | os.PathLike,
    *,
    conversation_html: str = "",
    drawn: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes ``workdir/report.html`` from config.json, metrics.jsonl and samples.jsonl; returns its path.

    Args:
        workdir: of a run, finished or not.
        conversation_html: one training row with its trained tokens coloured.
        drawn: a line for each source, of what was drawn of it.
        environment: what to list, name -> value.
    """
    workdir = pathlib.Path(workdir)
    metrics, samples = _read(workdir / "metrics.jsonl"), _read(workdir / "samples.jsonl")
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    title = f"{config['recipe'].upper()} of {pathlib.PurePath(config['model']['path']).name}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="sub">{html.escape(_subtitle(metrics))}</p>',
        f'<div class="cards">{"".join(_cards(metrics))}</div>',
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(metrics))}</div>',
        _samples_section(samples),
        f"<h2>A training row: the coloured tokens are trained</h2>{conversation_html}" if conversation_html else "",
        f"<h2>Drawn of each source</h2><pre>{html.escape(chr(10).join(drawn))}</pre>" if drawn else "",
        "<h2>Config</h2><details><summary>every key</summary>",
        f"<pre>{html.escape(json.dumps(config, indent=2))}</pre></details>",
        "<h2>Environment</h2><table>" + "".join(map(_environment_row, (environment or {}).items())) + "</table>",
    ]
    page = "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    page += f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    path = workdir / "report.html"
    write_whole(path, page)
    return path


def _read(path: pathlib.Path) -> list[dict]:
    """The lines of a file, [] where there is none."""
    return [line for _, line in read_jsonl(path, drop_torn=True)] if path.exists() else []


def collect(metrics: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has the metric."""
    return [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), (int, float))]


def _subtitle(metrics: list[dict]) -> str:
    steps = [line["step"] for line in metrics]
    return f"{max(steps)} update{'s' * (max(steps) != 1)}" if steps else "no updates yet"


def _cards(metrics: list[dict]) -> list[str]:
    cards = []
    for name, label, form in (
        ("eval/exact_match", "exact match", "{:.0%}"),
        ("eval/valid_json", "valid JSON", "{:.0%}"),
        ("eval/loss", "held-out loss", "{:.3f}"),
        ("train/loss", "training loss", "{:.3f}"),
    ):
        values = [value for _, value in collect(metrics, name)]
        if values:
            cards.append(_card(label, f"{form.format(values[0])} → {form.format(values[-1])}"))
    speeds = sorted(value for _, value in collect(metrics, "perf/tokens_per_second"))
    if speeds:
        cards.append(_card("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    mfu = sorted(value for _, value in collect(metrics, "perf/mfu"))
    if mfu:
        cards.append(_card("MFU, median", f"{mfu[len(mfu) // 2]:.0%}"))
    return cards


def _card(label: str, value: str) -> str:
    return f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def _charts(metrics: list[dict]) -> list[str]:
    drawn = []
    for title, names, (low, high) in CHARTS:
        chart = draw_curves({name: collect(metrics, name) for name in names}, low=low, high=high)
        if chart:
            drawn.append(f"<section><h3>{html.escape(title)}</h3>{chart}</section>")
    return drawn


def _samples_section(samples: list[dict]) -> str:
    """A table of questions with the first and the latest answer to each."""
    if not samples:
        return ""
    first, last = min(sample["step"] for sample in samples), max(sample["step"] for sample in samples)
    # A row may be several questions, one for each turn.
    before = {(sample["row"], sample.get("turn", 1)): sample for sample in samples if sample["step"] == first}
    after = [sample for sample in samples if sample["step"] == last][:NUM_SAMPLES]
    heads = ["Prompt", "Expected", *(f"Step {step}" for step in sorted({first, last}))]
    rows, start, end = [], *find_frame([sample["prompt"] for sample in after])
    for sample in after:
        turn = f" turn {sample['turn']}" if sample.get("turn", 1) > 1 else ""
        where = f'<div class="row">{html.escape(pathlib.PurePath(sample["row"]).name + turn)}</div>'
        prompt = sample["prompt"][start : len(sample["prompt"]) - end]
        cells = [f'<td class="prompt">{html.escape(prompt)}{where}</td>']
        cells += [f"<td>{html.escape(sample['expected'])}</td>"]
        answers = [before.get((sample["row"], sample.get("turn", 1))), sample] if first != last else [sample]
        cells += [_answer_cell(answer) for answer in answers]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<h2>Held-out answers</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def find_frame(prompts: list[str]) -> tuple[int, int]:
    """Lengths of what all prompts begin and end with, to be left out: (0, 0) of a single one.

    Cut at the end of a line or token in angle brackets, so that no word that rows happen to share is lost.
    """
    if len(set(prompts)) < 2:
        return 0, 0
    head = os.path.commonprefix(prompts)
    start = max(head.rfind("\n"), head.rfind(">")) + 1
    tail = os.path.commonprefix([prompt[start:][::-1] for prompt in prompts])[::-1]
    places = [place for place in (tail.find("\n"), tail.find("<")) if place >= 0]
    return start, len(tail) - min(places) if places else 0


def _answer_cell(sample: dict | None) -> str:
    if sample is None:
        return "<td></td>"
    right = sample["found"].strip() == sample["expected"].strip() and sample["finished"]
    found = sample["found"] if len(sample["found"]) <= 300 else sample["found"][:300] + " …"
    return f'<td class="{"good" if right else "bad"}">{"✓" if right else "✗"} {html.escape(found)}</td>'


def _environment_row(item: tuple[str, str]) -> str:
    return f"<tr><th>{html.escape(item[0])}</th><td>{html.escape(str(item[1]))}</td></tr>"
