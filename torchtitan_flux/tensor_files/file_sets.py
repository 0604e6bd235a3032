"""Which safetensors files of a folder belong together, by their names: shards, index, variants."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchtitan_flux.formatting import listed
from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights, read_json

_SET = r"(?P<stem>[^.]+?)(?:\.(?P<variant>.+?))?"
_FILE = re.compile(rf"{_SET}(?:-\d{{5}}-of-(?P<count>\d{{5}}))?\.(?:safetensors|sft)")
_INDEX = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(?:\.(?P<variant>.+))?\.json")


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold one set of tensors.

    Attributes:
        stem: what their names begin with, such as "diffusion_pytorch_model".
        variant: "" or such as "fp16".
        names: of the files that are there.
        index: name of the file that says what lies where; empty without.
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

    def paths(self) -> list[Path]:
        """All files of the set; UnreadableWeights names what is missing of them."""
        if not self.index:
            if len(self.names) < self.count:
                raise UnreadableWeights(
                    f"{self.folder} has {listed(self.names)}, {len(self.names)} of {self.count} "
                    "files; get the others"
                )
            return [self.folder / name for name in self.names]
        index = self.folder / self.index
        files = [self.folder / name for name in sorted(set(read_weight_map(index).values()))]
        if missing := [one for one in files if not one.is_file()]:
            raise UnreadableWeights(
                f"{index} names {listed(one.name for one in missing)}, which "
                f"{absence(missing[0])}; get it again"
            )
        return files


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of the file beside the index that holds it; UnreadableWeights."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in table.values()
    ):
        raise UnreadableWeights(f"{index}: its weight_map is no table of file names")
    return table


def shard_count(path: Path) -> int:
    """Of how many files a file is one, by its name."""
    found = _FILE.fullmatch(path.name)
    return int(found["count"] or 1) if found else 1


def weight_files(folder: Path, stems: Iterable[str] = ()) -> list[WeightFiles]:
    """Sets of safetensors files in a folder; a variant only where the plain set is not there.

    Where there are several, those of the first of the `stems` that any of them has count.
    """
    sets = all_files(folder)
    plain = {one.stem for one in sets if not one.variant}
    sets = [one for one in sets if not one.variant or one.stem not in plain]
    for stem in stems:
        if found := [one for one in sets if one.stem == stem or one.stem.startswith(f"{stem}-")]:
            return found
    return sets


def all_files(folder: Path) -> list[WeightFiles]:
    """Every set of safetensors files in a folder, variants included."""
    indexes: dict[tuple[str, str], str] = {}
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(path.name for path in folder.iterdir()):  # broken links included
        if found := _INDEX.fullmatch(name):
            indexes[found["stem"], found["variant"] or ""] = name
        elif found := _FILE.fullmatch(name):
            members[found["stem"], found["variant"] or ""].append(name)
    sets = []
    for key in sorted({*indexes, *members}):
        names, index = members[key], indexes.get(key, "")
        whole = [name for name in names if shard_count(folder / name) == 1]
        if whole and not index:  # shards beside it are of an earlier download
            names = whole[:1]
        count = max((shard_count(folder / name) for name in names), default=0)
        sets.append(WeightFiles(folder, *key, tuple(names), index, count))
    return sets
