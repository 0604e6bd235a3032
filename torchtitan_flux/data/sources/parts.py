"""Which part of a data set, for training or held out, files and folders are named after."""

import re
from collections.abc import Iterable, Mapping

from torchtitan_flux.data.sources.listing import PATH_KEY
from torchtitan_flux.data.sources.source import Split

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Part -> the words for it."""

_HELD_OUT = ("validation", "test")

NO_PART = "files that belong to no part of the data are left out"

# Words that a folder's name may have besides, as in "training_set" and "val images 2017".
_BESIDES = {"set", "split", "data", "images", "pictures"}


def part_of(name: str) -> str:
    """The part that a file belongs to by its name, or that of the nearest folder; "" for none.

    Any word counts, as in the names of the hub's files: train-00000-of-00005.parquet.
    """
    for piece in reversed(name.lower().split("/")):
        words = re.split(r"[-._\s\d]+", piece)
        for part, spellings in PARTS.items():
            if any(word in spellings for word in words):
                return part
    return ""


def part_of_folder(name: str) -> str:
    """The part that a folder of pictures is; "" for none.

    Every word counts: "test_2017" is a part, "test cars" may be a class of pictures.
    """
    words = set(re.findall(r"[^\W\d_]+", name.lower())) - _BESIDES
    for part, spellings in PARTS.items():
        if words and words <= set(spellings):
            return part
    return ""


def are_parts(parts: Iterable[str]) -> bool:
    """Whether folders of pictures that are these parts are meant as such."""
    there = set(parts)
    return "train" in there and not there.isdisjoint(_HELD_OUT)


def deeper_parts(folders: Iterable[str]) -> list[str]:
    """Folders that are named after parts, where parts are not looked for: not below the root.

    Args:
        folders: that hold pictures, relative to the root.
    """
    beside: dict[str, dict[str, str]] = {}
    for folder in folders:
        names = folder.split("/")
        for depth in range(1, len(names)):
            if part := part_of_folder(names[depth]):
                same = beside.setdefault("/".join(names[:depth]), {})
                same["/".join(names[: depth + 1])] = part
    return [name for same in beside.values() if are_parts(same.values()) for name in same]


def own_parts(parts: Iterable[str], split: Split, path: str) -> tuple[str, bool] | None:
    """(part of a split, whether both splits share it); None where no part is named at all.

    Args:
        parts: that are there.
        split: "held_out" reads the validation part, else the test part.
        path: of the data, for the message.

    Raises:
        ValueError: the train part is wanted, and only others are there.
    """
    there = set(parts) - {""}
    held_out = next((part for part in _HELD_OUT if part in there), None)
    if split == "held_out" and held_out:
        return held_out, False
    if "train" in there:
        return "train", held_out is None
    if held_out:
        raise ValueError(
            f"{PATH_KEY[split]}: {path} has no train part, only {', '.join(sorted(there))}"
        )
    return None


def not_read(parts: Mapping[str, str], own: tuple[str, bool] | None) -> dict[str, list[str]]:
    """What neither split reads, in words -> names.

    Args:
        parts: file or folder -> its part, "" for none.
        own: as of `own_parts`.
    """
    if own is None:
        return {}
    held_out = next((part for part in _HELD_OUT if part in parts.values()), None)
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        if not part:
            found.setdefault(NO_PART, []).append(name)
        elif part not in ("train", held_out):
            found.setdefault(f"files of a {part} part are left out", []).append(name)
    return found
