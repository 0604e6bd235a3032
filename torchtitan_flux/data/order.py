"""Which item stands at a position of the run (contract 1), without a list of the epoch.

Every epoch is a pseudo-random permutation of the items, computed for one position at a time by an
alternating Feistel network on Z_a x Z_b with a*b just above the number of items, and cycle
walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): values outside
the items are sent through the network again until they fall inside.
"""

import math

import numpy as np
from jaxtyping import Int64

from torchtitan_flux.randomness import Stream, generator

_ROUNDS = 16  # with 12, epochs of 5 items were still visibly uneven over 12,000 epochs
_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele et al., 2014): 64 well mixed bits."""
    value &= _MASK
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
        self.keys = [int(k) for k in rng.bit_generator.random_raw(_ROUNDS)]

    def __call__(self, index: int) -> int:
        a, b = self.a, self.b
        while True:
            left, right = divmod(index, b)
            keys = iter(self.keys)
            for key in keys:
                left = (left + _mix(right + key)) % a
                right = (right + _mix(left + next(keys))) % b
            index = left * b + right
            if index < self.length:
                return index

    def many(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The same of many indices at once."""
        result = np.array(indices)
        outside = np.arange(len(result))
        a, b = np.uint64(self.a), np.uint64(self.b)
        while len(outside):
            left, right = np.divmod(result[outside].astype(np.uint64), b)
            keys = iter(np.array(self.keys, np.uint64))
            for key in keys:  # a sum of residues, since one of 64-bit numbers would overflow
                left = (left + _mix_many(right + key) % a) % a
                right = (right + _mix_many(left + next(keys)) % b) % b
            result[outside] = (left * b + right).astype(np.int64)
            outside = outside[result[outside] >= self.length]
        return result


def _mix_many(values: np.ndarray) -> np.ndarray:
    """`_mix` of unsigned 64-bit integers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Order:
    """From positions of the run to items, a pure function of (seed, length).

    Args:
        seed: the run's seed.
        length: number of items in the source.
    """

    def __init__(self, seed: int, length: int):
        if length < 1:
            raise ValueError(f"training.dataset: a source of {length} items cannot be trained on")
        self.seed = seed
        self.length = length
        self._epoch: tuple[int, Permutation] = (0, self._permutation(0))

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.seed, f"epoch/{epoch}", self.length)

    def item(self, position: int, choice: int = 0) -> int:
        """Index of the item at a position, 0 <= item < length.

        Args:
            position: 0 <= position, the number of samples of the run before this one.
            choice: 0 for the item itself; k >= 1 for the k-th substitute, when the choices before
                it cannot be read. The first `length` choices of a position are all different.
        """
        epoch, offset = divmod(position, self.length)
        if self._epoch[0] != epoch:  # only spares work: positions come mostly in sequence
            self._epoch = (epoch, self._permutation(epoch))
        item = self._epoch[1](offset)
        if choice == 0 or self.length == 1:
            return item
        others = self.length - 1
        substitutes = Permutation(self.seed, f"substitute/{position}", others)
        return (item + 1 + substitutes((choice - 1) % others)) % self.length
