"""Line charts as inline SVG, for report.html: no script, no font, no other file."""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 30
Points = Sequence[tuple[float, float]]


def draw_curves(series: dict[str, Points], *, low: float | None = None, high: float | None = None) -> str:
    """One chart of named series over one x axis (steps). Colours are the CSS classes ``series0``, ``series1``, ...

    ``low``, ``high``: ends of the y axis where they are known, e.g. 0 and 1 of a share. A long series is drawn as
    a line, a short one with a mark at each point whose value shows when pointed at. Points that are not finite are
    left out.
    """
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks = make_ticks(min(xs), max(xs))
    y_ticks = make_ticks(min(ys) if low is None else low, max(ys) if high is None else high)
    x_ends, y_ends = (min(xs), max(xs)), (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * _share(x, *x_ends),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, *y_ends),
        )

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', *_axes(x_ticks, y_ticks, x_ends, place)]
    for i, points in enumerate(series.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thin(points)))
        parts.append(f'<polyline class="line series{i}" points="{path}"/>')
        if len(points) <= 40:
            for x, y in points:
                at = place(x, y)
                tip = f"<title>step {x:g}: {y:.4g}</title>"
                parts.append(f'<circle class="dot series{i}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5">{tip}</circle>')
    parts.append("</svg>")
    names = (f'<span class="key series{i}">{html.escape(name)}</span>' for i, name in enumerate(series))
    return f"<figure>{''.join(parts)}<figcaption>{''.join(names)}</figcaption></figure>"


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
