"""What weights say of the schedule that they are sampled with, wherever they keep it.

| weights | where |
|---|---|
| a pipeline, or a file or folder in it | `scheduler/scheduler_config.json` |
| an export or a converted checkpoint of ours | `scheduler_config.json` in the folder |
| a single file of ours | the entry `SCHEDULER_KEY` of its metadata |
| a checkpoint of a run | `sampling.schedule` of its configuration |
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.folder import list_steps, step_folder
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.paths import locate
from torchtitan_flux.sampling.schedules import SCHEDULER, Schedule
from torchtitan_flux.tensor_files.hub_cache import snapshot_of
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights, read_json
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.locations import PIPELINE_INDEX, WEIGHTS_NAME

SCHEDULER_FILE = "scheduler_config.json"
SCHEDULER_KEY = "torchtitan_flux.scheduler_config"

_KNOWN = {*Schedule._fields, "num_train_timesteps"}


@dataclass(frozen=True)
class StatedScheduler:
    """A scheduler's configuration as weights have it, whether or not it is computed here.

    Attributes:
        where: the file that says it.
        text: diffusers' JSON, as it is there.
        name: class of the scheduler.
    """

    where: Path
    text: str
    name: str

    def schedule(self) -> Schedule:
        """The schedule to sample with; UnreadableWeights names what is not computed here."""
        config = json.loads(self.text)
        try:
            found = Schedule.of_config({**config, "_class_name": self.name})
        except ValueError as error:
            raise UnreadableWeights(
                f"{self.where}: its schedule cannot be drawn with here: {error}; choose one by "
                'sampling.schedule, as "dev", "schnell" or "shift=3.0"'
            ) from None
        ignored = [
            f"{key} = {value!r}"
            for key, value in config.items()
            if not key.startswith("_") and key not in _KNOWN and value
        ]
        if ignored:
            logger.warning(
                f"{self.where}: {', '.join(ignored)} is no setting of {SCHEDULER}, and left out"
            )
        return found


def stated_scheduler(path: Path) -> StatedScheduler | None:
    """The scheduler of a file or folder of weights; None where it says nothing, or is not there.

    Raises UnreadableWeights, naming the file, where what says it is corrupt.
    """
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        return None
    try:
        return _stated(snapshot_of(path), ())
    except OSError as error:
        raise UnreadableWeights(
            f"{error.filename or path} cannot be read ({error.strerror or error})"
        ) from None


def of_run(checkpoints: Path) -> StatedScheduler | None:
    """The scheduler of a run, given its folder of checkpoints, by the configuration that it left.

    None without checkpoints or a readable configuration, and where it is the flavor's.
    """
    steps = list_steps(checkpoints)
    with suppress(UnreadableWeights):
        return _of_run(step_folder(checkpoints, max(steps)), ()) if steps else None
    return None


def flavor_scheduler(guidance_embed: bool) -> StatedScheduler:
    """FLUX.1's own, of weights that say nothing: dev's with a guidance input, else schnell's."""
    return _ours(Path(SCHEDULER_FILE), Schedule.of_flavor(guidance_embed))


def _ours(where: Path, schedule: Schedule) -> StatedScheduler:
    text = json.dumps(schedule.config(), indent=2, sort_keys=True) + "\n"
    return StatedScheduler(where, text, SCHEDULER)


def _stated(path: Path, seen: tuple[Path, ...]) -> StatedScheduler | None:
    if path.is_file() and path.name.startswith(WEIGHTS_NAME):  # its folder speaks for it
        path = path.parent
    if path.is_file():
        return _of_file(path) or _of_pipeline(path.parent)
    if (path / SCHEDULER_FILE).is_file():
        return _of_json(path / SCHEDULER_FILE)
    if (path / METADATA).is_file():
        flavor = architecture.flavor_of_run(path)
        return _of_run(path, seen) or (
            _ours(path, Schedule.of_flavor(flavor.guidance_embed)) if flavor else None
        )
    singles = list(path.glob("flux1-*.safetensors")) or list(path.glob("*.safetensors"))
    of_single = _of_file(singles[0]) if len(singles) == 1 else None
    return _of_pipeline(path) or of_single or _of_pipeline(path.parent)


def _of_run(checkpoint: Path, seen: tuple[Path, ...]) -> StatedScheduler | None:
    config = architecture.run_config(checkpoint) or {}
    given = _entry(config, "sampling", "schedule") or "auto"
    if given == "auto":
        path = _entry(config, "checkpoint", "initial_load_path")
        origin = locate(path) if path else None
        # a run may begin with a checkpoint of its own folder
        if origin is None or origin in seen:
            return None
        return _stated(snapshot_of(origin), (*seen, origin))
    try:
        return _ours(checkpoint, Schedule.parse(given))
    except ValueError as error:
        raise UnreadableWeights(
            f"{checkpoint}: its run's configuration has sampling.schedule = {given!r}: {error}"
        ) from None


def _entry(config: Mapping[str, Any], section: str, key: str) -> str:
    """A string of a run's configuration; empty where there is none."""
    entries = config.get(section)
    found = entries.get(key) if isinstance(entries, dict) else None
    return found if isinstance(found, str) else ""


def _of_pipeline(folder: Path) -> StatedScheduler | None:
    file = folder / "scheduler" / SCHEDULER_FILE
    if not (folder / PIPELINE_INDEX).is_file() or not file.is_file():
        return None
    entry = read_json(folder / PIPELINE_INDEX).get("scheduler")
    # diffusers builds what the index names, whatever the file itself says
    name = entry[-1] if isinstance(entry, list) and entry else None
    return _of_json(file, name if isinstance(name, str) else None)


def _of_json(file: Path, name: str | None = None) -> StatedScheduler:
    config, text = read_json(file), file.read_bytes().decode()
    name = name or str(config.get("_class_name", SCHEDULER))
    if config.get("_class_name") != name:  # the text travels without the index
        text = json.dumps({**config, "_class_name": name}, indent=2) + "\n"
    return StatedScheduler(file, text, name)


def _of_file(file: Path) -> StatedScheduler | None:
    text = None
    with suppress(UnreadableWeights):  # what is wrong with weights is said when they are opened
        text = TensorsFile.open(file).metadata.get(SCHEDULER_KEY)
    if text is None:
        return None
    try:
        name = str(json.loads(text).get("_class_name", SCHEDULER))
    except (ValueError, AttributeError) as error:  # no JSON, no object
        raise UnreadableWeights(f"{file}: its {SCHEDULER_KEY} is not usable ({error})") from None
    return StatedScheduler(file, text, name)
