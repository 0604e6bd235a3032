"""Which items a split reads: a part that files are named after, or a share that is held out."""

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from torchtitan_flux.data.order import Permutation
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import (
    HELD_OUT_SHARE,
    PATH_KEY,
    Item,
    SettingError,
    Source,
    SourceOptions,
    Split,
    items_digest,
)

_SEED = 0  # the split is a property of the data set: held-out losses of different runs must compare

_PARTS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}

NO_PART = "files that belong to no part of the data are left out"


def part_of(name: str) -> str:
    """The part that a file or folder belongs to by its name, or the nearest folder's; "" for none.

    Any word counts, as in the names of the hub's files: train-00000-of-00005.parquet.
    """
    for piece in reversed(name.lower().split("/")):
        words = set(re.split(r"[-._\s\d]+", piece))
        if part := next((part for part, known in _PARTS.items() if words & known), ""):
            return part
    return ""


class SplitFiles(NamedTuple):
    """`names` of `part` ("" where none is named), which may be `shared` by both splits."""

    part: str
    shared: bool
    names: list[str]
    left_out: dict[str, list[str]]


def split_files(
    parts: Mapping[str, str], split: Split, path: str, both: bool = False
) -> SplitFiles:
    """What a split reads: "train" the train part, "held_out" the validation or the test part.

    `parts` are file or folder -> its part. With `both`, they are meant only where a train part and
    another one are there. ValueError where the train part is wanted, and only others are there.
    """
    there = set(parts.values()) - {""}
    held_out = next((part for part in ("validation", "test") if part in there), None)
    if not there or (both and not (held_out and "train" in there)):
        return SplitFiles("", True, list(parts), {})
    part = held_out if split == "held_out" and held_out else "train"
    if part not in there:
        raise ValueError(f"{path} has no train part, only {', '.join(sorted(there))}")
    left_out: dict[str, list[str]] = {}
    for name, other in parts.items():
        if other not in ("train", held_out):
            why = f"files of a {other} part are left out" if other else NO_PART
            left_out.setdefault(why, []).append(name)
    names = [name for name in parts if parts[name] == part]
    return SplitFiles(part, held_out is None, names, left_out)


class SourcePart:
    """One of the two parts of a source, which share no item and together are all of it.

    The first images of a keyed permutation that can be read are held out: a function of the number
    of items and of which cannot be read, and of nothing in the run. `held_out` is their number,
    whichever part this is: `share` of the items, but at least one readable item goes either way.
    """

    def __init__(self, source: Source, split: Split, share: float):
        if not 0 < share < 1:
            raise SettingError(HELD_OUT_SHARE, f"{share} is not in [0, 1)")
        usable = source.usable_rows if isinstance(source, IndexedSource) else None
        readable = len(source) if usable is None else int(np.count_nonzero(usable))
        if readable < 2:
            raise SettingError(
                HELD_OUT_SHARE,
                f"a data set of {len(source)} items, {readable} of which can be read, has none to "
                f"hold out; set it to 0 and name other data in {PATH_KEY['held_out']}",
            )
        self.source = source
        self.name = source.name
        self.split: Split = split
        self.share = share
        self.held_out = min(max(round(share * len(source)), 1), readable - 1)
        self._permutation = Permutation(_SEED, "held_out", len(source))
        # Rows of the held-out items, and those passed over; empty where all items can be read.
        self._held_out: Int64[np.ndarray, " _"] = np.zeros(0, np.int64)
        self._passed_over = self._held_out
        missing = self.held_out if usable is not None and readable < len(source) else 0
        drawn = 0
        while missing and usable is not None:
            drawn += missing
            rows = self._permutation.many(np.arange(drawn))
            self._held_out, self._passed_over = rows[usable[rows]], rows[~usable[rows]]
            missing = self.held_out - len(self._held_out)

    @property
    def digest(self) -> str:
        what = f"{items_digest(self.source)}/{self.split}/{self.held_out}/".encode()
        return hashlib.blake2b(what + self._held_out.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.held_out if self.split == "held_out" else len(self.source) - self.held_out

    def row(self, index: int) -> int:
        """Where item `index` stands in the whole source."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a part of {len(self)}")
        if self.split == "train":
            if index < len(self._passed_over):
                return int(self._passed_over[index])
            return self._permutation(self.held_out + index)
        return int(self._held_out[index]) if len(self._held_out) else self._permutation(index)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.row(index)]


def whole_of(source: Source) -> Source:
    """The data set that a source is a part of, or the source itself."""
    return source.source if isinstance(source, SourcePart) else source


def part_or_share(source: Source, split: Split, options: SourceOptions) -> Source:
    """A split's own part of the data, or its share of data that both splits see."""
    if not (isinstance(source, IndexedSource) and source.shared):
        return source
    if options.held_out_share:
        return SourcePart(source, split, options.held_out_share)
    if options.validates_training_data:
        raise SettingError(
            PATH_KEY["held_out"],
            f"{options.path} has no validation or test part: name other data, or set "
            f"{HELD_OUT_SHARE} to the share of the training data to keep back",
        )
    return source
