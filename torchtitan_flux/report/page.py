"""A run as one HTML page that needs nothing else: no network, no other file."""

import json
import statistics
from collections.abc import Sequence
from html import escape

from torchtitan_flux import __version__
from torchtitan_flux.report import tables
from torchtitan_flux.report.charts import Chart, figure, hover_data, number
from torchtitan_flux.report.curves import loss_charts, not_finite, other_charts
from torchtitan_flux.report.grids import Grid
from torchtitan_flux.report.read import LOSS, VALIDATION, Run
from torchtitan_flux.report.script import SCRIPT
from torchtitan_flux.report.style import CSS
from torchtitan_flux.report.words import duration, plural, when

SCORES = "score/"
"""Tags of what a run is judged by at its end."""

# nothing is fetched, whatever a caption or a file name says
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def page(run: Run, now: float) -> str:
    """The page.

    Args:
        run: what the run left.
        now: seconds since the epoch, for the footer.
    """
    losses = loss_charts(run)
    others, absent = other_charts(run)
    missing = list(run.missing)
    if run.scalars and absent:
        missing.append(f"Not logged: {', '.join(absent)}.")
    curves = json.dumps({chart.name: hover_data(chart) for chart in losses + others})
    title = escape(run.folder.name)
    body = "\n".join(
        part
        for part in (
            _head(run),
            _curves(losses, others, not_finite(run)),
            _grids(run),
            tables.quarantine(run),
            tables.configuration(run.settings),
            tables.environment(run),
            tables.missing(missing),
            f"<footer>Written by torchtitan-flux {__version__} on {when(now)} from "
            f"{escape(str(run.folder))}</footer>",
        )
        if part
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n"
        # numbers and our own words: nothing in it could end the script
        f'<script type="application/json" id="curves">{curves}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# ---- headline ------------------------------------------------------------------------------


def _head(run: Run) -> str:
    steps = run.setting("training.steps")
    of = f" of {steps:,}" if steps else ""
    share = min(100.0, 100 * run.step / steps) if steps else 100.0
    tiles = "".join(
        f'<li class="card"><small>{escape(name)}</small><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></li>"
        for name, value, note in _tiles(run)
    )
    return (
        f'<header><div class="head"><h1>{escape(run.folder.name)}</h1>'
        f'<span class="state {run.state.split()[0]}">{_state(run)}</span></div>'
        f"<p>{escape(_what(run))}</p>"
        f'<div class="progress" role="progressbar" aria-label="step {run.step:,}{of}" '
        f'aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{share:.1f}%"></div></div>'
        f'<ul class="tiles">{tiles}</ul></header>'
    )


def _state(run: Run) -> str:
    return {
        "running": "running",
        "finished": "finished",
        "stopped": f"stopped at step {run.step:,}",
        "not known": "state not known",
    }[run.state]


def _what(run: Run) -> str:
    """Flavor, data and size in one sentence."""
    if not run.settings:
        return "The run left no configuration."
    get = run.setting
    height = get("training.img_height") or get("training.img_size")
    width = get("training.img_width") or get("training.img_size")
    path = get("training.dataset_path")
    batch = next(iter(run.checkpoints.values())).facts.global_batch_size if run.checkpoints else 0
    steps = plural(get("training.steps"), "step")
    parts = [
        get("job.description"),
        str(get("model.flavor")),
        f"{get('training.dataset')}{f' from {path}' if path else ''}, {height} × {width} px",
        f"{steps} of {plural(batch, 'image')}" if batch else steps,
    ]
    return " · ".join(part for part in parts if part)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and note of the figures at the top."""
    steps = run.setting("training.steps")
    tiles = [("Step", f"{run.step:,}", f"of {steps:,}" if steps else "of how many is not known")]
    for tag, name in ((LOSS, "Training loss"), (VALIDATION, "Validation loss")):
        if series := run.scalars.get(tag):
            tiles.append((name, number(series.last), f"at step {series.steps[-1]:,}"))
    for tag, series in run.scalars.items():
        if tag.startswith(SCORES):
            name = tag.removeprefix(SCORES).replace("_", " ")
            tiles.append(("Score", number(series.last), name))
    if series := run.scalars.get("throughput/images_per_second"):
        median = statistics.median(series.values)
        tiles.append(("Throughput", number(median), "images/s, median"))
    if series := run.scalars.get("mfu(%)"):
        tiles.append(("MFU", f"{number(statistics.median(series.values))} %", "median"))
    if run.sessions:
        spent = sum(end - begin for begin, end in run.sessions)
        starts = plural(len(run.sessions), "start")
        tiles.append(("Time", duration(spent), f"first to last value, {starts}"))
    return tiles


# ---- curves and pictures -------------------------------------------------------------------


def _curves(losses: Sequence[Chart], others: Sequence[Chart], bad: Sequence[int]) -> str:
    if not (losses or others):
        return ""
    switches = (
        '<label><input type="checkbox" id="switch-log">Log scale</label>'
        '<label><input type="checkbox" id="switch-smooth">Smooth</label>'
    )
    parts = [f'<div class="bar"><h2>Loss</h2>{switches}</div>']
    if bad:
        some = ", ".join(f"{step:,}" for step in bad[:20]) + " …" * (len(bad) > 20)
        parts.append(
            f'<p class="warning">Loss or gradient were not finite (×) in {len(bad)} of the steps'
            f" that were logged: {some}</p>"
        )
    parts.append(_figures(losses))
    if others:
        parts.append(f"<h2>Optimisation and throughput</h2>{_figures(others)}")
    return "\n".join(parts)


def _figures(charts: Sequence[Chart]) -> str:
    if not charts:
        return '<p class="soft">No loss was logged.</p>'
    return f'<div class="charts">{"".join(figure(chart) for chart in charts)}</div>'


def _grids(run: Run) -> str:
    if not run.grids:
        return ""
    some = ""
    if run.grid_count > len(run.grids):
        some = f" {len(run.grids)} of {run.grid_count:,} grids are in this page."
    if any(grid.reduced for grid in run.grids):
        some += " Large ones are reduced; the files in the run's folder are whole."
    facts = run.grids[-1].facts
    drawn = ", ".join(
        f"{text} {facts[name]}"
        for name, text in (
            ("size", "size"),
            ("steps", "Euler steps"),
            ("cfg", "CFG"),
            ("guidance", "guidance"),
            ("seed", "seed"),
        )
        if facts.get(name, "None") != "None"
    )
    last = len(run.grids) - 1
    return (
        f'<section><h2>Pictures over steps</h2><p class="soft">{escape(drawn)}.{some}</p>'
        f'<div class="card grids">{"".join(_grid(grid) for grid in run.grids)}'
        f'<div class="steps"><label for="step">Step</label><input type="range" id="step" min="0" '
        f'max="{last}" value="{last}"></div><div class="strip"></div></div>'
        "<dialog><img alt=''></dialog></section>"
    )


def _grid(grid: Grid) -> str:
    prompts = "".join(
        f'<li title="{escape(prompt)}"><span>{escape(prompt)}</span></li>'
        for prompt in grid.prompts
    )
    # as many lines as a row is high, in a window of usual height
    lines = max(1, int(min(grid.height, 700) / max(len(grid.prompts), 1) / 18))
    rows = f'<ol style="--lines:{lines}">{prompts}</ol>' if prompts else ""
    only = "" if prompts else ' class="only"'
    small = ' class="small"' if max(grid.width, grid.height) <= 800 else ""
    about = f"Pictures drawn at step {grid.step:,}, a row for each prompt"
    return (
        f'<div class="step" data-step="{grid.step:,}"><h3{only}>Step {grid.step:,}</h3>'
        f'<div{only}><img{small} src="{grid.data}" alt="{about}" width="{grid.width}" '
        f'height="{grid.height}"></div>{rows}</div>'
    )
