from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from torchtitan_flux import randomness
from torchtitan_flux.data.reused_generator import reused_generator
from torchtitan_flux.randomness import Stream

INDICES = [0, 1, 12345678901, "item/a.jpg", *range(2, 600)]


def numbers(rng: np.random.Generator) -> list:
    # of every kind, since some leave half a draw behind for the next call
    return [
        rng.random(),
        rng.integers(3),
        rng.standard_normal(5, dtype=np.float32).tolist(),
        rng.integers(2**31, dtype=np.int32),
        rng.random(2).tolist(),
    ]


@pytest.mark.parametrize("stream", Stream)
def test_the_same_numbers_as_fresh_generators_in_every_thread(stream):
    def drawn(generator, seed):
        return [numbers(generator(seed, stream, index)) for index in INDICES]

    seeds = (0, 7, 2**40)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda seed: drawn(reused_generator, seed), seeds))
    assert found == [drawn(randomness.generator, seed) for seed in seeds]
