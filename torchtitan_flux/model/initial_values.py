"""Initial values as a function of (seed, parameter name, block of 2^20 elements).

The same on every mesh: whoever owns a part of a parameter draws the blocks that it touches.
DiT style (arXiv:2212.09748, sec. 3.2): modulation and final layer zero, so that every block
starts as the identity and the output is exactly zero; embedders normal(0.02); other linears
xavier-uniform with zero bias; norm weights one.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor

from torchtitan_flux.randomness import Stream, generator

BLOCK = 2**20

_ZERO = re.compile(r"(_mod\.lin|\.modulation\.lin|final_layer\..*)\.(weight|bias)$|\.bias$")
_ONE = re.compile(r"(query_norm|key_norm)\.weight$")
_NORMAL = re.compile(r"^(time_in|vector_in|guidance_in)\.")
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def canonical_name(name: str) -> str:
    """A parameter's name without what torch.compile and checkpoint wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def initial_rows(seed: int, name: str, shape: tuple[int, ...], first_row: int, rows: int) -> Tensor:
    """Rows [first_row, first_row + rows) of a parameter's initial value, float32.

    `name` is canonical, and `shape` that of the whole parameter.
    """
    local_shape = (rows, *shape[1:])
    if _ONE.search(name):
        return torch.ones(local_shape)
    if _ZERO.search(f".{name}"):
        return torch.zeros(local_shape)
    row_size = math.prod(shape[1:])
    begin, end = first_row * row_size, (first_row + rows) * row_size
    values = np.empty(end - begin, dtype=np.float32)
    for block in range(begin // BLOCK, math.ceil(end / BLOCK)):
        drawn = _draw(seed, name, shape, block)
        low, high = max(begin, block * BLOCK), min(end, (block + 1) * BLOCK)
        values[low - begin : high - begin] = drawn[low - block * BLOCK : high - block * BLOCK]
    return torch.from_numpy(values).view(local_shape)


def _draw(seed: int, name: str, shape: tuple[int, ...], block: int) -> np.ndarray:
    """One whole block of a parameter (shorter at its end), float32."""
    size = min(BLOCK, math.prod(shape) - block * BLOCK)
    rng = generator(seed, Stream.WEIGHTS, f"{name}/{block}")
    if _NORMAL.match(name):
        return 0.02 * rng.standard_normal(size, dtype=np.float32)
    fan_out, fan_in = shape
    bound = math.sqrt(6 / (fan_in + fan_out))
    return np.float32(2 * bound) * rng.random(size, dtype=np.float32) - np.float32(bound)
