"""An export is complete or not there: made beside its place, and renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan_flux.files import sync_folder
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.tensor_files.safetensors_file import SAFETENSORS

_SLACK = 16 * 2**20  # headers, indexes, cards


class TargetRefused(ValueError):
    """A target that cannot be written; the message says why and what to do."""


@contextmanager
def staged(target: Path, format: str, needed: int) -> Iterator[Path]:
    """Where to make a file or folder that moves to `target` when all went well, else goes.

    Args:
        target: a file for "bfl" and "comfyui", else a folder.
        format: what will be written.
        needed: bytes that will be written.

    Raises:
        TargetRefused: another kind of name, something is there already, or the disk is too small.
    """
    single = format in ("bfl", "comfyui")
    if single != (target.suffix in SAFETENSORS) or target.suffix == ".sft":
        what = "a file: name it *.safetensors" if single else "a folder: leave the suffix out"
        raise TargetRefused(f"{target}: format {format} is {what}")
    target = Path(os.path.abspath(target))
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    _refuse_existing(target, single)
    needed, free = needed + _SLACK, shutil.disk_usage(parent).free
    if needed > free:
        raise TargetRefused(
            f"{target} needs {format_bytes(needed)}, {parent} has {format_bytes(free)} free; "
            "make room or name a target on another disk"
        )
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
    try:
        yield stage / target.name
        for one in (*stage.rglob("*"), stage):
            sync_folder(one)
        _refuse_existing(target, single)  # somebody may have been faster
        (stage / target.name).rename(target)
        sync_folder(parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _refuse_existing(path: Path, single: bool) -> None:
    empty_folder = not single and path.is_dir() and not any(path.iterdir())
    if os.path.lexists(path) and not empty_folder:
        raise TargetRefused(f"{path} exists; delete it, or name another target")
