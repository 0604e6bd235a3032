import numpy as np
import pytest
from sklearn.datasets import load_digits

from torchtitan_flux.data.sources.digits import DIGIT_WORDS, DigitsSource, load_digit_arrays


@pytest.fixture(scope="module")
def splits():
    return {split: DigitsSource(split) for split in ("train", "held_out")}


def test_sizes_and_ids(splits):
    assert (len(splits["train"]), len(splits["held_out"])) == (1437, 360)
    ids = [item.item_id for source in splits.values() for item in source]
    assert len(set(ids)) == 1797
    assert sorted(ids)[0] == "digits/0000"


def test_is_stratified():
    totals = np.bincount(load_digits().target)
    for split in ("train", "held_out"):
        labels = load_digit_arrays(split)[1]
        exact = totals * len(labels) / 1797
        assert np.abs(np.bincount(labels) - exact).max() < 1


def test_split_does_not_change_between_releases(splits):
    rows = [int(item.item_id[-4:]) for item in splits["held_out"]]
    assert rows[:8] == [3, 6, 15, 20, 21, 30, 39, 40]
    assert sum(rows) == 319412


def test_images_and_captions_are_the_arrays(splits):
    digits = load_digits()
    for split, source in splits.items():
        images, labels = load_digit_arrays(split)
        assert images.dtype == np.float32
        assert labels.dtype == np.int64
        for i in (0, 17, len(source) - 1):
            row = int(source[i].item_id[-4:])
            np.testing.assert_array_equal(images[i], digits.images[row])
            assert source[i].image.mode == "L"
            np.testing.assert_allclose(np.asarray(source[i].image), images[i] * 255 / 16, atol=0.5)
            word = DIGIT_WORDS[digits.target[row]]
            assert source[i].captions == (f"a handwritten {word}", f"the digit {word}", word)
    assert max(item.image.getextrema()[1] for item in splits["train"]) == 255
