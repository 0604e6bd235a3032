import threading

import numpy as np

from torchtitan_flux import randomness
from torchtitan_flux.data.reused_generator import reused_generator
from torchtitan_flux.randomness import Stream

ADDRESSES = [
    (seed, stream, index)
    for seed in (0, 7, 2**40)
    for stream in Stream
    for index in (0, 1, 12345678901, "item/a.jpg")
]


def numbers(rng: np.random.Generator) -> list:
    # of every kind, since some leave half a draw behind for the next call
    return [
        rng.random(),
        rng.integers(3),
        rng.standard_normal(5, dtype=np.float32).tolist(),
        rng.integers(2**31, dtype=np.int32),
        rng.random(2).tolist(),
    ]


def test_the_same_numbers_as_fresh_generators():
    for address in ADDRESSES:
        expected = numbers(randomness.generator(*address))
        assert numbers(reused_generator(*address)) == expected, address


def test_threads_do_not_disturb_each_other():
    failures = []

    def draw(seed):
        for position in range(500):
            address = (seed, Stream.NOISE, position)
            if numbers(reused_generator(*address)) != numbers(randomness.generator(*address)):
                failures.append(address)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
