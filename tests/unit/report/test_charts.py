"""Curves as SVG: what is drawn is what was logged."""

import itertools
import math
import re

import pytest

from torchtitan_flux.report.charts import (
    BOTTOM,
    DOTTED,
    LEFT,
    POINTS,
    RIGHT,
    SMOOTHING,
    TOP,
    Chart,
    Line,
    figure,
    hover_data,
    log_ticks,
    number,
    smoothed,
    thinned,
    tick_text,
    ticks,
    x_axis,
    y_axis,
)

NAN, INF = math.nan, math.inf


def paths(html: str, kind: str) -> list[list[tuple[float, float]]]:
    """Points of every drawn curve of a kind."""
    found = re.findall(rf'class="\w+ {kind}" d="([^"]*)"', html)
    pattern = r"[ML]([\d.]+) ([\d.]+)"
    return [[(float(a), float(b)) for a, b in re.findall(pattern, path)] for path in found]


def chart(y: tuple[float, ...], **more) -> Chart:
    return Chart("c", "Title", "unit", [Line("l", tuple(map(float, range(len(y)))), y)], **more)


def test_points_lie_where_the_values_are():
    y = (3.0, 1.0, 7.0, 2.0, 5.0)
    (drawn,) = paths(figure(chart(y)), "raw")
    for (px, py), x, value in zip(drawn, range(5), y, strict=True):
        assert px == pytest.approx(LEFT + (RIGHT - LEFT) * x / 4, abs=0.06)
        # 5 % of the range on either side
        assert py == pytest.approx(BOTTOM + (TOP - BOTTOM) * (value - 0.7) / 6.6, abs=0.06)


def test_a_logarithmic_axis_has_equal_ratios_at_equal_distances():
    html = figure(chart((1.0, 10.0, 100.0), logarithmic=True))
    linear, log = paths(html, "raw")
    assert linear[0][1] - linear[1][1] < 0.2 * (linear[1][1] - linear[2][1])
    assert log[0][1] - log[1][1] == pytest.approx(log[1][1] - log[2][1], abs=0.2)
    assert BOTTOM > log[0][1] > log[2][1] > TOP


def test_values_that_are_not_finite_break_the_line_and_are_marked():
    html = figure(chart((1.0, 2.0, NAN, 4.0, INF, 6.0)))
    (path,) = re.findall(r'class="c0 raw" d="([^"]*)"', html)
    assert path.count("M") == 3
    assert path.count("L") == 1
    assert len(re.findall('class="bad"', html)) == 2
    assert "nan" in html
    assert "NaN" not in html.replace("nan", "")


@pytest.mark.parametrize("y", [(NAN,), (NAN, INF), (0.0,), (0.0, 0.0), (-1.0, 0.0), (5.0, 5.0)])
@pytest.mark.parametrize("from_zero", [True, False])
def test_flat_empty_and_negative_curves_are_drawn(y, from_zero):
    html = figure(chart(y, from_zero=from_zero, logarithmic=True))
    assert not re.findall(r'd="[^"]*(?:nan|inf)', html)
    axis = y_axis([Line("l", (0.0,) * len(y), y)], from_zero, log=False)
    assert (axis is None) == (not any(map(math.isfinite, y)))
    positive = y_axis([Line("l", (0.0,) * len(y), y)], False, log=True)
    assert (positive is None) == (not any(math.isfinite(v) and v > 0 for v in y))


def test_smoothing_is_the_mean_around_each_point():
    y = [math.sin(i * i) for i in range(500)]
    half = round(500 * SMOOTHING / 2)
    assert half == 10
    means = smoothed(y)
    assert (means[0], means[-1]) == (y[0], y[-1])
    assert means[1] == pytest.approx(sum(y[:3]) / 3)
    for i in (10, 250, 489):
        assert means[i] == pytest.approx(sum(y[i - 10 : i + 11]) / 21)
    line = [3.0 - 0.01 * i for i in range(500)]
    assert smoothed(line) == pytest.approx(line), "a straight line stays where it is"


def test_smoothing_leaves_out_what_is_not_finite():
    assert smoothed([2.0, 4.0, INF, 8.0, 2.0])[1:4] == pytest.approx([3.0, 4.0, 5.0])
    assert math.isnan(smoothed([NAN, 1.0])[0])


def test_only_long_and_noisy_lines_are_smoothed():
    long, short = tuple(map(float, range(DOTTED + 1))), tuple(map(float, range(DOTTED)))
    assert paths(figure(chart(long)), "mean")
    for one in (chart(short), chart(long, noisy=False)):
        html = figure(one)
        assert not paths(html, "mean")
        assert "noisy" not in html
        assert paths(html, "raw")


def test_thinning_keeps_spikes_ends_and_what_is_not_finite():
    y = [math.sin(i / 500) for i in range(20_000)]
    y[777], y[12_345], y[4_000] = 50.0, -50.0, NAN
    kept = thinned(y)
    assert {0, 777, 12_345, 4_000, 19_999} <= set(kept)
    assert kept == sorted(set(kept))
    assert len(kept) <= POINTS + 3
    assert thinned(y[:POINTS]) == list(range(POINTS))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.13, 0.19), (1.0, 240.0), (0.0, 3e6), (-2.0, 5.0), (1e-6, 4e-5), (7.0, 8.0)],
)
def test_ticks_are_round_within_the_range_and_not_many(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len({tick_text(tick) for tick in found}) == len(found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    digits = f"{gaps[0]:.3e}"[:5]
    assert digits in ("1.000", "2.000", "2.500", "5.000")


@pytest.mark.parametrize(
    ("low", "high"), [(1.1, 1.3), (0.3, 4.0), (0.01, 90.0), (1e-8, 1e7), (2.0, 3.0)]
)
def test_ticks_of_a_logarithmic_axis(low, high):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in found)


def test_numbers_for_reading():
    values = (0.0, 1.5, 0.123456, 123.456, 1234.5, 1234567.0, 2e-5, -3.0, NAN, INF)
    assert [number(value) for value in values] == [
        "0", "1.5", "0.1235", "123.5", "1,234", "1,234,567", "2e-05", "-3", "nan", "inf",
    ]  # fmt: skip
    texts = [tick_text(value) for value in (0.0, 0.25, 5000.0, 20_000.0, 1.5e6, 2e9)]
    assert texts == ["0", "0.25", "5,000", "20k", "1.5M", "2G"]


def test_what_hovering_shows_is_what_was_logged():
    lines = [Line("a", (1.0, 2.0, 3.0), (0.5, NAN, 2.0)), Line("b", (2.0,), (7.0,), "c1")]
    one = Chart("c", "Title", "unit", lines)
    data = hover_data(one)
    assert data["lines"] == [
        {"x": [1, 2, 3], "at": ["1", "2", "3"], "y": ["0.5", "nan", "2"]},
        {"x": [2], "at": ["2"], "y": ["7"]},
    ]
    axis = x_axis(lines)
    assert axis(data["low"]) == data["left"]
    assert axis(data["high"]) == data["right"]
    assert "<b>7</b><small> at 2</small>" in figure(one), "not at the step that the rest is from"


def test_labels_are_escaped():
    html = figure(
        Chart("c", "<b>", '"&', [Line("<i>x", (1.0,), (1.0,)), Line("b", (1.0,), (1.0,))])
    )
    assert "<b>" not in html.replace("<b>1</b>", "")
    assert "<i>x" not in html
