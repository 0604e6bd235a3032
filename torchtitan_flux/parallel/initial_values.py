"""Fill a model's parameters, each rank only its own shards (contract 3)."""

import torch
from torch import nn

from torchtitan_flux.model.initial_values import BLOCK, canonical_name, initial_rows
from torchtitan_flux.shards import box, local


@torch.no_grad()
def fill_initial_values(
    model: nn.Module, seed: int, buffer_device: torch.device | None = None
) -> None:
    """Give every parameter its initial value, a function of (seed, name, block of elements).

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
