"""The generators of `randomness`, at a fifth of their price.

numpy seeds a new generator from the operating system before the key replaces that: 10 us, five
times for each sample. Moving one generator of a thread to another address takes 2 us.
"""

import threading
from typing import Any

import numpy as np

from torchtitan_flux.randomness import Stream, digest

_LOW = 2**64 - 1

_of_thread = threading.local()


def reused_generator(seed: int, stream: Stream, index: int | str) -> np.random.Generator:
    """`randomness.generator`, valid until the next call in this thread."""
    if not hasattr(_of_thread, "generator"):
        _of_thread.generator = np.random.Generator(np.random.Philox(key=0))
        _of_thread.state = dict(_of_thread.generator.bit_generator.state)
    state: dict[str, Any] = _of_thread.state  # of a generator at its beginning
    key = digest(seed, stream, index)
    state["state"]["key"] = np.array((key & _LOW, key >> 64), np.uint64)
    _of_thread.generator.bit_generator.state = state
    return _of_thread.generator
