"""A run's folder of checkpoints: which are complete, which one to load, what may go.

`step-N` is a checkpoint; `step-N.partial` was being written when the run was killed,
`step-N.deleting` was being deleted, `step-N.damaged` was replaced by a good one of the same step,
`step-N.abandoned` came after the step that a run went back to.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from torchtitan_flux.checkpoint.manifest import Damaged, Manifest

T = TypeVar("T")

WAITING = timedelta(hours=2)
"""How long ranks wait for one that reads or writes a checkpoint; 48 GB at 7 MB/s."""

LEFTOVERS = re.compile(r"step-\d+\.(partial|deleting)")


@dataclass(frozen=True)
class Choice:
    """What `choose_checkpoint` found.

    Attributes:
        folder, manifest: of the checkpoint to load; None where none is good.
        damaged: why newer ones, or all, were passed over, by step; newest first.
    """

    folder: Path | None = None
    manifest: Manifest | None = None
    damaged: dict[int, str] = field(default_factory=dict)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, complete or not, newest first."""
    names = (path.name for path in (folder.iterdir() if folder.is_dir() else ()))
    found = (re.fullmatch(r"step-(\d+)", name) for name in names)
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def choose_checkpoint(folder: Path, load_step: int = -1) -> Choice:
    """The newest checkpoint that is what its manifest says, or the one of `load_step`.

    Collective where ranks are joined: rank 0 looks for all, also where a file system lags behind
    on some node, and every rank reads its share of the files.
    """
    steps = agree(lambda: list_steps(folder)) if load_step == -1 else [load_step]
    damaged: dict[int, str] = {}
    for step in steps:
        manifest, problem = verify(step_folder(folder, step))
        if manifest is not None:
            return Choice(step_folder(folder, step), manifest, damaged)
        damaged[step] = problem
    return Choice(damaged=damaged)


def verify(checkpoint: Path) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint whose every byte was checked, or None and what is wrong.

    Collective where ranks are joined, which wait in a group of their own: reading 12B takes longer
    than any step may take.
    """
    manifest, problem = agree(lambda: _read(checkpoint))
    if manifest is None:
        return None, problem
    joined = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    group = dist.new_group(backend="gloo", timeout=WAITING) if joined else None
    # the largest first, so that the shares come out even
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    try:
        manifest.check_contents(checkpoint, names[rank::ranks])
        problem = ""
    except Damaged as error:
        problem = str(error)
    problems = [problem] * ranks
    if group is not None:
        assert isinstance(group, dist.ProcessGroup)
        dist.all_gather_object(problems, problem, group=group)
        dist.destroy_process_group(group)
    problem = "; ".join(sorted({one for one in problems if one}))
    return (None, problem) if problem else (manifest, "")


def complete_steps(folder: Path) -> dict[int, Manifest]:
    """Checkpoints with a manifest whose files are there in full size; reads no contents."""
    found = {}
    for step in list_steps(folder):
        manifest, _ = _read(step_folder(folder, step))
        if manifest is not None:
            found[step] = manifest
    return found


def stale_steps(folder: Path, keep: int, damaged: set[int]) -> list[int]:
    """Complete checkpoints beyond the `keep` newest good ones; 0 keeps all.

    `damaged` are steps known to be so although all their files are there; they are not counted.
    """
    good = [step for step in complete_steps(folder) if step not in damaged]  # newest first
    return good[keep:] if keep else []


def clear_leftovers(folder: Path) -> list[str]:
    """Tidy up after a killed run: what it left half-written or half-deleted goes.

    One that was complete but for its name gets it. Only for the one process that holds the run's
    folder. Returns what was done, a line for each.
    """
    done = []
    for path in sorted(folder.glob("step-*.*")):
        if not LEFTOVERS.fullmatch(path.name):
            continue
        named = path.with_name(path.stem)
        manifest, _ = _read(path)
        complete = manifest is not None and f"step-{manifest.step}" == path.stem
        if complete and path.suffix == ".partial" and not named.exists():
            path.rename(named)
            done.append(f"{named} was complete but for its name")
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        done.append(f"Removed {path}, which a killed run left unfinished")
    return done


def make_room(checkpoint: Path, damaged: bool) -> None:
    """Let a new checkpoint have this name: a good one goes, a damaged one is set aside.

    `damaged` says that it is known to be so, also where all its files are there.
    """
    if checkpoint.exists():
        good = not damaged and _read(checkpoint)[0] is not None
        rename_over(checkpoint, "deleting" if good else "damaged")


def abandon_after(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a run goes back to; returns their new names."""
    later = [one for one in list_steps(folder) if one > step]
    return [rename_over(step_folder(folder, one), "abandoned") for one in sorted(later)]


def rename_over(checkpoint: Path, suffix: str) -> Path:
    """Add a suffix to a checkpoint's name, in place of one that has it already."""
    target = checkpoint.with_name(f"{checkpoint.name}.{suffix}")
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def _read(checkpoint: Path) -> tuple[Manifest | None, str]:
    """The manifest, where files of the right sizes lie beside it; else what is wrong."""
    if not checkpoint.is_dir():
        return None, "it does not exist"
    try:
        manifest = Manifest.read(checkpoint)
        manifest.check_sizes(checkpoint)
    except Damaged as error:
        return None, str(error)
    return manifest, ""


def agree(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; so is an OSError that it raises."""
    if not dist.is_initialized():
        return find()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = find()
        except OSError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise OSError(box[1])
    return box[0]
