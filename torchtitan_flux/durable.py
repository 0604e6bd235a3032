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


def take(descriptor: int) -> bool:
    """Whether a file or folder is this process's until the descriptor is closed.

    False where another one has it. A file system without locks cannot tell, and says True.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
