"""SIGTERM and Ctrl-C ask for a stop: the step is finished and saved. A second one does not wait."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ONE_REQUEST = 1.0
"""Seconds in which several signals are one request, for a rank and for the launcher: Slurm signals
every process of a job, a terminal every one of its group, and launchers and wrappers forward it."""


class StopSignals:
    """Handlers of this process's SIGTERM and SIGINT, until `uninstall`; made in the main thread.

    A thread of its own reads the signals: Python's handlers wait for the main thread, which may
    stand in a collective that never ends.

    Attributes:
        requested: whether somebody asked for a stop. The trainer asks all ranks at every step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, noted) for s in SIGNALS}
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()
        # The launcher starts its ranks with them blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def uninstall(self) -> None:
        """Leave the signals to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._written.close()  # ends the thread

    def _listen(self) -> None:
        with self._read:
            while received := self._read.recv(1):
                if received[0] in SIGNALS:
                    self._receive(signal.Signals(received[0]))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.requested:
            self._first = now
            self.requested = True
            logger.info(
                f"{number.name}: stopping at the next step boundary; a second signal leaves at once"
            )
        elif now - self._first > ONE_REQUEST:
            print(f"{number.name}: left without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)


def noted(number: int, frame: FrameType | None) -> None:
    """Handler that does nothing: the interpreter writes to the wakeup socket, if there is one."""
