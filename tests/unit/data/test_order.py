import itertools
from collections import Counter

import numpy as np
import pytest

from torchtitan_flux.data.order import Order

LENGTHS = [1, 2, 3, 10, 97, 1437]


def epoch_of(order: Order, epoch: int) -> list[int]:
    first = epoch * order.length
    return [order.item(p) for p in range(first, first + order.length)]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_epoch_is_a_permutation(length):
    order = Order(seed=3, length=length)
    for epoch in (0, 1, 2, 1000, 2**50 // length):
        assert sorted(epoch_of(order, epoch)) == list(range(length))


@pytest.mark.parametrize("length", [10, 97, 1437])
def test_epochs_and_seeds_differ(length):
    first = epoch_of(Order(3, length), 0)
    assert first != list(range(length))
    assert first != epoch_of(Order(3, length), 1)
    assert first != epoch_of(Order(4, length), 0)


def test_is_a_pure_function_of_the_position():
    order = Order(3, 97)
    forward = [order.item(p) for p in range(400)]
    assert [order.item(p) for p in reversed(range(400))] == forward[::-1]
    assert Order(3, 97).item(250) == forward[250]


def test_does_not_change_between_releases():
    # A resumed run continues under the order it was started with.
    assert [Order(0, 10).item(p) for p in range(12)] == [6, 8, 2, 9, 4, 7, 3, 0, 5, 1, 1, 2]


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_whole_permutations_are_equally_frequent(length):
    epochs = 3000
    order = Order(11, length)
    counts = Counter(tuple(epoch_of(order, e)) for e in range(epochs))
    permutations = list(itertools.permutations(range(length)))
    expected = epochs / len(permutations)
    chi_square = sum((counts[p] - expected) ** 2 / expected for p in permutations)
    freedom = len(permutations) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("length", [10, 97])
def test_places_and_neighbours_are_uniform(length):
    epochs = 1000 if length == 10 else 300
    order = Order(11, length)
    rows = np.array([epoch_of(order, e) for e in range(epochs)])
    steps = (rows[:, 1:] - rows[:, :-1]) % length  # 1 .. length-1
    places = np.zeros((length, length))
    np.add.at(places, (np.arange(length)[None], rows), 1)
    for observed in (places, np.bincount(steps.ravel(), minlength=length)[1:]):
        expected = observed.sum() / observed.size
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert chi_square < observed.size + 4 * np.sqrt(2 * observed.size)


@pytest.mark.parametrize("length", [2, 3, 10, 97])
def test_substitutes_are_deterministic_and_new(length):
    order = Order(3, length)
    for position in range(12):
        choices = [order.item(position, k) for k in range(length)]
        assert sorted(choices) == list(range(length))
        assert choices == [Order(3, length).item(position, k) for k in range(length)]


def test_substitutes_of_one_item_spread():
    order = Order(3, 97)
    bad = [p for p in range(97 * 200) if order.item(p) == 13]
    counts = Counter(order.item(p, 1) for p in bad)
    assert 13 not in counts
    assert len(counts) > 75  # 84 of 96 are expected in 200 draws


def test_single_item_and_empty_source():
    assert {Order(1, 1).item(p, k) for p in range(5) for k in range(3)} == {0}
    with pytest.raises(ValueError, match=r"training\.dataset"):
        Order(1, 0)
