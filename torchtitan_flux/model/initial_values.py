"""Initial values as a function of (seed, parameter name, block of 2^20 elements).

The same on every mesh: whoever owns a part of a parameter draws the blocks that it touches.
DiT style (arXiv:2212.09748, sec. 3.2): modulation and final layer zero, so that every block
starts as the identity and the output is exactly zero; embedders normal(0.02); other linears
xavier-uniform with zero bias; norm weights one.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from torchtitan_flux.randomness import Stream, generator
from torchtitan_flux.shards import box, local

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


def trainable(name: str, only: Sequence[str]) -> bool:
    """Whether the parameter of that canonical name is trained; `only` is `training.train_only`."""
    return not only or any(part in name for part in only)


@torch.no_grad()
def fill_initial_values(
    model: nn.Module, seed: int, buffer_device: torch.device | None = None
) -> None:
    """Give every parameter its initial value, each rank only its own shards (contract 3).

    Parameters may be DTensors, sharded in any dimensions; `buffer_device` is torchtitan's.
    """
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        shard, slices = local(parameter), box(parameter)
        if shard.numel() == 0:
            continue
        first, rows = slices[0].start, shard.shape[0]
        # a slab of rows at a time: a 3072 x 12288 weight needs no second copy in memory
        rows_at_once = max(1, 8 * BLOCK // max(1, shape[-1]))
        for row in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - row)
            values = initial_rows(seed, canonical_name(name), shape, first + row, count)
            shard[row : row + count].copy_(values[(slice(None), *slices[1:])])


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
