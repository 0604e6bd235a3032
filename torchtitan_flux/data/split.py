"""A held-out part for sources that have none of their own."""

from torchtitan_flux.data.order import Permutation
from torchtitan_flux.data.sources import Item, Source, Split

_SEED = 0  # the split is a property of the data set: held-out losses of different runs must compare


class SourcePart:
    """One of the two parts of a source, which share no item and together are all of it.

    Which items are held out is drawn by a keyed permutation, computed for one index at a time:
    the first of its images are held out, the others are for training. It is a function of the
    number of items alone, and of nothing in the run.

    Args:
        source: what is split.
        split: which part this is.
        share: share of the items that is held out, in (0, 1); at least one item goes either way.

    Raises:
        ValueError: `share` is not in (0, 1), or there are fewer than two items.
    """

    def __init__(self, source: Source, split: Split, share: float):
        if not 0 < share < 1:
            raise ValueError(f"data.held_out_share is {share}, not in [0, 1)")
        if len(source) < 2:
            raise ValueError(
                f"data.held_out_share: a data set of {len(source)} items has none to hold out; "
                "set it to 0 and name other data in validation.dataset_path"
            )
        self.source = source
        self.name = source.name
        held_out = min(max(round(share * len(source)), 1), len(source) - 1)
        self._start = 0 if split == "held_out" else held_out
        self._length = held_out if split == "held_out" else len(source) - held_out
        self._permutation = Permutation(_SEED, "held_out", len(source))

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> int:
        """Where item `index` stands in the whole source."""
        if not 0 <= index < self._length:
            raise IndexError(f"item {index} of a part of {self._length}")
        return self._permutation(self._start + index)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.row(index)]


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
