"""A held-out part for sources that have none of their own."""

import hashlib

import numpy as np
from jaxtyping import Bool, Int64

from torchtitan_flux.data.order import Permutation
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import Item, Source, SourceOptions, Split, items_digest

Rows = Int64[np.ndarray, " _"]

_SEED = 0  # the split is a property of the data set: held-out losses of different runs must compare


class SourcePart:
    """One of the two parts of a source, which share no item and together are all of it.

    Which items are held out is drawn by a keyed permutation, computed for one index at a time:
    the first of its images that can be read are held out, the others are for training. It is a
    function of the number of items and of which cannot be read, and of nothing in the run.

    Args:
        source: what is split.
        split: which part this is.
        share: share of the items that is held out, in (0, 1); at least one item that can be read
            goes either way.

    Raises:
        ValueError: `share` is not in (0, 1), or fewer than two items can be read.
    """

    def __init__(self, source: Source, split: Split, share: float):
        if not 0 < share < 1:
            raise ValueError(f"data.held_out_share is {share}, not in [0, 1)")
        usable = source.usable_rows if isinstance(source, IndexedSource) else None
        readable = len(source) if usable is None else int(np.count_nonzero(usable))
        if readable < 2:
            of = "" if readable == len(source) else f", {readable} of which can be read,"
            raise ValueError(
                f"data.held_out_share: a data set of {len(source)} items{of} has none to hold out; "
                "set it to 0 and name other data in validation.dataset_path"
            )
        self.source = source
        self.name = source.name
        self.split: Split = split
        self.share = share
        self._permutation = Permutation(_SEED, "held_out", len(source))
        self._count = min(max(round(share * len(source)), 1), readable - 1)
        # Rows of the held-out items, and those that were passed over; both empty where all can be
        # read, and the permutation alone says what is held out.
        self._held_out = self._passed_over = np.zeros(0, np.int64)
        if usable is not None and readable < len(source):
            self._held_out, self._passed_over = self._draw(usable)

    def _draw(self, usable: Bool[np.ndarray, " rows"]) -> tuple[Rows, Rows]:
        """The first rows of the permutation that can be read, and those before the last of them
        that cannot."""
        drawn = self._count
        while True:
            rows = self._permutation.many(np.arange(drawn))
            missing = self._count - int(np.count_nonzero(usable[rows]))
            if not missing:
                return rows[usable[rows]], rows[~usable[rows]]
            drawn += missing

    @property
    def held_out(self) -> int:
        """Number of held-out items, whichever part this is."""
        return self._count

    @property
    def digest(self) -> str:
        what = f"{items_digest(self.source)}/{self.split}/{self._count}/".encode()
        return hashlib.blake2b(what + self._held_out.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._count if self.split == "held_out" else len(self.source) - self._count

    def row(self, index: int) -> int:
        """Where item `index` stands in the whole source."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a part of {len(self)}")
        if self.split == "train":
            if index < len(self._passed_over):
                return int(self._passed_over[index])
            return self._permutation(self._count + index)
        return int(self._held_out[index]) if len(self._held_out) else self._permutation(index)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.row(index)]


def whole_of(source: Source) -> Source:
    """The data set that a source is a part of, or the source itself."""
    return source.source if isinstance(source, SourcePart) else source


def part_of(source: Source, split: Split, share: float) -> Source:
    """The part of `source` that a split reads; all of it for either when nothing is held out.

    Args:
        source: a source without a held-out part of its own.
        split: "train" or "held_out".
        share: share of the items that is held out, in [0, 1).

    Raises:
        ValueError: as `SourcePart` does.
    """
    return source if share == 0 else SourcePart(source, split, share)


def part_or_share(source: Source, shared: bool, split: Split, options: SourceOptions) -> Source:
    """A split's own part of the data, or its share of data that both splits see.

    Args:
        source: what was opened for the split.
        shared: whether it holds the same for either split.
        split: "train" or "held_out".
        options: path, held_out_share, validates_training_data.

    Raises:
        ValueError: nothing is held out, and validation is to read it; or as `part_of`.
    """
    if shared and options.validates_training_data and not options.held_out_share:
        raise ValueError(
            f"validation.enable = true, and {options.path} has no validation or test part: set "
            "validation.dataset_path to other data, or data.held_out_share to the share of the "
            "training data to keep back"
        )
    return part_of(source, split, options.held_out_share) if shared else source
