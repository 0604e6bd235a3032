"""Finding data on disk: walking folders, expanding patterns, recognising foreign files."""

import itertools
import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from torchtitan_flux.tensor_files import file_kinds
from torchtitan_flux.tensor_files.file_kinds import HEAD as HEAD

LFS_POINTER = "is a Git LFS pointer, run `git lfs pull`"
LEFT_OUT = "left out: folders that cannot be opened, names that are not UTF-8, pipes and devices"
_FOREIGN = {
    file_kinds.LFS_POINTER: LFS_POINTER,
    file_kinds.WEB_PAGE: "is a web page: download the file itself",
    "an Arrow file": "is an Arrow file for random access (Feather), not a stream: write it as "
    "parquet",
    "a parquet file": "is a parquet file under another name: rename it to .parquet",
    **{k: f"is {k} under another name: unpack it" for k in file_kinds.COMPRESSED},
}


class Directory(NamedTuple):
    """A directory of a walk: its path relative to the root, "" for the root; names, sorted.

    `left_out` are paths of what LEFT_OUT says.
    """

    name: str
    files: list[str]
    folders: list[str]
    left_out: list[str]

    def paths(self) -> list[str]:
        """The files, relative to the root."""
        return [os.path.join(self.name, file) for file in self.files]


def walk(
    root: Path, without: Path | None = None, only: Collection[str] | None = None
) -> Iterator[Directory]:
    """Every directory at and below `root`, parents first, siblings sorted.

    Hidden names, the folder `without` and, directly below the root, folders not in `only` are left
    out. Links are followed, but not in circles; a broken one counts as a file. OSError where the
    root cannot be listed.
    """
    skipped = _identity(without) if without and without.is_dir() else None
    stack = [("", frozenset[tuple[int, int]]())]
    while stack:
        name, ancestors = stack.pop()
        found = Directory(name, [], [], [])
        try:
            identity = _identity(root / name)
            if identity in ancestors or (name and identity == skipped):
                continue
            with os.scandir(root / name) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        _kind(entry, found).append(entry.name)
        except OSError as error:
            if not name:
                raise
            yield Directory(name, [], [], [f"{name}: {error.strerror}"])
            continue
        for names in found[1:]:
            names.sort()
        yield found._replace(left_out=[os.path.join(name, one) for one in found.left_out])
        stack += [
            (os.path.join(name, folder), ancestors | {identity})
            for folder in reversed(found.folders)
            if name or only is None or folder in only
        ]


def _kind(entry: os.DirEntry, found: Directory) -> list[str]:
    """Which of the lists an entry belongs to."""
    if not is_unicode(entry.name):
        return found.left_out
    try:
        if entry.is_dir():
            return found.folders
        return found.files if entry.is_file() or not os.path.exists(entry) else found.left_out
    except OSError:  # a link to itself
        return found.left_out


def files_below(folder: Path, without: Path | None) -> tuple[list[str], list[str]]:
    """(all files that `walk` meets, what it leaves out), relative to the folder."""
    found = list(walk(folder, without))
    names = [path for directory in found for path in directory.paths()]
    return names, [one for directory in found for one in directory.left_out]


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
    if path.is_symlink():
        return "is a broken link"
    return "is no file" if path.exists() else "does not exist"


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
