"""One run writes a dump folder at a time."""

import os
import socket
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

from torchtitan_flux.files import try_lock
from torchtitan_flux.startup.load_config import ConfigError

NAME = "run.lock"


class RunFolderLock:
    """A lock that the kernel gives back when this process ends, however it ends.

    The file stays: whoever removed it could remove another's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        # A forked loader worker shares the lock and could outlive this process.
        os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        """Give the folder back; in a forked process only its own share of the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_run_folder(folder: str | Path) -> RunFolderLock | None:
    """Take `folder` for this process; called by one process of a run.

    Returns:
        the lock, to be kept; None where the file system has no locks (logged).

    Raises:
        ConfigError: another live process has it.
    """
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    locked = try_lock(descriptor)
    if locked:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode(), 0)
        return RunFolderLock(descriptor)
    os.close(descriptor)
    if locked is None:
        logger.warning(f"{path}: this file system has no locks; start no second run there")
        return None
    holder = path.read_text().strip() or "an unknown process"
    raise ConfigError(
        [
            f"job.dump_folder = {str(folder)!r} is being written by another run ({holder}); wait "
            "for it, stop it, or set another job.dump_folder"
        ]
    )
