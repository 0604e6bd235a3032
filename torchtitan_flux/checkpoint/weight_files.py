"""Which safetensors files of a folder belong together: shards, their index, variants."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan_flux.checkpoint.safetensors_file import (
    TensorsFile,
    UnreadableWeights,
    listed,
    read_weight_map,
)
from torchtitan_flux.paths import absence

_VARIANT = r"(?:\.(?:fp|bf|float|bfloat|int)\d+\w*|\.(?:non_)?ema)"
_FILE = re.compile(
    rf"(?P<stem>.+?)(?P<before>{_VARIANT})?(?:-(?P<number>\d{{5}})-of-(?P<count>\d{{5}}))?"
    rf"(?P<after>{_VARIANT})?\.(?:safetensors|sft)"
)
_INDEX = re.compile(
    rf"(?P<stem>.+?)(?P<before>{_VARIANT})?\.safetensors\.index(?P<after>{_VARIANT})?\.json"
)


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold one set of tensors.

    Attributes:
        folder: where they lie.
        stem: what their names begin with, such as "diffusion_pytorch_model".
        variant: "" or such as "fp16".
        names: of the files; those that are missing are not among them.
        index: the name of the file that says what lies where; empty without.
        count: how many files there have to be, by their names.
    """

    folder: Path
    stem: str
    variant: str
    names: tuple[str, ...]
    index: str
    count: int

    @property
    def shown(self) -> str:
        """For a message: the one file, or the index, or the first."""
        return self.index or self.names[0]

    def open(self) -> list[TensorsFile]:
        """All files, found consistent with each other.

        Raises:
            UnreadableWeights: names the shard that is missing, or the tensor that is not in its
                shard.
        """
        if self.index:
            return _by_index(self.folder / self.index)
        if len(self.names) < self.count:
            raise UnreadableWeights(
                f"{self.folder} has {listed(self.names)}, {len(self.names)} of {self.count} files; "
                "get the others"
            )
        return [TensorsFile.open(self.folder / name) for name in self.names]


def is_index(path: Path) -> bool:
    """Whether a file, by its name, says in which shards tensors lie."""
    return _INDEX.fullmatch(path.name) is not None


def shard_count(path: Path) -> int:
    """Of how many files a file is one, by its name."""
    found = _FILE.fullmatch(path.name)
    return int(found["count"] or 1) if found else 1


def weight_files(folder: Path) -> list[WeightFiles]:
    """Sets of safetensors files in a folder; a variant only where the plain set is not there."""
    sets = all_files(folder)
    plain = {one.stem for one in sets if not one.variant}
    return [one for one in sets if not one.variant or one.stem not in plain]


def all_files(folder: Path) -> list[WeightFiles]:
    """Every set of safetensors files in a folder, variants included."""
    entries = sorted(path.name for path in folder.iterdir())  # broken links included
    indexes: dict[tuple[str, str], str] = {}
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in entries:
        if found := _INDEX.fullmatch(name):
            indexes[_set_of(found)] = name
        elif found := _FILE.fullmatch(name):
            members[_set_of(found)].append(name)
    sets = []
    for key in sorted({*indexes, *members}):
        names, index = members[key], indexes.get(key, "")
        whole = [name for name in names if shard_count(folder / name) == 1]
        if whole and not index:  # shards beside it are of an earlier download
            names = whole[:1]
        count = max((shard_count(folder / name) for name in names), default=0)
        sets.append(WeightFiles(folder, *key, tuple(names), index, count))
    return sets


def by_stem(sets: Sequence[WeightFiles], stems: Iterable[str]) -> list[WeightFiles]:
    """The sets of the first of the given beginnings that any set has; all of them where none."""
    for stem in stems:
        if found := [one for one in sets if one.stem == stem or one.stem.startswith(f"{stem}-")]:
            return found
    return list(sets)


def _set_of(found: re.Match[str]) -> tuple[str, str]:
    return found["stem"], (found["before"] or found["after"] or "").removeprefix(".")


def _by_index(index: Path) -> list[TensorsFile]:
    table, folder = read_weight_map(index), index.parent
    names = sorted(set(table.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if links := [name for name in missing if (folder / name).is_symlink()]:
        raise UnreadableWeights(f"{folder / links[0]} {absence(folder / links[0])}; get it again")
    if missing:
        raise UnreadableWeights(
            f"{index} names {listed(missing)}, which {folder} does not hold; get it again"
        )
    files = [TensorsFile.open(folder / name) for name in names]
    holder = {name: file.path.name for file in files for name in file.shapes}
    lost = [f"{name} (in {file})" for name, file in table.items() if holder.get(name) != file]
    if lost:
        raise UnreadableWeights(f"{index} names tensors that are not there: {listed(lost)}")
    return files
