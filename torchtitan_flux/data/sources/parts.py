"""Which part of a data set, for training or held out, files and folders are named after."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torchtitan_flux.data.sources.source import Split

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Part -> the words for it."""

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
    return next((part for part, known in PARTS.items() if words and words <= set(known)), "")


class OwnPart(NamedTuple):
    """What a split reads: names of `part` ("" where none is named); `shared` by both splits."""

    part: str
    shared: bool
    names: list[str]
    left_out: dict[str, list[str]]


def own_part(parts: Mapping[str, str], split: Split, path: str, both: bool = False) -> OwnPart:
    """What a split reads: training the train part, else the validation part, else the test part.

    Args:
        parts: file or folder -> its part, "" for none.
        split: "train" or "held_out".
        path: of the data, for the message.
        both: parts are meant only where a train part and another one are there.

    Raises:
        ValueError: the train part is wanted, and only others are there.
    """
    there = set(parts.values()) - {""}
    held_out = next((part for part in ("validation", "test") if part in there), None)
    if not there or (both and not (held_out and "train" in there)):
        return OwnPart("", True, list(parts), {})
    part = held_out if split == "held_out" and held_out else "train"
    if part not in there:
        raise ValueError(f"{path} has no train part, only {', '.join(sorted(there))}")
    left_out: dict[str, list[str]] = {}
    for name, other in parts.items():
        if other not in ("train", held_out):
            why = f"files of a {other} part are left out" if other else NO_PART
            left_out.setdefault(why, []).append(name)
    names = [name for name in parts if parts[name] == part]
    return OwnPart(part, held_out is None, names, left_out)
