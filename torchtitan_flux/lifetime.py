"""A process that ends with the one that started it, also when that one is killed.

A rank whose launcher is gone would keep training next to the restarted run; a loader worker
whose rank is gone would wait for ever, since workers ignore SIGTERM.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the process `parent` ends; by default that of multiprocessing, as in a loader
    worker. Only Linux can; elsewhere this does nothing.

    The kernel looks at the *thread* that started this process: it must live as long as the parent.
    The order is lost on fork, so every process asks for itself.
    """
    if sys.platform.startswith("linux"):
        process = multiprocessing.parent_process()
        parent = parent or (process.pid if process else os.getppid())
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before we could ask
            os.kill(os.getpid(), signal.SIGKILL)
