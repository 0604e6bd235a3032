"""Where each rank is: its step, phase and the time, in a file that outlives it.

The only clock is CLOCK_MONOTONIC, which all processes of a machine share.
"""

import contextlib
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "FLUX_HEARTBEATS"
"""Environment variable in which the launcher names the folder."""

_RECORD = struct.Struct("=dqq24s")  # time, step, exit status, phase
_RUNNING = -1


@dataclass(frozen=True)
class Beat:
    """The last sign of a rank, without a phase before its first one.

    Attributes:
        exit_status: what it is about to end with, None until then.
    """

    time: float = 0.0
    step: int = 0
    phase: str = ""
    exit_status: int | None = None

    @property
    def place(self) -> str:
        """For reports: "in step 12 (data)"."""
        if not self.phase:
            return "before its first sign"
        return f"in step {self.step} ({self.phase})" if self.step else f"while {self.phase}"


class Heartbeat:
    """Writes this rank's beats; does nothing where no launcher asked for them."""

    def __init__(self) -> None:
        self._file: int | None = None
        if folder := os.environ.get(FOLDER):
            with contextlib.suppress(OSError):  # the launcher is gone, and its folder with it
                path = Path(folder) / f"rank-{os.environ['RANK']}"
                self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def beat(self, step: int, phase: str) -> None:
        """Say that `phase` of `step` begins."""
        self._write(step, phase.encode(), _RUNNING)

    def leave(self, status: int) -> None:
        """Say that the process ends with this status; step and phase stay as they are."""
        if self._file is not None:
            _, step, _, phase = _RECORD.unpack(os.pread(self._file, _RECORD.size, 0))
            self._write(step, phase, status)

    def _write(self, step: int, phase: bytes, status: int) -> None:
        if self._file is not None:
            os.pwrite(self._file, _RECORD.pack(time.monotonic(), step, status, phase), 0)


def read_beat(folder: Path, rank: int) -> Beat:
    """The last beat of a rank."""
    with contextlib.suppress(OSError, struct.error):  # not started yet
        when, step, status, phase = _RECORD.unpack((folder / f"rank-{rank}").read_bytes())
        text = phase.rstrip(b"\0").decode()
        return Beat(when, step, text, None if status == _RUNNING else status)
    return Beat()
