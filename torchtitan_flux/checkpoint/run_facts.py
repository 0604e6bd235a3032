"""What a run is tied to, stored with its checkpoints and read before the next part is built."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from torchtitan_flux.randomness import RANDOMNESS_VERSION


@dataclass(frozen=True)
class RunFacts:
    """Facts that must not change while a run goes on.

    Attributes:
        seed: the run's seed.
        global_batch_size: positions of one step.
        context_in_dim, vec_in_dim, in_channels: widths that followed the encoders and the codec.
        randomness_version: scheme of the random numbers.
    """

    seed: int
    global_batch_size: int
    context_in_dim: int
    vec_in_dim: int
    in_channels: int
    randomness_version: int = RANDOMNESS_VERSION

    def as_state(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunFacts":
        return cls(**{field.name: int(state[field.name]) for field in fields(cls)})


def newest_step(folder: Path) -> int | None:
    """Step of the newest DCP checkpoint step-N in a folder, or None."""
    steps = [
        int(match.group(1))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / ".metadata").is_file()
    ]
    return max(steps, default=None)


def step_to_load(folder: Path, load_step: int) -> int | None:
    """What `checkpoint.load_step` means: itself, or for -1 the newest; None where there is none."""
    return newest_step(folder) if load_step == -1 else load_step


def read_run_facts(checkpoint: Path) -> RunFacts | None:
    """The facts stored in one checkpoint folder; None where it holds only a model.

    Reads the training state alone, needs no process group.

    Raises:
        ValueError: for another program's checkpoint.
    """
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(checkpoint),
        planner=_EmptyStateDictLoadPlanner(keys={"train_state"}),
        no_dist=True,
    )
    train_state = state.get("train_state")
    if train_state is None:
        return None
    try:
        return RunFacts.from_state(train_state)
    except KeyError as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint of torchtitan-flux: its train_state lacks {error}; set "
            "another job.dump_folder, or start from its weights by checkpoint.initial_load_path"
        ) from None
