"""What a device has free, and the most that drawing takes of it.

On a GPU that is what torch's allocator gives out. On the CPU it is anonymous memory: pages of a
weights file that is read through a mapping belong to the file, and the system takes them back when
it needs them.
"""

import os
import threading
from pathlib import Path
from types import TracebackType

from torchtitan_flux.torchtitan_shim import local_ranks  # isort: skip

import torch

INTERVAL = 0.004
"""Seconds between two looks at the memory of this process; a look takes some microseconds."""


def text_of(size: int) -> str:
    """Bytes for people: `812 MiB`, `11.4 GiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device by this rank.

    Ranks of a machine share its CPU memory; each gets its part.
    """
    if device.type != "cpu":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(_available(), _left_in_group()) // local_ranks()


def _available() -> int:
    """MemAvailable of the machine: free pages, and those that the system can take back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # another system: what there is at all
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return int(values["MemAvailable"][0]) * 1024


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Below the limit of a container, files in its page cache not counted."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**62
    if not limit.isdigit():
        return 2**62
    files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(0, int(limit) - used + files)


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
