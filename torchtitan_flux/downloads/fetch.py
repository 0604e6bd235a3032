"""One file, fetched in as many pieces as the connection needs, and given its name when it is right.

huggingface_hub writes to a file of a random name and removes it when it fails, so that a second
run starts over. Here the bytes go to `NAME.DIGEST.part` beside the file; the next run asks for the
rest. The checksum is taken on the way, and only a right file gets its name.
"""

import errno
import glob
import hashlib
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import tqdm

from torchtitan_flux.downloads.choose import DownloadError, RemoteFile
from torchtitan_flux.downloads.hub import Hub
from torchtitan_flux.files import sync_folder

CHUNK = 1 << 20
DIGITS = 12
"""Of the checksum, in the name of a part file."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds before each new attempt; an attempt that brought bytes starts the row again."""


def part_path(path: Path, file: RemoteFile) -> Path:
    """Where the bytes of `file` wait until `path` can be whole. Another content, another name."""
    return path.with_name(f"{path.name}.{file.digest[:DIGITS]}.part")


def is_right(path: Path, file: RemoteFile) -> bool:
    """Whether `path` is there and holds exactly this file."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as content, _bar(f"checking {path.name}", file.size) as bar:
        return _digest(content, file.size, file, bar).hexdigest() == file.digest


def fetch(hub: Hub, file: RemoteFile, path: Path) -> None:
    """Fetch what is missing of `file`, verify the whole and give it its name.

    Raises:
        DownloadError: of status 1. Connection cut for good, access lost, disk full: what came is
            kept and the next run continues. Wrong checksum: what came is deleted.
    """
    part = part_path(path, file)
    with hub.explained(status=1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob(f"{glob.escape(path.name)}.{'?' * DIGITS}.part"):
                if stale != part:
                    stale.unlink()
            _complete(hub, file, part)
            os.replace(part, path)
            sync_folder(path.parent)
        except (HTTPError, OfflineModeIsEnabled):  # the hub's; some are OSErrors too
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(
                    f"disk full while {file.name} was written to {path.parent}: free some space "
                    "(--dry_run shows how much it needs); the same command continues",
                    status=1,
                ) from error
            raise DownloadError(f"{file.name} cannot be written: {error}", status=1) from error


def _complete(hub: Hub, file: RemoteFile, part: Path) -> None:
    """Bring the part file to its full and verified length."""
    part.touch()
    with part.open("r+b") as out, _bar(file.name, file.size) as bar:
        done = os.fstat(out.fileno()).st_size
        if done > file.size:
            out.truncate(done := 0)
        digest = _digest(out, done, file, bar)
        failures = 0
        while done < file.size:
            before = done
            try:
                with hub.stream(file, done) as response:
                    if done and response.status_code != 206:  # it cannot give a part
                        out.seek(0)
                        out.truncate(done := 0)
                        before, digest = 0, _begun(file)
                        bar.reset()
                    for chunk in response.iter_bytes():  # as they come: none is lost in a cut
                        done += len(chunk)
                        if done > file.size:
                            break
                        out.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
            except HfHubHTTPError:
                raise
            except HTTPError as error:
                out.flush()
                failures = 0 if done > before else failures
                if failures == len(PAUSES):
                    raise DownloadError(
                        f"the connection was cut at {done:,} of {file.size:,} bytes of {file.name} "
                        f"({error}); the same command continues there",
                        status=1,
                    ) from error
                time.sleep(PAUSES[failures])
                failures += 1
                continue
            if done == before:
                raise DownloadError(f"the hub sends no bytes of {file.name}", status=1)
        out.flush()
        os.fsync(out.fileno())
    if done != file.size or digest.hexdigest() != file.digest:
        part.unlink()
        raise DownloadError(
            f"{file.name}: what was sent is not the file that the hub lists (its "
            f"{'sha256' if file.lfs else 'git sha1'} is {file.digest}); it was deleted. Run the "
            "same command again; if it happens twice, a proxy or the disk changes bytes",
            status=1,
        )


def _begun(file: RemoteFile) -> Any:
    """The checksum of a file before its first byte."""
    if file.lfs:
        return hashlib.sha256()
    # what `git hash-object` computes, which is what the hub lists
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def _digest(content: BinaryIO, length: int, file: RemoteFile, bar: tqdm) -> Any:
    """The checksum over the first `length` bytes; `content` stands behind them afterwards."""
    digest = _begun(file)
    while length > 0 and (chunk := content.read(min(CHUNK, length))):
        digest.update(chunk)
        bar.update(len(chunk))
        length -= len(chunk)
    return digest


def _bar(label: str, size: int) -> tqdm:
    """The hub's progress bar, on terminals only; HF_HUB_DISABLE_PROGRESS_BARS hides it."""
    return tqdm(desc=label, total=size, unit="B", unit_scale=True, disable=None)
