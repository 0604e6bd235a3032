"""Addressed random numbers: fixed for version 1, independent across seeds, streams and indices."""

import numpy as np
import pytest

from torchtitan_flux.randomness import RANDOMNESS_VERSION, Stream, digest, draw_seed, generator


def test_numbers_of_version_1():
    """Runs are continued with these numbers: whoever changes them raises RANDOMNESS_VERSION."""
    assert RANDOMNESS_VERSION == 1
    assert digest(0, Stream.TIME, 0) == 0xFDA21216E040856C2752941622FF8D09
    times = generator(0, Stream.TIME, 0).random(2)
    assert times.tolist() == [0.047304216685247424, 0.003505950255742407]
    normal = generator(42, Stream.NOISE, 2**40).standard_normal(3, dtype=np.float32)
    assert normal.tolist() == [0.8361430764198303, 0.11962883919477463, -1.6005107164382935]
    order = generator(2**64 - 1, Stream.ORDER, "a/b.jpg").permutation(7)
    assert order.tolist() == [2, 3, 1, 6, 5, 4, 0]


def test_streams_keep_their_names():
    """The name is hashed: renaming one changes every run; adding or moving one changes none."""
    expected = "ORDER TIME NOISE POSTERIOR CROP FLIP CAPTION DROPOUT WEIGHTS SAMPLE SHAPES"
    assert set(expected.split()) <= {stream.name for stream in Stream}


def test_an_address_gives_the_same_numbers_every_time():
    first, second = (generator(7, Stream.CROP, "x") for _ in range(2))
    first.random(1000)  # what one generator has drawn does not matter to another
    assert np.array_equal(generator(7, Stream.CROP, "x").random(5), second.random(5))


def test_no_two_addresses_meet():
    seeds = [0, 1, 2**32, 2**32 + 1, -1]
    indices = [0, 1, 10, 2**32, "a", "a/0"]
    digests = {digest(s, stream, i) for s in seeds for stream in Stream for i in indices}
    assert len(digests) == len(seeds) * len(Stream) * len(indices)
    assert all(0 <= d < 2**128 for d in digests)


@pytest.mark.parametrize("by", ["seed", "stream", "index"])
def test_neighbours_are_independent(by):
    base = generator(7, Stream.TIME, 100).standard_normal(4000)
    other = {
        "seed": generator(8, Stream.TIME, 100),
        "stream": generator(7, Stream.NOISE, 100),
        "index": generator(7, Stream.TIME, 101),
    }[by].standard_normal(4000)
    assert abs(np.corrcoef(base, other)[0, 1]) < 0.06  # four standard deviations
    # shifted against each other as well: neither is a later part of the other
    spectrum = np.fft.ifft(np.fft.fft(base) * np.conj(np.fft.fft(other))).real / 4000
    assert np.abs(spectrum).max() < 0.1


def test_fresh_seeds_differ_and_can_be_typed():
    seeds = {draw_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)
