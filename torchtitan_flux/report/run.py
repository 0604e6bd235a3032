"""What a run left in its dump folder, as plain data."""

import base64
import io
import json
import logging
import os
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
Series = dict[int, float]
"""Step -> value."""


class NotARun(Exception):
    """The folder holds nothing that a run leaves; the message says what was looked for."""


@dataclass(frozen=True)
class Grid:
    """Pictures of one step: its prompts, one for each row, its other metadata, a data URI."""

    step: int
    prompts: list[str]
    facts: dict[str, str]
    data: str


@dataclass(frozen=True)
class Run:
    """Everything that the page shows.

    Attributes:
        folder: the dump folder, absolute.
        state: "running", "finished", "stopped" or "unknown".
        step: the last one that was logged, drawn or saved.
        scalars: series by TensorBoard's tag.
        starts: begin and end of every start that logged, in seconds since the epoch.
        config, defaults: values by "section.key"; `config` is empty where the run left none.
        grids: at most MAX_GRIDS of the `grid_count` that the run drew.
        checkpoints: complete ones, newest first.
        incomplete: steps of those that are not.
        quarantine: items that could not be read.
        environments: what each start ran on.
        missing: what the page cannot show, a sentence each.
    """

    folder: Path
    state: str
    step: int
    scalars: dict[str, Series]
    starts: list[tuple[float, float]]
    config: dict[str, Any]
    defaults: dict[str, Any]
    grids: list[Grid]
    grid_count: int
    checkpoints: dict[int, Manifest]
    incomplete: list[int]
    quarantine: list[dict[str, Any]]
    environments: list[dict[str, Any]]
    missing: list[str]


def read_run(folder: Path) -> Run:
    """Read a dump folder.

    Raises:
        NotARun: there is nothing of a run in it.
    """
    defaults = _flat(asdict(FluxJobConfig()))
    config = _read_config(folder)
    known = {**defaults, **config}
    scalars, starts = _read_scalars(folder / str(known["metrics.save_tb_folder"]))
    files = _grid_files(folder / str(known["sampling.folder"]))
    checkpoints = folder / str(known["checkpoint.folder"])
    saved = list_steps(checkpoints)
    if not (config or scalars or files or saved):
        reason = "does not exist" if not folder.exists() else "holds nothing that a run leaves"
        raise NotARun(
            f"{folder} {reason} (no config.toml, tb/, samples/step-N.png, checkpoint/step-N): "
            "give the job.dump_folder of a run"
        )
    missing = []
    if not config:
        missing.append("No configuration (job.save_config_file).")
    if not scalars:
        missing.append("No TensorBoard values (metrics.enable_tensorboard): no curves.")
    elif "validation_metrics/loss" not in scalars:
        missing.append("No validation loss (validation.enable).")
    if not files:
        missing.append("No grids of pictures (sampling.enable).")
    environments = read_json_lines(folder / ENVIRONMENT)
    if not environments:
        missing.append(f"No {ENVIRONMENT}: versions, devices and number of ranks are unknown.")
    grids = []
    for step, file in spread(files, MAX_GRIDS):
        try:
            grids.append(read_grid(step, file))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            missing.append(f"{file.name} cannot be read as a picture.")
    complete = complete_steps(checkpoints)
    last = [max(series) for series in scalars.values()] + [step for step, _ in files]
    step = max([*last, *complete], default=0)
    return Run(
        folder=folder.resolve(),
        state=_state(folder, step, config.get("training.steps")),
        step=step,
        scalars=scalars,
        starts=starts,
        config=config,
        defaults=defaults,
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
    """A grid's file as a data URI, made smaller where it is large.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: it is no picture.
    """
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.load()
        facts = {name: str(text) for name, text in getattr(image, "text", {}).items()}
        if len(content) > MAX_GRID_BYTES:
            smaller, kind = image.convert("RGB"), "jpeg"
            smaller.thumbnail((MAX_GRID_SIDE, MAX_GRID_SIDE), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            smaller.save(out, format="JPEG", quality=88)
            content = out.getvalue()
    try:
        prompts = json.loads(facts.pop("prompts", ""))
    except ValueError:
        prompts = []
    prompts = list(map(str, prompts)) if isinstance(prompts, list) else []
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Grid(step, prompts, facts, data)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration as the run resolved it: config.toml, or the newest file that is one."""
    files = [*folder.glob("*.toml"), *folder.glob("*.json")] if folder.is_dir() else []
    files.sort(key=lambda file: (file.name != "config.toml", -file.stat().st_mtime))
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            table = tomli.loads(text) if file.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError):
            continue
        if isinstance(table, dict) and {"job", "training"} <= set(table):
            return _flat(table)
    return {}


def _read_scalars(folder: Path) -> tuple[dict[str, Series], list[tuple[float, float]]]:
    """Every tag, and the starts; where starts overlap, the later one counts from its first step."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    sessions = []
    for directory in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(directory), size_guidance={SCALARS: 0})
        try:
            events.Reload()
        except Exception:  # whatever a damaged file makes it raise: what was read before stays
            logging.getLogger(__name__).warning("%s is damaged", directory)
        tags = {tag: events.Scalars(tag) for tag in events.Tags()[SCALARS]}
        times = [event.wall_time for values in tags.values() for event in values]
        if times:
            sessions.append((min(times), max(times), tags))
    scalars: dict[str, Series] = {}
    for _, _, tags in sorted(sessions, key=lambda session: session[0]):
        first = min(values[0].step for values in tags.values())
        scalars = {
            tag: {step: value for step, value in series.items() if step < first}
            for tag, series in scalars.items()
        }
        for tag, values in tags.items():
            scalars.setdefault(tag, {}).update({event.step: event.value for event in values})
    found = {tag: series for tag, series in scalars.items() if series}
    return found, sorted((begin, end) for begin, end, _ in sessions)


def _grid_files(folder: Path) -> list[tuple[int, Path]]:
    names = ((re.fullmatch(r"step-(\d+)\.png", p.name), p) for p in folder.glob("step-*.png"))
    return sorted((int(match[1]), path) for match, path in names if match)


def _state(folder: Path, step: int, steps: int | None) -> str:
    try:
        lock = os.open(folder / "run.lock", os.O_RDONLY)
    except OSError:
        pass
    else:
        try:
            if try_lock(lock, shared=True) is False:
                return "running"
        finally:
            os.close(lock)
    if steps is None:
        return "unknown"
    return "finished" if step >= steps else "stopped"
