"""Durable and atomic writes, locks that work without flock, and full disks."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes that name when the block ends without an error.

    Readers see the old file or the whole new one, also after a power failure. Raises what the
    block raises, and then leaves `path` as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def try_lock(descriptor: int, wait: bool = False, shared: bool = False) -> bool | None:
    """Lock an open file or folder until its descriptor is closed.

    Args:
        descriptor: of the open file or folder.
        wait: for as long as another process holds the lock.
        shared: only look whether another process holds it exclusively.

    Returns:
        True; False where another process holds it; None where the file system has no locks.
    """
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class DiskFull(OSError):
    """Something could not be written for want of room; the message names the disk and its room."""


def disk_full(error: BaseException, path: Path) -> DiskFull | None:
    """The error to report instead of one that came of a full disk or quota; None for any other.

    Args:
        error: raised on writing. torch's own hides the system's, which is then its cause.
        path: a folder on the disk, which need not exist yet.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno in (errno.ENOSPC, errno.EDQUOT):
            break
        behind = behind.__cause__ or behind.__context__
    if behind is None:
        return None
    disk = next(one for one in (path, *path.absolute().parents) if os.path.ismount(one))
    free = tqdm.format_sizeof(shutil.disk_usage(disk).free, "B")
    return DiskFull(f"no space left on {disk}: {free} are free, quotas apart")
