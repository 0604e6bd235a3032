"""Files that are to be there after a power failure, and those that one process has alone."""

import fcntl
import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take(descriptor: int, wait: bool = False) -> bool | None:
    """Make a file or folder this process's until the descriptor is closed.

    Args:
        descriptor: of the open file or folder.
        wait: for as long as another process has it.

    Returns:
        True; False where another one has it; None where the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
