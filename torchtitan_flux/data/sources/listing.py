"""Finding data on disk: walking folders, expanding patterns, recognising foreign files."""

import glob
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchtitan_flux.tensor_files import file_kinds
from torchtitan_flux.tensor_files.file_kinds import HEAD as HEAD

LFS_POINTER = "is a Git LFS pointer, run `git lfs pull`"
NOT_UTF8 = "files whose names are not UTF-8 are left out"
_FOREIGN = {
    file_kinds.LFS_POINTER: LFS_POINTER,
    file_kinds.WEB_PAGE: "is a web page: download the file itself",
    "an Arrow file": "is an Arrow file for random access (Feather), not a stream: write it as "
    "parquet",
    "a parquet file": "is a parquet file under another name: rename it to .parquet",
    **{k: f"is {k} under another name: unpack it" for k in file_kinds.COMPRESSED},
}


@dataclass(frozen=True)
class Directory:
    """A directory of a walk: its path relative to the root, "" for the root; names, sorted.

    `undecodable` is how many names are not UTF-8 and left out, `error` why it cannot be listed.
    """

    name: str
    files: list[str]
    folders: list[str]
    undecodable: int = 0
    error: OSError | None = None

    def paths(self) -> list[str]:
        """The files, relative to the root."""
        return [os.path.join(self.name, file) for file in self.files]


def walk(
    root: Path, without: Path | None = None, only: Collection[str] | None = None
) -> Iterator[Directory]:
    """Every directory at and below `root`, parents first, siblings sorted.

    Hidden names, the folder `without` and, directly below the root, folders not in `only` are left
    out. Links are followed, but not in circles; a broken one counts as a file, as a pipe does.
    OSError where the root cannot be listed.
    """
    skipped = _identity(without) if without and without.is_dir() else None
    stack = [("", frozenset[tuple[int, int]]())]
    while stack:
        name, ancestors = stack.pop()
        files, folders, undecodable = [], [], 0
        try:
            identity = _identity(root / name)
            if identity in ancestors or (name and identity == skipped):
                continue
            with os.scandir(root / name) as entries:
                for entry in entries:
                    if not is_unicode(entry.name):
                        undecodable += 1
                    elif not entry.name.startswith("."):
                        (folders if _is_folder(entry) else files).append(entry.name)
        except OSError as error:
            if not name:
                raise
            yield Directory(name, [], [], error=error)
            continue
        yield Directory(name, sorted(files), sorted(folders), undecodable)
        stack += [
            (os.path.join(name, folder), ancestors | {identity})
            for folder in sorted(folders, reverse=True)
            if name or only is None or folder in only
        ]


class Files(NamedTuple):
    """Files below a folder, relative to it; folders with undecodable names; unlisted folders."""

    names: list[str]
    undecodable: list[str]
    refused: list[tuple[Path, OSError]]


def files_below(folder: Path, without: Path | None) -> Files:
    """All files that `walk` meets."""
    files = Files([], [], [])
    for directory in walk(folder, without):
        files.names.extend(directory.paths())
        files.undecodable.extend([directory.name or str(folder)] * directory.undecodable)
        if directory.error:
            files.refused.append((folder / directory.name, directory.error))
    return files


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def is_unicode(name: str) -> bool:
    """Whether a name can be encoded as UTF-8."""
    return name == name.encode("utf-8", "replace").decode()


def stamp(path: Path) -> str:
    """Size and time of the last change of a file, "" where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"


def matches(pattern: str) -> list[Path]:
    """Files that a shell pattern names; what braces spell out need not exist."""
    found: list[str] = []
    for name in expand_braces(pattern):
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    return [Path(name) for name in dict.fromkeys(found)]


def expand_braces(pattern: str) -> list[str]:
    """The names that {a,b}, {1..3} and {08..11} stand for in a shell, in its order."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):  # innermost first, so that they nest
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", match[1]):
            first, last = map(int, numbers.groups())
            width = max(map(len, numbers.groups())) if re.search(r"\b0\d", match[1]) else 0
            step = 1 if first <= last else -1
            choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
        elif "," in match[1]:
            choices = match[1].split(",")
        else:
            continue
        head, tail = pattern[: match.start()], pattern[match.end() :]
        expanded = (expand_braces(head + choice + tail) for choice in choices)
        return list(dict.fromkeys(itertools.chain.from_iterable(expanded)))
    return [pattern]


def as_spelled(folder: Path, name: str) -> str:
    """A name, which may have back-slashes or another Unicode spelling, as it is spelled on disk."""
    if name.isascii() and "\\" not in name:
        return name
    names = [name, name.replace("\\", "/")]
    names += [unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in names]
    return next((name for name in names if os.path.lexists(folder / name)), names[1])


def missing(path: Path) -> str:
    """Why there is no file, to be read after its name."""
    return "is a broken link" if path.is_symlink() else "does not exist"


def not_regular(path: Path) -> str:
    """What a path is that opening might wait for or never end; "" for a regular file."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((what for test, what in kinds.items() if test(mode)), "a device")


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file is what Git leaves in place of a large one, by its first bytes."""
    return file_kinds.kind_of_bytes(head) == file_kinds.LFS_POINTER


def foreign_content(head: bytes, name: str = "") -> str:
    """What a file of a name is instead by its first `HEAD` bytes, to be read after it, or ""."""
    if not head:
        return "is empty"
    kind = file_kinds.kind_of_bytes(head)
    if kind == "a parquet file" and name.lower().endswith(".parquet"):
        return ""
    return _FOREIGN.get(kind, "")
