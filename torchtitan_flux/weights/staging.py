"""An export is complete or not there: made beside its place, and renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan_flux.files import sync_folder
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.tensor_files.safetensors_file import SAFETENSORS

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
def staged(target: Path, needed: int, beside: Collection[str] = ()) -> Iterator[Path]:
    """A new folder, whose contents move next to `target` when all went well, else go.

    Args:
        target: the file or folder to be made, as `<the yielded folder>/<target's name>`.
        needed: bytes that will be written.
        beside: names that will be, or would be taken for, the target's companions.

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
    _refuse_existing([target, *(parent / name for name in beside)])
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
        made = sorted(stage.iterdir(), key=lambda one: one.name == target.name)  # which comes last
        _refuse_existing(parent / one.name for one in made)  # somebody may have been faster
        for one in made:
            one.rename(parent / one.name)
        sync_folder(parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        empty_folder = path.is_dir() and not any(path.iterdir()) and path.suffix not in SAFETENSORS
        if os.path.lexists(path) and not empty_folder:
            raise TargetRefused(f"{path} exists; delete it, or name another target")
