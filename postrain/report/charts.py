"""Line charts of metrics as inline SVG: the page needs no script, no font and no other file."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

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


# The charts of every run. A recipe whose loss has more metrics shows ``(*CHARTS, Chart(...))``.
CHARTS = (
    Chart("Loss per trained token", ("train/loss", "eval/loss")),
    Chart("Held-out answers, greedy", ("eval/exact_match", "eval/valid_json"), 0.0, 1.0),
    Chart("Useful tokens per second", ("perf/tokens_per_second",), 0.0),
    Chart("Gradient norm before clipping", ("train/grad_norm",), 0.0),
)


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

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', *_axes(x_ticks, y_ticks, x_ends, place)]
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


def _axes(x_ticks, y_ticks, x_ends, place) -> list[str]:
    parts = []
    for y in y_ticks:
        top = place(x_ends[0], y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{top + 4:.1f}">{y:g}</text>')
    for x in x_ticks:
        if x_ends[0] <= x <= x_ends[1]:
            parts.append(f'<text class="tick" x="{place(x, y_ticks[0])[0]:.1f}" y="{HEIGHT - 8}">{x:g}</text>')
    return parts


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
