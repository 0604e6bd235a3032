"""Which item stands at a position of the run (contract 1), without a list of the epoch.

Every epoch is a pseudo-random permutation of the items, computed for one position at a time by an
alternating Feistel network on Z_a x Z_b with a*b just above the number of items, and cycle
walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): values outside
the items are sent through the network again until they fall inside.
"""

import math
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from torchtitan_flux.randomness import Stream, generator

_ROUNDS = 16  # with 12, epochs of 5 items were still visibly uneven over 12,000 epochs
_MASK = 2**64 - 1

Integers = TypeVar("Integers", int, np.ndarray)
"""One number, or unsigned 64-bit ones."""


def _mix(value: Integers) -> Integers:
    """The finalizer of SplitMix64 (Steele et al., 2014): 64 well mixed bits."""
    value = value & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A keyed permutation of range(length)."""

    def __init__(self, seed: int, key: str, length: int):
        self.length = length
        # One side is even: turns of odd cycles alone would reach only the even permutations.
        side = math.isqrt(length - 1) + 1
        self.a = side + side % 2
        self.b = -(-length // self.a)
        rng = generator(seed, Stream.ORDER, key)
        # Raw output: numpy promises that its bit generators' streams never change.
        keys = [int(k) for k in rng.bit_generator.random_raw(_ROUNDS)]
        self.rounds = list(zip(keys[::2], keys[1::2], strict=True))

    def _network(self, index: Integers) -> Integers:
        left, right = index // self.b, index % self.b
        for key, other in self.rounds:  # sums of residues, since 64-bit ones would overflow
            left = (left + _mix(right + key) % self.a) % self.a
            right = (right + _mix(left + other) % self.b) % self.b
        return left * self.b + right  # pyright: ignore[reportReturnType]

    def __call__(self, index: int) -> int:
        index = self._network(index)
        while index >= self.length:
            index = self._network(index)
        return index

    def many(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The same of many indices at once."""
        result = self._network(indices.astype(np.uint64))
        while len(outside := np.flatnonzero(result >= self.length)):
            result[outside] = self._network(result[outside])
        return result.astype(np.int64)


class Order:
    """From positions of the run to `length` items of the source, by the run's seed."""

    def __init__(self, seed: int, length: int):
        if length < 1:
            raise ValueError(f"training.dataset: a source of {length} items cannot be trained on")
        self.seed = seed
        self.length = length
        self._epoch, self._permutation = 0, Permutation(seed, "epoch/0", length)

    def item(self, position: int, choice: int = 0) -> int:
        """Index of the item at a position, the number of samples of the run before this one.

        `choice` is 0 for the item itself; k >= 1 for the k-th substitute, when the choices before
        it cannot be read. The first `length` choices of a position are all different.
        """
        epoch, offset = divmod(position, self.length)
        if self._epoch != epoch:  # only spares work: positions come mostly in sequence
            self._epoch = epoch
            self._permutation = Permutation(self.seed, f"epoch/{epoch}", self.length)
        item = self._permutation(offset)
        if choice == 0 or self.length == 1:
            return item
        others = self.length - 1
        substitutes = Permutation(self.seed, f"substitute/{position}", others)
        return (item + 1 + substitutes((choice - 1) % others)) % self.length
