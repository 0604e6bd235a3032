"""The files of a folder's weights, chosen, opened and found consistent with each other."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torchtitan_flux.formatting import listed
from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.file_sets import WeightFiles
from torchtitan_flux.tensor_files.safetensors_file import (
    TensorsFile,
    UnreadableWeights,
    read_weight_map,
)


def open_files(files: WeightFiles) -> list[TensorsFile]:
    """All files of a set.

    Raises:
        UnreadableWeights: names the shard that is missing, or the tensor that is not in its shard.
    """
    if files.index:
        return _by_index(files.folder / files.index)
    if len(files.names) < files.count:
        raise UnreadableWeights(
            f"{files.folder} has {listed(files.names)}, {len(files.names)} of {files.count} files; "
            "get the others"
        )
    return [TensorsFile.open(files.folder / name) for name in files.names]


def by_stem(sets: Sequence[WeightFiles], stems: Iterable[str]) -> list[WeightFiles]:
    """The sets of the first of the given beginnings that any set has; all of them where none."""
    for stem in stems:
        if found := [one for one in sets if one.stem == stem or one.stem.startswith(f"{stem}-")]:
            return found
    return list(sets)


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
