"""An export is complete or not there: made beside its place, and renamed at the end."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan_flux.files import sync_folder, try_lock
from torchtitan_flux.tensor_files.safetensors_file import listed

_MARKS = ("model_index.json", "config.json", "manifest.json", ".metadata")
_REPLACED = "replaced"
_SLACK = 16 * 2**20  # headers, indexes, cards


class TargetRefused(ValueError):
    """A target that cannot be written; the message says why and what to do."""


@contextmanager
def staged(
    target: Path,
    needed: int,
    overwrite: bool,
    reads: Collection[Path],
    beside: Collection[str] = (),
    outdated: Collection[str] = (),
) -> Iterator[Path]:
    """A new folder beside `target`, whose contents move next to it when all went well.

    What has the target's name comes last. When anything goes wrong the folder is removed, and
    what was there before stays. No second process writes the same target meanwhile, unless the
    file system has no locks.

    Args:
        target: the file or folder to be made, as `<the yielded folder>/<target's name>`.
        needed: bytes that will be written.
        overwrite: whether an earlier export may be replaced.
        reads: what the export is made from.
        beside: names of the files that will lie beside the target.
        outdated: names that an earlier export left beside it; those not made again go.

    Raises:
        TargetRefused: something is there already, somebody else is writing it, or the disk is too
            small.
    """
    target = Path(os.path.abspath(target))
    parent = target.parent
    missing = [one for one in (parent, *parent.parents) if not one.exists()]
    existing = next(one for one in (parent, *parent.parents) if one.exists())
    if not existing.is_dir():
        raise TargetRefused(f"{target} cannot be made: {existing} is a file")
    try:
        with _stage(target) as stage:
            _check_free(target, overwrite, reads, beside)
            free = shutil.disk_usage(stage).free
            if needed + _SLACK > free:
                raise TargetRefused(
                    f"{target} needs {_gigabytes(needed + _SLACK)}, {existing} has "
                    f"{_gigabytes(free)} free; make room or name a target on another disk"
                )
            yield stage
            _check_free(target, overwrite, reads, beside)  # somebody may have been faster
            _move_in(stage, target)
            for name in set(outdated).difference(beside):
                (parent / name).unlink(missing_ok=True)
    except BaseException:
        for one in missing:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
        raise
    sync_folder(parent)


@contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """`<target>.partial`, empty and for this process alone; removed in the end.

    What a killed export left there goes. An earlier export that it had moved away comes back.
    """
    stage = target.with_name(f"{target.name}.partial")
    if os.path.lexists(stage) and (stage.is_symlink() or not stage.is_dir()):
        raise TargetRefused(f"{stage} is in the way; move it, or name another target")
    stage.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        if not _lock(descriptor, stage):
            raise TargetRefused(
                f"{target} is being written by another process; wait for it, or name another target"
            )
        ours = (target.name, _REPLACED)
        foreign = sorted(
            one.name
            for one in stage.iterdir()
            if one.name not in ours and not one.name.startswith(f"{target.stem}.")
        )
        if foreign:
            raise TargetRefused(
                f"{stage} holds {listed(foreign)}, which no export has left there; move it, or "
                "name another target"
            )
        _put_back(stage, target)
        for one in stage.iterdir():
            shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
        try:
            yield stage
        except BaseException:
            _put_back(stage, target)
            shutil.rmtree(stage, ignore_errors=True)
            raise
        shutil.rmtree(stage)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, stage: Path) -> bool:
    """Whether the folder is ours until the descriptor is closed."""
    # whoever held it may have removed it before the lock was ours
    there = try_lock(descriptor) is not False and stage.exists()
    return there and os.path.samestat(os.fstat(descriptor), stage.stat())


def _check_free(
    target: Path, overwrite: bool, reads: Collection[Path], beside: Collection[str]
) -> None:
    taken = [one for one in (target, *map(target.with_name, beside)) if os.path.lexists(one)]
    if taken and not overwrite:
        raise TargetRefused(f"{taken[0]} exists; name another target, or pass --overwrite")
    if target not in taken:
        return
    for read in _ways(reads):
        if any(_overlap(read, way) for way in (target, target.resolve())):
            raise TargetRefused(
                f"{target} holds what is read from, or lies in it ({read}); name another target"
            )
    filled = target.is_dir() and any(target.iterdir())
    if filled and not any((target / mark).exists() for mark in _MARKS):
        raise TargetRefused(
            f"{target} is no earlier export (it holds none of {', '.join(_MARKS)}), so "
            "--overwrite does not replace it; name another target"
        )


def _ways(reads: Collection[Path]) -> Iterator[Path]:
    """Where all that is read lies, as named and resolved: single files may be links elsewhere."""
    for read in reads:
        for one in (read, *read.glob("*"), *read.glob("*/*")):  # as deep as a pipeline
            yield Path(os.path.abspath(one))
            yield one.resolve()


def _overlap(a: Path, b: Path) -> bool:
    return a.is_relative_to(b) or b.is_relative_to(a)


def _move_in(stage: Path, target: Path) -> None:
    """What was made, to its place; where that is interrupted, `_put_back` has the rest."""
    made = stage / target.name
    sync_tree(made)
    for beside in sorted(stage.iterdir()):
        if beside != made:
            sync_tree(beside)
            os.replace(beside, target.parent / beside.name)
    if not (target.is_dir() or made.is_dir()):
        os.replace(made, target)
        return
    if os.path.lexists(target):
        target.rename(stage / _REPLACED)
    made.rename(target)


def _put_back(stage: Path, target: Path) -> None:
    """An earlier export that was moved away for a new one which did not come."""
    old = stage / _REPLACED
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


def sync_tree(path: Path) -> None:
    """Make a file, or all that a folder holds, durable."""
    if path.is_dir():
        for one in path.iterdir():
            sync_tree(one)
        sync_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
