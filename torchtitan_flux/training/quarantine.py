"""Items that could not be read: counted, named with the reason in a file, and a limit to them."""

import json
import os
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torchtitan.tools.logging import logger

from torchtitan_flux.collectives import gather
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
        path: the file; one that is there is appended to.
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
        # context and tensor peers read the same samples; positions sort, whatever the ranks
        found = sorted({one for of_rank in gather(local) for one in of_rank})
        if used_for == "training":
            self.count += len(found)
            latest = {one.item_id: one for one in [*self._latest, *found]}
            self._latest = list(latest.values())[-_SHOWN:]
        if dist.get_rank() == 0:
            self._append(found, used_for)

    def check(self, read: int) -> None:
        """Raise TooManyUnreadable, on every rank, where too many of `read` samples and the
        replaced ones could not be read."""
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
            self._listed = _listed_items(self.path)
        new = {one.item_id: one for one in reversed(found) if one.item_id not in self._listed}
        if not new:
            return
        self._listed |= set(new)
        lines = [
            json.dumps({"item": item, "reason": why, "used_for": used_for, "position": position})
            for position, item, why in sorted(new.values())
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    lines = [""] * (file.read() != b"\n") + lines  # a crash cut the last one short
                file.write("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:  # a full disk must not end the run here
            logger.warning(f"{self.path} cannot be written ({error}); it would say: {lines}")


def take_replaced(loader: FluxDataLoader | ValidationLoader) -> list[Replacement]:
    """What a loader replaced since this was last asked."""
    found, loader.replaced = loader.replaced, []
    return found


def _listed_items(path: Path) -> set[str]:
    """Names in a quarantine file; a last line cut short by a crash is passed over."""
    names = set()
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            names.add(json.loads(line)["item"])
        except ValueError:
            continue
    return names
