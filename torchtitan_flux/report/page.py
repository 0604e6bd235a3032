"""A run as one HTML page that needs nothing else: no network, no other file."""

import math
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
from torchtitan_flux.report.run import Run, spread

LOSS, VALIDATION = "loss_metrics/global_avg_loss", "validation_metrics/"
BY_TIME = "loss_t="
OTHERS = {
    "grad_norm": "Gradient norm, before clipping",
    "lr": "Learning rate",
    "throughput/images_per_second": "Images/s, all devices",
    "throughput/tflops_per_device": "TFLOP/s of each device",
    "mfu(%)": "MFU, % of the device's peak",
    "time_metrics/seconds_per_step": "Step time, s",
    "time_metrics/data_wait(%)": "Waiting for data, % of the time",
    "memory/max_reserved(GiB)": "Memory, GiB, peak of rank 0",
}
FACTS = {"seed": "Seed", "global_batch_size": "Global batch", "randomness_version": "Randomness"}


def page(run: Run, now: float) -> str:
    """The page.

    Args:
        run: what the run left.
        now: seconds since the epoch, for the footer.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["when"] = when
    environment.filters["bytes"] = format_bytes
    source = resources.files("torchtitan_flux").joinpath("report/page.html.j2")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    facts = next(iter(run.checkpoints.values())).facts if run.checkpoints else None
    return template.render(
        run=run,
        version=__version__,
        now=now,
        plotly=get_plotlyjs(),
        tiles=tiles(run),
        figures={name: figure.to_json() for name, figure in figures(run).items()},
        not_finite=not_finite(run),
        differing=[
            (key, value, run.defaults.get(key, "no such key"))
            for key, value in run.config.items()
            if value != _as_stored(run.defaults.get(key, ...))
        ],
        facts={label: getattr(facts, name) for name, label in FACTS.items()} if facts else {},
    )


def when(seconds: float) -> str:
    """A time, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and note of the figures at the top."""
    steps = run.config.get("training.steps")
    found = [("Step", f"{run.step:,}", f"of {steps:,}" if steps else "of how many is unknown")]
    for tag, name in ((LOSS, "Training loss"), (f"{VALIDATION}loss", "Validation loss")):
        if series := run.scalars.get(tag):
            step = max(series)
            found.append((name, f"{series[step]:.4g}", f"at step {step:,}"))
    for tag, series in run.scalars.items():
        if tag.startswith("score/"):
            name = tag.removeprefix("score/").replace("_", " ")
            found.append(("Score", f"{series[max(series)]:.4g}", name))
    if series := run.scalars.get("throughput/images_per_second"):
        found.append(
            ("Throughput", f"{statistics.median(series.values()):.4g}", "images/s, median")
        )
    if run.starts:
        minutes = sum(end - begin for begin, end in run.starts) / 60
        found.append(("Time", f"{minutes:.1f} min", f"in {len(run.starts)} start(s)"))
    return found


def figures(run: Run) -> dict[str, go.Figure]:
    """Every curve, by the id of its element."""
    averages = sorted(
        tag.removeprefix(VALIDATION).removesuffix("/loss")
        for tag in run.scalars
        if tag.startswith(f"{VALIDATION}ema") and tag.endswith("/loss")
    )
    lines = {"training": LOSS, "validation": f"{VALIDATION}loss"}
    lines |= {f"validation, {name}": f"{VALIDATION}{name}/loss" for name in averages}
    found = {
        "loss": _figure("Loss", {k: run.scalars[t] for k, t in lines.items() if t in run.scalars})
    }
    by_time = {
        float(tag.removeprefix(VALIDATION + BY_TIME)): series
        for tag, series in run.scalars.items()
        if tag.startswith(VALIDATION + BY_TIME)
    }
    if by_time:
        named = {f"t {t:.2f}": series for t, series in sorted(by_time.items())}
        found["by-time"] = _figure("Loss by time (0 data, 1 noise)", named)
        steps = sorted(set.intersection(*map(set, by_time.values())))
        profile = {
            f"step {step:,}": {t: series[step] for t, series in sorted(by_time.items())}
            for step in spread(steps, 4)
        }
        found["profile"] = _figure("Validation loss over t", profile, x="t")
    for tag, title in OTHERS.items():
        if tag in run.scalars:
            name = "".join(c if c.isalnum() else "-" for c in tag)
            found[name] = _figure(title, {title: run.scalars[tag]})
    return {name: figure for name, figure in found.items() if figure.data}


def not_finite(run: Run) -> list[int]:
    """Logged steps whose loss or gradient norm was not finite."""
    tags = (LOSS, "grad_norm")
    series = [run.scalars.get(tag, {}) for tag in tags]
    return sorted({step for one in series for step, v in one.items() if not math.isfinite(v)})


def _figure(title: str, lines: Mapping[str, Mapping[Any, float]], x: str = "step") -> go.Figure:
    figure = go.Figure()
    for name, series in lines.items():
        points = sorted(series.items())
        mode = "lines+markers" if len(points) < 40 else "lines"
        figure.add_scatter(x=[p for p, _ in points], y=[v for _, v in points], name=name, mode=mode)
    scale = [
        {"label": kind, "method": "relayout", "args": [{"yaxis.type": kind}]}
        for kind in ("linear", "log")
    ]
    figure.update_layout(
        title=title,
        xaxis_title=x,
        height=340,
        margin={"l": 50, "r": 10, "t": 60, "b": 40},
        legend={"orientation": "h", "y": -0.25},
        showlegend=len(lines) > 1,
        updatemenus=[
            {
                "type": "buttons",
                "buttons": scale,
                "direction": "left",
                "x": 1,
                "y": 1.2,
                "xanchor": "right",
            }
        ],
    )
    return figure


def _as_stored(value: Any) -> Any:
    """A default as the stored configuration would have it."""
    return "None" if value is None else value
