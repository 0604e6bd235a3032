"""What weights say of the schedule that they are sampled with, wherever they keep it.

| weights | where |
|---|---|
| a pipeline, or a file or folder in it | `scheduler/scheduler_config.json` |
| an export or a converted checkpoint of ours | `scheduler_config.json` in the folder |
| a checkpoint of a run | `sampling.schedule` of its configuration |
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_flux.checkpoint.folder import list_steps, step_folder
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.paths import locate
from torchtitan_flux.sampling.schedules import Schedule
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights, read_json
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.locations import PIPELINE_INDEX

SCHEDULER_FILE = "scheduler_config.json"


@dataclass(frozen=True)
class StatedScheduler:
    """A scheduler's `config`, as diffusers has it and whether or not it is computed here, and
    `where` it was found."""

    where: Path
    config: dict[str, Any]

    def schedule(self) -> Schedule:
        """The schedule to sample with; UnreadableWeights names what is not computed here."""
        try:
            return Schedule.of_config(self.config)
        except ValueError as error:
            raise UnreadableWeights(
                f"{self.where}: its schedule cannot be drawn with here: {error}; choose one by "
                'sampling.schedule, as "dev", "schnell" or "shift=3.0"'
            ) from None


def stated_scheduler(path: Path, seen: tuple[Path, ...] = ()) -> StatedScheduler | None:
    """The scheduler of a file or folder of weights; None where it says nothing, or is not there.

    Raises UnreadableWeights, naming the file, where what says it is corrupt. `seen`: runs that
    began with these weights.
    """
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        return None
    folder = path if path.is_dir() else path.parent
    places = [folder / SCHEDULER_FILE]
    for pipeline in (folder, folder.parent):
        if (pipeline / PIPELINE_INDEX).is_file():
            places.append(pipeline / "scheduler" / SCHEDULER_FILE)
    if file := next((one for one in places if one.is_file()), None):
        return StatedScheduler(file, read_json(file))
    return _of_run(folder, seen) if (folder / METADATA).is_file() else None


def of_run(checkpoints: Path) -> StatedScheduler | None:
    """The scheduler of a run, given its folder of checkpoints, by the configuration that it left;
    None without checkpoints or a readable configuration."""
    steps = list_steps(checkpoints)
    with suppress(UnreadableWeights):
        return stated_scheduler(step_folder(checkpoints, max(steps))) if steps else None
    return None


def _of_run(checkpoint: Path, seen: tuple[Path, ...]) -> StatedScheduler | None:
    config = architecture.run_config(checkpoint) or {}
    given = config.get("sampling", {}).get("schedule", "auto")
    if given != "auto":
        try:
            return StatedScheduler(checkpoint, Schedule.parse(given).config())
        except ValueError as error:
            raise UnreadableWeights(
                f"{checkpoint}: its run's configuration has sampling.schedule = {given!r}: {error}"
            ) from None
    begun = config.get("checkpoint", {}).get("initial_load_path")
    origin = locate(begun) if begun else None
    # a run may begin with a checkpoint of its own folder
    if origin and origin not in seen and (stated := stated_scheduler(origin, (*seen, origin))):
        return stated
    flavor = architecture.flavor_of_run(checkpoint)
    schedule = flavor and Schedule.of_flavor(flavor.guidance_embed)
    return StatedScheduler(checkpoint, schedule.config()) if schedule else None
