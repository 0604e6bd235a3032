"""What a run left in its dump folder -> plain data. Nothing is changed there."""

import contextlib
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchtitan_flux.checkpoint.folder import complete_steps, list_steps
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.report.events import Series, event_files, joined, read_session
from torchtitan_flux.report.grids import MAX_GRIDS, Grid, list_grids, read_grid, spread
from torchtitan_flux.report.settings import Setting, find_configuration, read_settings
from torchtitan_flux.training.environment import NAME as ENVIRONMENT
from torchtitan_flux.training.environment import read_json_lines

LOSS = "loss_metrics/global_avg_loss"
VALIDATION = "validation_metrics/loss"
BY_TIME = "validation_metrics/loss_t="

State = Literal["running", "finished", "stopped", "not known"]


class NotARun(Exception):
    """The folder holds nothing that a run leaves; the message says what was looked for."""


@dataclass(frozen=True)
class Run:
    """Everything that the page shows.

    Attributes:
        folder: the dump folder, absolute.
        state: running, finished, stopped; "not known" where the last step is not told anywhere.
        step: the last one that was logged, drawn or saved.
        scalars: series by TensorBoard's tag.
        sessions: (begin, end) in seconds since the epoch of every start that logged.
        settings: every key of the configuration; empty where the run left none.
        grids: pictures over steps, at most MAX_GRIDS.
        grid_count: how many the run drew.
        checkpoints: complete ones, newest first.
        incomplete: steps of those that are not.
        quarantine: items that could not be read.
        environments: what each start ran on.
        missing: what the page cannot show, a sentence each.
    """

    folder: Path
    state: State
    step: int
    scalars: dict[str, Series]
    sessions: list[tuple[float, float]]
    settings: list[Setting]
    grids: list[Grid]
    grid_count: int
    checkpoints: dict[int, Manifest]
    incomplete: list[int]
    quarantine: list[dict[str, Any]]
    environments: list[dict[str, Any]]
    missing: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """The value of a key; None where it is not known."""
        return next((one.value for one in self.settings if one.key == key), None)

    @property
    def by_time(self) -> dict[float, Series]:
        """Validation loss by its time."""
        found = {}
        for tag, series in self.scalars.items():
            if tag.startswith(BY_TIME):
                with contextlib.suppress(ValueError):
                    found[float(tag.removeprefix(BY_TIME))] = series
        return dict(sorted(found.items()))


def read_run(folder: Path) -> Run:
    """Read a dump folder.

    Raises:
        NotARun: there is nothing of a run in it.
    """
    missing: list[str] = []
    path = find_configuration(folder) if folder.is_dir() else None
    settings = read_settings(path) if path else []
    value = {one.key: one.value for one in settings}

    events = event_files(folder / str(value.get("metrics.save_tb_folder", "tb")))
    found = list_grids(folder / str(value.get("sampling.folder", "samples")))
    checkpoint_folder = folder / str(value.get("checkpoint.folder", "checkpoint"))
    saved = list_steps(checkpoint_folder)
    if not (path or events or found or saved):
        reason = "does not exist" if not folder.exists() else "holds nothing that a run leaves"
        raise NotARun(
            f"{folder} {reason} (no config.toml, tb/, samples/step-N.png, checkpoint/step-N): "
            "give the job.dump_folder of a run"
        )

    sessions = [session for one in events if (session := read_session(one))]
    found = [
        (step, file)
        for step, file in found
        if not any(session.redid(step, file.stat().st_mtime) for session in sessions)
    ]
    scalars = joined(sessions)
    if not path:
        missing.append(
            "No configuration as resolved (job.save_config_file was empty, or the run is older "
            "than it): flavor, data set and number of steps are not known."
        )
    if not scalars:
        missing.append("No TensorBoard values yet (metrics.enable_tensorboard): no curves.")
    elif not any(tag.startswith(VALIDATION) for tag in scalars):
        missing.append("No validation loss (validation.enable, or none measured yet).")
    grids = []
    for step, file in spread(found, MAX_GRIDS):
        try:
            grids.append(read_grid(step, file))
        except OSError:
            missing.append(f"{file.name} cannot be read as a picture.")
    if not found:
        missing.append("No grids of pictures (sampling.enable, or none drawn yet).")
    environments = read_json_lines(folder / ENVIRONMENT)
    if not environments:
        missing.append(f"No {ENVIRONMENT}: versions, devices and number of ranks are not known.")

    complete = complete_steps(checkpoint_folder)
    last = [series.steps[-1] for series in scalars.values()] + [step for step, _ in found]
    step = max([*last, *complete], default=0)
    steps = value.get("training.steps")
    return Run(
        folder=folder.resolve(),
        state=_state(folder, step, steps),
        step=step,
        scalars=scalars,
        sessions=sorted((one.begin, one.end) for one in sessions),
        settings=settings,
        grids=grids,
        grid_count=len(found),
        checkpoints=complete,
        incomplete=[step for step in saved if step not in complete],
        quarantine=read_json_lines(folder / "quarantine.jsonl"),
        environments=environments,
        missing=missing,
    )


def _state(folder: Path, step: int, steps: int | None) -> State:
    if _is_being_written(folder / "run.lock"):
        return "running"
    if steps is None:
        return "not known"
    return "finished" if step >= steps else "stopped"


def _is_being_written(lock: Path) -> bool:
    """Whether a live process has the folder; looks by sharing the lock for some microseconds."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system knows no locks
        return False
    finally:
        os.close(descriptor)
    return False
