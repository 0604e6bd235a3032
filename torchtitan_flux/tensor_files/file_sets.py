"""Which safetensors files of a folder belong together, by their names: shards, index, variants."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

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


def _set_of(found: re.Match[str]) -> tuple[str, str]:
    return found["stem"], (found["before"] or found["after"] or "").removeprefix(".")
