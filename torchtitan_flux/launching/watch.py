"""While the ranks run: passes a stop on to them, sees who fails first, ends those left behind."""

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torchtitan_flux.launching.output import RankOutput
from torchtitan_flux.training.heartbeat import Beat, read_beats
from torchtitan_flux.training.stopping import ONE_REQUEST

PATIENCE = 5.0
"""Seconds after the first failure in which the other ranks may leave a traceback of their own.
Those that wait for the failed one on a GPU never would; torchrun would give them 30."""

PERIOD = 0.1

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask for a stop; the last is what a lost connection sends."""


class Watch:
    """A thread beside torchrun's, which holds the main one.

    torchrun itself would signal whole process groups, loader workers included, and give ranks 30 s.

    Args:
        folder: where the ranks leave their beats.
        output: knows which ranks are about to start.
        grace: seconds that ranks get to save.
        saves: whether ranks save and leave when they are asked to; otherwise they are ended.
    """

    def __init__(self, folder: Path, output: RankOutput, grace: int, saves: bool):
        self._folder = folder
        self._output = output
        self._grace = grace
        self._saves = saves
        self.requested: signal.Signals | None = None
        """The signal that asked for a stop."""
        self.overdue = False
        """Whether ranks had to be ended because they did not save in time."""
        self.killed: set[int] = set()
        """Ranks that this launcher ended."""
        self.states: dict[int, str] = {}
        """State letter of each rank's process, as it was before the first failure."""
        self.failed_at: float | None = None
        """Time of the first failure, seconds since the epoch."""
        self._requested_at = 0.0
        self._asked: set[int] = set()
        self._ended = threading.Event()
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._before: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        # Python's handlers wait for the main thread, which may wait for other nodes inside torch.
        signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        for number in STOPS:
            if signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            self._before[number] = signal.signal(number, _noted)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._written.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            if select.select([self._read], [], [], PERIOD)[0]:
                for number in self._read.recv(16):
                    if number in STOPS:
                        self._on_signal(signal.Signals(number))
            beats = read_beats(self._folder)
            self._look_for_failure(beats)
            if self.requested is not None:
                self._ask(beats)
            self._end_late_ones(beats)

    # ---- a stop on request ------------------------------------------------------------------

    def _on_signal(self, number: signal.Signals) -> None:
        if self.requested is not None:
            # a terminal signals the whole group, and what stands between (uv, make, timeout) again
            if time.monotonic() - self._requested_at < ONE_REQUEST:
                return
            _say(f"{number.name} again: ending all ranks; the last checkpoint stays")
            self._leave_at_once()
        self.requested = number
        self._requested_at = time.monotonic()
        if not self._saves or not self._output.ranks:
            _say(f"{number.name}: ended")
            self._leave_at_once()
        _say(
            f"{number.name}: the ranks finish their step and save, {self._grace} s at most; "
            "a second signal ends them at once"
        )

    def _ask(self, beats: dict[int, Beat]) -> None:
        """SIGTERM to the rank processes alone: their loader workers are needed to the end.

        A rank that has just been started is asked as soon as it is there.
        """
        for rank, beat in beats.items():
            if rank not in self._asked and beat.left is None:
                self._asked.add(rank)
                _signal(os.kill, beat.pid, signal.SIGTERM)

    def _leave_at_once(self) -> None:
        """Without torchrun, which may be waiting; ranks that are not known yet die with us."""
        for beat in read_beats(self._folder).values():
            _signal(os.killpg, beat.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)

    # ---- a failure --------------------------------------------------------------------------

    def _look_for_failure(self, beats: dict[int, Beat]) -> None:
        if self.failed_at is not None:
            return
        states = {rank: process_state(beat.pid) for rank, beat in beats.items()}
        if any(
            beat.left not in (None, 0) or (states[rank] is None and beat.left != 0)
            for rank, beat in beats.items()
        ):
            self.failed_at = time.time()
        for rank, state in states.items():
            if state is not None:
                self.states[rank] = state

    def _end_late_ones(self, beats: dict[int, Beat]) -> None:
        failed = self.failed_at is not None and time.time() - self.failed_at > PATIENCE
        late = self.requested is not None and time.monotonic() - self._requested_at > self._grace
        if not failed and not late:
            return
        for rank, beat in beats.items():
            if rank not in self.killed and process_state(beat.pid) is not None:
                self.overdue |= not failed
                if beat.left is None:
                    self.killed.add(rank)
                _signal(os.killpg, beat.pid, signal.SIGKILL)


def process_state(pid: int) -> str | None:
    """State letter of a process, as in ps: T is stopped, D waits in the kernel. None: it ended.

    "?" where the system does not tell.
    """
    try:
        os.kill(pid, 0)
        # the name, in brackets, may hold anything
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else "?"
    return None if state in "ZX" else state


def _signal(send: Any, pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        send(pid, number)


def _say(line: str) -> None:
    print(f"torchtitan-flux: {line}", file=sys.stderr, flush=True)


def _noted(number: int, frame: FrameType | None) -> None:
    """The interpreter has written the signal's number to the wakeup socket already."""
