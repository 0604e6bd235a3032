"""Which part of a data set, for training or held out, files and folders are named after."""

import re
from collections.abc import Iterable, Mapping

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


def are_parts(parts: Iterable[str]) -> bool:
    """Whether a train part and a held-out one are there; a lone "train" may be a class."""
    there = set(parts)
    return "train" in there and _held_out(there) is not None


def _held_out(parts: Iterable[str]) -> str | None:
    there = set(parts)
    return next((part for part in ("validation", "test") if part in there), None)


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
    held_out = _held_out(there)
    if split == "held_out" and held_out:
        return held_out, False
    if "train" in there:
        return "train", held_out is None
    if held_out:
        raise ValueError(f"{path} has no train part, only {', '.join(sorted(there))}")
    return None


def not_read(parts: Mapping[str, str], own: tuple[str, bool] | None) -> dict[str, list[str]]:
    """What neither split reads, in words -> names.

    Args:
        parts: file or folder -> its part, "" for none.
        own: as of `own_parts`.
    """
    found: dict[str, list[str]] = {}
    for name, part in parts.items() if own else ():
        if not part:
            found.setdefault(NO_PART, []).append(name)
        elif part not in ("train", _held_out(parts.values())):
            found.setdefault(f"files of a {part} part are left out", []).append(name)
    return found
