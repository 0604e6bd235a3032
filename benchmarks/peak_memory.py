"""The most memory that a piece of a benchmark takes: anonymous on the CPU, torch's on a GPU."""

import os
import threading
from pathlib import Path
from types import TracebackType

import torch

INTERVAL = 0.004
"""Seconds between two looks at the memory of this process; a look takes some microseconds."""


def anonymous_memory() -> int:
    """Bytes of this process that belong to no file; 0 where the system does not tell."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """The most memory that is taken on a device while this context is open.

    Attributes:
        before: bytes when it was opened; on the CPU mostly the program itself.
        peak: most bytes beyond that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look_again, name="peak-memory", daemon=True)
        self.before = self._most = 0

    @property
    def peak(self) -> int:
        if self._device.type != "cpu":
            return torch.cuda.max_memory_allocated(self._device) - self.before
        self._most = max(self._most, anonymous_memory())
        return self._most - self.before

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cpu":
            self.before = self._most = anonymous_memory()
            self._watch.start()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch.is_alive():
            self._ended.set()
            self._watch.join()

    def _look_again(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._most = max(self._most, anonymous_memory())
