"""What drawing a task will take, with and without --low_memory, and what is said about it."""

import math
from dataclasses import dataclass
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import utils

from torchtitan_flux.inference.command import Task
from torchtitan_flux.inference.draw import portion
from torchtitan_flux.inference.estimate import Estimate, estimate
from torchtitan_flux.inference.memory import text_of
from torchtitan_flux.model import FluxModelArgs


@dataclass(frozen=True)
class Expectation:
    """Bytes on one rank.

    Attributes:
        normal, low: all parts loaded, and one after another.
        batch: pictures that a rank really draws at once.
        what: in words.
    """

    normal: Estimate
    low: Estimate
    batch: int
    what: str

    @classmethod
    def of(
        cls, config: Any, args: FluxModelArgs, task: Task, ranks: int, elsewhere: bool = False
    ) -> "Expectation":
        """Before anything is loaded.

        Args:
            config: job configuration.
            args: resolved model arguments.
            task: what is to be drawn.
            ranks: that draw.
            elsewhere: not on this machine but on one with a GPU.
        """
        dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
        device = "cuda" if elsewhere else utils.device_type
        batch = min(task.batch, math.ceil(len(task.requests) / ranks))
        pictures = min(math.ceil(len(task.requests) / ranks), portion(batch) * batch)
        normal, low = (
            estimate(config, args, task.settings, batch, ranks, low, dtype, device, pictures)
            for low in (False, True)
        )
        what = (
            f"{config.model.flavor} at {task.settings.size}, {batch} at once, in "
            f"{config.training.mixed_precision_param}, on {device}"
        )
        return cls(normal, low, batch, what)

    def told(self, free: int, whose: str) -> str:
        """For --estimate: each phase of both paths, and which of them fits.

        Args:
            free: bytes there are.
            whose: where that is.
        """
        lines = [f"{self.what}; {text_of(free)} free {whose}"]
        for title, one in (("normal", self.normal), ("--low_memory", self.low)):
            verdict = "fits" if one.peak <= free else "does not fit"
            lines.append(f"{one.table(title)}\n  {verdict}")
        if self.normal.assumed:
            lines.append(f"not here, sizes of the published ones: {', '.join(self.normal.assumed)}")
        return "\n".join(lines)

    def took(self, peak: int, before: int, low_memory: bool) -> str:
        """The line at the end of every drawing.

        Args:
            peak: most bytes beyond `before`.
            before: what the program itself took.
            low_memory: which path was taken.
        """
        own, other = (self.low, self.normal) if low_memory else (self.normal, self.low)
        which = "without" if low_memory else "with"
        beside = f" beside the program's {text_of(before)}" if before else ""
        return (
            f"peak memory: {text_of(peak)}{beside} (estimated {text_of(own.peak)}; {which} "
            f"--low_memory {text_of(other.peak)})"
        )
