"""A held-out part for sources that have none of their own."""

import hashlib

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


class SourcePart:
    """One of the two parts of a source, which share no item and together are all of it.

    Which items are held out is drawn by a keyed permutation, computed for one index at a time:
    the first of its images that can be read are held out, the others are for training. It is a
    function of the number of items and of which cannot be read, and of nothing in the run.

    `held_out` is their number, whichever part this is: `share` of the items, in (0, 1), but at
    least one item that can be read goes either way.
    """

    def __init__(self, source: Source, split: Split, share: float):
        if not 0 < share < 1:
            raise SettingError(HELD_OUT_SHARE, f"{share} is not in [0, 1)")
        usable = source.usable_rows if isinstance(source, IndexedSource) else None
        readable = len(source) if usable is None else int(np.count_nonzero(usable))
        if readable < 2:
            of = "" if readable == len(source) else f", {readable} of which can be read,"
            raise SettingError(
                HELD_OUT_SHARE,
                f"a data set of {len(source)} items{of} has none to hold out; set it to 0 and name "
                f"other data in {PATH_KEY['held_out']}",
            )
        self.source = source
        self.name = source.name
        self.split: Split = split
        self.share = share
        self.held_out = min(max(round(share * len(source)), 1), readable - 1)
        self._permutation = Permutation(_SEED, "held_out", len(source))
        # Rows of the held-out items, and those that were passed over; both empty where all can be
        # read, and the permutation alone says what is held out.
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
