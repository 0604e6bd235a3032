"""An export is complete or not there: made beside its place, and renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan_flux.files import sync_folder
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.tensor_files.safetensors_file import SAFETENSORS

_MARKS = ("model_index.json", "config.json", "manifest.json", ".metadata")
"""What a folder has one of that an export left."""
_SLACK = 16 * 2**20  # headers, indexes, cards


class TargetRefused(ValueError):
    """A target that cannot be written; the message says why and what to do."""


def check_suffix(target: Path, format: str) -> None:
    """Raise TargetRefused where a single file has a folder's name, or a folder a file's."""
    single = format in ("bfl", "comfyui")
    if single != (target.suffix in SAFETENSORS) or target.suffix == ".sft":
        what = "a file: name it *.safetensors" if single else "a folder: leave the suffix out"
        raise TargetRefused(f"{target}: format {format} is {what}")


@contextmanager
def staged(
    target: Path,
    needed: int,
    overwrite: bool,
    reads: Collection[Path],
    outdated: Collection[str] = (),
) -> Iterator[Path]:
    """A new folder beside `target`, whose contents move next to it when all went well, the target
    last. When anything goes wrong the folder is removed, and what was there before stays.

    Args:
        target: the file or folder to be made, as `<the yielded folder>/<target's name>`.
        needed: bytes that will be written.
        overwrite: whether an earlier export may be replaced, but for what is in `reads`.
        outdated: names of what an earlier export left beside it; goes, unless made again.

    Raises:
        TargetRefused: something is there already, or the disk is too small.
    """
    target = Path(os.path.abspath(target))
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(one for one in target.parents if one.exists())
        raise TargetRefused(f"{target} cannot be made: {file} is a file") from None
    old = {parent / name for name in outdated}
    _check_replaceable([target, *old], overwrite, reads)
    needed, free = needed + _SLACK, shutil.disk_usage(parent).free
    if needed > free:
        raise TargetRefused(
            f"{target} needs {format_bytes(needed)}, {parent} has {format_bytes(free)} free; "
            "make room or name a target on another disk"
        )
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
    try:
        yield stage
        for one in (*stage.rglob("*"), stage):
            sync_folder(one)
        names = [parent / one.name for one in stage.iterdir()]
        _check_replaceable(names, overwrite, reads)  # somebody may have been faster
        for one in sorted(names, key=target.__eq__):
            _move_in(stage / one.name, one)
        for one in old.difference(names):
            one.unlink(missing_ok=True)
        sync_folder(parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_replaceable(paths: Collection[Path], overwrite: bool, reads: Collection[Path]) -> None:
    # single files of what is read may be links elsewhere; as deep as a pipeline
    read = [one for path in reads for one in (path, *path.glob("*"), *path.glob("*/*"))]
    for path in filter(os.path.lexists, paths):
        if not overwrite:
            raise TargetRefused(f"{path} exists; name another target, or pass --overwrite")
        for one, a, b in ((o, a, b) for o in read for a in _places(o) for b in _places(path)):
            if a.is_relative_to(b) or b.is_relative_to(a):
                raise TargetRefused(
                    f"{path} holds what is read from, or lies in it ({one}); name another target"
                )
        if path.is_dir() and any(path.iterdir()) and not any((path / m).exists() for m in _MARKS):
            raise TargetRefused(
                f"{path} is no earlier export (it holds none of {', '.join(_MARKS)}), so "
                "--overwrite does not replace it; name another target"
            )


def _places(path: Path) -> tuple[Path, Path]:
    """By its name, and where links lead."""
    return Path(os.path.abspath(path)), path.resolve()


def _move_in(made: Path, target: Path) -> None:
    if not made.is_dir() and not target.is_dir():
        os.replace(made, target)
        return
    old = made.with_name("replaced")
    try:
        if os.path.lexists(target):
            target.rename(old)
        made.rename(target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        raise
