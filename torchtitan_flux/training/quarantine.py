"""Items that could not be read: counted, named with the reason in a file, and a limit to them."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torchtitan.tools.logging import logger

from torchtitan_flux.data.batch import Replacement
from torchtitan_flux.data.loader import FluxDataLoader, ValidationLoader
from torchtitan_flux.data.survey import MIN_ITEMS

_SHOWN = 20


class TooManyUnreadable(RuntimeError):
    """More items than `data.max_unreadable_share` could not be read; names them and the file."""


class Quarantine:
    """The run's list of unreadable items, one JSON object a line, each item once.

    Rank 0 writes; all ranks count.

    Args:
        path: the file; one that is there is gone on with.
        max_share: of the items asked for, the share that may be unreadable.
    """

    def __init__(self, path: Path, max_share: float):
        self.path = path
        self.max_share = max_share
        self.count = 0
        """Training items replaced since the run began; a checkpoint stores it."""
        self._listed: set[str] | None = None
        self._latest: list[Replacement] = []

    def record(self, local: list[Replacement], used_for: str) -> None:
        """List what the ranks could not read; collective.

        Args:
            local: replacements of this rank; ranks that read the same samples say the same.
            used_for: "training" or "validation"; only the former counts towards the limit.
        """
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, local)
        # context and tensor peers read the same samples; positions sort, whatever the ranks
        found = sorted({one for of_rank in gathered for one in of_rank})
        if used_for == "training":
            self.count += len(found)
            latest = {one.item_id: one for one in [*self._latest, *found]}
            self._latest = list(latest.values())[-_SHOWN:]
        if dist.get_rank() == 0:
            self._append(found, used_for)

    def check(self, read: int) -> None:
        """Raise when too many could not be read.

        Args:
            read: training samples that the run has had so far.

        Raises:
            TooManyUnreadable: the same on every rank.
        """
        asked = read + self.count
        if self.count <= self.max_share * max(asked, MIN_ITEMS):
            return
        names = "\n".join(f"  - {one.item_id}: {one.reason}" for one in self._latest)
        raise TooManyUnreadable(
            f"{self.count} of the {asked} items asked for could not be read, more than "
            f"data.max_unreadable_share = {self.max_share}. All are listed in {self.path}; "
            f"the last ones:\n{names}\n"
            "Repair or remove them, or raise data.max_unreadable_share; the same command continues"
        )

    def _append(self, found: list[Replacement], used_for: str) -> None:
        if self._listed is None:
            self._listed = set(listed_items(self.path))
        new = {one.item_id: one for one in reversed(found) if one.item_id not in self._listed}
        if not new:
            return
        self._listed |= set(new)
        lines = [
            json.dumps(
                {
                    "item": one.item_id,
                    "reason": one.reason,
                    "used_for": used_for,
                    "position": one.position,
                }
            )
            for one in sorted(new.values())
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                cut_short = file.tell() and not _ends_with_newline(file)
                file.write(("\n" * bool(cut_short) + "\n".join(lines) + "\n").encode())
        except OSError as error:  # a full disk must not end the run here
            logger.warning(f"{self.path} cannot be written ({error}); it would say: {lines}")


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def take_replaced(loader: FluxDataLoader | ValidationLoader) -> list[Replacement]:
    """What a loader replaced since this was last asked."""
    found, loader.replaced = loader.replaced, []
    return found


def listed_items(path: Path) -> list[str]:
    """Names in a quarantine file; a last line cut short by a crash is passed over."""
    names = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            names.append(json.loads(line)["item"])
        except ValueError:
            continue
    return names
