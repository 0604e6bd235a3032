"""Curves -> SVG that needs no script: lines, axes, a legend that holds the values.

Colours are classes of style.py. What hovering shows goes beside the picture as plain data, with
every number as text, so that script.py formats nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

from torchtitan_flux.report.grids import spread

WIDTH, HEIGHT = 360, 208
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 10, 178
"""Edges of the plot in the picture."""

POINTS = 800
"""A line is drawn with about so many points at most."""
DOTTED = 32
"""Lines of up to so many points show them, and are never smoothed."""
TABLE_ROWS = 50
SMOOTHING = 0.04
"""Share of a line's points that a mean is taken over."""


@dataclass(frozen=True)
class Line:
    """One curve: `x` ascending; `y` may hold values that are not finite."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: str = "c0"


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: HTML id.
        title: what is drawn.
        unit: of the vertical axis, with what else must be said.
        lines: at least one, each with a point.
        x_label: of the horizontal axis.
        from_zero: whether the vertical axis begins at 0.
        logarithmic: whether a logarithmic axis is offered.
        noisy: whether smoothing is offered.
    """

    name: str
    title: str
    unit: str
    lines: Sequence[Line]
    x_label: str = "step"
    from_zero: bool = False
    logarithmic: bool = False
    noisy: bool = True


def number(value: float) -> str:
    """A value for reading: four digits, or all before the point."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def smoothed(y: Sequence[float]) -> list[float]:
    """Mean of the values around each one, as many before as after, so that nothing lags.

    Values that are not finite are left out of it; nan where no other is near.
    """
    finite = [math.isfinite(value) for value in y]
    sums = list(
        accumulate((v if ok else 0.0 for v, ok in zip(y, finite, strict=True)), initial=0.0)
    )
    counts = list(accumulate(finite, initial=0))
    half = max(2, round(SMOOTHING * len(y) / 2))
    out = []
    for i in range(len(y)):
        reach = min(half, i, len(y) - 1 - i)
        begin, end = i - reach, i + reach + 1
        count = counts[end] - counts[begin]
        out.append((sums[end] - sums[begin]) / count if count else math.nan)
    return out


def thinned(y: Sequence[float], points: int = POINTS) -> list[int]:
    """Indices to draw: all, or of each stretch the lowest and the highest, so that spikes stay."""
    if len(y) <= points:
        return list(range(len(y)))
    keep = {0, len(y) - 1}
    size = 2 * len(y) / points
    for bucket in range(points // 2):
        stretch = range(int(bucket * size), min(int((bucket + 1) * size), len(y)))
        finite = [i for i in stretch if math.isfinite(y[i])]
        if finite:
            keep |= {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}
    return sorted(keep | {i for i, value in enumerate(y) if not math.isfinite(value)})


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [i * step for i in range(first, math.floor(high / step + 1e-6) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or these powers alone; where few fit, round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [m * 10.0**p for p in powers for m in factors if low <= m * 10.0**p <= high]
        if 3 <= len(found) <= 7:
            return found
    return found[:: -(-len(found) // 6)] if len(found) > 7 else ticks(low, high)


def tick_text(value: float) -> str:
    """A round number, short."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:,.6g}"


@dataclass(frozen=True)
class Axis:
    """Values to places in the picture."""

    low: float
    high: float
    begin: int
    end: int
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        value = math.log(value) if self.log else value
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    @property
    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def x_axis(lines: Sequence[Line]) -> Axis:
    """The horizontal axis of a chart."""
    low, high = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    if low == high:
        low, high = low - 1, high + 1
    return Axis(low, high, LEFT, RIGHT)


def y_axis(lines: Sequence[Line], from_zero: bool, log: bool) -> Axis | None:
    """The vertical axis; None where no value can be shown on it."""
    values = [v for line in lines for v in line.y if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return None
    low, high = min(values), max(values)
    if log:
        margin = max(high / low, 1.02) ** 0.05
        return Axis(low / margin, high * margin, BOTTOM, TOP, log=True)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return Axis(low if from_zero else low - margin, high + margin, BOTTOM, TOP)


def figure(chart: Chart) -> str:
    """The chart as an HTML figure, with a table of its values."""
    end, swatches = max(line.x[-1] for line in chart.lines), len(chart.lines) > 1
    legend = "".join(
        f"<li>{f'<i class={line.colour}></i>' if swatches else ''}"
        f"{f'<span>{escape(line.label)}</span> ' if swatches else ''}"
        f"<b>{number(line.y[-1])}</b><small>{_elsewhere(line.x[-1], end)}</small></li>"
        for line in chart.lines
    )
    return (
        f'<figure class="card chart" id="{chart.name}">'
        f"<figcaption><h3>{escape(chart.title)}</h3><small>{escape(chart.unit)}</small>"
        f'<div class="read"><span class="at">{escape(chart.x_label)} {number(end)}</span>'
        f'<ul class="legend">{legend}</ul></div></figcaption>'
        f"{_svg(chart)}{_table(chart)}</figure>"
    )


def _elsewhere(x: float, shown: float) -> str:
    """Where a value is from, unless from where all others are."""
    return "" if x == shown else f" at {number(x)}"


def hover_data(chart: Chart) -> dict[str, Any]:
    """What script.py needs to read out the chart; every number that it shows is text here."""
    axis = x_axis(chart.lines)
    return {
        "low": axis.low,
        "high": axis.high,
        "left": LEFT,
        "right": RIGHT,
        "width": WIDTH,
        "label": chart.x_label,
        "lines": [
            {
                "x": [line.x[i] for i in kept],
                "at": [number(line.x[i]) for i in kept],
                "y": [number(line.y[i]) for i in kept],
            }
            for line in chart.lines
            for kept in [thinned(line.y)]
        ],
    }


def _svg(chart: Chart) -> str:
    x = x_axis(chart.lines)
    linear = y_axis(chart.lines, chart.from_zero, log=False)
    log = y_axis(chart.lines, False, log=True) if chart.logarithmic else None
    plots = ""
    if linear:
        plots += f'<g class="{"lin" if log else "both"}">{_plot(chart, x, linear)}</g>'
    if log:
        plots += f'<g class="log">{_plot(chart, x, log)}</g>'
    marks = "".join(
        f'<text class="bad" x="{x(line.x[i]):.1f}" y="{TOP + 4}">×</text>'
        for line in chart.lines
        for i, value in enumerate(line.y)
        if not math.isfinite(value)
    )
    x_ticks = "".join(
        f'<text x="{x(tick):.1f}" y="{BOTTOM + 14}" text-anchor="middle">{tick_text(tick)}</text>'
        for tick in x.ticks
        if chart.x_label != "step" or tick == round(tick)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(_summary(chart))}">{plots}'
        f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>{x_ticks}'
        f'<text class="name" x="{RIGHT}" y="{HEIGHT - 3}" text-anchor="end">'
        f"{escape(chart.x_label)}</text>"
        f'{marks}<path class="cursor" d="M0 {TOP}V{BOTTOM}"/></svg>'
    )


def _plot(chart: Chart, x: Axis, y: Axis) -> str:
    grid = "".join(
        f'<path class="rule" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>'
        for tick in y.ticks
    )
    drawn = ""
    for line in chart.lines:
        kept = thinned(line.y)
        smooth = chart.noisy and len(line.x) > DOTTED
        drawn += _path(line, line.y, kept, x, y, "raw noisy" if smooth else "raw")
        if smooth:
            mean = smoothed(line.y)
            drawn += _path(line, mean, thinned(mean), x, y, "mean")
        if len(line.x) <= DOTTED:
            drawn += "".join(
                f'<circle class="{line.colour} dot" cx="{x(line.x[i]):.1f}" '
                f'cy="{y(line.y[i]):.1f}" r="1.8"/>'
                for i in kept
                if _drawable(line.y[i], y)
            )
    return grid + drawn


def _path(
    line: Line, values: Sequence[float], kept: Sequence[int], x: Axis, y: Axis, kind: str
) -> str:
    steps, pen = [], "M"
    for i in kept:
        if _drawable(values[i], y):
            steps.append(f"{pen}{x(line.x[i]):.1f} {y(values[i]):.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{line.colour} {kind}" d="{"".join(steps)}"/>'


def _drawable(value: float, y: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not y.log)


def _summary(chart: Chart) -> str:
    parts = [
        f"{line.label}: {number(line.y[0])} at {chart.x_label} {number(line.x[0])}, "
        f"{number(line.y[-1])} at {chart.x_label} {number(line.x[-1])}"
        for line in chart.lines
    ]
    return f"{chart.title}. {'; '.join(parts)}."


def _table(chart: Chart) -> str:
    """Values of all lines, a row for each x; evenly spaced rows where there are many."""
    columns = [dict(zip(line.x, line.y, strict=True)) for line in chart.lines]
    xs = sorted({value for line in chart.lines for value in line.x})
    rows = "".join(
        f"<tr><th scope=row>{number(value)}</th>"
        + "".join(f"<td>{number(c[value]) if value in c else ''}</td>" for c in columns)
        + "</tr>"
        for value in spread(xs, TABLE_ROWS)
    )
    heads = "".join(f"<th scope=col>{escape(line.label)}</th>" for line in chart.lines)
    some = f" ({TABLE_ROWS} of {len(xs):,} rows)" if len(xs) > TABLE_ROWS else ""
    return (
        f'<details><summary>Values{some}</summary><div class="scroll"><table class="numbers">'
        f"<thead><tr><th scope=col>{escape(chart.x_label)}</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )
