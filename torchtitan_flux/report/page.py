"""A run as one HTML page that needs nothing else: no network, no other file."""

import math
import re
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import resources
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from torchtitan_flux import __version__
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.report.run import Run, Series

LOSS = "loss_metrics/global_avg_loss"
VALIDATION = "validation_metrics/loss"
AVERAGE = re.compile(r"validation_metrics/(ema.*)/loss")
BY_TIME = re.compile(r"validation_metrics/loss_t=(\d+(?:\.\d+)?)")
OTHERS = {
    "grad_norm": "Gradient norm, before clipping",
    "lr": "Learning rate",
    "throughput/images_per_second": "Images/s, all devices",
    "throughput/tokens_per_second": "Tokens/s, all devices",
    "throughput/tflops_per_device": "TFLOP/s of each device",
    "mfu(%)": "MFU, % of the device's peak",
    "time_metrics/seconds_per_step": "Step time, s",
    "time_metrics/data_wait(%)": "Waiting for data, % of the time",
    "memory/max_reserved(GiB)": "Memory, GiB, peak of rank 0",
}


def page(run: Run, now: float) -> str:
    """The page; `now`, in seconds since the epoch, is in its footer."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"when": when, "bytes": format_bytes}
    source = resources.files("torchtitan_flux").joinpath("report/page.html.j2")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        run=run,
        version=__version__,
        now=now,
        plotly=get_plotlyjs(),
        tiles=tiles(run),
        figures={name: figure.to_json() for name, figure in figures(run).items()},
        not_finite=not_finite(run),
    )


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and note of the figures at the top."""
    steps = run.config.get("training.steps")
    found = [("Step", f"{run.step:,}", f"of {steps:,}" if steps else "of how many is unknown")]
    for tag, series in run.scalars.items():
        last = max(series)
        value, at = f"{series[last]:.4g}", f"at step {last:,}"
        if tag in (LOSS, VALIDATION):
            found.append(("Training loss" if tag == LOSS else "Validation loss", value, at))
        elif tag.startswith("score/"):
            found.append(("Score", value, tag.removeprefix("score/").replace("_", " ")))
        elif tag == "throughput/images_per_second":
            median = statistics.median(series.values())
            found.append(("Throughput", f"{median:.4g}", "images/s, median"))
    if run.starts:
        minutes = sum(start.end - start.begin for start in run.starts) / 60
        found.append(("Time", f"{minutes:.1f} min", f"in {len(run.starts)} start(s)"))
    return found


def figures(run: Run) -> dict[str, go.Figure]:
    """Every curve, by the id of its element."""
    scalars = run.scalars
    tags = {"training": LOSS, "validation": VALIDATION}
    tags |= {f"validation, {m[1]}": tag for tag in scalars if (m := AVERAGE.fullmatch(tag))}
    times = {float(m[1]): one for tag, one in scalars.items() if (m := BY_TIME.fullmatch(tag))}
    found = {
        "loss": _figure("Loss", {name: scalars[t] for name, t in tags.items() if t in scalars}),
        "by-time": _figure(
            "Validation loss by time (0 data, 1 noise)",
            {f"t {time:.2f}": times[time] for time in sorted(times)},
        ),
    }
    for tag, title in OTHERS.items():
        if tag in scalars:
            name = "".join(c if c.isalnum() else "-" for c in tag)
            found[name] = _figure(title, {title: scalars[tag]})
    return {name: figure for name, figure in found.items() if figure.data}


def not_finite(run: Run) -> list[int]:
    """Logged steps whose loss or gradient norm was not finite."""
    series = [run.scalars.get(tag, {}) for tag in (LOSS, "grad_norm")]
    return sorted({step for one in series for step, v in one.items() if not math.isfinite(v)})


def _figure(title: str, lines: Mapping[str, Series]) -> go.Figure:
    figure = go.Figure()
    for name, series in lines.items():
        mode = "lines+markers" if len(series) < 40 else "lines"
        figure.add_scatter(x=list(series), y=list(series.values()), name=name, mode=mode)
    margin: dict[str, Any] = {"l": 50, "r": 10, "t": 50, "b": 40}
    figure.update_layout(title=title, xaxis_title="step", height=340, margin=margin)
    figure.update_layout(legend={"orientation": "h", "y": -0.25}, showlegend=len(lines) > 1)
    return figure
