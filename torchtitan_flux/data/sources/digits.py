"""The 1,797 handwritten digits that scikit-learn ships: real pictures, 8 x 8 pixels, offline."""

import functools

import numpy as np
from jaxtyping import Float32, Int64
from PIL import Image

from torchtitan_flux.data.sources.source import Item, Split
from torchtitan_flux.randomness import Stream, generator

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_ITEMS = 1437
MAX_VALUE = 16.0  # scikit-learn's pixel values are 0..16

_SPLIT_SEED = 0  # the split is fixed for good: held-out scores of different runs must compare


@functools.cache
def _arrays() -> tuple[Float32[np.ndarray, "n 8 8"], Int64[np.ndarray, " n"]]:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.asarray(values, np.float32).reshape(-1, 8, 8), np.asarray(labels, np.int64)


@functools.cache
def split_rows(split: Split) -> Int64[np.ndarray, " n"]:
    """Rows of scikit-learn's array that belong to the split, ascending.

    Of each class as many go to train as its share is, by largest remainder: TRAIN_ITEMS in all.
    """
    labels = _arrays()[1]
    counts, remainders = np.divmod(np.bincount(labels) * TRAIN_ITEMS, len(labels))
    missing = TRAIN_ITEMS - counts.sum()
    counts[np.argsort(-remainders, kind="stable")[:missing]] += 1
    rows = []
    for label, count in enumerate(counts):
        of_class = np.flatnonzero(labels == label)
        # Raw output, since numpy promises a fixed stream for bit generators but not for
        # Generator.permutation.
        bits = generator(_SPLIT_SEED, Stream.ORDER, f"digits/{label}").bit_generator
        shuffled = of_class[np.argsort(bits.random_raw(len(of_class)), kind="stable")]
        rows.append(shuffled[:count] if split == "train" else shuffled[count:])
    return np.sort(np.concatenate(rows))


def load_digit_arrays(
    split: Split,
) -> tuple[Float32[np.ndarray, "n 8 8"], Int64[np.ndarray, " n"]]:
    """Images with values in [0, 16], and their labels 0..9, in the order of the source's items."""
    images, labels = _arrays()
    rows = split_rows(split)
    return images[rows], labels[rows]


def digit_captions(label: int) -> tuple[str, ...]:
    """Captions of a digit, canonical first."""
    word = DIGIT_WORDS[label]
    return f"a handwritten {word}", f"the digit {word}", word


class DigitsSource:
    """Items of one split: mode "L" images of 8 x 8 pixels; ids are "digits/<row>"."""

    name = "digits"

    def __init__(self, split: Split):
        images, labels = load_digit_arrays(split)
        pixels = np.round(images * (255.0 / MAX_VALUE)).astype(np.uint8)
        self._items = [
            Item(Image.fromarray(image), digit_captions(int(label)), f"digits/{row:04d}")
            for image, label, row in zip(pixels, labels, split_rows(split), strict=True)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]
