"""An export is complete or not there: made beside its place, and renamed at the end."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan_flux.durable import sync_folder

_MARKS = ("model_index.json", "config.json", "manifest.json", ".metadata")
_SLACK = 16 * 2**20  # headers, indexes, cards


class TargetRefused(ValueError):
    """A target that cannot be written; the message says why and what to do."""


@contextmanager
def staged(target: Path, needed: int, overwrite: bool, reads: Iterable[Path]) -> Iterator[Path]:
    """A new folder beside `target`, whose contents move next to it when all went well.

    What has the target's name comes last. When anything goes wrong the folder is removed, and
    what was there before stays.

    Args:
        target: the file or folder to be made, as `<the yielded folder>/<target's name>`.
        needed: bytes that will be written.
        overwrite: whether an earlier export may be replaced.
        reads: what the export is made from.

    Raises:
        TargetRefused: something is there already, or the disk is too small.
    """
    target = Path(os.path.abspath(target))
    _check_free(target, overwrite, list(reads))
    parent = target.parent
    missing = [one for one in (parent, *parent.parents) if not one.exists()]
    existing = next(one for one in (parent, *parent.parents) if one.exists())
    if not existing.is_dir():
        raise TargetRefused(f"{target} cannot be made: {existing} is a file")
    free = shutil.disk_usage(existing).free
    if needed + _SLACK > free:
        raise TargetRefused(
            f"{target} needs {_gigabytes(needed + _SLACK)}, {existing} has {_gigabytes(free)} "
            "free; make room or name a target on another disk"
        )
    stage = parent / f"{target.name}.partial"
    try:
        shutil.rmtree(stage, ignore_errors=True)  # of one that was killed
        stage.mkdir(parents=True)
        yield stage
        _move_in(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for one in missing:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
        raise
    shutil.rmtree(stage)
    sync_folder(parent)


def _check_free(target: Path, overwrite: bool, reads: list[Path]) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise TargetRefused(f"{target} exists; name another target, or pass --overwrite")
    real = target.resolve()
    for read in reads:
        if real == read.resolve() or real in read.resolve().parents:
            raise TargetRefused(f"{target} holds what is read from; name another target")
    filled = target.is_dir() and any(target.iterdir())
    if filled and not any((target / mark).exists() for mark in _MARKS):
        raise TargetRefused(
            f"{target} is no earlier export (it holds none of {', '.join(_MARKS)}), so "
            "--overwrite does not replace it; name another target"
        )


def _move_in(stage: Path, target: Path) -> None:
    made = stage / target.name
    sync_tree(made)
    for beside in sorted(stage.iterdir()):
        if beside != made:
            sync_tree(beside)
            os.replace(beside, target.parent / beside.name)
    if not (target.is_dir() or made.is_dir()):
        os.replace(made, target)
        return
    old = stage / "replaced"
    if os.path.lexists(target):
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise


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
