"""Random numbers addressed by (seed, stream, index), not consumed from a shared generator.

Contract 2 (docs/contracts.md): the numbers come from numpy's Philox, keyed by a 128-bit digest of
(version, seed, stream, index). A training sample is addressed by its position in the run, a
validation sample by its item id. Nothing depends on how many numbers a rank has drawn so far.
"""

import enum
import hashlib
import secrets

import numpy as np

RANDOMNESS_VERSION = 1
"""Stored with checkpoints: a run continues only under the scheme it was started with."""


class Stream(enum.Enum):
    """What a random number is used for. One stream never influences another."""

    ORDER = enum.auto()  # which item stands at a position
    TIME = enum.auto()  # flow-matching time
    NOISE = enum.auto()  # noise that the latents are mixed with
    POSTERIOR = enum.auto()  # sample of the autoencoder's posterior
    CROP = enum.auto()
    FLIP = enum.auto()
    CAPTION = enum.auto()  # which caption of an image with several
    DROPOUT = enum.auto()  # caption dropout
    WEIGHTS = enum.auto()  # initial values
    SAMPLE = enum.auto()  # the noise that sampling starts from
    ROUNDING = enum.auto()  # stochastic rounding of bfloat16 weights
    SHAPES = enum.auto()  # contents of the procedural data set


def digest(seed: int, stream: Stream, index: int | str) -> int:
    """128-bit integer that identifies (version, seed, stream, index)."""
    text = f"{RANDOMNESS_VERSION}/{seed}/{stream.name}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, stream: Stream, index: int | str) -> np.random.Generator:
    """A generator whose numbers are a pure function of (seed, stream, index).

    `index` is a position in the run, or an item id.
    """
    return np.random.Generator(np.random.Philox(key=digest(seed, stream, index)))


def draw_seed() -> int:
    """A fresh seed from the operating system, small enough to be typed again."""
    return secrets.randbelow(2**32)
