"""A run's folder of checkpoints: which are complete, which one to load, what may go.

`step-N` is a checkpoint; `step-N.partial` was being written when the run was killed,
`step-N.deleting` was being deleted, `step-N.damaged` was replaced by a good one of the same step,
`step-N.abandoned` came after the step that a run went back to.
"""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from torchtitan_flux.checkpoint.manifest import Damaged, Manifest
from torchtitan_flux.collectives import from_rank_0, gather, own_share, patient_group
from torchtitan_flux.files import sync_folder

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
    paths = folder.iterdir() if folder.is_dir() else ()  # glob would take "forbidden" for "none"
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in paths)
    return sorted((int(match[1]) for match in found if match), reverse=True)


def choose_checkpoint(folder: Path, load_step: int = -1) -> Choice:
    """The newest checkpoint that is what its manifest says, or the one of `load_step`.

    Collective: rank 0 looks for all, also where a file system lags behind on some node, and every
    rank reads its share of the files.
    """
    steps = from_rank_0(lambda: list_steps(folder)) if load_step == -1 else [load_step]
    damaged: dict[int, str] = {}
    for step in steps:
        manifest, problem = verify(step_folder(folder, step))
        if manifest is not None:
            return Choice(step_folder(folder, step), manifest, damaged)
        damaged[step] = problem
    return Choice(damaged=damaged)


def verify(checkpoint: Path) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint whose every byte was checked, or None and what is wrong.

    Collective where ranks are joined.
    """
    manifest, problem = from_rank_0(lambda: _read(checkpoint))
    if manifest is None:
        return None, problem
    # the largest first, so that the shares come out even
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    with patient_group() as group:
        try:
            manifest.check_contents(checkpoint, own_share(names))
        except Damaged as error:
            problem = str(error)
        problem = "; ".join(sorted(set(filter(None, gather(problem, group)))))
    return (None, problem) if problem else (manifest, "")


def complete_steps(folder: Path) -> dict[int, Manifest]:
    """Checkpoints with a manifest whose files are there in full size; reads no contents."""
    found = {step: _read(step_folder(folder, step))[0] for step in list_steps(folder)}
    return {step: manifest for step, manifest in found.items() if manifest is not None}


def stale_steps(folder: Path, keep: int, damaged: set[int]) -> list[int]:
    """Complete checkpoints beyond the `keep` newest that are not known as damaged; 0 keeps all."""
    good = [step for step in complete_steps(folder) if step not in damaged]  # newest first
    return good[keep:] if keep else []


def clear_leftovers(folder: Path) -> list[str]:
    """Remove what a killed run left half-written or half-deleted; a line for each.

    One that was complete but for its name gets it. Only for the process that holds the run's lock.
    """
    done = []
    for path in sorted(one for one in folder.glob("step-*.*") if LEFTOVERS.fullmatch(one.name)):
        named = path.with_name(path.stem)
        manifest, _ = _read(path)
        complete = manifest is not None and f"step-{manifest.step}" == path.stem
        if complete and path.suffix == ".partial" and not named.exists():
            path.rename(named)
            done.append(f"{named} was complete but for its name")
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            done.append(f"Removed {path}, which a killed run left unfinished")
    return done


def put_in_place(partial: Path, checkpoint: Path, damaged: bool) -> None:
    """Give a new checkpoint its name, durably.

    A good one that has it is deleted; one that is damaged, or known to be, is set aside.
    """
    good = not damaged and _read(checkpoint)[0] is not None
    there = checkpoint.exists()
    old = rename_over(checkpoint, "deleting" if good else "damaged") if there else None
    partial.rename(checkpoint)
    sync_folder(checkpoint.parent)
    if good and old is not None:
        shutil.rmtree(old, ignore_errors=True)


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
