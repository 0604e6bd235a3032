"""Which curves a run's page shows, and under which words."""

import math

from torchtitan_flux.report.charts import Chart, Line
from torchtitan_flux.report.events import Series
from torchtitan_flux.report.grids import spread
from torchtitan_flux.report.read import LOSS, VALIDATION, Run

MAX_LOSS = "loss_metrics/global_max_loss"

# tag, title, unit, axis from zero, logarithmic axis offered
SINGLE = (
    ("grad_norm", "Gradient norm", "before clipping", False, True),
    ("lr", "Learning rate", "of the step", True, False),
    ("throughput/images_per_second", "Images/s", "all devices", True, False),
    ("throughput/tokens_per_second", "Tokens/s", "all devices", True, False),
    ("throughput/tflops_per_device", "TFLOP/s", "of each device", True, False),
    ("mfu(%)", "MFU", "% of the device's peak TFLOP/s", True, False),
    (
        "time_metrics/seconds_per_step",
        "Step time",
        "s, training alone",
        True,
        False,
    ),
    ("time_metrics/data_wait(%)", "Waiting for data", "% of the time", True, False),
    ("memory/max_reserved(GiB)", "Memory", "GiB, peak of rank 0", True, False),
)


def loss_charts(run: Run) -> list[Chart]:
    """Loss over steps, loss by time over steps, and its profile over time."""
    charts = []
    lines = [
        Line(label, *_points(run.scalars[tag]), colour)
        for tag, label, colour in ((LOSS, "training", "c0"), (VALIDATION, "validation", "c1"))
        if tag in run.scalars
    ]
    highest = run.scalars.get(MAX_LOSS)
    if highest and LOSS in run.scalars and highest.values != run.scalars[LOSS].values:
        lines.insert(1, Line("training, highest of a rank", *_points(highest), "c2"))
    if lines:
        unit = "mean squared velocity error"
        charts.append(Chart("loss", "Loss", unit, lines, logarithmic=True))
    by_time = run.by_time
    if by_time:
        lines = [
            Line(f"t {t:.2f}", *_points(series), f"s{_shade(i, len(by_time))}")
            for i, (t, series) in enumerate(by_time.items())
        ]
        unit = "validation; t = 0 is data, t = 1 is noise"
        charts.append(Chart("by-time", "Loss by time", unit, lines, logarithmic=True))
        charts += profile(by_time)
    return charts


def profile(by_time: dict[float, Series]) -> list[Chart]:
    """Validation loss over t, at the first, some and the last step that measured every time."""
    steps = set.intersection(*(set(series.steps) for series in by_time.values()))
    values = {t: dict(zip(s.steps, s.values, strict=True)) for t, s in by_time.items()}
    chosen = spread(sorted(steps), 4)
    if len(by_time) < 2 or not chosen:
        return []
    lines = [
        Line(
            f"step {step:,}",
            tuple(by_time),
            tuple(values[t][step] for t in by_time),
            f"a{3 - (len(chosen) - 1 - i)}",
        )
        for i, step in enumerate(chosen)
    ]
    unit = "validation; t = 0 is data, t = 1 is noise"
    return [
        Chart("profile", "Profile over t", unit, lines, x_label="t", logarithmic=True, noisy=False)
    ]


def other_charts(run: Run) -> tuple[list[Chart], list[str]]:
    """Everything else that was logged, and the titles of what was not."""
    charts, absent = [], []
    for tag, title, unit, from_zero, log in SINGLE:
        if tag in run.scalars:
            line = Line(title, *_points(run.scalars[tag]))
            name = "".join(c if c.isalnum() else "-" for c in tag).strip("-")
            charts.append(Chart(name, title, unit, [line], "step", from_zero, log, tag != "lr"))
        else:
            absent.append(title + " (the device's peak is not known)" * (tag == "mfu(%)"))
    return charts, absent


def not_finite(run: Run) -> list[int]:
    """Steps whose loss or gradient norm was not finite."""
    return sorted(
        {
            step
            for tag in (LOSS, "grad_norm")
            if (series := run.scalars.get(tag))
            for step, value in zip(series.steps, series.values, strict=True)
            if not math.isfinite(value)
        }
    )


def _points(series: Series) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(map(float, series.steps)), series.values


def _shade(index: int, count: int) -> int:
    """One of eight colours in their order."""
    return round(index * 7 / max(count - 1, 1))
