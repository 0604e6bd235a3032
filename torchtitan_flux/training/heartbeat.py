"""Where each rank is: its step, phase and the time, left where the launcher can read them.

They lie in a file mapped into memory, so that a beat costs a microsecond and the last one outlives
the process, however it ended.
"""

import contextlib
import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "FLUX_HEARTBEATS"
"""Environment variable in which the launcher names the folder."""

_RECORD = struct.Struct("=qqqd24s")  # pid, status it left with, step, time, phase
_RUNNING = -1


@dataclass(frozen=True)
class Beat:
    """The last sign of a rank."""

    rank: int
    pid: int
    step: int
    phase: str
    time: float
    """Seconds since the epoch."""
    left: int | None
    """Status that the rank was about to end with, None when it did not get that far."""

    @property
    def place(self) -> str:
        """For reports: "in step 12 (data)"."""
        return f"in step {self.step} ({self.phase})" if self.step else f"while {self.phase}"


class Heartbeat:
    """Writes this rank's beats; does nothing where no launcher asked for them."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._pid = os.getpid()
        folder = os.environ.get(FOLDER)
        if not folder:
            return
        path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}"
        with contextlib.suppress(OSError):  # the launcher is gone, and its folder with it
            with open(path, "ab") as file:
                file.truncate(_RECORD.size)
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), _RECORD.size)

    def beat(self, step: int, phase: str) -> None:
        """Say that `phase` of `step` begins."""
        self._write(step, phase, _RUNNING)

    def leave(self, status: int) -> None:
        """Say that the process ends with this status; step and phase stay as they are."""
        if self._map is not None:
            _, _, step, _, phase = _RECORD.unpack_from(self._map)
            self._write(step, phase.rstrip(b"\0").decode(), status)

    def _write(self, step: int, phase: str, status: int) -> None:
        if self._map is not None:
            _RECORD.pack_into(self._map, 0, self._pid, status, step, time.time(), phase.encode())


def read_beats(folder: Path) -> dict[int, Beat]:
    """The last beat of every rank that has begun, by rank."""
    beats = {}
    for path in folder.glob("rank-*"):
        name = path.name.removeprefix("rank-")
        if not name.isdecimal():
            continue
        with contextlib.suppress(struct.error, OSError, UnicodeDecodeError):
            pid, status, step, when, phase = _RECORD.unpack(path.read_bytes())
            if pid:
                left = None if status == _RUNNING else status
                text = phase.rstrip(b"\0").decode()
                beats[int(name)] = Beat(int(name), pid, step, text, when, left)
    return beats
