"""What a run left in its dump folder, as plain data."""

import base64
import contextlib
import io
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import tomli
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from torchtitan_flux.checkpoint.folder import complete_steps, list_steps
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.files import try_lock
from torchtitan_flux.training.environment import NAME as ENVIRONMENT
from torchtitan_flux.training.environment import read_json_lines

MAX_GRIDS, MAX_GRID_BYTES, MAX_GRID_SIDE = 40, 400_000, 1600
GRID = re.compile(r"step-(\d+)\.png")
OTHER_RANK = re.compile(r"rank_0*[1-9]\d*")
Series = dict[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Grid:
    """Pictures of one step: its prompts, one for each row, its other metadata, a data URI."""

    step: int
    prompts: list[str]
    facts: dict[str, str]
    data: str


@dataclass(frozen=True)
class Start:
    """What one start logged, from `begin` to `end` (seconds since the epoch)."""

    begin: float
    end: float
    scalars: dict[str, Series]

    @property
    def first_step(self) -> int:
        return min(min(series) for series in self.scalars.values())


@dataclass(frozen=True)
class Run:
    """Everything that the page shows."""

    folder: Path  # absolute
    state: str  # "running", "finished", "stopped" or "unknown"
    step: int  # the last one that was logged, drawn or saved
    scalars: dict[str, Series]  # by TensorBoard's tag
    starts: list[Start]
    config: dict[str, Any]  # by "section.key"; empty where the run left none
    differing: list[tuple[str, Any, Any]]  # key, value, default
    grids: list[Grid]  # at most MAX_GRIDS of `grid_count`
    grid_count: int
    checkpoints: dict[int, Manifest]  # complete ones, newest first
    incomplete: list[int]
    quarantine: list[dict[str, Any]]
    environments: list[dict[str, Any]]
    missing: list[str]  # what the page cannot show, a sentence each


def read_run(folder: Path) -> Run:
    """Read a dump folder; FileNotFoundError where there is nothing of a run in it."""
    flat = _flat(asdict(FluxJobConfig())).items()
    defaults = {key: "None" if value is None else value for key, value in flat}  # as it is stored
    config = _read_config(folder)
    known = defaults | config
    starts = _read_starts(folder / str(known["metrics.save_tb_folder"]))
    scalars = joined(starts)
    pictures = (folder / str(known["sampling.folder"])).glob("step-*.png")
    files = sorted((int(m[1]), path) for path in pictures if (m := GRID.fullmatch(path.name)))
    checkpoints = folder / str(known["checkpoint.folder"])
    saved, complete = list_steps(checkpoints), complete_steps(checkpoints)
    if not (config or scalars or files or saved):
        reason = "holds nothing that a run leaves" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder} {reason} (no config.toml, tb/, samples/step-N.png, checkpoint/step-N): "
            "give the job.dump_folder of a run"
        )
    environments = read_json_lines(folder / ENVIRONMENT)
    notes = {
        "No configuration (job.save_config_file).": config,
        "No TensorBoard values (metrics.enable_tensorboard): no curves.": scalars,
        "No validation loss (validation.enable).": "validation_metrics/loss" in scalars,
        "No grids of pictures (sampling.enable).": files,
        f"No {ENVIRONMENT}: versions, devices and number of ranks are unknown.": environments,
    }
    missing = [note for note, found in notes.items() if not found]
    grids = []
    for step, file in spread(files, MAX_GRIDS):
        try:
            grids.append(read_grid(step, file))
        except (OSError, ValueError, TypeError, SyntaxError):
            missing.append(f"{file.name} cannot be read as a picture.")
    steps = [*map(max, scalars.values()), *(step for step, _ in files), *complete]
    step = max(steps, default=0)
    return Run(
        folder=folder.resolve(),
        state=_state(folder, step, config.get("training.steps")),
        step=step,
        scalars=scalars,
        starts=starts,
        config=config,
        differing=[
            (key, value, defaults.get(key, "no such key"))
            for key, value in config.items()
            if value != defaults.get(key, ...)
        ],
        grids=grids,
        grid_count=len(files),
        checkpoints=complete,
        incomplete=[step for step in saved if step not in complete],
        quarantine=read_json_lines(folder / "quarantine.jsonl"),
        environments=environments,
        missing=missing,
    )


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def read_grid(step: int, path: Path) -> Grid:
    """A grid's file as a data URI, made smaller where it is large."""
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.load()
        facts = {name: str(text) for name, text in getattr(image, "text", {}).items()}
        if len(content) > MAX_GRID_BYTES:
            smaller, kind, out = image.convert("RGB"), "jpeg", io.BytesIO()
            smaller.thumbnail((MAX_GRID_SIDE, MAX_GRID_SIDE), Image.Resampling.LANCZOS)
            smaller.save(out, format="JPEG", quality=88)
            content = out.getvalue()
    facts.pop("step", None)
    prompts = list(map(str, json.loads(facts.pop("prompts", "[]"))))
    return Grid(
        step, prompts, facts, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    )


def joined(starts: list[Start]) -> dict[str, Series]:
    """Series of a run, by tag; a later start counts from its first step on.

    At that step itself only where it logs again: a finished run keeps the loss of its last step.
    """
    scalars: dict[str, Series] = {}
    for start in starts:
        for tag, series in scalars.items():
            scalars[tag] = {step: v for step, v in series.items() if step <= start.first_step}
        for tag, series in start.scalars.items():
            scalars[tag] = scalars.get(tag, {}) | series
    return {tag: series for tag, series in scalars.items() if series}


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in table.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration as the run resolved it."""
    try:
        return _flat(tomli.loads((folder / "config.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _read_starts(folder: Path) -> list[Start]:
    """What the event files hold, by time; where all ranks log, rank 0's."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    starts = []
    for path in folder.rglob("events.out.tfevents.*"):
        if any(OTHER_RANK.fullmatch(part) for part in path.relative_to(folder).parts):
            continue
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
        try:
            events.Reload()
        except Exception:  # whatever a damaged file makes it raise: what was read before stays
            logging.getLogger(__name__).warning("%s is damaged", path)
        tags = {tag: events.Scalars(tag) for tag in events.Tags()[SCALARS]}
        times = [event.wall_time for values in tags.values() for event in values]
        if times:
            series = {tag: {e.step: e.value for e in values} for tag, values in tags.items()}
            starts.append(Start(min(times), max(times), series))
    return sorted(starts, key=lambda start: start.begin)


def _state(folder: Path, step: int, steps: int | None) -> str:
    with contextlib.suppress(OSError), (folder / "run.lock").open() as lock:
        if try_lock(lock.fileno(), shared=True) is False:
            return "running"
    if steps is None:
        return "unknown"
    return "finished" if step >= steps else "stopped"
