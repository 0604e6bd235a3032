"""Finding data on disk: walking folders, expanding patterns."""

import glob
import itertools
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtitan_flux.data.sources.source import Split

PATH_KEY: dict[Split, str] = {
    "train": "training.dataset_path",
    "held_out": "validation.dataset_path",
}
"""The TOML key that says where the data of each split lie."""


@dataclass(frozen=True)
class Directory:
    """What a walk met in one directory.

    Attributes:
        name: path relative to the root, "" for the root itself, "/" between the parts.
        files: names of the files, sorted by their UTF-8 bytes.
        unnameable: files whose names are not UTF-8, and therefore left out.
        error: what the operating system said when it refused to list the directory, which then
            seems to be empty.
    """

    name: str
    files: list[str]
    unnameable: int = 0
    error: OSError | None = None

    def paths(self) -> list[str]:
        """The files, relative to the root."""
        return [f"{self.name}/{file}" if self.name else file for file in self.files]


def walk(
    root: Path,
    without: Path | None = None,
    only: Container[str] | None = None,
    strict: bool = True,
) -> Iterator[Directory]:
    """Every directory at and below `root`, parents first, siblings sorted.

    Hidden files and directories are ignored. Symbolic links are followed, except to a directory
    that is being walked already; a broken link counts as a file, and so does a pipe or a device.

    Args:
        root: an existing directory.
        without: a directory that is left out, with all below it.
        only: names of the directories directly below the root that are walked; None for all.
        strict: raise where a directory cannot be listed; else say so in its `error`.

    Raises:
        OSError: the root, or with `strict` any directory, cannot be listed.
    """
    without = without and without.expanduser()
    skipped = _identity(without) if without and without.is_dir() else None

    def below(name: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[Directory]:
        try:
            identity = _identity(root / name)
            if identity in ancestors or (name and identity == skipped):
                return
            files, directories, unnameable = _entries(root / name)
        except OSError as error:
            if strict or not name:
                raise
            yield Directory(name, [], error=error)
            return
        yield Directory(name, sorted(files), unnameable)
        for directory in sorted(directories):
            if name:
                yield from below(f"{name}/{directory}", ancestors | {identity})
            elif only is None or directory in only:
                yield from below(directory, ancestors | {identity})

    yield from below("", frozenset())


def _entries(folder: Path) -> tuple[list[str], list[str], int]:
    """(names of files, of directories, how many are not UTF-8), what is hidden left out."""
    files, directories, unnameable = [], [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_directory = entry.is_dir()
            except OSError:  # a link to itself
                is_directory = False
            if not _is_text(entry.name):
                unnameable += 1
            elif is_directory:
                directories.append(entry.name)
            else:
                files.append(entry.name)
    return files, directories, unnameable


def directories_of(root: Path, without: Path | None = None) -> list[str]:
    """Names of the directories directly below `root`, sorted, without those that `walk` ignores."""
    without = without and without.expanduser().resolve()
    return sorted(name for name in _entries(root)[1] if (root / name).resolve() != without)


def missing(path: Path) -> str:
    """Why there is no file, to be read after its name."""
    return "is a broken link" if path.is_symlink() else "does not exist"


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def matches(pattern: str) -> list[Path]:
    """Files that a shell pattern with {00..09}, {a,b}, *, ? and [] names, sorted within each brace.

    What braces alone spell out is returned whether it exists or not; what `*` finds, exists.
    """
    found: list[str] = []
    for name in expand_braces(pattern):
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    return [Path(name) for name in dict.fromkeys(found)]


def expand_braces(pattern: str) -> list[str]:
    """The names that {a,b} and {1..3} stand for, in the order of the shell; {08..11} keeps zeros.

    Braces without a comma or a range mean themselves.
    """
    for match in re.finditer(r"\{([^{}]*)\}", pattern):  # innermost first, so that they nest
        inside = match[1]
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", inside):
            first, last = int(numbers[1]), int(numbers[2])
            padded = any(re.match(r"-?0\d", number) for number in numbers.groups())
            width = max(map(len, numbers.groups())) if padded else 0
            steps = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            choices = [f"{number:0{width}d}" for number in steps]
        elif "," in inside:
            choices = inside.split(",")
        else:
            continue
        head, tail = pattern[: match.start()], pattern[match.end() :]
        expanded = (expand_braces(head + choice + tail) for choice in choices)
        return list(dict.fromkeys(itertools.chain.from_iterable(expanded)))
    return [pattern]


def given_path(path: str | None, split: Split, what: str) -> str:
    """The path that a source of files cannot do without.

    Raises:
        ValueError: there is none; says which key to set, and to `what`.
    """
    if not path:
        raise ValueError(f"{PATH_KEY[split]}: not set; name {what}")
    return os.path.expanduser(path)
